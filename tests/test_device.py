"""`make device`: the parts, the time, what a second call measures, and the targets."""

import importlib
import importlib.util
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kernels.block_sparse_matmul import tuned
from sat_jax.results.bars import bars
from sat_jax.results.rows import append
from scripts import device
from scripts.device import PARTS, Part, run_parts
from scripts.efficiency import check_sizes
from tests.conftest import ROOT, RunPython

# Absent from a machine that has jax, flax, optax, orbax, torch and transformers only.
ABSENT = ("array_record", "gguf", "grain", "matplotlib", "ml_collections", "submitit")
ABSENT += ("tensorboardX", "tensorflow_datasets", "zstandard")
ORIGIN: dict[str, Any] = {
    "versions": {"python": "3.12.3"},
    "device": {"platform": "gpu", "kind": "NVIDIA H200", "count": 1},
    "commit": "a" * 40,
}
STEPS = Part("steps", 100, "scripts.efficiency --rows 8")
KERNELS = Part("kernels", 60, "kernels.benchmark")
PEER = Part("peer", 90, "scripts.benchmark --only peer")


@pytest.mark.slow
def test_rehearsal(run_python: RunPython, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One part of each kind, in processes without the packages of the data pipeline."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "rows"

    def rehearse() -> tuple[list[dict[str, Any]], str]:
        done = run_python("-m", "scripts.device", "--rehearse", "--out", str(out))
        rows = [json.loads(line) for line in (out / "device.jsonl").read_text().splitlines()]
        failed = {
            row["measurement"]: row["outcome"] for row in rows if row["outcome"] != "complete"
        }
        with_torch = all(map(importlib.util.find_spec, ("torch", "transformers")))
        assert failed.keys() == (set() if with_torch else {PARTS[3].name}), failed
        assert done.returncode == bool(failed), done.stderr
        return rows, done.stdout

    rows, text = rehearse()
    assert [row["measurement"] for row in rows] == [part.name for part in PARTS[:4]]
    assert "column: speed-up over gather" in text and "table_rates.py:small" in text
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.json*")}
    assert names >= {"efficiency.jsonl", "kernels.jsonl", "device.jsonl", "tuning/cpu.json"}
    again, text = rehearse()
    assert text.count(": complete\n") == sum(row["outcome"] == "complete" for row in rows)
    assert len(again) == len(rows) + sum(row["outcome"] != "complete" for row in rows)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_commands_accept_their_options(part: Part, tmp_path: Path) -> None:
    _, module, *arguments = device._command(part, tmp_path, [], rehearse=False)
    command: Any = importlib.import_module(module)
    parser = command.parser if module.startswith("scripts.") else command._parser
    args = parser().parse_args(arguments)
    if module.startswith("scripts."):
        check_sizes(args, "rows", "row_length")
    _, _, *arguments = device._command(part, tmp_path, [], rehearse=True)
    assert parser().parse_args(arguments).model in ("tiny", ["small"])


def test_parts_are_distinct_and_the_first_fit() -> None:
    assert len({part.name for part in PARTS}) == len({part.command for part in PARTS}) == len(PARTS)
    assert sum(part.seconds for part in PARTS[:5]) < 8 * 60
    modules = [part.command.split()[0] for part in PARTS[: device._REHEARSED]]
    assert set(modules) == device._TOY.keys() and len(modules) == len(device._TOY)
    assert ROOT / device._TUNING == tuned.FOLDER


def fake_run(
    monkeypatch: pytest.MonkeyPatch, outcomes: Mapping[str, str | None]
) -> list[tuple[str, float]]:
    """Replace the processes; return the calls, as module and limit."""
    calls: list[tuple[str, float]] = []

    def run(arguments: Sequence[str], limit: float) -> str | None:
        calls.append((arguments[1], limit))
        return outcomes.get(arguments[1])

    monkeypatch.setattr(device, "_run", run)
    return calls


def test_failures_do_not_end_the_rest_and_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_run(monkeypatch, {"kernels.benchmark": "XlaRuntimeError: no memory"})
    parts, deadline = [STEPS, KERNELS, PEER], time.monotonic() + 600
    assert not run_parts(parts, False, tmp_path, ORIGIN, deadline)
    assert [module for module, _ in calls] == [part.command.split()[0] for part in parts]
    assert [round(limit) for _, limit in calls] == [200, 120, 180]  # twice the estimates
    assert "kernels: XlaRuntimeError: no memory" in capsys.readouterr().out

    calls = fake_run(monkeypatch, {})
    assert run_parts(parts, False, tmp_path, ORIGIN, deadline)
    assert [module for module, _ in calls] == ["kernels.benchmark"]
    other = ORIGIN | {"commit": "b" * 40}
    assert run_parts(parts, False, tmp_path, other, deadline)
    assert [module for module, _ in calls[1:]] == [part.command.split()[0] for part in parts]


def test_tiles_are_copied_beside_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles, out = tmp_path / "tiles", tmp_path / "rows"
    monkeypatch.setattr(device, "_TUNING", tiles)
    fake_run(monkeypatch, {})
    for folder in (tiles, out):
        folder.mkdir()
    (tiles / "nvidia-h200.json").write_text("{}")
    run_parts([KERNELS], False, out, ORIGIN, time.monotonic() + 600)
    assert (out / "tuning" / "nvidia-h200.json").read_text() == "{}"


def test_a_part_that_does_not_fit_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_run(monkeypatch, {})
    assert run_parts([STEPS, KERNELS, PEER], False, tmp_path, ORIGIN, time.monotonic() + 80)
    ((module, limit),) = calls
    assert module == "kernels.benchmark" and 70 < limit <= 80
    text = capsys.readouterr().out
    assert "steps: skipped, takes about 100 s of 80 s" in text and "peer: skipped" in text


def test_steps_use_plain_attention_where_the_default_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[str] = []

    def run(arguments: Sequence[str], _: float) -> str | None:
        commands.append(shlex.join(arguments))
        if arguments[1] == "scripts.efficiency":
            row: dict[str, Any] = {"part": "step", "execution": "dense", "attention": None}
            row |= (
                {"error": "no engine"} if "--attention" not in arguments else {"attention": "xla"}
            )
            append(tmp_path / "efficiency.jsonl", [row], ORIGIN)
        return None

    monkeypatch.setattr(device, "_run", run)
    parts = [STEPS, KERNELS, PEER]
    assert not run_parts(parts, False, tmp_path, ORIGIN, time.monotonic() + 600)
    plain = ["--attention xla" in command for command in commands]
    assert plain == [False, True, False, True]
    assert "scripts.efficiency" in commands[1] and "kernels.benchmark" in commands[2]


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_a_process_ends_within_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By an interrupt, so that it can remove an unfinished row, or else by force."""
    monkeypatch.setattr(device, "_GRACE", 0.5)
    note = tmp_path / "note"
    tidy = f"""
import pathlib, sys, time
note = pathlib.Path({str(note)!r})
try:
    note.touch()
    time.sleep(60)
finally:
    note.unlink()
"""
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    for code in (tidy, stubborn):
        started = time.monotonic()
        assert device._run(["-c", code], 3.0) == "interrupted after 3 s"
        assert time.monotonic() - started < 30
    assert not note.exists()

    failing = "import sys; print('I0000 cuda', file=sys.stderr); raise MemoryError('no memory')"
    assert device._run(["-c", failing], 60.0) == "MemoryError: no memory"
    assert "Traceback" in capfd.readouterr().err
    assert device._run(["-c", "import os; os.abort()"], 60.0) == "exit code -6"
    assert device._run(["-c", ""], 60.0) is None


def test_the_reason_is_the_error_and_not_what_loggers_write_after_it() -> None:
    text = "Traceback\n  File x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED\nI0000 shutdown\n"
    assert device._reason(text) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED"
    assert device._reason("Timeout (0:05:00)!\nThread 1:\n  File x\n") == "Timeout (0:05:00)!"


@pytest.mark.slow
def test_an_accelerator_is_needed(run_python: RunPython, tmp_path: Path) -> None:
    done = run_python("-m", "scripts.device", "--out", str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: jax found no accelerator")


STEP: dict[str, Any] = {"part": "step", "target": "NVIDIA H200", "model": "llama-2-7b"}
STEP |= {"rows": 8, "row_length": 2048, "dtype": "bfloat16", "optimizer": "lion"}
STEP |= {"remat": "full", "kernels": "pallas_gpu", "attention": None, **ORIGIN}


def test_targets_of_steps() -> None:
    rows = [
        STEP | {"execution": "dense", "rate": 0.0, "seconds": 2.0, "model_flops": 990e12},
        STEP | {"execution": "gather", "rate": 0.5, "seconds": 1.0, "bound": 2.0},
        STEP | {"execution": "kernel", "rate": 0.5, "seconds": 1.25, "bound": 2.0},
        STEP | {"execution": "kernel", "rate": 0.4, "error": "no memory"},
        STEP | {"execution": "gather", "rate": 1.0, "seconds": 0.1, "bound": 30.0},
        STEP | {"rows": 4, "execution": "gather", "rate": 0.5, "seconds": 1.0, "bound": 2.0},
    ]
    size = "llama-2-7b, 8 x 2048 tokens"
    bound = "dense, FLOP bound 2.00x, share of the bound"
    assert bars(rows)[:3] == [
        f"short    {size}, dense: 2.000 s, share of the peak (MFU): 0.50; target 0.55",
        f"reached  {size}, gather r = 0.5: 2.00x {bound}: 1.00; target 0.92",
        f"short    {size}, kernel r = 0.5: 1.60x {bound}: 0.80; target 0.92",
    ]
    assert [line.rpartition(": ")[2] for line in bars(rows)[3:]] == ["not measured"] * 3


def test_targets_of_kernels_and_of_the_dense_step() -> None:
    case = {"benchmark": "kernels", "model": "llama-2-7b", "program": "mlp", "density": 0.5}
    case |= {"block": 128, "flops": 50.0, **ORIGIN}
    dense = {"implementation": "dense", "density": 1.0, "block": None, "flops": 100.0}
    peer = {"benchmark": "peer", "model": "tinyllama-1.1b", "rows": 8, "row_length": 2048}
    peer |= {
        "work": "step",
        "dtype": "bfloat16",
        "transformers": "5.17.0",
        "wall_seconds": 0.2,
        **ORIGIN,
    }
    rows = [
        case | dense | {"tokens": 4096, "seconds": 10.0},
        case | {"implementation": "pallas_gpu", "tokens": 4096, "seconds": 5.0},
        case | {"implementation": "xla", "tokens": 4096, "seconds": 4.0},
        case | dense | {"tokens": 1024, "seconds": 3.0},
        case | {"implementation": "pallas_gpu", "tokens": 1024, "seconds": 2.0},
        case | {"implementation": "xla", "tokens": 1024, "seconds": 4.0},
        case | {"implementation": "pallas_gpu", "tokens": 64, "seconds": 1.0, "program": "mask"},
        peer | {"library": "sat_jax", "speed_against_transformers_wall": 1.25},
        peer | {"library": "transformers", "speed_against_transformers_wall": 1.0},
    ]
    product = "llama-2-7b, {} tokens, 0.5 in blocks of 128, mlp"
    assert bars(rows)[2:] == [
        f"reached  {product.format(4096)}: share of the dense product's FLOP/s: 1.00; target 0.85",
        f"short    {product.format(4096)}: speed-up over gather: 0.80; target 1.00",
        f"reached  {product.format(1024)}: speed-up over gather: 2.00; target 1.00",
        "reached  tinyllama-1.1b, 8 x 2048 tokens, bfloat16: 0.200 s,"
        " speed-up over transformers 5.17.0: 1.25; target 1.00",
    ]
