"""Benchmark block-sparse products against dense products and XLA's gather on the current device.

  python -m kernels.benchmark --out experiments/results/kernels.jsonl
  python -m kernels.benchmark --out rows.jsonl --model small --tokens 256 --density 0.5

Appends one JSON row to FILE for each program of `workloads`, number of tokens, density, block size
and implementation. `dense` is the same product of full matrices, by XLA. `torch_bsr` is PyTorch's
block-sparse (BSR) product, where PyTorch has a CUDA device. `seconds` is the median of --repeat
timings on random data; short calls are queued, up to 16 per timing. `flops` counts the matrix
products of the kept blocks.

The same command resumes an interrupted benchmark: rows of this device, jax version and commit in
FILE are not measured again. A program that fails gets a row with `error`. A measurement of more
than two minutes ends the process and leaves an `error` as well. With --minutes no measurement
starts after that time.

Prints each row with its speed-up over dense, and the bound of the speed-up, 1 / density. --profile
also writes traces of `jax.profiler` of all programs but PyTorch's, one folder per row.
"""

import argparse
import datetime
import importlib
import importlib.util
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from kernels import measure
from kernels.block_sparse_matmul import backends
from kernels.block_sparse_matmul.workloads import LLAMA_2, MODELS, Workload, programs
from kernels.provenance import commit, provenance

# The fields that identify a row on a device.
_CASE = ("model", "program", "tokens", "density", "block", "implementation")
_PROGRAMS = list(programs(LLAMA_2[0], "dense"))
_TORCH_PROGRAMS = ("mask", "mask_gradients")
_TORCH_NOTE = (
    "no autograd of BSR values: linear, linear by the transposed blocks, sampled_addmm (private)"
)
Key = tuple[Any, ...]


def main() -> None:
    """Measure the rows that are not in the file."""
    parser = _parser()
    args = parser.parse_args()
    try:
        rows = _read(args.out)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parser.error(f"{args.out}: {reason}; accepted: rows of this command, or a new file")
    with args.out.open("a", encoding="utf-8") as file:
        for row in _missing(args, rows):
            start = file.tell()
            _write(file, row | measure.UNFINISHED)
            try:
                with measure.time_limit():
                    row |= _measure(row, args.repeat, args.profile)
            finally:
                file.truncate(start)
            _write(file, row)
            rows[_key(row)] = row
            _print(row, rows)


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _missing(args: argparse.Namespace, measured: Collection[Key]) -> Iterator[dict[str, Any]]:
    """Yield the rows that are not measured, without their results."""
    start, source = time.monotonic(), provenance()
    if error := _torch_error():
        print(f"torch_bsr is not measured: {error}", flush=True)
    # On a CPU, the TPU kernels run in interpret mode.
    kernels = backends.PLATFORM_KERNELS.get(jax.default_backend(), "pallas_tpu")
    for case in _cases(args, kernels, torch=not error):
        row = {"benchmark": "kernels", **dict(zip(_CASE, case, strict=True)), **source}
        if _key(row) in measured:
            continue
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            sys.exit(f"{args.minutes} minutes are over; the same command resumes")
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield row


def _key(row: Mapping[str, Any]) -> Key:
    """Return the key under which a row is measured once."""
    return row["device"]["kind"], row["versions"]["jax"], *(row[name] for name in _CASE)


def _parser() -> argparse.ArgumentParser:
    parser = measure.parser(
        "python -m kernels.benchmark",
        __doc__,
        models=[workload.model for workload in LLAMA_2],
        densities=[0.125, 0.25, 0.5, 0.75, 1.0],
        blocks=[128],
        tokens=[1024, 4096, 16_384, 65_536],
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows are appended")
    add("--program", nargs="+", choices=_PROGRAMS, default=_PROGRAMS, help="default: all")
    add("--profile", type=Path, metavar="DIR", help="also write profiler traces to DIR")
    return parser


def _cases(
    args: argparse.Namespace, kernels: str, torch: bool
) -> Iterator[tuple[str, str, int, float, int | None, str]]:
    """Yield the values of `_CASE`, the dense ones first, with density 1 and no block."""
    for case in itertools.product(args.model, args.program, args.tokens):
        yield (*case, 1.0, None, "dense")
        by_torch = torch and case[1] in _TORCH_PROGRAMS
        implementations = ("xla", kernels, "torch_bsr") if by_torch else ("xla", kernels)
        for density, block, name in itertools.product(args.density, args.block, implementations):
            yield (*case, density, block, name)


def _measure(case: dict[str, Any], repeat: int, profiles: Path | None) -> dict[str, Any]:
    """Return the results of a row."""
    name, implementation = case["program"], case["implementation"]
    workload = MODELS[case["model"]]._replace(tokens=case["tokens"], density=case["density"])
    workload = workload._replace(block=case["block"] or workload.block)
    by_torch = implementation == "torch_bsr"
    program = programs(workload, "xla" if by_torch else implementation)[name]
    row: dict[str, Any] = {"flops": program.flops}
    try:
        if by_torch:
            return row | _measure_torch(workload, name, repeat)
        row |= {"seconds": measure.seconds(program, repeat), "repeat": repeat}
        if profiles:
            measure.trace(program, repeat, profiles / _describe(case).replace("  ", "-"))
    except Exception as error:
        row["trace_error" if "seconds" in row else "error"] = measure.first_line(error)
    return row


def _print(row: dict[str, Any], rows: Mapping[Key, dict[str, Any]]) -> None:
    text = _describe(row)
    if "error" in row:
        print(f"{text}: {row['error']}", flush=True)
        return
    text += f": {row['seconds'] * 1e3:.3f} ms, {row['flops'] / row['seconds'] / 1e12:.1f} TFLOP/s"
    dense = rows.get(_key(row | {"density": 1.0, "block": None, "implementation": "dense"}))
    if dense and "seconds" in dense:
        speedup, bound = dense["seconds"] / row["seconds"], dense["flops"] / row["flops"]
        text += f", {speedup:.2f}x dense (bound {bound:.2f}x)"
    print(text, flush=True)


def _describe(row: dict[str, Any]) -> str:
    return "  ".join(f"{row[name]}" for name in _CASE if row[name] is not None)


def _read(path: Path) -> dict[Key, dict[str, Any]]:
    """Return the rows of a file by key, without those of other commits.

    Removes an incomplete last line from the file.
    """
    current, text = commit(), path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    rows = map(json.loads, complete.splitlines())
    known = {_key(row): row for row in rows if row["commit"] == current}
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return known


def _torch_error() -> str | None:
    """Return why PyTorch cannot be measured here, or None if it can."""
    if jax.default_backend() != "gpu":
        return f"jax runs on {jax.default_backend()}, not on a GPU"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return None if _torch().cuda.is_available() else "torch has no CUDA device"


def _measure_torch(workload: Workload, program: str, repeat: int) -> dict[str, Any]:
    """Return the results of PyTorch's product in bfloat16. Raises the exceptions of torch."""
    torch = _torch()
    call = torch_product(workload, program, "cuda", torch.bfloat16)
    seconds = measure.median_seconds(call, lambda _: torch.cuda.synchronize(), repeat)
    row = {"seconds": seconds, "repeat": repeat}
    return row if program == "mask" else row | {"note": _TORCH_NOTE}


def torch_product(workload: Workload, program: str, device: str, dtype: Any) -> Callable[[], Any]:
    """Return a call of PyTorch's x · Wᵀ with a BSR matrix W, or with both gradients as well.

    torch has no autograd of BSR values, so the gradients are separate products. That of the values
    is a BSR matrix, and runs on CUDA only.
    """
    torch = _torch()
    mask, linear = workload.mask(), torch.nn.functional.linear
    kept = torch.zeros(mask.shape, dtype=torch.bool, device=device)
    kept[torch.tensor(mask.rows.tolist()), torch.tensor(mask.columns.tolist())] = True
    rows, columns = kept.nonzero(as_tuple=True)

    def bsr(starts: Any, columns: Any, values: Any, *shape: int) -> Any:
        return torch.sparse_bsr_tensor(starts, columns, values, shape, check_invariants=False)

    def row_starts(kept: Any) -> Any:
        counts = kept.sum(1)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    x = torch.randn(workload.tokens, workload.width, device=device, dtype=dtype)
    values = torch.randn(mask.nonzero, mask.block, mask.block, device=device, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that the layout is in beta
        w = bsr(row_starts(kept), columns, values, workload.neurons, workload.width)
    if program == "mask":
        return lambda: linear(x, w)
    # The order of the transposed blocks is computed before the timing, as for our kernels.
    order = torch.argsort(columns, stable=True)
    starts, rows = row_starts(kept.T), rows[order]
    sampled_addmm = importlib.import_module("torch.sparse._triton_ops").sampled_addmm

    def with_gradients() -> Any:
        y = linear(x, w)
        dy = torch.sin(y)
        blocks = values[order].mT.contiguous()
        transposed = bsr(starts, rows, blocks, workload.width, workload.neurons)
        return y, linear(dy, transposed), sampled_addmm(w, dy.T, x, beta=0.0)

    return with_gradients


def _torch() -> Any:
    """Return PyTorch, which no other part of the kernels needs."""
    return importlib.import_module("torch")


if __name__ == "__main__":
    main()
