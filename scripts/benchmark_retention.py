"""RetNet beside a transformer of the same width, depth and number of parameters: training steps and
decoding at several lengths, which `scripts.benchmark --only retention` measures."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sat_jax.cli import Parser
from sat_jax.errors import UserError
from sat_jax.models.build import initial_values, layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import preset, resized
from sat_jax.models.retnet import RetNetConfig
from sat_jax.nn.context import Cache
from sat_jax.nn.decoder import Compute, for_decoding
from sat_jax.nn.layout import Flat, flat_values
from sat_jax.train.step_program import count_bytes, make_case
from scripts.benchmark_turns import Variant, compile_step, medians, ratio, take_turns, timed

Row = dict[str, Any]

_LENGTHS = [512, 1024, 2048, 4096, 8192, 16_384]
_BATCHES = (1, 8)
_VOCABULARY = 4096
DECODED = 16  # tokens of a call, so that launching it counts little
CHUNKWISE, PARALLEL, ATTENTION = "chunkwise retention", "parallel retention", "attention"


class Models(NamedTuple):
    """Two models of the same width, depth and, up to rounding, number of parameters."""

    retnet: RetNetConfig
    transformer: DecoderConfig


class Measured(NamedTuple):
    """A compiled program: bytes of what it updates, XLA's memory analysis, and a function that
    allocates its arguments and returns its calls."""

    state_bytes: int
    memory: Any
    variant: Callable[[], Variant]

    @property
    def needed_bytes(self) -> int:
        """Bytes of arguments, new results and temporaries."""
        memory = self.memory
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(memory.argument_size_in_bytes + new + memory.temp_size_in_bytes)


def add_options(parser: Parser) -> None:
    """Add the options of this part."""
    add = parser.add_argument_group("the part retention").add_argument
    add("--width", type=int, default=192, help="width of both models; default 192")
    add("--layers", type=int, default=4, help="layers of both; default 4")
    add("--heads", type=int, default=6, help="heads of both; default 6")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=_LENGTHS,
        help="tokens in a row; default 512 … 16384",
    )
    add(
        "--step-tokens",
        type=int,
        default=4096,
        help="tokens of a step, at least one row; default 4096",
    )
    add(
        "--memory-limit",
        type=float,
        default=8.0,
        metavar="GIB",
        help="programs that need more are compiled, not run; default 8",
    )


def check_options(args: Namespace) -> None:
    """Raise `UserError` for sizes that cannot be measured."""
    shortest = 2 * DECODED
    if min(args.lengths) < shortest:
        raise UserError(f"--lengths {min(args.lengths)}; accepted: {shortest} or more")
    models_of(args)


def models_of(args: Namespace) -> Models:
    """Return the models of the options. Values and MLP of RetNet are 27/16 of the width, as in
    torchscale's recipe of 1.3B; the transformer has one KV head for each query head."""
    sizes = {"d_model": args.width, "n_layers": args.layers, "n_heads": args.heads}
    sizes |= {"vocab_size": _VOCABULARY}
    retnet = resized(preset("retnet-1.3b"), sizes)
    assert isinstance(retnet, RetNetConfig)
    # 2 D² + 3 D (values + MLP) parameters of a layer of RetNet, and 4 D² + 3 D MLP of the other.
    channels = 8 * round((2 * retnet.d_value - 2 * args.width / 3) / 8)
    transformer = resized(preset("smollm2-1.7b"), sizes | {"d_ff": channels})
    longest: dict[str, Any] = {"max_positions": max(args.lengths)}
    return Models(
        dataclasses.replace(retnet, d_ff=retnet.d_value, **longest),
        dataclasses.replace(transformer, **longest),
    )


def retention(args: Namespace) -> Iterator[Row]:
    """Yield rows of training steps at all lengths, and of decoding at every second one."""
    models = models_of(args)
    setting = {"model": f"width {args.width}, {args.layers} layers, {args.heads} heads"}
    for length in args.lengths:
        rows = max(1, args.step_tokens // length)
        programs = {
            name: _training(model, compute, (rows, length))
            for name, (model, compute) in _forms(models, length, args).items()
        }
        shape = {"work": "training", "rows": rows, "row_length": length, **setting}
        yield from (shape | row for row in _rows(programs, args))
    for length in args.lengths[::-2][::-1]:
        for batch in _BATCHES:
            programs = {
                "retention": _decoding(models.retnet, _compute(models.retnet, args), batch, length),
                ATTENTION: _decoding(
                    models.transformer, _compute(models.transformer, args), batch, length
                ),
            }
            shape = {"work": "decoding", "rows": batch, "row_length": length, **setting}
            shape |= {"decoded": DECODED}
            yield from (shape | row for row in _rows(programs, args))


def _forms(
    models: Models, length: int, args: Namespace
) -> dict[str, tuple[DecoderConfig, Compute]]:
    """Return the trained models. The parallel form is one chunk as long as the row, whose pairs the
    backward pass computes again."""
    forms = {
        CHUNKWISE: models.retnet,
        PARALLEL: dataclasses.replace(models.retnet, chunk=length),
        ATTENTION: models.transformer,
    }
    return {name: (model, _compute(model, args)) for name, model in forms.items()}


def _compute(model: DecoderConfig, args: Namespace) -> Compute:
    attention = None if isinstance(model, RetNetConfig) else args.attention
    return Compute(args.dtype, args.remat, attention=attention)


def _training(model: DecoderConfig, compute: Compute, shape: tuple[int, int]) -> Measured:
    """Return one optimizer step; its state are parameters and moments."""
    step = compile_step(make_case(layout_of(model, compute), "dense", 0.0), shape)
    return Measured(count_bytes(step.program.state), step.compiled.memory_analysis(), step.variant)


def _decoding(model: DecoderConfig, compute: Compute, batch: int, length: int) -> Measured:
    """Return the decoding of the last tokens of rows of `length`; its state is the cache."""
    layout = layout_of(model, compute)

    def prepare() -> tuple[Flat, Cache, Array]:
        values = flat_values(for_decoding(layout.bind(initial_values(model, 0))))
        cache = layout.bind(values).empty_cache(batch, length)
        used = jnp.asarray(length - DECODED, jnp.int32)
        cache = cache._replace(segment_ids=jnp.ones_like(cache.segment_ids), used=used)
        return values, cache, jnp.zeros((batch, 1), jnp.int32)

    def decode(values: Flat, cache: Cache, token: Array) -> tuple[Cache, Array]:
        decoder, ones = layout.bind(values), jnp.ones_like(token)

        def body(_: Any, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, token = carry
            positions = jnp.broadcast_to(cache.used, token.shape)
            x_B1D, cache = decoder.extend(cache, token, ones, positions)
            logits_BV = jnp.einsum("BD,VD->BV", x_B1D[:, 0], decoder.head())
            return cache, jnp.argmax(logits_BV, axis=-1, keepdims=True).astype(jnp.int32)

        after, token = jax.lax.fori_loop(0, DECODED, body, (cache, token))
        return after._replace(used=cache.used), token

    shapes = jax.eval_shape(prepare)
    compiled = jax.jit(decode, donate_argnums=1).lower(*shapes).compile()

    def variant() -> Variant:
        values, cache, token = jax.jit(prepare)()

        def call() -> Array:
            nonlocal cache, token
            cache, token = compiled(values, cache, token)
            return token

        return timed(call)

    state_bytes = sum(x.size * x.dtype.itemsize for x in shapes[1].arrays.values())
    return Measured(state_bytes, compiled.memory_analysis(), variant)


def _rows(programs: Mapping[str, Measured], args: Namespace) -> Iterator[Row]:
    """Yield what is measured of each program. Calls of those that fit in memory are interleaved;
    the others have the reason in place of times."""
    limit = args.memory_limit * 2**30
    running = {name: p.variant() for name, p in programs.items() if p.needed_bytes <= limit}
    costs = take_turns(running, args.turns) if running else {}
    for name, program in programs.items():
        row = {
            "variant": name,
            "state_bytes": program.state_bytes,
            "temporary_bytes": program.memory.temp_size_in_bytes,
            "needed_bytes": program.needed_bytes,
        }
        if name in costs:
            row |= medians(costs[name])
            if ATTENTION in costs:
                row["speedup_wall"] = ratio(costs[ATTENTION], costs[name], "wall")
        else:
            row["not_run"] = f"needs more than {args.memory_limit:g} GiB"
        yield row
