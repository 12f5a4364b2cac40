"""Runs whose base model and texts are moved or changed after their start."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import sat_jax
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.eval_model import open_eval_model
from sat_jax.train.loop import train
from scripts import convert
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # two short runs

SETTINGS = (
    *("data.tokenizer=model", "data.row_length=32", "train.rows_per_step=4", "train.eval_every=0"),
    *("train.steps=4", "checkpoint.every=2", "train.measure_speed=false"),
)


def test_a_work_directory_does_not_need_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, texts, run = tmp_path / "base", tmp_path / "texts", tmp_path / "run"
    shutil.copytree(ROOT / "tests/golden/llama_gqa", base)
    load_tokenizer("bytes", None, 256).save(base)
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"{number} is not {number + 1}. " * 40)

    def config(base: Path, texts: Path) -> Config:
        paths = [f"model.path={base}", f"data.sources={texts}"]
        return load(str(ROOT / "experiments/tiny.py:dense"), [*paths, *SETTINGS])

    summary = train(config(base, texts), run, print)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "summary.json").unlink()
    shutil.rmtree(unfinished / "checkpoints/4")
    tokenizer = load_tokenizer("model", base)
    moved = base.rename(tmp_path / "moved"), texts.rename(tmp_path / "moved_texts")

    opened = open_eval_model(str(run))
    assert opened.tokenizer().fingerprint == tokenizer.fingerprint
    assert sat_jax.load_model(run).config.n_layers == opened.weights.config.n_layers
    monkeypatch.setattr(sys, "argv", ["convert", str(run), "--out", str(tmp_path / "out")])
    convert.main()
    assert (tmp_path / "out/tokenizer.json").exists()

    with pytest.raises(UserError, match=r"base: no such path"):
        train(config(base, moved[1]), unfinished, print)
    changed = tmp_path / "changed"
    shutil.copytree(moved[0], changed)
    weights = load_file(changed / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2},
              changed / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"the content of model\.path is not that of the start"):
        train(config(changed, moved[1]), unfinished, print)
    continued = train(config(*moved), unfinished, print)
    assert continued["eval_loss"] == summary["eval_loss"]
