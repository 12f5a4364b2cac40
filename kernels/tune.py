"""Chooses the kernels' tiles by timing them on the device at hand: `make tune`.

  python -m kernels.tune --minutes 9
  python -m kernels.tune --tokens 4096 --block 128 --out somewhere

For every model, density, operation, block and number of tokens: XLA on the same random arrays
(bfloat16), the default tiles, and some around the fastest so far, one setting after the other. What
the processor does not hold is left out before it is compiled, what comes to a program that was
timed before is not timed again, and what does not compile is said and passed over; what takes two
minutes ends the command, which goes on behind it when it is typed again. A line each is printed.
DIR/<device>.json is written after each, so that the same command goes on where it ended; what is
complete is not measured again (after a change of a kernel, delete the file). The package's own
folder, the default, is where the kernels look for the fastest tiles, and where it is seen which
operations they are chosen for. Needs jax and numpy alone.
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
from kernels.benchmark import MODELS, share
from kernels.block_sparse_matmul import pallas_gpu, pallas_tpu, tuned, xla
from kernels.block_sparse_matmul.arg_specs import Program, Spec, operations
from kernels.block_sparse_matmul.tiled import Loops, Tiled
from kernels.block_sparse_matmul.tiles import DEFAULTS, Misfit, Tiles

_LOOPS: dict[str, Loops] = {"gpu": pallas_gpu, "tpu": pallas_tpu}
Round = list[dict[str, int]]
_OPERATIONS = sorted({name for _, name in tuned.OPERATIONS})


def main() -> None:
    """Measures what is not measured yet."""
    parser = _parser()
    given = parser.parse_args()
    platform = jax.default_backend()
    if platform not in _LOOPS and not given.interpret:
        accepted = " and ".join(_LOOPS)
        parser.error(f"there are no kernels for {platform}, accepted {accepted}; or --interpret")
    if given.interpret and (platform != "cpu" or given.out is None):
        parser.error("--interpret is for a CPU, and its figures are of use nowhere: it needs --out")
    try:
        file = File(tuned.path(tuned.device_kind(), given.out or tuned.FOLDER))
    except ValueError as error:
        parser.error(str(error))
    ends = time.monotonic() + 60 * given.minutes if given.minutes else math.inf
    for search in _searches(given, _LOOPS.get(platform, pallas_tpu), file):
        if not search.run(ends):
            sys.exit(f"{given.minutes} minutes are over; the same command goes on")
    print(f"all is measured: {file.path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="default: the package's own")
    add("--model", nargs="+", choices=MODELS, default=["llama-2-7b"], help="whose MLP")
    add("--density", nargs="+", type=share, default=[0.5])
    add("--operation", nargs="+", choices=_OPERATIONS, default=_OPERATIONS)
    add("--block", nargs="+", type=measure.count, default=[128, 64])
    add("--tokens", nargs="+", type=measure.count, default=[1024, 4096, 16_384])
    add("--repeat", type=measure.count, default=20, help="timings of each")
    add("--minutes", type=float, help="begin no measurement after so many")
    add("--interpret", action="store_true", help="on a CPU, to see the loop at work")
    return parser


def _searches(given: argparse.Namespace, loops: Loops, file: "File") -> Iterator["Search"]:
    """One after the other, for blocks that the kernels take."""
    every = itertools.product(given.model, given.density, given.block, given.tokens)
    for model, density, block, tokens in every:
        spec = MODELS[model]._replace(tokens=tokens, density=density, block=block)
        if reason := loops.refusal(jnp.dtype(jnp.bfloat16), spec.width, block):
            print(f"{loops.NAME}: {reason}", flush=True)
            continue
        for pattern, operation in tuned.OPERATIONS:
            if operation in given.operation:
                case = tuned.Case(loops.NAME, pattern, operation, "bfloat16", block, tokens)
                yield Search(case, spec, loops, given.repeat, file)


class File:
    """The entries of a device, read once and written after each change.

    One has, beside its case, what it was measured with, and `timed`: seconds or the `error` of
    tiles, null for XLA, and a hash of their `program`. When all is timed, it has the fields of
    `tuned.Entry` too.
    """

    def __init__(self, path: Path) -> None:
        """Reads it if it is there."""
        self.path, self._entries = path, tuned.read(path)[0]

    def entry(self, case: tuned.Case, matrix: tuned.Matrix) -> dict[str, Any]:
        """That of a case and a matrix, or a new one."""
        named = case._asdict() | matrix._asdict()
        for entry in self._entries:
            if named.items() <= entry.items():
                return entry
        self._entries.append(named | {"timed": []})
        return self._entries[-1]

    def write(self) -> None:
        """All of it, or nothing."""
        content = {"device": tuned.device_kind(), "entries": self._entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


@dataclasses.dataclass(frozen=True)
class Search:
    """For the fastest tiles of one case, at the shapes of `spec`."""

    case: tuned.Case
    spec: Spec
    loops: Loops
    repeat: int
    file: File

    @property
    def entry(self) -> dict[str, Any]:
        """Where it is written down."""
        spec = self.spec
        return self.file.entry(self.case, tuned.Matrix(spec.width, spec.neurons, spec.density))

    def run(self, ends: float) -> bool:
        """Whether it came to its end before that time."""
        entry, default = self.entry, DEFAULTS[self.case.backend]
        if "tiles" in entry:
            return True
        best: Any = default
        for changes in ([], *_rounds(self.case)):
            around = [dataclasses.replace(best, **change) for change in changes]
            for tiles in (None, default, *around):
                if self._record(tiles) is None:
                    if time.monotonic() > ends:
                        return False
                    self._time(tiles)
            best = min((best, *around), key=self._seconds)
        entry |= {"model": self.spec.model, "repeat": self.repeat, "jax": jax.__version__}
        entry |= {"date": datetime.date.today().isoformat()}
        runs = math.isfinite(self._seconds(best))
        entry["tiles"] = dataclasses.asdict(best) if runs else None
        for name, tiles in (("seconds", best), ("default_seconds", default), ("xla_seconds", None)):
            taken = self._seconds(tiles)
            entry[name] = taken if math.isfinite(taken) else None
        self.file.write()
        return True

    def _time(self, tiles: Tiles | None) -> None:
        """Adds to what is timed, and says so."""
        backend = Tiled(self.loops, tiles) if tiles else xla
        program = operations(self.spec, backend)[self.case.pattern, self.case.operation]
        record: dict[str, Any] = {"tiles": tiles and dataclasses.asdict(tiles)}
        twin = None
        try:
            record["program"] = identity(program)
            if twin := self._twin(record["program"]):
                record |= {name: twin[name] for name in ("seconds", "error") if name in twin}
            else:
                record["seconds"] = self._measure(program, record)
        except Misfit as error:
            record["error"] = f"left out: {error}"
        except Exception as error:
            record["error"] = measure.first_line(error)
        self.entry["timed"].append(record)
        self.file.write()
        same = f" (the program of {self._named(twin)})" if twin else ""
        print(f"{'  '.join(map(str, self.case[1:]))}  {self._said(record)}{same}", flush=True)
        if "seconds" not in record:
            jax.block_until_ready(jnp.ones(8) + 1)  # raises where the device was lost with it

    def _measure(self, program: Program, record: dict[str, Any]) -> float:
        """Seconds. What ends the process leaves the record unfinished, and is not tried again."""
        timed = self.entry["timed"]
        timed.append(record | measure.UNFINISHED)
        self.file.write()
        try:
            with measure.watched():
                return measure.seconds(program, self.repeat)
        finally:
            timed.pop()
            self.file.write()

    def _twin(self, program: str) -> dict[str, Any] | None:
        """What was timed of the same program: settings that ask for more than there is room for, or
        tokens to fill, change nothing."""
        records = (r for r in self.entry["timed"] if r.get("program") == program)
        return next(records, None)

    def _named(self, record: dict[str, Any]) -> str:
        tiles = record["tiles"]
        return named(type(DEFAULTS[self.case.backend])(**tiles)) if tiles else "xla"

    def _said(self, record: dict[str, Any]) -> str:
        text = self._named(record)
        if "error" in record:
            return f"{text}: {record['error']}"
        text += f": {record['seconds'] * 1e3:.3f} ms"
        beside = self._seconds(None)
        if record["tiles"] is None or math.isinf(beside):
            return text
        return f"{text}, {record['seconds'] / beside:.2f}x the time of XLA"

    def _record(self, tiles: Tiles | None) -> dict[str, Any] | None:
        given = tiles and dataclasses.asdict(tiles)
        records = (r for r in self.entry["timed"] if r["tiles"] == given)
        return next(records, None)

    def _seconds(self, tiles: Tiles | None) -> float:
        return (self._record(tiles) or {}).get("seconds", math.inf)


def identity(program: Program) -> str:
    """A hash of all that is traced, kernels included. Raises what tracing does.

    Not of what is lowered: there jax 0.11 numbers kernels, so that no two programs are the same.
    """
    text = str(jax.jit(program.function).trace(*program.arguments).jaxpr)
    return hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]


def candidates(case: tuned.Case) -> Iterator[Tiles]:
    """All that a search can come to, whichever is fastest: the default tiles first."""
    for changes in itertools.product(*([{}, *changes] for changes in _rounds(case))):
        merged: Any = dict(itertools.chain.from_iterable(change.items() for change in changes))
        yield dataclasses.replace(DEFAULTS[case.backend], **merged)


def named(tiles: Tiles) -> str:
    """By what differs from the default."""
    given, default = (dataclasses.asdict(t) for t in (tiles, type(tiles)()))
    changed = [f"{name} {size}" for name, size in given.items() if size != default[name]]
    return ", ".join(changed) or "default"


def _rounds(case: tuned.Case) -> list[Round]:
    """What each round tries in place of settings of the fastest tiles so far."""
    if case.backend == "pallas_tpu":
        if case.operation == "sampled":
            return [[{"sampled": 2_048}, {"sampled": 8_192}]]
        rows = [[{"row": 5_120}, {"row": 20_480}]] if case.pattern == "rows" else []
        return [*rows, [{"tokens": 512}, {"tokens": 2_048}]]
    stages: Round = [{"stages": 2}, {"stages": 3}, {"stages": 6}]
    if case.operation == "sampled":
        return [[{"factor": 128}], stages]
    first: Round = [{"tall": 64}, {"tall": 64, "factor": 128}, {"factor": 128}]
    if case.operation != "swiglu_gradients":  # of which tall tiles spill registers
        first.append({"tall": 256})
    if case.pattern == "rows" and case.operation.startswith("row"):
        # No block gives the width of the results.
        first += [{"tall": 64, "result": 256}, {"tall": 256, "result": 64}]
    return [first, stages, [{"snake": 1}, {"snake": 4}, {"snake": 16}]]


if __name__ == "__main__":
    main()
