"""Measures block-sparse products beside dense ones and beside XLA's gather, on the device at hand.

  python -m kernels.benchmark --out experiments/results/kernels.jsonl
  python -m kernels.benchmark --out rows.jsonl --model small --tokens 256 --density 0.5

A row of FILE for every program of `arg_specs`, number of tokens, density and implementation
(`dense` is the same without sparsity, by XLA): seconds of a call are the median of --repeat timings
on random data (short calls are queued, up to 16 a timing), FLOPs those of matrix products with what
takes part. Rows that are there for this device are not measured again, so that a long measurement
goes on where it ended (a kernel that has changed wants a new file); what cannot run has its
`error`. With --minutes it ends early enough. A line a row is printed: the speed-up over dense, and
beside it the bound, 1 / density. Where PyTorch sees a CUDA device, its products with block-sparse
matrices (`torch_bsr`) and with dense ones (`torch_dense`) stand beside ours.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from kernels import benchmark_torch, measure
from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Spec, dense, programs

MODELS = {spec.model: spec for spec in (*LLAMA_2, Spec("small", 256, 512))}
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
    if absent := benchmark_torch.absence():
        print(f"torch_bsr and torch_dense are left out: {absent}", flush=True)
    for case in _cases(given, _KERNELS[jax.default_backend()], torch=not absent):
        row = dict(zip(_KEY, (jax.devices()[0].device_kind, jax.__version__, *case), strict=True))
        if tuple(row.values()) in done:
            continue
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            sys.exit(f"{given.minutes} minutes are over; the same command goes on")
        model, program, tokens, density, implementation = case
        spec = MODELS[model]._replace(tokens=tokens, density=density)
        yield row | _measure(spec, program, implementation, given.repeat)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m kernels.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines, added to")
    add("--model", nargs="+", choices=MODELS, default=[spec.model for spec in LLAMA_2])
    add("--program", nargs="+", choices=dense(LLAMA_2[0]), default=list(dense(LLAMA_2[0])))
    add("--tokens", nargs="+", type=measure.count, default=[1024, 4096, 16_384, 65_536])
    add("--density", nargs="+", type=share, default=[0.125, 0.25, 0.5, 0.75, 1.0])
    add("--repeat", type=measure.count, default=20, help="timed calls")
    add("--minutes", type=float, help="begin no measurement after so many")
    return parser


def share(text: str) -> float:
    """Of the smallest model at least a block is kept."""
    number = float(text)
    if not 0.125 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 0.125 to 1")
    return number


def _cases(
    given: argparse.Namespace, kernels: str, torch: bool
) -> Iterator[tuple[str, str, int, float, str]]:
    """(model, program, tokens, density, implementation), what is dense first and at density 1."""
    for case in itertools.product(given.model, given.program, given.tokens):
        by_torch = torch and case[1] in benchmark_torch.PROGRAMS
        for name in ("dense", "torch_dense") if by_torch else ("dense",):
            yield (*case, 1.0, name)
        sparse = ("xla", kernels, "torch_bsr") if by_torch else ("xla", kernels)
        for density, name in itertools.product(given.density, sparse):
            yield (*case, density, name)


def _measure(spec: Spec, name: str, implementation: str, repeat: int) -> dict[str, Any]:
    made = dense(spec) if implementation.endswith("dense") else programs(spec, "xla")
    row = {"flops": made[name].flops}
    try:
        if implementation.startswith("torch"):
            return row | benchmark_torch.measure(spec, name, implementation, repeat)
        if implementation != "dense":
            made = programs(spec, implementation)
        return row | {"seconds": measure.seconds(made[name], repeat), "repeat": repeat}
    except Exception as error:
        return row | {"error": measure.first_line(error)}


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
