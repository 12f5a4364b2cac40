"""`scripts.train`: the recorded row, and the printed suggestions."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from sat_jax.config import Config, DataConfig
from sat_jax.config_sparsity import SparsityConfig, WeightSparsityConfig
from sat_jax.errors import UserError
from scripts.train import _next, main, parser
from tests.conftest import ROOT, RunPython


@pytest.mark.slow
def test_the_next_commands_keep_the_settings_and_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: RunPython
) -> None:
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "my run"
    given = parser().parse_args(["--config=experiments/tiny.py", f"--workdir={workdir}"])
    overrides = ["data.sources=a b.txt", "sparsity.rate=0.3"]
    config = Config(data=DataConfig(sources=("a b.txt",)))
    generate, own, sweep = _next(given, overrides, config, str(workdir / "huggingface"))
    python, *words = shlex.split(generate)
    assert Path(shutil.which(python) or "").samefile(sys.executable)
    assert words[:4] == ["-m", "scripts.generate", "--model", str(workdir / "huggingface")]
    assert "--chat" not in words
    chat, *_ = _next(given, overrides, Config(data=DataConfig(format="messages")), "x")
    assert chat.endswith(" --chat")
    assert "--config.model.path=DIR" in own
    words = shlex.split(sweep)
    assert "--config.data.sources=a b.txt" in words
    assert "--config.sparsity.rate=0.3" not in words and f"--workdir={workdir}-rates" in words
    # Of block-sparse runs, which have no rate, it varies the density.
    blocks = Config(sparsity=SparsityConfig(weights=WeightSparsityConfig(density=0.5)))
    *_, varied = _next(given, ["sparsity.weights.density=0.5"], blocks, None)
    assert " --axis sparsity.weights.density=1,0.5,0.25 " in varied
    done = run_python(*words[1:], "--dry-run")
    assert done.returncode == 0 and "4 runs, 4 to do" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_row_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    record = tmp_path / "rows.jsonl"
    arguments = ["train", "--config=experiments/tiny.py:dense"]
    arguments += [f"--workdir={tmp_path / 'run'}", "--config.train.steps=2"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"--record={tmp_path / 'none' / 'rows.jsonl'}"])
    with pytest.raises(UserError, match="cannot be written"):
        main()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, f"--record={record}"])
    for _ in range(2):
        main()
    (line,) = record.read_text().splitlines()
    row = json.loads(line)
    assert (row["rate"], row["steps"]) == (0.0, 2)
