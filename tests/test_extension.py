"""Runs that extend the context of a model."""

from pathlib import Path

import pytest

import sat_jax
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.models.presets import extended, preset
from sat_jax.train.loop import train
from sat_jax.train.setup import set_up
from tests.conftest import ROOT
from tests.user_errors import user_error

OVERRIDES = [
    *(
        "data.sources=README.md,CHANGELOG.md",
        "data.row_length=32",
        "train.steps=2",
        "train.rows_per_step=4",
    ),
    *("train.eval_rows=4", "train.measure_speed=False", "sparsity.rate=0.0"),
]


def settings(*overrides: str) -> Config:
    return load(str(ROOT / "experiments/tiny.py"), [*OVERRIDES, *overrides])


@pytest.mark.slow
def test_the_extended_model_is_trained_and_exported(tmp_path: Path) -> None:
    """Rows of 32 tokens, trained as documents of up to 1,024: the loss of skipping positions is
    another one than that of consecutive positions from the first step on."""
    lengths = [f"model.rope_type=yarn model.rope_factor=2 data.pose_length={n}" for n in (1024, 32)]
    losses = [
        train(settings(*some.split()), tmp_path / str(index), lambda _: None)["loss"]
        for index, some in enumerate(lengths)
    ]
    assert losses[0] != losses[1]
    model = sat_jax.load_model(tmp_path / "0" / "huggingface")
    assert model.config.rope == extended(preset("tiny"), "yarn", 2.0).rope
    assert model.config.max_positions == 2 * preset("tiny").max_positions


def test_lengths_beyond_the_model_are_refused() -> None:
    positions = preset("tiny").max_positions
    message = user_error(lambda: set_up(settings("data.pose_length=999999"), print))
    assert message == f"data.pose_length 999999 exceeds the model's {positions} positions"


def test_positions_of_a_model_without_rotary_ones_do_not_skip() -> None:
    config = settings("model.preset=retnet-tiny", "data.pose_length=64")
    assert user_error(lambda: set_up(config, print)) == (
        "data.pose_length 64: a retnet model has no rotary positions; accepted: None"
    )
