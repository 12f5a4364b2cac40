"""Measure on an accelerator that is available for minutes: `make device`.

  python -m scripts.device --minutes 8 --out DIR
  python -m scripts.device --rehearse

Runs the measurements of docs/efficiency.md, the most important ones first, each in a process of its
own. A measurement that is estimated to take longer than the time left is skipped. One that fails is
reported in one line, and the next one starts. One that takes twice its estimate is interrupted. The
same command resumes: complete measurements and single rows of this device and commit are not
measured again. A copy without git's folder needs the commit in the environment: SAT_JAX_COMMIT.

Rows are appended to DIR: efficiency.jsonl (steps), kernels.jsonl, benchmark.jsonl (transformers,
refreshes) and device.jsonl (the measurements, and how long they took). The end compares the rows
with their targets. Tiles of the kernels are written to kernels/block_sparse_matmul/tuning, where
the kernels read them, and copied to DIR/tuning unless DIR is the default. Exits with 1 if a
measurement failed.

Needs jax for the accelerator, flax, optax, orbax, jaxtyping and numpy, and for one comparison torch
and transformers. Installs nothing and reads no data: tokens and weights are random.

--rehearse runs one measurement of each kind with toy sizes on the CPU.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError
from sat_jax.results.bars import bars
from sat_jax.results.rows import Row, append, check, device_name, read

_RESULTS = Path("experiments/results")
_TUNING = Path("kernels/block_sparse_matmul/tuning")
_STUDY = """\
Not part of this command: the study of quality, which needs text and the packages of the data
pipeline: python -m scripts.sweep --config=experiments/table_rates.py:small
--config.data.sources=TEXT --workdir=runs/small"""


class Part(NamedTuple):
    """A measurement. `seconds`: estimated, with the start of the process and compilation."""

    name: str
    seconds: int
    command: str


_EFFICIENCY = "scripts.efficiency --kernels pallas_gpu --repeat 5"
_7B = f"{_EFFICIENCY} --model llama-2-7b --optimizer lion"
_13B = f"{_EFFICIENCY} --model llama-2-13b --optimizer lion --rows 4"
_TINYLLAMA = f"{_EFFICIENCY} --model tinyllama-1.1b --rows 8"
_HALF, _RATES = "--part step --rate 0.5", "--rate 0.2 0.4 0.5 0.6"
_BENCHMARK = "scripts.benchmark --model tinyllama-1.1b --dtype bfloat16 --rows 8 --remat full"
_PRODUCTS = "kernels.benchmark --program column row mlp mlp_gradients --model"
_MASKS = "kernels.benchmark --program mask mask_gradients --model"

# In this order. The first five answer the first questions in about eight minutes.
PARTS = (
    Part("Llama-2-7B, 16k tokens, r = 0.5", 150, f"{_7B} --rows 8 --part peak step --rate 0.5"),
    Part("tiles, 4k tokens", 110, "kernels.tune --tokens 4096 --block 128"),
    Part("kernels, 50 %", 60, f"{_PRODUCTS} llama-2-7b --tokens 4096 16384 --density 0.5"),
    Part("dense step against transformers", 90, f"{_BENCHMARK} --row-length 2048 --only peer"),
    Part("TinyLlama, 16k tokens, r = 0.5", 60, f"{_TINYLLAMA} {_HALF}"),
    Part("Llama-2-7B, 16k tokens, all rates", 180, f"{_7B} --rows 8 --part step {_RATES}"),
    Part("Llama-2-7B, optimizer", 140, f"{_7B} --rows 8 --part optimizer {_RATES}"),
    Part("TinyLlama, all rates, optimizer", 200, f"{_TINYLLAMA} {_RATES}"),
    Part("parts of a refresh, TinyLlama", 60, f"{_BENCHMARK} --row-length 2048 --only moves"),
    Part("kernels, 1k and 64k tokens", 90, f"{_PRODUCTS} llama-2-7b --density 0.5"),
    Part("Llama-2-7B, 8k tokens", 140, f"{_7B} --rows 4 {_HALF}"),
    Part("Llama-2-7B, 32k tokens", 200, f"{_7B} --rows 16 {_HALF}"),
    Part("Llama-2-7B, 2 x 4,096 tokens", 140, f"{_7B} --rows 2 --row-length 4096 {_HALF}"),
    Part("Llama-2-7B, 4 x 4,096 tokens", 150, f"{_7B} --rows 4 --row-length 4096 {_HALF}"),
    Part("Llama-2-7B, 8 x 4,096 tokens", 200, f"{_7B} --rows 8 --row-length 4096 {_HALF}"),
    Part("Llama-2-13B, 8k tokens, r = 0.5", 200, f"{_13B} {_HALF}"),
    Part("Llama-2-13B, all rates, optimizer", 420, f"{_13B} {_RATES}"),
    Part("block masks, 50 %", 200, f"{_MASKS} llama-2-7b --density 0.5"),
    Part("tiles, all sizes", 420, "kernels.tune"),
    Part("kernels, blocks of 64", 180, f"{_PRODUCTS} llama-2-7b --density 0.5 --block 64"),
    Part("block masks, blocks of 64", 200, f"{_MASKS} llama-2-7b --density 0.5 --block 64"),
    Part("kernels, all densities", 400, f"{_PRODUCTS} llama-2-7b"),
    Part("block masks, all densities", 400, f"{_MASKS} llama-2-7b"),
    Part("kernels, Llama-2-13B", 600, f"{_PRODUCTS} llama-2-13b"),
    Part("block masks, Llama-2-13B", 600, f"{_MASKS} llama-2-13b"),
    Part("tiles, 64k tokens", 300, "kernels.tune --tokens 65536"),
    Part("tiles, 12.5 and 25 %", 600, "kernels.tune --density 0.125 0.25"),
    Part("tiles, Llama-2-13B", 420, "kernels.tune --model llama-2-13b"),
)
_REHEARSED = 4  # one of each command
# Later options replace earlier ones.
_TOY = {
    "scripts.efficiency": "--model tiny --rows 1 --row-length 16 --dtype float32 --kernels xla"
    " --repeat 1",
    "kernels.tune": "--model small --tokens 64 --operation sampled --repeat 1 --interpret",
    "kernels.benchmark": "--model small --tokens 64 --density 0.5 --repeat 1",
    "scripts.benchmark": "--model tiny --rows 1 --row-length 16 --dtype float32 --turns 1",
}
_FILES = {  # the option for the rows, and their file in DIR
    "scripts.efficiency": ("--out", "efficiency.jsonl"),
    "kernels.benchmark": ("--out", "kernels.jsonl"),
    "scripts.benchmark": ("--results", "benchmark.jsonl"),
}
# Imports everything that the parts need, torch and transformers excepted.
_ORIGIN = """
import json, kernels.tune, kernels.benchmark, scripts.benchmark
from sat_jax.provenance import environment
print(json.dumps(environment()))
"""
_GRACE = 15.0  # seconds for the end of an interrupted measurement
_ERROR = re.compile(r"^(error: |Timeout|[\w.]*(Error|Exception|Interrupt)\b)")


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("device", __doc__)
    add = result.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything; default 8")
    folder = f"folder of the rows; default {_RESULTS}, or with --rehearse a temporary one"
    add("--out", type=Path, metavar="DIR", help=folder)
    add("--rehearse", action="store_true", help="toy sizes on the CPU")
    return result


def main() -> None:
    """Run the parts, and print how their rows compare with the targets."""
    args = parser().parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    # A shell may have started this process with interrupts ignored, which children inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if args.rehearse:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes most of the time
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or (Path(temporary) if args.rehearse else _RESULTS)
        out.mkdir(parents=True, exist_ok=True)
        check(out / "device.jsonl")
        origin = _origin(args.rehearse)
        parts = PARTS[:_REHEARSED] if args.rehearse else PARTS
        if not args.rehearse and (out / "tuning").exists() and not _TUNING.exists():
            shutil.copytree(out / "tuning", _TUNING)  # of an earlier call, on another machine
        success = run_parts(parts, args.rehearse, out, origin, deadline)
        print(f"\nTargets, {device_name(origin['device'])}, commit {origin['commit']}")
        print("\n".join(bars(_rows(out, origin))))
    print(f"\n{_STUDY}", flush=True)
    sys.exit(not success)


def _origin(rehearse: bool) -> Row:
    """Return versions, device and commit, as children see them, and give them this commit.

    This process must not use the device, since its memory is for the measurements.
    """
    done = subprocess.run([sys.executable, "-c", _ORIGIN], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nothing can be measured: {_reason(done.stderr)}")
    origin: Row = json.loads(done.stdout.splitlines()[-1])
    if origin["device"]["platform"] == "cpu" and not rehearse:
        raise UserError("jax found no accelerator; --rehearse runs toy sizes on the CPU")
    if origin["commit"]:
        os.environ["SAT_JAX_COMMIT"] = origin["commit"]
    else:
        print("The rows will have no commit; SAT_JAX_COMMIT=COMMIT sets it", flush=True)
    return origin


def run_parts(
    parts: Sequence[Part], rehearse: bool, out: Path, origin: Row, deadline: float
) -> bool:
    """Run the parts that are not complete and fit in the time, until `deadline` of
    `time.monotonic`; return whether all of them ended without an error."""
    rows = _rows(out, origin)
    complete = {row["measurement"] for row in rows if row.get("outcome") == "complete"}
    success, waiting = True, list(parts)
    while waiting:
        part, left = waiting.pop(0), deadline - time.monotonic()
        if part.name in complete:
            print(f"{part.name}: complete", flush=True)
            continue
        if left < part.seconds:
            print(f"{part.name}: skipped, takes about {part.seconds} s of {left:.0f} s", flush=True)
            continue
        options = _attention(_rows(out, origin))
        command, started = _command(part, out, options, rehearse), time.monotonic()
        print(f"\n{part.name}: python {shlex.join(command)}", flush=True)
        reason = _run(command, min(left, 2 * part.seconds))
        seconds = round(time.monotonic() - started, 1)
        if _attention(_rows(out, origin)) != options:
            reason = "the dense step failed, again with attention in plain XLA"
            waiting.insert(0, part)
        if out != _RESULTS and _TUNING.exists():
            shutil.copytree(_TUNING, out / "tuning", dirs_exist_ok=True)
        row = {"measurement": part.name, "seconds": seconds, "outcome": reason or "complete"}
        append(out / "device.jsonl", [row], origin)
        print(f"{part.name}: {row['outcome']}, {seconds:.0f} s\n", flush=True)
        success &= reason is None
    return success


def _attention(rows: Sequence[Row]) -> list[str]:
    """Return the options of steps: plain XLA if every dense step failed with the default."""
    dense = [
        row
        for row in rows
        if row.get("part") == "step" and row["execution"] == "dense" and not row["attention"]
    ]
    return ["--attention", "xla"] if dense and all("error" in row for row in dense) else []


def _command(part: Part, out: Path, options: Sequence[str], rehearse: bool) -> list[str]:
    """Return the arguments of Python that run a part; `options` are for training steps."""
    module, *arguments = shlex.split(part.command)
    if module.startswith("scripts."):
        arguments += options
    if module in _FILES:
        option, file = _FILES[module]
        arguments += [option, str(out / file)]
    if rehearse:
        arguments += _TOY[module].split()
        if module == "kernels.tune":
            arguments += ["--out", str(out / "tuning")]
    return ["-m", module, *arguments]


def _run(arguments: Sequence[str], limit: float) -> str | None:
    """Run Python for at most `limit` seconds; return None, or in one line why it failed."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        # In a process group of its own, with the processes that torch.compile starts.
        process = subprocess.Popen([sys.executable, *arguments], stderr=errors, process_group=0)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"interrupted after {limit:.0f} s"
        finally:
            _stop(process)
        errors.seek(0)
        text = errors.read()
    if code == 0:
        return None
    sys.stderr.write(text[-4000:])
    return _reason(text) or f"exit code {code}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process group that still runs, so that it removes unfinished rows, or kill it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(text: str) -> str:
    """Return the line that names the error: loggers may write after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return (named or lines or [""])[-1][:200]


def _rows(out: Path, origin: Mapping[str, Any]) -> list[Row]:
    """Return the rows of this device and commit."""
    device = origin["device"]
    kinds = {device["kind"], device["platform"]}  # kernels name a CPU by its platform
    rows = [row for path in sorted(out.glob("*.jsonl")) for row in read(path)]
    return [
        row
        for row in rows
        if row.get("device", {}).get("kind") in kinds and row["commit"] == origin["commit"]
    ]


if __name__ == "__main__":
    run(main)
