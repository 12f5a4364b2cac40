"""Choose the tiles of the kernels by timing them on the current device: `make tune`.

  python -m kernels.tune --minutes 9
  python -m kernels.tune --tokens 4096 --block 128 --out somewhere

Times, for each model, density, operation, block size and number of tokens, on the same random
arrays (bfloat16): XLA, the default tiles, and variations of the fastest tiles, one setting at a
time. Tiles that do not fit the device are skipped before compilation. Tiles that result in an
already timed program are not timed again. Tiles that do not compile are reported and skipped. A
measurement of more than two minutes ends the process. Prints one line for each of them.

DIR/<device>.json is written after each measurement. The same command resumes an interrupted search
and repeats no completed measurement; delete the file after a change of a kernel. The kernels read
their tiles, and for which operations to use them, from the default DIR. Needs only jax and numpy.
"""

import argparse
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels import measure
from kernels.block_sparse_matmul import backends, tuned, xla
from kernels.block_sparse_matmul.tiled import Kernels, Tiled
from kernels.block_sparse_matmul.tiles import DEFAULTS, Tiles, UnsupportedTiles
from kernels.block_sparse_matmul.workloads import MODELS, Workload, operations
from kernels.program import Program

Changes = list[dict[str, int]]
_OPERATIONS = sorted({name for _, name in tuned.OPERATIONS})


def main() -> None:
    """Measure the cases that are not in the file."""
    parser = _parser()
    args = parser.parse_args()
    platform = jax.default_backend()
    if platform not in backends.PLATFORM_KERNELS and not args.interpret:
        accepted = " and ".join(sorted(backends.PLATFORM_KERNELS))
        parser.error(f"there are no kernels for {platform}, accepted {accepted}; or --interpret")
    if args.interpret and (platform != "cpu" or args.out is None):
        parser.error("--interpret tests the search on a CPU, and needs --out for its timings")
    try:
        file = TuningFile(tuned.path(tuned.device_kind(), args.out or tuned.FOLDER))
    except ValueError as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    kernels = backends.KERNELS[backends.PLATFORM_KERNELS.get(platform, "pallas_tpu")]
    for search in _searches(args, kernels, file):
        if not search.run(deadline):
            sys.exit(f"{args.minutes} minutes are over; the same command resumes")
    print(f"all cases are measured: {file.path}")


def _parser() -> argparse.ArgumentParser:
    parser = measure.parser(
        "python -m kernels.tune",
        __doc__,
        models=["llama-2-7b"],
        densities=[0.5],
        blocks=[128, 64],
        tokens=[1024, 4096, 16_384],
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="default: the folder that the kernels read")
    add("--operation", nargs="+", choices=_OPERATIONS, default=_OPERATIONS, help="default: all")
    add("--interpret", action="store_true", help="run on a CPU, to test the search")
    return parser


def _searches(args: argparse.Namespace, kernels: Kernels, file: "TuningFile") -> Iterator["Search"]:
    """Yield a search for each case with a block size that the kernels support."""
    settings = itertools.product(args.model, args.density, args.block, args.tokens)
    for model, density, block, tokens in settings:
        workload = MODELS[model]._replace(tokens=tokens, density=density, block=block)
        if reason := kernels.refusal(jnp.dtype(jnp.bfloat16), workload.width, block):
            print(f"{kernels.NAME}: {reason}", flush=True)
            continue
        for pattern, operation in tuned.OPERATIONS:
            if operation in args.operation:
                case = tuned.Case(kernels.NAME, pattern, operation, "bfloat16", block, tokens)
                yield Search(case, workload, kernels, args.repeat, file)


class TuningFile:
    """The entries of a device kind, read once and written after each change.

    An entry has the fields of its case and matrix, and a list `timed`. Each of its records has the
    `tiles` (null for XLA), a hash of the `program`, and `seconds` or an `error`. A complete entry
    also has the other fields of `tuned.Entry`.
    """

    def __init__(self, path: Path) -> None:
        """Read the file if it exists."""
        self.path, self._entries = path, tuned.read(path)[0]

    def entry(self, case: tuned.Case, matrix: tuned.Matrix) -> dict[str, Any]:
        """Return the entry of a case and a matrix, or add one."""
        key = case._asdict() | matrix._asdict()
        for entry in self._entries:
            if key.items() <= entry.items():
                return entry
        self._entries.append(key | {"timed": []})
        return self._entries[-1]

    def write(self) -> None:
        """Replace the file atomically."""
        content = {"device": tuned.device_kind(), "entries": self._entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for the fastest tiles of one case, at the shapes of `workload`."""

    case: tuned.Case
    workload: Workload
    kernels: Kernels
    repeat: int
    file: TuningFile

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of this search in the file."""
        size = self.workload
        return self.file.entry(self.case, tuned.Matrix(size.width, size.neurons, size.density))

    def run(self, deadline: float) -> bool:
        """Run the search; return False if it was not complete at the deadline."""
        entry, default = self.entry, DEFAULTS[self.case.backend]
        if "tiles" in entry:
            return True
        best: Any = default
        for changes in ([], *_rounds(self.case)):
            variants = [dataclasses.replace(best, **change) for change in changes]
            for tiles in (None, default, *variants):
                if self._record(tiles) is None:
                    if time.monotonic() > deadline:
                        return False
                    self._time(tiles)
            best = min((best, *variants), key=self._seconds)
        seconds, xla_seconds = self._seconds(best), self._seconds(None)
        runs = math.isfinite(seconds)
        entry |= {
            "model": self.workload.model,
            "repeat": self.repeat,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "tiles": dataclasses.asdict(best) if runs else None,
            "seconds": seconds if runs else None,
            "xla_seconds": xla_seconds if math.isfinite(xla_seconds) else None,
        }
        self.file.write()
        return True

    def _time(self, tiles: Tiles | None) -> None:
        """Add and print the record of these tiles, None for XLA."""
        backend = Tiled(self.kernels, tiles) if tiles else xla
        program = operations(self.workload, backend)[self.case.pattern, self.case.operation]
        record: dict[str, Any] = {"tiles": tiles and dataclasses.asdict(tiles)}
        duplicate = None
        try:
            record["program"] = program_hash(program)
            if duplicate := self._same_program(record["program"]):
                record |= {key: duplicate[key] for key in ("seconds", "error") if key in duplicate}
            else:
                record["seconds"] = self._measure(program, record)
        except UnsupportedTiles as error:
            record["error"] = f"not supported: {error}"
        except Exception as error:
            record["error"] = measure.first_line(error)
        self.entry["timed"].append(record)
        self.file.write()
        note = f" (same program as {self._tile_names(duplicate)})" if duplicate else ""
        print(f"{'  '.join(map(str, self.case[1:]))}  {self._describe(record)}{note}", flush=True)
        if "seconds" not in record:
            jax.block_until_ready(jnp.ones(8) + 1)  # raises if the failure has lost the device

    def _measure(self, program: Program, record: dict[str, Any]) -> float:
        """Return seconds per call.

        The file holds an unfinished record meanwhile, so that tiles that end the process are not
        tried again.
        """
        timed = self.entry["timed"]
        timed.append(record | measure.UNFINISHED)
        self.file.write()
        try:
            with measure.time_limit():
                return measure.seconds(program, self.repeat)
        finally:
            timed.pop()
            self.file.write()

    def _same_program(self, program: str) -> dict[str, Any] | None:
        """Return the record of an equal program.

        Tiles larger than the memory or the operands allow are reduced, and result in equal
        programs.
        """
        records = (r for r in self.entry["timed"] if r.get("program") == program)
        return next(records, None)

    def _tile_names(self, record: dict[str, Any]) -> str:
        tiles = record["tiles"]
        return describe_tiles(type(DEFAULTS[self.case.backend])(**tiles)) if tiles else "xla"

    def _describe(self, record: dict[str, Any]) -> str:
        text = self._tile_names(record)
        if "error" in record:
            return f"{text}: {record['error']}"
        text += f": {record['seconds'] * 1e3:.3f} ms"
        xla_seconds = self._seconds(None)
        if record["tiles"] is None or math.isinf(xla_seconds):
            return text
        return f"{text}, {record['seconds'] / xla_seconds:.2f}x the time of XLA"

    def _record(self, tiles: Tiles | None) -> dict[str, Any] | None:
        settings = tiles and dataclasses.asdict(tiles)
        records = (r for r in self.entry["timed"] if r["tiles"] == settings)
        return next(records, None)

    def _seconds(self, tiles: Tiles | None) -> float:
        return (self._record(tiles) or {}).get("seconds", math.inf)


def program_hash(program: Program) -> str:
    """Return a hash of the traced program, kernels included. Raises the exceptions of tracing.

    The lowered program is no alternative: jax 0.11 numbers kernels, so that all of them differ.
    """
    text = str(jax.jit(program.function).trace(*program.arguments).jaxpr)
    return hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]


def candidates(case: tuned.Case) -> Iterator[Tiles]:
    """Yield all tiles that a search can time, whatever the timings; the default tiles first."""
    for changes in itertools.product(*([{}, *changes] for changes in _rounds(case))):
        merged: Any = dict(itertools.chain.from_iterable(change.items() for change in changes))
        yield dataclasses.replace(DEFAULTS[case.backend], **merged)


def describe_tiles(tiles: Tiles) -> str:
    """Return the settings that differ from the default tiles."""
    settings, default = (dataclasses.asdict(t) for t in (tiles, type(tiles)()))
    changed = [f"{name} {size}" for name, size in settings.items() if size != default[name]]
    return ", ".join(changed) or "default"


def _rounds(case: tuned.Case) -> list[Changes]:
    """Return the changes that each round applies to the fastest tiles so far."""
    if case.backend == "pallas_tpu":
        if case.operation == "sampled":
            return [[{"sampled_bytes": 2_048}, {"sampled_bytes": 8_192}]]
        rows = [[{"row_bytes": 5_120}, {"row_bytes": 20_480}]] if case.pattern == "rows" else []
        return [*rows, [{"token_bytes": 512}, {"token_bytes": 2_048}]]
    stages: Changes = [{"stages": 2}, {"stages": 3}, {"stages": 6}]
    if case.operation == "sampled":
        return [[{"tile_k": 128}], stages]
    shapes: Changes = [{"tile_m": 64}, {"tile_m": 64, "tile_k": 128}, {"tile_k": 128}]
    if case.operation != "swiglu_gradients":  # it spills registers with tile_m 256
        shapes.append({"tile_m": 256})
    if case.pattern == "rows" and case.operation.startswith("row"):
        # No block of the pattern determines the width of the result tiles.
        shapes += [{"tile_m": 64, "tile_n": 256}, {"tile_m": 256, "tile_n": 64}]
    widths: Changes = [{"grid_tile_width": 1}, {"grid_tile_width": 4}, {"grid_tile_width": 16}]
    return [shapes, stages, widths]


if __name__ == "__main__":
    main()
