"""Measure speed and append rows to experiments/results/; `make bench` runs every part.

  python -m scripts.benchmark                     every part
  python -m scripts.benchmark --only steps        SAT steps against the dense step
  python -m scripts.benchmark --only peer         the dense step against transformers
  python -m scripts.benchmark --only moves        the parts of a refresh against a SAT step
  python -m scripts.benchmark --only blocks       block-sparse products against dense ones and peers
  python -m scripts.benchmark --only retention    RetNet against a transformer, by row length

Every turn calls each variant once, so that other work on the machine affects all of them alike. A
speed-up is the median over turns of the ratio of two times in the same turn. Weights and tokens are
random. `peer` and `blocks` need torch and transformers (the extra `bench`). `blocks` measures
matrices of one size in float32; --rows and --row-length are the only sizes that it takes.
`retention` has sizes of its own; of the others it takes --dtype, --remat and --attention.
"""

import importlib.util
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sat_jax.cli import Parser, run
from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.registry import format_of
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout
from sat_jax.results.rows import append
from sat_jax.results.text import fixed_width
from sat_jax.sparsity.choose import Criteria, choose
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.flops import speedup_bound
from sat_jax.sparsity.plan import kept_shares, neurons_of
from sat_jax.train.moves import compile_moves
from sat_jax.train.probe import ProbeSettings, make_probe, observe_batch
from sat_jax.train.step_program import (
    full_state,
    make_case,
    random_batch,
    random_state,
)
from scripts import benchmark_retention
from scripts.benchmark_blocks import (
    CASES,
    COPIED_BYTES,
    NEURONS,
    WIDTH,
    copy_call,
    mlp_calls,
    product_calls,
)
from scripts.benchmark_turns import Variant, compile_step, medians, ratio, take_turns, timed
from scripts.efficiency import add_size_options, check_sizes

Row = dict[str, Any]

_STEPS = [
    ("dense", 0.0),
    *(("gather", rate) for rate in (0.2, 0.4, 0.5, 0.6)),
    ("kernel", 0.5),
    ("mask", 0.5),
]
_SETTING = ("model", "rows", "row_length", "dtype", "remat", "attention")
_PROBE_TOKENS = 1024
_REFRESH_RATE = 0.4


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("benchmark", __doc__)
    add = result.add_argument
    add("--only", choices=_PARTS, help="the part to measure; default: all")
    small = {"rows": 2, "row_length": 1024, "dtype": "float32", "remat": "none"}
    add_size_options(result, model="smollm2-135m", **small)
    benchmark_retention.add_options(result)
    add("--turns", type=int, default=7, help="turns after a warm-up turn; default 7")
    out = Path("experiments/results/benchmark.jsonl")
    add("--results", type=Path, default=out, metavar="FILE", help="JSON lines, appended to")
    return result


def main() -> None:
    """Run the parts; print a table of each and append its rows."""
    args = parser().parse_args()
    sizes = ("rows", "row_length", "turns", "width", "layers", "heads", "step_tokens")
    model = check_sizes(args, *sizes)
    benchmark_retention.check_options(args)
    parts = [args.only] if args.only else list(_PARTS)
    if "peer" in parts or "blocks" in parts:
        _prepare_torch()
    setting = {name: getattr(args, name) for name in _SETTING}
    layout = layout_of(model, Compute(args.dtype, args.remat, attention=args.attention))
    for part in parts:
        results = _PARTS[part](model, layout, args)
        append(args.results, [{"benchmark": part, **setting, **row} for row in results])
        print(_table(results), flush=True)


def steps(_: DecoderConfig, layout: Layout[Decoder], args: Namespace) -> list[Row]:
    """Return rows of SAT steps of all executions, against the dense step and their FLOP bounds."""
    cases = {case: make_case(layout, *case) for case in _STEPS}
    costs = take_turns({case: _step(e, args) for case, e in cases.items()}, args.turns)
    rows = []
    for (name, rate), execution in cases.items():
        heads, channels = kept_shares(execution.plan, neurons_of(layout))
        cost, dense = costs[name, rate], costs[_STEPS[0]]
        wall, cpu = (ratio(dense, cost, field) for field in ("wall", "cpu"))
        bound = speedup_bound(layout, args.row_length, execution.plan.segments, args.remat)
        rows.append(
            {
                "execution": name,
                "rate": rate,
                "kept_heads": heads,
                "kept_channels": channels,
                **medians(cost),
                "speedup_wall": wall,
                "speedup_cpu": cpu,
                "bound": bound,
                "share_of_bound": wall / bound,
            }
        )
    return rows


def peer(model: DecoderConfig, layout: Layout[Decoder], args: Namespace) -> list[Row]:
    """Return rows of the dense step and of transformers' step on the same shapes, and of what both
    have to compute: the products of a layer with its weights, in XLA and in torch."""
    steps = {
        "sat_jax": _step(make_case(layout, "dense", 0.0), args),
        "transformers": _transformers_step(model, args),
    }
    products = {
        "sat_jax": _xla_products(layout, args),
        "transformers": _torch_products(layout, args),
    }
    rows = []
    for work, variants in (("step", steps), ("products", products)):
        costs = take_turns(variants, args.turns)
        rows += [
            {
                "work": work,
                "library": name,
                "torch": version("torch"),
                "transformers": version("transformers"),
                **medians(cost),
                "speed_against_transformers_wall": ratio(costs["transformers"], cost, "wall"),
                "speed_against_transformers_cpu": ratio(costs["transformers"], cost, "cpu"),
            }
            for name, cost in costs.items()
        ]
    return rows


def _prepare_torch() -> None:
    """Configure torch and jax for one process. Raises `UserError` for a missing package."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the parts peer and blocks need {package}, which is not installed; `make bench` or"
                " pip install -e '.[bench]' does that, --only runs another part without it"
            )
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would slow jax's turns


def _transformers_step(model: DecoderConfig, args: Namespace) -> Variant:
    """Return one training step in torch: forward, backward and AdamW, with sdpa attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    config = AutoConfig.for_model(
        model.family,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        **format_of(model).write_config(model),
    )
    with torch.device(device):  # random weights of large models take long on a CPU
        module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    module.train()
    if args.remat == "full":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    forward = torch.compile(module) if on_gpu else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=on_gpu)
    shape = args.rows, args.row_length
    tokens = torch.randint(0, model.vocab_size, shape, device=device)
    dtype = getattr(torch, args.dtype)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=args.dtype != "float32"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    return timed(step)


def _product_shapes(layout: Layout[Decoder]) -> list[tuple[int, int]]:
    """Return `[N, D]` of each matrix of a layer."""
    leaves = ((layout.shapes[path], leaf) for path, leaf in layout.leaves.items())
    return [
        (math.prod(array.shape[1:-1]), array.shape[-1])
        for array, leaf in leaves
        if leaf.in_layers and leaf.role != "vector"
    ]


def _xla_products(layout: Layout[Decoder], args: Namespace) -> Variant:
    """Return the products of a layer with its weights: forward, and both gradients."""
    tokens, dtype = args.rows * args.row_length, jnp.dtype(args.dtype)
    shapes = _product_shapes(layout)
    arrays = [
        tuple(jnp.ones(s, dtype) for s in ((tokens, d), (n, d), (tokens, n))) for n, d in shapes
    ]

    @jax.jit
    def products(arrays: Any) -> Any:
        return [(x @ w.T, dy @ w, (x.T @ dy).T) for x, w, dy in arrays]

    return timed(lambda: products(arrays))


def _torch_products(layout: Layout[Decoder], args: Namespace) -> Variant:
    """Return the same products in torch."""
    import torch

    tokens, dtype = args.rows * args.row_length, getattr(torch, args.dtype)
    on = {"dtype": dtype, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    shapes = _product_shapes(layout)
    arrays = [
        tuple(torch.ones(*s, **on) for s in ((tokens, d), (n, d), (tokens, n))) for n, d in shapes
    ]

    def products() -> None:
        for x, w, dy in arrays:
            x @ w.T, dy @ w, dy.T @ x
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return timed(products)


def moves(_: DecoderConfig, layout: Layout[Decoder], args: Namespace) -> list[Row]:
    """Return rows of the parts of a refresh (probe, selection, compact, expand) and of a step."""
    execution = make_case(layout, "gather", _REFRESH_RATE)
    state = random_state(full_state(layout, OptimizerConfig()))
    batch = random_batch(layout, (args.rows, args.row_length))
    observe = ("outputs",)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda p, b: observe_batch(layout, p, b, observe), state.params, batch),
    )
    probe = jax.jit(make_probe(layout, ProbeSettings(observe, 0.0, _PROBE_TOKENS)))
    select = jax.jit(
        lambda p, s: choose(layout, p, s, execution.plan, Criteria(), jax.random.key(0))
    )
    stats = probe(state.params, zeros, batch)
    kept = select(state.params, stats).kept
    converted: Any = None
    programs = compile_moves(
        *jax.eval_shape(lambda: (state, kept)),
        execution,
        placed=lambda tree: tree,
        compiled=lambda function, *args, **jit: jax.jit(function, **jit).lower(*args).compile(),
    )

    def compact() -> Any:
        nonlocal converted
        converted = programs.compact(state, kept)
        return converted

    def expand() -> Any:
        nonlocal state
        state = programs.expand(*converted, kept)
        return state

    # In this order: compact frees the full state, and expand restores it for the next turn.
    variants = {
        "step": _step(execution, args),
        "probe": timed(lambda: probe(state.params, zeros, batch)),
        "select": timed(lambda: select(state.params, stats)),
        "compact": timed(compact),
        "expand": timed(expand),
    }
    costs = take_turns(variants, args.turns)
    return [
        {"move": name, "rate": _REFRESH_RATE, **medians(cost)}
        | {"share_of_a_step": 1 / ratio(costs["step"], cost, "wall")}
        for name, cost in costs.items()
    ]


def blocks(_: DecoderConfig, __: Layout[Decoder], args: Namespace) -> list[Row]:
    """Return rows of a GELU MLP with gradients and of one product, dense and with block masks, and
    of a copy in memory."""
    copied = take_turns({"copy": timed(copy_call())}, args.turns)["copy"]
    rows: list[Row] = [{"work": "copy", "bytes": COPIED_BYTES, **medians(copied)}]
    for case in CASES:
        for work, calls in (("mlp", mlp_calls), ("product", product_calls)):
            variants = calls(args.rows * args.row_length, case)
            costs = take_turns({name: timed(c) for name, c in variants.items()}, args.turns)
            rows += [
                {
                    "model": f"{NEURONS}x{WIDTH}",
                    "dtype": "float32",
                    "work": work,
                    **case._asdict(),
                    "library": name,
                    **medians(cost),
                    "speedup_wall": ratio(costs["dense"], cost, "wall"),
                    "speedup_cpu": ratio(costs["dense"], cost, "cpu"),
                }
                for name, cost in costs.items()
            ]
    return rows


def retention(_: DecoderConfig, __: Layout[Decoder], args: Namespace) -> list[Row]:
    """Return rows of training steps and of decoding, of RetNet and of a transformer."""
    return list(benchmark_retention.retention(args))


_PARTS = {"steps": steps, "peer": peer, "moves": moves, "blocks": blocks, "retention": retention}


def _step(execution: Execution, args: Namespace) -> Variant:
    """Return one optimizer step on random arrays, compiled."""
    return compile_step(execution, (args.rows, args.row_length)).variant()


def _table(rows: Sequence[Row]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "-") for name in header] for row in rows]
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in some] for some in values]
    return fixed_width(header, cells)


if __name__ == "__main__":
    run(main)
