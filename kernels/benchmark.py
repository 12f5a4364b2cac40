"""Measures block-sparse products beside dense ones and beside XLA's gather, on the device at hand.

  python -m kernels.benchmark --out experiments/results/kernels.jsonl
  python -m kernels.benchmark --out rows.jsonl --model small --tokens 256 --density 0.5

A row of FILE for every program of `arg_specs`, number of tokens, density and implementation
(`dense` is the same without sparsity, by XLA): seconds are the median of --repeat calls on random
data, FLOPs those of matrix products with what takes part. Rows that are there for this device are
not measured again, so that a long measurement goes on where it ended (a kernel that has changed
wants a new file); what cannot run has its `error`. With --minutes it ends early enough. A line a
row is printed: the speed-up over dense, and beside it the bound, 1 / density.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Program, Spec, dense, programs

_MODELS = {spec.model: spec for spec in (*LLAMA_2, Spec("small", 256, 512))}
_KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "pallas_tpu"}
_KEY = ("device", "jax", "model", "program", "tokens", "density", "implementation")


def main() -> None:
    """Measures what is not measured yet."""
    given = _parser().parse_args()
    done = _known(given.out)
    with given.out.open("a", encoding="utf-8") as file:
        for row in _rows(given, done):
            file.write(json.dumps(row | {"benchmark": "kernels", "commit": _commit()}) + "\n")
            file.flush()
            done[tuple(row[name] for name in _KEY)] = row
            _report(row, done)


def _rows(given: argparse.Namespace, done: Collection[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Those that are not there, one measured after the other."""
    started = time.monotonic()
    for case in _cases(given, ("dense", "xla", _KERNELS[jax.default_backend()])):
        row = dict(zip(_KEY, (jax.devices()[0].device_kind, jax.__version__, *case), strict=True))
        if tuple(row.values()) in done:
            continue
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            sys.exit(f"{given.minutes} minutes are over; the same command goes on")
        model, program, tokens, density, implementation = case
        spec = _MODELS[model]._replace(tokens=tokens, density=density)
        made = dense(spec) if implementation == "dense" else programs(spec, implementation)
        yield row | _measure(made[program], given.repeat)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m kernels.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines, added to")
    add("--model", nargs="+", choices=_MODELS, default=[spec.model for spec in LLAMA_2])
    add("--program", nargs="+", choices=dense(LLAMA_2[0]), default=list(dense(LLAMA_2[0])))
    add("--tokens", nargs="+", type=_count, default=[1024, 4096, 16_384, 65_536])
    add("--density", nargs="+", type=_share, default=[0.125, 0.25, 0.5, 0.75, 1.0])
    add("--repeat", type=_count, default=20, help="timed calls")
    add("--minutes", type=float, help="begin no measurement after so many")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 1 and more")
    return number


def _share(text: str) -> float:
    """Of the smallest model at least a block is kept."""
    number = float(text)
    if not 0.125 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 0.125 to 1")
    return number


def _cases(
    given: argparse.Namespace, implementations: tuple[str, ...]
) -> Iterator[tuple[str, str, int, float, str]]:
    """(model, program, tokens, density, implementation), what is dense first and at density 1."""
    for case in itertools.product(given.model, given.program, given.tokens):
        yield (*case, 1.0, implementations[0])
        for density, name in itertools.product(given.density, implementations[1:]):
            yield (*case, density, name)


def _measure(program: Program, repeat: int) -> dict[str, Any]:
    call = jax.jit(program.function)
    try:
        arguments = _random(program)
        jax.block_until_ready(call(*arguments))
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds.append(time.perf_counter() - started)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"flops": program.flops, "error": reason[:200]}
    return {"flops": program.flops, "seconds": statistics.median(seconds), "repeat": repeat}


def _random(program: Program) -> list[jax.Array]:
    """Values of N(0, 1), and ids spread evenly over the blocks of the matrix before them."""
    arrays: list[jax.Array] = []
    for number, shape in enumerate(program.arguments):
        if jnp.issubdtype(shape.dtype, jnp.integer):
            blocks = arrays[-1].shape[0] // program.block
            arrays.append(jnp.arange(shape.size, dtype=jnp.int32) * blocks // shape.size)
        else:
            arrays.append(jax.random.normal(jax.random.key(number), shape.shape, shape.dtype))
    return arrays


def _report(row: dict[str, Any], rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    text = "  ".join(f"{row[name]}" for name in _KEY[2:])
    if "error" in row:
        print(f"{text}: {row['error']}", flush=True)
        return
    text += f": {row['seconds'] * 1e3:.3f} ms, {row['flops'] / row['seconds'] / 1e12:.1f} TFLOP/s"
    beside = rows.get(tuple((row | {"density": 1.0, "implementation": "dense"})[n] for n in _KEY))
    if beside and "seconds" in beside:
        speedup, bound = beside["seconds"] / row["seconds"], beside["flops"] / row["flops"]
        text += f", {speedup:.2f}x dense (bound {bound:.2f}x)"
    print(text, flush=True)


def _known(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows by what was measured, without those that failed. A torn last line is cut off."""
    rows = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for row in map(json.loads, whole.splitlines()):
        if "seconds" in row:
            rows[tuple(row[name] for name in _KEY)] = row
    return rows


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


if __name__ == "__main__":
    main()
