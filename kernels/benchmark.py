"""Measures block-sparse products beside dense ones and beside XLA's gather, on the device at hand.

  python -m kernels.benchmark --out experiments/results/kernels.jsonl
  python -m kernels.benchmark --out rows.jsonl --model small --tokens 256 --density 0.5

A row of FILE for every program of `arg_specs`, number of tokens, density, block and implementation
(`dense` is the same without sparsity, by XLA): seconds of a call are the median of --repeat timings
on random data (short calls are queued, up to 16 a timing), FLOPs those of matrix products with what
takes part. Rows that are there for this device are not measured again, so that a long measurement
goes on where it ended (a kernel that has changed wants a new file); what cannot run has its
`error`, and is tried again at another commit. What takes two minutes ends the command, and what
ends it has an `error` too. With --minutes it ends early enough. A line a row is printed: the
speed-up over dense, and beside it the bound, 1 / density. With --profile as many calls again leave
a trace of `jax.profiler`, a folder a row. Where PyTorch sees a CUDA device, its products with
block-sparse matrices (`torch_bsr`) and with dense ones (`torch_dense`) stand beside ours.
"""

import argparse
import datetime
import itertools
import json
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from kernels import benchmark_torch, measure
from kernels.block_sparse_matmul.arg_specs import LLAMA_2, Spec, dense, programs
from kernels.origin import commit, origin

MODELS = {spec.model: spec for spec in (*LLAMA_2, Spec("small", 256, 512))}
_KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "pallas_tpu"}
# Of a row what is said apart of device and versions, and what tells it from others.
_CASE = ("model", "program", "tokens", "density", "block", "implementation")
Key = tuple[Any, ...]


def main() -> None:
    """Measures what is not measured yet."""
    parser = _parser()
    given = parser.parse_args()
    try:
        done = _known(given.out)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parser.error(f"{given.out}: {reason}; accepted: rows of this command, or a new file")
    here = origin()
    with given.out.open("a", encoding="utf-8") as file:
        for row in _missing(given, done, here):
            place = file.tell()
            _write(file, row | measure.UNFINISHED)
            try:
                with measure.watched():
                    row |= _measure(row, given.repeat, given.profile)
            finally:
                file.truncate(place)
            _write(file, row)
            done[_key(row)] = row
            _report(row, done)


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _missing(
    given: argparse.Namespace, done: Collection[Key], here: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows that are not there, without their figures."""
    started = time.monotonic()
    if absent := benchmark_torch.absence():
        print(f"torch_bsr and torch_dense are left out: {absent}", flush=True)
    for case in _cases(given, _KERNELS[jax.default_backend()], torch=not absent):
        row = {"benchmark": "kernels", **dict(zip(_CASE, case, strict=True)), **here}
        if _key(row) in done:
            continue
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            sys.exit(f"{given.minutes} minutes are over; the same command goes on")
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield row


def _key(row: Mapping[str, Any]) -> Key:
    """What is not measured twice."""
    return row["device"]["kind"], row["versions"]["jax"], *(row[name] for name in _CASE)


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
    add("--block", nargs="+", type=int, choices=(64, 128), default=[128])
    add("--repeat", type=measure.count, default=20, help="timed calls")
    add("--minutes", type=float, help="begin no measurement after so many")
    add("--profile", type=Path, metavar="DIR", help="traces of what is timed; not of PyTorch")
    return parser


def share(text: str) -> float:
    """Of the smallest model at least a block is kept."""
    number = float(text)
    if not 0.125 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}, accepted 0.125 to 1")
    return number


def _cases(
    given: argparse.Namespace, kernels: str, torch: bool
) -> Iterator[tuple[str, str, int, float, int | None, str]]:
    """Values of `_CASE`, what is dense first: at density 1, without blocks."""
    for case in itertools.product(given.model, given.program, given.tokens):
        by_torch = torch and case[1] in benchmark_torch.PROGRAMS
        for name in ("dense", "torch_dense") if by_torch else ("dense",):
            yield (*case, 1.0, None, name)
        sparse = ("xla", kernels, "torch_bsr") if by_torch else ("xla", kernels)
        for density, block, name in itertools.product(given.density, given.block, sparse):
            yield (*case, density, block, name)


def _measure(given: dict[str, Any], repeat: int, profiles: Path | None) -> dict[str, Any]:
    """The figures of a row."""
    name, implementation, block = (given[key] for key in ("program", "implementation", "block"))
    sizes = {"tokens": given["tokens"], "density": given["density"]}
    sizes |= {"block": block} if block else {}
    spec = MODELS[given["model"]]._replace(**sizes)
    made = dense(spec) if block is None else programs(spec, "xla")
    row: dict[str, Any] = {"flops": made[name].flops}
    profile = profiles and profiles / re.sub("[ ,]+", "-", _named(given))
    try:
        if implementation.startswith("torch"):
            return row | benchmark_torch.measure(spec, name, implementation, repeat)
        if implementation != "dense":
            made = programs(spec, implementation)
        row |= {"seconds": measure.seconds(made[name], repeat), "repeat": repeat}
        if profile:
            measure.trace(made[name], repeat, profile)
    except Exception as error:
        row["trace_error" if "seconds" in row else "error"] = measure.first_line(error)
    return row


def _report(row: dict[str, Any], rows: Mapping[Key, dict[str, Any]]) -> None:
    text = _named(row)
    if "error" in row:
        print(f"{text}: {row['error']}", flush=True)
        return
    text += f": {row['seconds'] * 1e3:.3f} ms, {row['flops'] / row['seconds'] / 1e12:.1f} TFLOP/s"
    whole = {"density": 1.0, "block": None, "implementation": "dense"}
    beside = rows.get(_key(row | whole))
    if beside and "seconds" in beside:
        speedup, bound = beside["seconds"] / row["seconds"], beside["flops"] / row["flops"]
        text += f", {speedup:.2f}x dense (bound {bound:.2f}x)"
    print(text, flush=True)


def _named(row: dict[str, Any]) -> str:
    return "  ".join(f"{row[name]}" for name in _CASE if row[name] is not None)


def _known(path: Path) -> dict[Key, dict[str, Any]]:
    """Rows by what was measured, without those that failed at another commit. A torn last line is
    cut off."""
    here, text = commit(), path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    rows = map(json.loads, whole.splitlines())
    known = {_key(row): row for row in rows if "seconds" in row or row["commit"] == here}
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return known


if __name__ == "__main__":
    main()
