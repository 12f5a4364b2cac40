"""Recipes of scripts/compress.py: steps that continue, their report, dry runs, and misuse."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_jax.config import Config
from sat_jax.errors import UserError
from sat_jax.interop import load_model
from scripts.compress import main
from tests.conftest import ROOT
from tests.golden_model import GOLDEN

MODEL = GOLDEN / "llama_gqa"
STEPS = """
[[step]]
name = "prune"
compress = { method = "structured", remove = ["channel=0.5"], importance = "magnitude" }
[[step]]
name = "recover"
[step.train]
config = "experiments/tiny.py"
train.steps = 2
data.sources = ["a.txt", "b.txt"]
[[step]]
name = "quantize"
compress = { method = "rtn", bits = 8, group = 8 }
"""
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs a recipe on the golden model and returns the output. The n-th
    measured perplexity is n."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall.\n" for n in range(99)))
    measured: list[float] = []

    def perplexity(*_: Any) -> float:
        measured.append(len(measured) + 1.0)
        return measured[-1]

    monkeypatch.setattr("scripts.compression.held_out_perplexity", perplexity)
    monkeypatch.setattr("scripts.recipe_run.held_out_perplexity", perplexity)

    def run(recipe: str = STEPS, **options: Any) -> str:
        file = tmp_path / "recipe.toml"
        file.write_text(recipe)
        defaults = {
            "recipe": file, "model": MODEL, "tokenizer": "bytes", "calibration": text,
            "context": 16, "calibration_rows": 8, "rows": 8, "out": tmp_path / "out",
        }  # fmt: skip
        arguments = []
        for name, value in (defaults | options).items():
            if value is not None:
                values = [value] * (value is not True)
                arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        main()
        return capsys.readouterr().out

    return run


def copy_model(config: Config, directory: Path, _: Any) -> None:
    """In place of a training: its result is the model that it begins with."""
    assert config.train.steps == 2 and config.data.sources == ("a.txt", "b.txt")
    assert config.model.path is not None
    shutil.copytree(config.model.path, directory)


def test_a_recipe_that_is_killed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It continues at the step where it was; each has its directory, and the report all of them."""
    out = tmp_path / "out"
    monkeypatch.setattr("scripts.recipe_run.train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert load_model(out / "1-prune").config.d_ff == 88
    first = json.loads((out / "report.json").read_text())
    assert [step["name"] for step in first["steps"]] == ["1-prune"]
    changed = STEPS.replace("bits = 8", "bits = 4")
    with pytest.raises(UserError, match=r"begun with another recipe: step 3-quantize differs; acc"):
        run(changed)
    with pytest.raises(UserError, match="begun with another recipe: calibration_rows differs"):
        run(calibration_rows=4)
    monkeypatch.setattr("scripts.recipe_run.train", copy_model)
    printed = run()
    assert "1-prune: finished before\n2-recover: train for 2 steps" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["steps"][0] == first["steps"][0]
    assert report["perplexity_before"] == 1.0
    # Before and after each compression, and after the training.
    assert [step["perplexity"] for step in report["steps"]] == [3.0, 4.0, 6.0]
    assert printed.splitlines()[-1].split() == ["3-quantize", "6.0000"]
    assert report["steps"][2]["compress"] == {"method": "rtn", "bits": 8, "group": 8}
    assert report["steps"][2]["bits_per_weight"]["in_matrices"] == 12
    assert load_model(out / "3-quantize").config.d_ff == 88
    again = run()
    assert again.count("finished before") == 3
    assert json.loads((out / "report.json").read_text()) == report


def test_a_dry_run(run: Run, tmp_path: Path) -> None:
    """Each step begins with the sizes that the one before leaves."""
    printed = run(dry_run=True, calibration=None, out=None)
    assert "1-prune: method structured, remove channel=0.5, importance magnitude\n" in printed
    assert re.search(r"channel +176 +88 +50.00%", printed)
    assert "\n2-recover: train for 2 steps (config experiments/tiny.py, " in printed
    # Three layers of 64 × 64 for query and output, 64 × 16 for key and value, and of 88 channels.
    assert f"{3 * 64 * (2 * 64 + 2 * 16 + 3 * 88):,} weights in matrices" in printed
    assert not (tmp_path / "out").exists()


def step(text: str) -> str:
    return f'[[step]]\nname = "a"\n{text}\n'


MAGNITUDE, RTN = (
    step('compress.method = "magnitude"'),
    step('compress = { method = "rtn", group = 16 }'),
)
TRAIN = step('train.config = "experiments/tiny.py"')


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("[[step", {}, r"recipe.toml: cannot be read as TOML: "),
        ("[step]", {}, r"recipe.toml: accepted: tables \[\[step\]\], and nothing else"),
        (step(""), {}, "step 1: accepted: a name, and one table compress or train"),
        (step("compress = 1"), {}, "step 1: accepted: a name, and one table compress or train"),
        (MAGNITUDE + "train = {}", {}, "step 1: accepted: a name, and one table"),
        (MAGNITUDE.replace('"a"', '"a/b"'), {}, "step 1: name = 'a/b'; accepted: letters, digits"),
        (step("compress.sparsity = 0.5"), {}, "step 1: --method is missing; accepted: "),
        (MAGNITUDE + "compress.context = 8", {}, "compress has no option context; accepted: meth"),
        (MAGNITUDE + 'compress.block = "x"', {}, "step 1: argument --block: invalid int value"),
        (MAGNITUDE + "compress.sparsity = 2", {}, "step 1: sparsity 2; accepted: a share betw"),
        (step("train.steps = 2"), {}, "step 1: train needs config, an experiment file"),
        (TRAIN + "train.train.setps = 2", {}, "step 1: .*train.setps.*train.steps"),
        (TRAIN + 'train.model.path = "x"', {}, "step 1: train: model.path is the model of the st"),
        (RTN + MAGNITUDE, {}, "step 2: the model is quantized by 1-a; accepted: nothing after"),
        (MAGNITUDE + TRAIN, {}, "step 2: training does not keep the zeros of 1-a; accepted: tra"),
        (MAGNITUDE, {"method": "rtn"}, "--method has no effect with --recipe; accepted: in a st"),
        (MAGNITUDE, {"record": "x"}, "--record with --recipe; accepted: one of them"),
        (MAGNITUDE, {"calibration": None}, "--calibration is missing; only --dry-run does with"),
        (MAGNITUDE + RTN.replace("16", "5"), {}, "group 5: layers/attention/key has 64 columns"),
        (MAGNITUDE, {"out": GOLDEN}, "exists and is no folder of a recipe; accepted: a new one"),
    ],
)
def test_misuse_is_a_user_error(
    run: Run, tmp_path: Path, recipe: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(recipe, **options)
    assert not (tmp_path / "out").exists()


def test_the_example(run: Run) -> None:
    text = (ROOT / "experiments/recipe_smollm2.toml").read_text()
    printed = run(text.replace("group = 64", "group = 4"), dry_run=True, calibration=None)
    assert "\n2-recover: train for 96 steps (config experiments/distill.py:recover" in printed
