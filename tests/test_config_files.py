"""Experiment files, and settings on the command line, which override them."""

from pathlib import Path
from typing import Any

import pytest

from sat_jax.config import Config
from sat_jax.config_values import experiment as get_experiment
from sat_jax.config_values import from_config_dict, load, to_dict
from tests.conftest import ROOT
from tests.test_config import (
    BASE,
    KEYS,
    NEEDS,
    built,
    kind,
    literals,
    nested,
    other,
    refusal,
    value_of,
)

HEADER = "from sat_jax.config_values import default_config\n\n\n"


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    """Write an experiment file: lines of `get_config` after the defaults, or a complete file."""

    def write(*lines: str, whole: str | None = None, arguments: str = "") -> str:
        body = "".join(f"    {line}\n" for line in ("config = default_config()", *lines))
        text = f"{HEADER}def get_config({arguments}):\n{body}    return config\n"
        path = tmp_path / "mine.py"
        path.write_text(text if whole is None else whole)
        return str(path)

    return write


def test_an_experiment_file_sets_what_it_names(experiment: Any) -> None:
    path = experiment("config.train.steps = 7", "config.sparsity.rate = 0.5")
    expected = built(train__steps=7, sparsity__rate=0.5)
    assert load(path) == expected
    assert load(path, ["train.steps=9"]) == built(train__steps=9, sparsity__rate=0.5)


def test_the_last_override_wins(experiment: Any) -> None:
    config = load(experiment(), ["train.steps=9", "seed=4", "train.steps=8"])
    assert config == built(train__steps=8, seed=4)


def test_overrides_reach_groups_that_a_file_leaves_out(experiment: Any) -> None:
    whole = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    assert load(experiment(whole=whole), ["train.steps=9"]) == built(train__steps=9)


def spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("path", KEYS)
def test_every_setting_can_be_overridden(path: str, experiment: Any) -> None:
    values = BASE | NEEDS.get(path, {})
    base = [f"{name}={value}" for name, value in values.items()]
    value = other(KEYS[path])
    config = load(experiment(), [*base, f"{path}={spelled(value)}"])
    assert config == from_config_dict(nested(values | {path: value}))
    for bad in ("no such value", "1.5x", "[1]"):
        if kind(KEYS[path]) is str and not literals(KEYS[path]):
            continue
        if KEYS[path].accepts.startswith("texts"):
            continue
        message = refusal(load, experiment(), [f"{path}={bad}"])
        assert path in message
        assert repr(bad) in message
        assert message.endswith(f"accepted: {KEYS[path].accepts}")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("sparsity.dense_layers=0,-1", (0, -1)),
        ("sparsity.dense_layers=", ()),
        ("data.sources=a b.txt,c.md", ("a b.txt", "c.md")),
        ("data.max_tokens=None", None),
        ("data.max_tokens=1_000", 1000),
        ("optimizer.clip_norm=none", None),
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("train.deterministic=True", True),
        ("train.deterministic=false", False),
        ("model.path=a=b", "a=b"),
        ("seed=4294967295", 2**32 - 1),
    ],
)
def test_how_values_are_written_on_the_command_line(
    override: str, value: Any, experiment: Any
) -> None:
    path = override.partition("=")[0]
    given = value_of(load(experiment("config.optimizer.clip_norm = 2.0"), [override]), path)
    assert (given, type(given)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--config.train.steps has no value; write --config.train.steps=VALUE"),
        ("train.steps=", "--config.train.steps is ''; accepted: int >= 1"),
        ("train.steps=nan", "--config.train.steps is 'nan'; accepted: int >= 1"),
        ("train.steps=0", "train.steps is 0; accepted: int >= 1"),
        ("optimizer.beta1=nan", "optimizer.beta1 is nan; accepted: float >= 0, <= 0.9999"),
        ("optimizer.beta1=inf", "optimizer.beta1 is inf; accepted: float >= 0, <= 0.9999"),
        ("train.steps=1e2", "--config.train.steps is '1e2'; accepted: int >= 1"),
        (
            "train.deterministic=1",
            "--config.train.deterministic is '1'; accepted: true or false",
        ),
        ("=3", "--config. is not a setting; --help lists all settings"),
    ],
)
def test_bad_overrides(override: str, message: str, experiment: Any) -> None:
    assert refusal(load, experiment(), [override]) == message


def test_a_misspelt_key_in_a_file(experiment: Any) -> None:
    message = refusal(load, experiment("config.sparsity.rte = 0.4"))
    assert message.startswith("sparsity.rte is not a setting; near: sparsity.rate")
    message = refusal(load, experiment("config.sparsty.rate = 0.4"))
    assert ", line 6: AttributeError: 'sparsty' Did you mean \"sparsity\"" in message
    assert len(message) < 200


def test_a_bad_value_in_a_file(experiment: Any) -> None:
    path = experiment("config.train.steps = 'many'")
    assert refusal(load, path) == "train.steps is 'many'; accepted: int >= 1"
    assert load(path, ["train.steps=3"]).train.steps == 3


def test_experiments_that_cannot_be_run(experiment: Any, tmp_path: Path) -> None:
    missing = tmp_path / "none.py"
    assert refusal(load, str(missing)).startswith(f"--config: no file {missing}; ")
    assert refusal(load, str(tmp_path)).startswith(f"--config: no file {tmp_path}; ")
    text = tmp_path / "notes.txt"
    text.write_text("seed = 3")
    assert refusal(load, str(text)) == f"--config: {text} is not a Python file"

    path = str(tmp_path / "mine.py")
    for whole, message in {
        "x = 1\n": f"--config: {path} has no get_config()",
        "def get_config():\n    return None\n": (
            f"--config: get_config() of {path} returns None, not a ConfigDict"
        ),
        "x = (\n": f"--config: {path}, line 1: SyntaxError: '(' was never closed",
        "\nimport nothing_like_it\n": (
            f"--config: {path}, line 2: ModuleNotFoundError: No module named 'nothing_like_it'"
        ),
        "def get_config():\n    return 1 / 0\n": (
            f"--config: {path}, line 2: ZeroDivisionError: division by zero"
        ),
    }.items():
        assert refusal(load, experiment(whole=whole)) == message


def test_the_line_is_named_for_a_relative_path_too(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment("config.seed = 1 / 0")
    monkeypatch.chdir(tmp_path)
    message = refusal(load, "mine.py:small")
    assert message == "--config: mine.py has no variants; small is not accepted"
    message = refusal(load, "mine.py")
    assert message == "--config: mine.py, line 6: ZeroDivisionError: division by zero"


def test_variants(experiment: Any) -> None:
    path = experiment("config.seed = {'a': 1, 'b': 2}[variant]", arguments="variant='a'")
    text = Path(path).read_text()
    Path(path).write_text(text.replace("):\n", '):\n    """Variants: a, b."""\n', 1))
    assert [load(path).seed, load(f"{path}:a").seed, load(f"{path}:b").seed] == [1, 1, 2]
    message = f"--config: {path} has no variant 'c'. Variants: a, b."
    assert refusal(load, f"{path}:c") == message
    path = experiment()
    message = f"--config: {path} has no variants; dense is not accepted"
    assert refusal(load, f"{path}:dense") == message
    path = experiment("raise UserError('sizes: small, large')", arguments="variant")
    Path(path).write_text("from sat_jax.errors import UserError\n" + Path(path).read_text())
    assert refusal(load, f"{path}:x") == "sizes: small, large"
    assert refusal(load, path).endswith("missing 1 required positional argument: 'variant'")


def test_committed_experiments_load() -> None:
    shared = {ROOT / "experiments" / "scales.py"}
    for path in sorted({*(ROOT / "experiments").glob("[a-z]*.py")} - shared):
        from_scratch = get_experiment(str(path))["model"]["preset"]
        weights = [] if from_scratch else ["model.path=where the weights are"]
        config = load(str(path), weights)
        assert config != Config()
        assert from_config_dict(to_dict(config)) == config
