"""How fast training steps of large models are on the device at hand.

  python -m scripts.efficiency --model llama-2-7b --rows 4 --row-length 2048 --minutes 8

A row of --out for the dense step, for SAT's at every rate in each execution, for one that keeps
next to nothing (what it takes is no neuron's time), for the optimizer alone, and for the largest
rate of matrix products (bfloat16, 8,192 square; 64 on a CPU, where that would take hours). Seconds
are medians of --repeat calls on random weights and tokens. A row that is there already for this
device is not measured again: the same command goes on where --minutes ended it. Nothing of the data
pipeline is needed; of transformers on the same shapes `scripts.benchmark --only peer` tells.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

_OUT = Path("experiments/results/efficiency.jsonl")
_PEAK, _PEAK_ON_CPU = 8192, 64


def step_options(made: Parser) -> None:
    """Options that say which steps."""
    add = made.add_argument
    add("--model", default="llama-2-7b", help="a preset; default llama-2-7b")
    add("--rows", type=int, default=4, help="rows a step; default 4")
    add("--row-length", type=int, default=2048, help="tokens a row; default 2048")
    add("--rate", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6], help="of SAT's steps")
    add("--execution", nargs="+", choices=("gather", "kernel"), default=["gather", "kernel"])
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--optimizer", choices=("adamw", "lion"), default="adamw", help="lion: bfloat16 momentum")
    add("--remat", choices=("none", "dots", "full"), default="full")
    names = ("xla", "pallas_tpu", "pallas_gpu")
    add("--kernels", choices=names, help="of kernel execution; default: the best there is")


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("efficiency", __doc__)
    step_options(made)
    add = made.add_argument
    add("--out", type=Path, default=_OUT, metavar="FILE", help="JSON lines, added to")
    add("--repeat", type=int, default=10, help="timed calls; default 10")
    add("--minutes", type=float, help="begin no measurement after so many")
    add("--profile", type=Path, metavar="DIR", help="measure again, with a trace of each for XProf")
    return made


def main() -> None:
    """Measures what is not there yet."""
    given = parser().parse_args()
    if given.repeat < 1:
        raise UserError(f"--repeat {given.repeat}; accepted: 1 or more")
    # Of an accelerator's memory jax takes three quarters; the largest steps need more. It knows
    # two names for that, and refuses to be given both.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    import jax

    from scripts.large_steps import Case, Row, add_rows, checked, described, plan_of, sparse_cases
    from scripts.step_program import filled

    model = checked(given)
    started = time.monotonic()

    def measured(case: Case) -> Row:
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            raise UserError(f"{given.minutes:g} minutes are over; the same command goes on")
        if case.part == "peak":
            return _peak(given.repeat)
        row, program = described(model, case, given, attention=None)
        arguments = filled(program, model, plan_of(model, case))
        trace = given.profile and given.profile / f"{case.part}-{case.execution}-{case.rate:g}"
        return row | _timed(program.function, arguments, given.repeat, trace=trace)

    cases = [Case("peak", "dense", 0.0), *sparse_cases("step", given), Case("step", "gather", 1.0)]
    cases += sparse_cases("optimizer", given)
    kind, again = jax.devices()[0].device_kind, given.profile is not None
    for row in add_rows(given.out, given, kind, cases, measured, again):
        said = row.get("error") or f"{row['seconds'] * 1e3:.1f} ms"
        print(f"{row['part']}  {row['execution']}  r = {row['rate']:g}: {said}", flush=True)


def _timed(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    repeat: int,
    queued: int = 1,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Of a program that gives back its first argument, changed, and something small; `queued` calls
    are timed together, so that between short ones the device does not wait for the host. What
    `trace` is given is one more call, which is not timed."""
    import jax

    state, *rest = arguments
    del arguments
    started = time.perf_counter()
    call = jax.jit(function, donate_argnums=0).lower(state, *rest).compile()
    compiled = time.perf_counter() - started
    seconds = []
    for turn in range(repeat + 2):  # two to warm up
        started = time.perf_counter()
        for _ in range(queued):
            state, small = call(state, *rest)
        jax.block_until_ready((state, small))
        if turn >= 2:
            seconds.append((time.perf_counter() - started) / queued)
    traced = {}
    if trace is not None:
        try:
            with jax.profiler.trace(trace):
                jax.block_until_ready(call(state, *rest))
        except Exception as error:  # what was timed stays
            traced = {"trace_error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    analysis = call.memory_analysis()
    assert analysis is not None
    return traced | {
        "seconds": statistics.median(seconds),
        "repeat": repeat,
        "compile_seconds": compiled,
        "state_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }


def _peak(repeat: int) -> dict[str, Any]:
    """Of a product of two square matrices in bfloat16."""
    import jax
    import jax.numpy as jnp

    size = _PEAK_ON_CPU if jax.default_backend() == "cpu" else _PEAK
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    row = _timed(lambda x, y: (x @ y / size**0.5, 0), (square, square + 0), repeat, queued=20)
    return row | {"model_flops": 2.0 * size**3}


if __name__ == "__main__":
    run(main)
