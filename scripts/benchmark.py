"""Measures speed and appends rows to experiments/results/: `make bench` runs every part.

  python -m scripts.benchmark                     every part
  python -m scripts.benchmark --only steps        SAT steps against the dense step
  python -m scripts.benchmark --only peer         the dense step against transformers
  python -m scripts.benchmark --only moves        probe, selection, compact and expand
  python -m scripts.benchmark --only reading      prepared rows
  python -m scripts.benchmark --only start        from the command to its first step, warm

Variants take turns, one step each, so that a busy machine slows all of them alike; every ratio is
the median of the ratios within a turn. Weights and tokens are random: speed does not depend on
them. Needs no data; `peer` needs torch and transformers (the extra `bench`), `reading` a text.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import preset
from sat_jax.results.rows import append
from sat_jax.results.text import fixed_width
from scripts.benchmark_steps import moves, peer, steps

PARTS = ("steps", "peer", "moves", "reading", "start")


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("benchmark", __doc__)
    add = made.add_argument
    add("--only", choices=PARTS, help="one part; default all")
    add("--model", default="smollm2-135m", help="a preset; default smollm2-135m")
    add("--rows", type=int, default=2, help="rows a step; default 2")
    add("--row-length", type=int, default=1024, help="tokens a row; default 1024")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--remat", choices=("none", "dots", "full"), default="none")
    add("--turns", type=int, default=7, help="counted turns, after one that is not; default 7")
    add("--text", nargs="+", default=["package:sympy/**/*.py"], help="of `reading`")
    add(
        "--results",
        type=Path,
        default=Path("experiments/results/benchmark.jsonl"),
        help="file that rows are appended to",
    )
    return made


def main() -> None:
    """Runs the parts, prints a table of each, appends its rows."""
    given = parser().parse_args()
    model = preset(given.model)
    parts = [given.only] if given.only else PARTS
    if "peer" in parts:  # which shares the device with torch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _check(given, model, parts)
    measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "steps": lambda: steps(model, given),
        "peer": lambda: peer(model, given),
        "moves": lambda: moves(model, given),
        "reading": lambda: reading(given),
        "start": start,
    }
    setting = {
        "model": given.model,
        "rows": given.rows,
        "row_length": given.row_length,
        "dtype": given.dtype,
        "remat": given.remat,
    }
    for part in parts:
        rows = [{"benchmark": part, **setting, **row} for row in measured[part]()]
        append(given.results, rows)
        print(_table(rows, setting), flush=True)


def _check(given: Any, model: DecoderConfig, parts: Sequence[str]) -> None:
    """Refuses before anything is measured: a part takes minutes."""
    for name in ("rows", "row_length", "turns"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(given, name)}; accepted: 1 or more")
    if given.row_length > model.max_positions:
        raise UserError(
            f"--row-length {given.row_length}; accepted: up to {model.max_positions}, the positions"
            f" of {given.model}"
        )
    if "peer" in parts:
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"the part peer needs {package}, which is not installed; `make bench` or"
                    " pip install -e '.[bench]' does that, --only runs another part without it"
                )


def reading(given: Any) -> list[dict[str, Any]]:
    """Tokens a CPU-second out of prepared rows, packing undone, batches made."""
    from sat_jax.data.batches import batches, open_split
    from sat_jax.data.prepare import prepare
    from sat_jax.data.tokenizer import load_tokenizer

    prepared = prepare(
        sources=given.text,
        tokenizer=load_tokenizer("bytes"),
        row_length=given.row_length,
        held_out=0.05,
        max_tokens=4_000_000,
    )
    get = batches(open_split(prepared, "train"), 16, seed=0)
    get(0)
    speeds = []
    for turn in range(given.turns):
        started, tokens = time.process_time(), 0
        for step in range(100):
            tokens += int(get(100 * turn + step).loss_mask.sum())
        speeds.append(tokens / (time.process_time() - started))
    return [{"tokens_per_cpu_second": statistics.median(speeds)}]


def start() -> list[dict[str, Any]]:
    """Wall time from the quickstart's command to the end of its first step: twice, in new work
    directories, so that the second time finds warm caches."""
    rows = []
    for caches in ("as found", "warm"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "scripts.train", "--workdir", folder]
            command += ["--config=experiments/quickstart.py", "--config.train.steps=4"]
            command += ["--config.sparsity.schedule=constant"]
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wall = time.perf_counter() - started
            summary = json.loads((Path(folder) / "summary.json").read_text())
        # The run's own clock starts when its imports are done.
        imports = wall - summary["seconds"]["total"]
        rows.append({"caches": caches, "seconds": imports + summary["first_step_seconds"]})
    return rows


def _table(rows: list[dict[str, Any]], setting: Mapping[str, Any]) -> str:
    """The rows without what they share."""
    header = [name for name in rows[0] if name not in setting and name != "benchmark"]
    cells = [
        [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in header]
        for row in rows
    ]
    return fixed_width(header, cells)


if __name__ == "__main__":
    run(main)
