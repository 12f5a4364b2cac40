"""Settings: accepted values, and errors in one line that names the key."""

import dataclasses
import json
import re
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sat_jax.config import Config
from sat_jax.config_values import (
    Key,
    default_config,
    fingerprint,
    from_config_dict,
    keys,
    load,
    to_dict,
)
from sat_jax.data.data_format import DataFormat
from sat_jax.errors import UserError
from sat_jax.models.presets import PRESETS
from sat_jax.sparsity.importance import METRICS
from tests.conftest import ROOT

KEYS = {key.path: key for key in keys()}
TINY = str(ROOT / "experiments" / "tiny.py")


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` → `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def built(**values: Any) -> Config:
    """From keyword arguments with `__` for the dot."""
    return from_config_dict(nested({name.replace("__", "."): v for name, v in values.items()}))


def value_of(config: Config, path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = getattr(node, name)
    return node


def refusal(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def literals(key: Key) -> tuple[str, ...]:
    """The names that a key accepts, if it accepts names."""
    for option in (key.type, *typing.get_args(key.type)):
        if typing.get_origin(option) is typing.Literal:
            return typing.get_args(option)
    return key.choices


def kind(key: Key) -> type:
    """bool, int, float, str or tuple."""
    if literals(key):
        return str
    for option in (key.type, *typing.get_args(key.type)):
        for one in (bool, int, float, str, tuple):
            if option is one or typing.get_origin(option) is one:
                return one
    raise AssertionError(key)


# --- accepted ---


def test_defaults_are_accepted_and_explained() -> None:
    config = from_config_dict(default_config())
    assert config == Config()
    for path, key in KEYS.items():
        assert value_of(config, path) == key.default
        assert key.help
        assert key.accepts


def valid(key: Key) -> st.SearchStrategy[Any]:
    if literals(key):
        values: st.SearchStrategy[Any] = st.sampled_from(literals(key))
    elif kind(key) is bool:
        values = st.booleans()
    elif kind(key) is int:
        low, high = int(key.low or 0), key.high or 2**40
        values = st.integers(low, int(high))
    elif kind(key) is float:
        values = st.floats(
            key.low if key.above is None else key.above,
            key.high or 1e300,
            exclude_min=key.above is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    elif kind(key) is tuple:
        numbers = {"int": st.integers(-9, 9), "float": st.floats(0, 1)}
        named = next((number for number in numbers if number in key.accepts), None)
        item: Any = numbers[named] if named else st.text(max_size=5)
        values = st.lists(item, max_size=3).map(tuple)
    else:
        values = st.text(max_size=8)
    optional = type(None) in typing.get_args(key.type)
    return st.none() | values if optional else values


ADAPTERS = {path for path in KEYS if path.startswith("lora.")}
QUANTIZATION = {path for path in KEYS if path.startswith("quantization.")}
WITH_TEACHER = {path for path in KEYS if path.startswith("distill.")}
# Settings whose accepted values depend on other settings.
DEPENDENT = {
    *(
        "model.preset",
        "model.path",
        "model.adapter",
        "model.rope_factor",
        "data.pose_length",
        "train.accumulate",
        "optimizer.warmup_steps",
        "optimizer.moments",
    ),
    "optimizer.decay_share",
    *("sparsity.split", "sparsity.rungs", "sparsity.schedule", "sparsity.dense_start"),
    "sparsity.min_gain",
    *("sparsity.refresh_every", "sparsity.least_squares_correction", "sparsity.metric"),
    *("sparsity.dense_layers", "sparsity.weights.density"),
    *("sparsity.weights.update_every", "sparsity.weights.drop_fraction"),
    *("mesh.data", "mesh.context", "mesh.tensor", "mesh.pipeline", "mesh.rounds"),
    *("sparsity.execution", "sparsity.token_rate", "model.kernels"),
    "sparsity.token_skip_rate",
    *("sparsity.adapters", "sparsity.predictor_rank", "sparsity.dense_answers"),
    *(f"data.{field.name}" for field in dataclasses.fields(DataFormat)),
    *ADAPTERS,
    *QUANTIZATION,
    *WITH_TEACHER,
}
assert KEYS.keys() >= DEPENDENT
VALID = {path: valid(key) for path, key in KEYS.items() if path not in DEPENDENT}


@settings(max_examples=50)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_every_config_survives_the_way_there_and_back(values: dict[str, Any]) -> None:
    config = from_config_dict(nested(values))
    for path, value in values.items():
        assert value_of(config, path) == value
    text = json.dumps(to_dict(config))
    assert from_config_dict(json.loads(text)) == config
    assert from_config_dict(ConfigDict(json.loads(text))) == config
    assert hash(config) == hash(from_config_dict(to_dict(config)))


def other(key: Key) -> Any:
    """A valid value that is neither the default nor in `BASE`."""
    if key.path in DEFAULTS:
        return DEFAULTS[key.path]
    if literals(key):
        name = next(name for name in literals(key) if name != key.default)
        return (name,) if key.default == () else name
    if kind(key) is float:
        return (key.default or 0.25) * (2 if key.default == key.low else 0.5)
    if kind(key) is int:
        return max(key.default or 0, int(key.low or 0)) + 2
    if kind(key) is tuple:
        return next(
            (v for n, v in {"int": (1,), "float": (1.0,)}.items() if n in key.accepts), ("other",)
        )
    return not key.default if kind(key) is bool else "other"


# With these every single change below is accepted.
BASE = {
    "train.rows_per_step": 12,
    "sparsity.execution": "mask",
    "sparsity.metric": "wanda",
    "sparsity.selection": "sample",
}
NEEDS = {
    "model.adapter": {"model.path": "base"},
    **{path: {"lora.rank": 2} for path in ADAPTERS - {"lora.rank"}},
    "lora.group": {"lora.rank": 2, "lora.base": "nf4"},
    "quantization.group": {"quantization.bits": 4},
    **{path: {"distill.teacher": "base"} for path in WITH_TEACHER - {"distill.teacher"}},
    **{
        f"distill.{name}": {"distill.teacher": "base", "distill.hidden_weight": 1.0}
        for name in ("hidden_loss", "hidden_layers", "teacher_layers")
    },
    "mesh.pipeline": {"train.accumulate": 3},
    "mesh.context": {"data.row_length": 30},
    "mesh.rounds": {"mesh.pipeline": 2, "train.accumulate": 2, "sparsity.execution": "gather"},
    "model.rope_factor": {"model.rope_type": "yarn"},
    "data.pose_length": {"data.row_length": 3},
    "model.kernels": {"sparsity.execution": "kernel", "sparsity.block": 64},
    "optimizer.decay_share": {"optimizer.schedule": "wsd"},
    "sparsity.min_gain": {"sparsity.schedule": "auto"},
    "sparsity.weights.density": {"sparsity.execution": "gather"},
    "sparsity.token_skip_rate": {"sparsity.execution": "gather"},
    "sparsity.adapters": {"lora.rank": 2, "sparsity.refresh_every": 0},
    **{
        f"sparsity.{name}": {
            "lora.rank": 2,
            "sparsity.refresh_every": 0,
            "sparsity.adapters": "dense",
            "sparsity.metric": "svd",
        }
        for name in ("predictor_rank", "dense_answers")
    },
    **{
        f"sparsity.weights.{name}": {"sparsity.weights.update": "rigl"}
        for name in ("update_every", "drop_fraction")
    },
    **{
        f"data.{name}_field": {"data.format": "prompt_completion"}
        for name in ("prompt", "completion")
    },
    **{
        f"data.{name}": {"data.format": "messages"}
        for name in ("chat_template", "system", "loss_on", "too_long")
    },
}
DEFAULTS = {path: KEYS[path].default for path in BASE if path.startswith("sparsity.")}


def test_the_fingerprint_names_every_setting() -> None:
    base = from_config_dict(nested(BASE))
    prints = {fingerprint(base)}
    for path, key in KEYS.items():
        value = other(key)
        changed = from_config_dict(nested(BASE | NEEDS.get(path, {}) | {path: value}))
        assert value_of(changed, path) == value != value_of(base, path)
        prints.add(fingerprint(changed))
    assert len(prints) == len(KEYS) + 1
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in prints)
    assert fingerprint(from_config_dict(to_dict(base))) == fingerprint(base)


def test_numbers_become_the_type_of_their_key() -> None:
    config = built(optimizer__learning_rate=1, sparsity__dense_layers=[0, -1], data__sources="a.md")
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.sparsity.dense_layers == (0, -1)
    assert config.data.sources == ("a.md",)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"rate": 0.4}, (0.4, 0.4)),
        ({"rate": 0.4, "rate_mlp": 0.6}, (0.4, 0.6)),
        ({"rate": 0.4, "rate_attention": 0.0}, (0.0, 0.4)),
        ({"rate": 0.4, "rate_mlp": 0.0}, (0.4, 0.0)),
        ({"rate": 0.4, "rate_mlp": (0.25, 0.75)}, (0.4, 0.5)),
    ],
)
def test_rates_of_both_modules(given: dict[str, float], rates: tuple[float, float]) -> None:
    assert from_config_dict({"sparsity": given}).rates == rates


# --- refused ---


def bad_values(key: Key) -> list[Any]:
    """Wrong types, and both sides of the bounds."""
    number = kind(key) in (int, float)
    wrong: list[Any] = [{"a": 1}, object]
    wrong += [] if kind(key) is bool else [True]
    wrong += [] if kind(key) in (str, tuple) and not literals(key) else ["no such value"]
    wrong += [] if kind(key) is float or "int" in key.accepts else [1.5, 7]
    wrong += [] if type(None) in typing.get_args(key.type) else [None]
    wrong += [float("nan"), float("inf")] if number else []
    wrong += [1.5] if kind(key) is int else []
    if number and key.low is not None:
        wrong.append(type(key.low)(key.low) - 1 if kind(key) is float else int(key.low) - 1)
    if number and key.above is not None:
        wrong.append(key.above)
    if number and key.high is not None:
        wrong.append(key.high * 1.01 if kind(key) is float else int(key.high) + 1)
    wrong += [["a", 1], [None]] if "separated" in key.accepts else [(1,)]
    return [value for value in wrong if value != 7 or kind(key) is not tuple]


@pytest.mark.parametrize("path", KEYS)
def test_bad_values_are_refused_by_name(path: str) -> None:
    key = KEYS[path]
    for value in bad_values(key):
        message = refusal(from_config_dict, nested({path: value}))
        assert message.startswith(f"{path} is {value!r}; ")
        assert message.endswith(f"accepted: {key.accepts}")


@pytest.mark.parametrize(
    ("path", "accepts"),
    [
        ("seed", "int >= 0, <= 4294967295"),
        ("model.dtype", "one of float32, bfloat16"),
        ("model.attention", "one of xla, splash, cudnn, or None"),
        ("sparsity.metric", f"one of {', '.join(METRICS)}"),
        ("model.preset", f"one of {', '.join(PRESETS)}, or None"),
        ("data.sources", "texts separated by commas"),
        ("sparsity.dense_layers", "ints separated by commas"),
        ("train.deterministic", "true or false"),
        ("sparsity.rate_mlp", "float or floats separated by commas >= 0, <= 1, or None"),
        ("sparsity.balance", "int >= 1, or None"),
        ("model.path", "text, or None"),
    ],
)
def test_what_is_accepted_is_said_in_words(path: str, accepts: str) -> None:
    assert KEYS[path].accepts == accepts


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("model.preset", "llama-2-7B", "llama-2-7b, "),
        ("model.preset", "tinylama-1.1b", "tinyllama-1.1b"),
        ("sparsity.metric", "magnitud", "magnitude;"),
        ("sparsity.metric", "outputs", "output;"),
        ("sparsity.metric", "OUTPUT", "output;"),
    ],
)
def test_misspelt_names_are_answered_with_near_ones(path: str, value: str, near: str) -> None:
    for refused in (
        refusal(from_config_dict, nested({path: value})),
        refusal(load, TINY, [f"{path}={value}"]),
    ):
        assert refused.startswith(f"{path} is {value!r}; near: {near}")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("sparsity.rte", "sparsity.rate"),
        ("sparsity.learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("sed", "seed"),
        ("rows_per_step", "train.rows_per_step"),
        ("rungz", "sparsity.rungs"),
    ],
)
def test_misspelt_keys_are_answered_with_near_ones(path: str, near: str) -> None:
    said = rf"{path} is not a setting; near: (.*, )?{near}(,|$)"
    assert re.match(said, refusal(from_config_dict, nested({path: 1})))
    assert re.match("--config." + said, refusal(load, TINY, [f"{path}=1"]))


def test_misspelt_groups_and_keys_like_no_other() -> None:
    message = refusal(load, TINY, ["sparsty.rate=0.4"])
    assert message.startswith("--config.sparsty.rate is not a setting; near: sparsity.rate, ")
    message = refusal(load, TINY, ["train=1"])
    assert message == "--config.train is not a setting; near: train.steps, lora.trained"
    message = refusal(load, TINY, ["zzz=1"])
    assert message == "--config.zzz is not a setting; --help lists all settings"


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]
