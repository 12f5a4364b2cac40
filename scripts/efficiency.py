"""Measure the time of training steps of large models on the current device.

  python -m scripts.efficiency --model llama-2-7b --rows 4 --row-length 2048 --minutes 8

Appends rows to --out for the dense step, a SAT step for each rate and execution, a step that keeps
the fewest neurons possible, the optimizer alone, and products of large matrices (bfloat16, 8,192 ×
8,192; 64 × 64 on a CPU), whose FLOP/s are the peak that is reached. Seconds are medians of --repeat
calls with random weights and tokens; no data are needed. A case that has a row for this device and
commit is not measured again, so the same command resumes after --minutes. `scripts.benchmark --only
peer` compares with transformers on the same shapes.
"""

import contextlib
import dataclasses
import faulthandler
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from sat_jax.cli import Parser, run
from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import preset
from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.nn.decoder import Compute
from sat_jax.provenance import environment
from sat_jax.results.rows import STEP_SETTING, append, read
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.flops import speedup_bound, training_flops
from sat_jax.sparsity.plan import kept_shares, neurons_of
from sat_jax.train.step_program import (
    Program,
    Trained,
    count_bytes,
    full_state,
    make_case,
    optimizer_program,
    random_arguments,
    step_program,
)

Row = dict[str, Any]

_OUT = Path("experiments/results/efficiency.jsonl")
_PEAK, _PEAK_ON_CPU = 8192, 64
_PRODUCTS = 20  # in one call, so that launching it is not measured
_LIMIT = 300.0  # seconds that one row may take, compilation included
_STDERR = 2
_PARTS = ["peak", "step", "optimizer"]


class Case(NamedTuple):
    """What one row measures. `part`: step, optimizer or peak."""

    part: str
    execution: Trained
    rate: float


def add_size_options(
    parser: Parser, *, model: str, rows: int, row_length: int, dtype: str, remat: str
) -> None:
    """Add the options of the model and the batch of a step, with these defaults."""
    add = parser.add_argument
    add("--model", default=model, help=f"a preset; default {model}")
    add("--rows", type=int, default=rows, help=f"rows per step; default {rows}")
    length = f"tokens per row; default {row_length}"
    add("--row-length", type=int, default=row_length, help=length)
    add("--dtype", choices=("bfloat16", "float32"), default=dtype, help=f"default {dtype}")
    add("--remat", choices=("none", "dots", "full"), default=remat, help=f"default {remat}")
    backends = get_args(Implementation)
    add("--attention", choices=backends, help="attention backend; default: the device's fastest")


def add_case_options(parser: Parser) -> None:
    """Add the options that define the cases: model, batch, rates, executions and optimizer."""
    large = {"rows": 4, "row_length": 2048, "dtype": "bfloat16", "remat": "full"}
    add_size_options(parser, model="llama-2-7b", **large)
    add = parser.add_argument
    add("--rate", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6], help="omission rates")
    add("--execution", nargs="+", choices=("gather", "kernel"), default=["gather", "kernel"])
    add(
        "--optimizer",
        choices=("adamw", "lion"),
        default="adamw",
        help="update rule; lion has bfloat16 momentum",
    )
    names = ("xla", "pallas_tpu", "pallas_gpu")
    add("--kernels", choices=names, help="kernels of kernel execution; default: the fastest known")


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("efficiency", __doc__)
    add_case_options(result)
    add = result.add_argument
    add("--out", type=Path, default=_OUT, metavar="FILE", help="JSON lines, appended to")
    add("--part", nargs="+", choices=_PARTS, default=_PARTS, help="kinds of cases; default: all")
    add("--repeat", type=int, default=10, help="timed calls of each case; default 10")
    add("--minutes", type=float, help="start no measurement after this many minutes")
    return result


def main() -> None:
    """Measure the cases that have no row."""
    args = parser().parse_args()
    model = check_sizes(args, "rows", "row_length", "repeat")
    cases = [
        Case("peak", "dense", 0.0),
        *cases_of("step", args),
        Case("step", "gather", 1.0),
        *cases_of("optimizer", args),
    ]
    cases = [case for case in cases if case.part in args.part]
    # jax takes three quarters of an accelerator's memory, and the largest steps need more. The
    # setting has two names, and jax refuses both together.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    started = time.monotonic()

    def measure(case: Case) -> Row:
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            raise UserError(f"{args.minutes:g} minutes are over; the same command resumes")
        if case.part == "peak":
            return _peak(args.repeat)
        execution, program = make_program(model, case, args, args.attention)
        arguments = random_arguments(program, execution)
        row = describe(execution, program, args)
        return row | _time(program.function, arguments, args.repeat)

    kind = jax.devices()[0].device_kind
    for row in add_rows(args.out, args, kind, cases, measure):
        result = row.get("error") or f"{row['seconds'] * 1e3:.1f} ms"
        print(f"{row['part']}  {row['execution']}  r = {row['rate']:g}: {result}", flush=True)


def check_sizes(args: Namespace, *names: str) -> DecoderConfig:
    """Return the model of the options. Raises `UserError` for sizes and rates out of range."""
    model = preset(args.model)
    for name in names:
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}; accepted: 1 or more")
    if wrong := [rate for rate in getattr(args, "rate", ()) if not 0 < rate < 1]:
        raise UserError(f"--rate {wrong[0]:g}; accepted: above 0 and below 1")
    # Weights are random, so that rows may be longer than those of the published model.
    return dataclasses.replace(model, max_positions=max(model.max_positions, args.row_length))


def cases_of(part: str, args: Namespace) -> Iterator[Case]:
    """Yield the dense case, then every rate in every execution."""
    yield Case(part, "dense", 0.0)
    for execution in args.execution:
        for rate in args.rate:
            yield Case(part, execution, rate)


def make_program(
    model: DecoderConfig, case: Case, args: Namespace, attention: Implementation | None = None
) -> tuple[Execution, Program]:
    """Return the execution of a case and its program."""
    layout = layout_of(model, Compute(args.dtype, args.remat, attention=attention))
    execution = make_case(layout, case.execution, case.rate, args.kernels)
    if case.part == "optimizer":
        return execution, optimizer_program(execution, optimizer_of(args))
    shape = args.rows, args.row_length
    return execution, step_program(execution, optimizer_of(args), shape)


def optimizer_of(args: Namespace) -> OptimizerConfig:
    """Return the optimizer of the options."""
    if args.optimizer == "lion":
        return OptimizerConfig("lion", beta2=0.99, momentum_dtype="bfloat16")
    return OptimizerConfig()


def describe(execution: Execution, program: Program, args: Namespace) -> Row:
    """Return the part of a row that needs no compilation.

    `resting_bytes`: the size of the omitted state. `bound`: FLOPs of the dense step divided by
    those of this step, both with recomputation. `model_flops`: FLOPs of this step without
    recomputation.
    """
    layout, segments = execution.layout, execution.plan.segments
    heads, channels = kept_shares(execution.plan, neurons_of(layout))
    flops = training_flops(layout, args.row_length, segments).total
    full = full_state(layout, optimizer_of(args))
    return {
        "kept_heads": heads,
        "kept_channels": channels,
        "bound": speedup_bound(layout, args.row_length, segments, args.remat),
        "model_flops": args.rows * args.row_length * flops,
        "resting_bytes": count_bytes(full) - count_bytes(program.state),
    }


def add_rows(
    path: Path,
    args: Namespace,
    target: str,
    cases: Sequence[Case],
    measure: Callable[[Case], Row],
) -> Iterator[Row]:
    """Append and yield a row for each case that has none for this target, setting and commit."""
    origin = environment()  # before the file changes
    setting = {"target": target} | {name: getattr(args, name) for name in STEP_SETTING[1:]}
    known = read(path) if path.exists() else []
    known = [row for row in known if row["commit"] == origin["commit"]]
    done = [{key: row.get(key) for key in (*setting, *Case._fields)} for row in known]
    for case in dict.fromkeys(cases):
        row = setting | case._asdict()
        if row in done:
            continue
        with _unfinished_row(path, row, origin):
            row |= _result_or_error(measure, case)
        append(path, [row], origin)
        yield row


@contextlib.contextmanager
def _unfinished_row(path: Path, row: Row, origin: Mapping[str, Any]) -> Iterator[None]:
    """Store a row with an error while the body runs. The row remains if the body ends the process,
    which a time limit does too, so that the next call skips the case."""
    size = path.stat().st_size if path.exists() else 0
    append(path, [row | {"error": "started, not finished"}], origin)
    faulthandler.dump_traceback_later(_LIMIT, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.truncate(path, size)
        if not size:
            path.unlink()


def _result_or_error(measure: Callable[[Case], Row], case: Case) -> Row:
    """Return the result; a case that does not compile or fit must not end the others."""
    try:
        return measure(case)
    except UserError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _time(function: Callable[..., Any], arguments: tuple[Any, ...], repeat: int) -> Row:
    """Return time and memory of a program that returns its first argument, updated, and a
    scalar."""
    state, *rest = arguments
    del arguments
    started = time.perf_counter()
    program = jax.jit(function, donate_argnums=0).lower(state, *rest).compile()
    compiled, seconds = time.perf_counter() - started, []
    for _ in range(repeat + 2):  # the first two are not counted
        started = time.perf_counter()
        state, scalar = program(state, *rest)
        jax.block_until_ready((state, scalar))
        seconds.append(time.perf_counter() - started)
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "seconds": statistics.median(seconds[2:]),
        "repeat": repeat,
        "compile_seconds": compiled,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _peak(repeat: int) -> Row:
    """Return time and FLOPs of products of two square matrices in bfloat16."""
    size = _PEAK_ON_CPU if jax.default_backend() == "cpu" else _PEAK

    def products(x: jax.Array, y: jax.Array) -> tuple[jax.Array, int]:
        for _ in range(_PRODUCTS):
            x = x @ y / size**0.5
        return x, 0

    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    row = _time(products, (square, square + 0), repeat)
    return row | {"model_flops": 2.0 * size**3 * _PRODUCTS}


if __name__ == "__main__":
    run(main)
