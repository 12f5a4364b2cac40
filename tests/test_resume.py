"""A whole run through the command line: killed, continued, finished, and told to change."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sat_jax import load_model
from sat_jax.models.params import flat_params
from sat_jax.train.trained import open_run
from tests.conftest import ROOT
from tests.tolerances import assert_close

EXACT = ("loss", "eval_loss", "grad_norm", "tokens", "learning_rate")
LIMIT = 300  # seconds

pytestmark = pytest.mark.slow


def command(text: Path, workdir: Path, *settings: str) -> list[str]:
    given = [
        f"--config.data.sources={text}",
        "--config.train.steps=8",
        "--config.train.rows_per_step=2",
        "--config.train.eval_every=4",
        "--config.train.eval_rows=4",
        "--config.sparsity.rungs=1",
        "--config.sparsity.refresh_every=2",
        "--config.checkpoint.every=3",
        "--config.export.huggingface=true",
        *settings,
    ]
    script = [sys.executable, "-m", "scripts.train", "--config=experiments/tiny.py"]
    return [*script, f"--workdir={workdir}", *given]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def records(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in EXACT} for line in lines]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "lines.jsonl"
    documents = [f"{n} sheep and {n + 1} goats make {2 * n + 1} animals. " * 9 for n in range(40)]
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return file


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(*command(text, workdir))
    assert done.returncode == 0, done.stderr
    yield workdir


def test_a_killed_run_continues_bit_for_bit(text: Path, unbroken: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    with subprocess.Popen(
        command(text, workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + LIMIT
        while not (workdir / "checkpoints" / "3").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (workdir / "summary.json").exists()

    done = run(*command(text, workdir))
    assert done.returncode == 0, done.stderr
    assert "restored after step" in done.stderr
    assert records(workdir) == records(unbroken)

    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(*command(text, workdir))
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_what_a_run_leaves(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["perplexity_after"] < summary["perplexity_before"]
    assert summary["spent_flops"] < summary["dense_flops"]
    assert [rung["omission_rate"] for rung in summary["rungs"]] == [0.5, 0.0]
    assert all(
        (unbroken / "figures" / f"{n}.png").stat().st_size for n in ("loss", "speed", "kept")
    )
    evaluated = [r for r in records(unbroken) if "eval_loss" in r]
    assert len(evaluated) == 3  # before, after step 4, after the last
    exported, trained = flat_params(load_model(summary["export"])), open_run(unbroken)[0]
    for path, value in exported.items():
        assert_close(value, trained.read(path), "float32", "exact")


def test_other_settings_and_bad_settings_are_one_line(text: Path, unbroken: Path) -> None:
    for settings, words in (
        (["--config.sparsity.rate=0.25"], "sparsity.rate was 0.5 and is 0.25"),
        (["--config.sparsity.rat=0.25"], "sparsity.rat is no setting; near: sparsity.rate"),
    ):
        done = run(*command(text, unbroken, *settings))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words in done.stderr
