"""Rotary embeddings: every length scaling against committed numbers, and rotation by hand."""

import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.nn.rope import (
    RopeConfig,
    RopeType,
    attention_scaling,
    inverse_frequencies,
    rotary_tables,
    rotate,
)
from tests.tolerances import assert_close

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope.npz")
SIZE = 128
ULP = float(np.finfo(np.float32).eps)

# Angles are float32 products, so the error of cos and sin grows with the position. These are the
# errors of transformers, whose tables ours are no worse than: position → largest error.
ERRORS_DEFAULT = {0: 0.0, 1: 4.6e-8, 100: 3.15e-6, 4095: 1.4e-4, 8191: 4.0e-4, 65535: 1.3e-3}
ERRORS_YARN = {0: 9.6e-10, 1: 1.0e-7, 100: 4.24e-6, 4095: 1.84e-4, 8191: 5.4e-4, 65535: 1.75e-3}


def cases() -> list[tuple[tuple[int, int], int, float]]:
    """(place in the golden arrays, original length, factor)."""
    lengths, factors = GOLDEN["original_max_positions"], GOLDEN["factors"]
    return [
        ((i, j), int(length), float(factor))
        for i, length in enumerate(lengths)
        for j, factor in enumerate(factors)
    ]


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "yarn_no_truncation", "llama3"])
def test_frequencies(kind: str) -> None:
    name: RopeType = "yarn" if "yarn" in kind else kind  # type: ignore[assignment]
    for place, length, factor in cases():
        rope = RopeConfig(10_000.0, name, factor, length, truncate=kind != "yarn_no_truncation")
        golden = GOLDEN[f"{kind}_inv_freq"]
        expected = golden if kind == "default" else golden[place]
        actual = inverse_frequencies(rope, SIZE, length=7 * length)
        assert_close(actual / expected, np.ones(SIZE // 2), "float64", "forward")


def test_frequencies_of_dynamic_follow_the_length_of_the_row() -> None:
    for place, original, factor in cases():
        rope = RopeConfig(10_000.0, "dynamic", factor, original)
        for at, length in enumerate(GOLDEN["dynamic_length"][place]):
            expected = GOLDEN["dynamic_inv_freq"][place][at]
            actual = inverse_frequencies(rope, SIZE, int(length))
            assert_close(actual / expected, np.ones(SIZE // 2), "float64", "forward")
        shorter = inverse_frequencies(rope, SIZE, original // 2)
        assert_close(shorter / GOLDEN["default_inv_freq"], np.ones(64), "float64", "forward")


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("yarn_beta16_2", RopeConfig(1e4, "yarn", 16.0, 4096, beta_fast=16.0, beta_slow=2.0)),
        ("yarn_attention_factor_1", RopeConfig(1e4, "yarn", 16.0, 4096, attention_factor=1.0)),
        ("yarn_truncate_false", RopeConfig(1e4, "yarn", 16.0, 4096, truncate=False)),
        ("llama3.1", RopeConfig(5e5, "llama3", 8.0, 8192)),
        ("llama3.2", RopeConfig(5e5, "llama3", 32.0, 8192)),
    ],
)
def test_frequencies_of_other_settings(name: str, rope: RopeConfig) -> None:
    """Against float32 frequencies of transformers."""
    ratio = inverse_frequencies(rope, SIZE, 1) / GOLDEN[f"variant_{name}"]
    assert_close(ratio, np.ones(SIZE // 2), "float32", "gradient_norm")


def test_attention_scaling() -> None:
    for place, length, factor in cases():
        rope = RopeConfig(1e4, "yarn", factor, length)
        expected = GOLDEN["yarn_attention_scaling"][place]
        assert_close(attention_scaling(rope), expected, "float64", "forward")
    assert attention_scaling(RopeConfig(1e4, "yarn", 16.0, 4096, attention_factor=1.5)) == 1.5
    assert attention_scaling(RopeConfig(1e4, "yarn", 0.5, 4096)) == 1.0
    for other in ("default", "linear", "dynamic", "llama3"):
        assert attention_scaling(RopeConfig(1e4, other, 16.0, 4096, attention_factor=1.5)) == 1.0


def table_error(rope: RopeConfig, cos: np.ndarray, sin: np.ndarray) -> dict[int, float]:
    """Position → largest error of our float32 tables."""
    positions = jnp.asarray(GOLDEN["positions"], jnp.int32)[None]
    tables = rotary_tables(rope, SIZE, positions)
    assert [table.dtype for table in tables] == [jnp.float32] * 2
    ours = np.asarray(tables, np.float64)[:, 0]
    errors = np.abs(ours - [cos, sin]).max((0, 2))
    return dict(zip(GOLDEN["positions"].tolist(), errors.tolist(), strict=True))


def test_tables_are_as_accurate_as_float32_angles() -> None:
    errors = table_error(RopeConfig(), GOLDEN["default_cos"], GOLDEN["default_sin"])
    assert all(errors[position] <= most + ULP for position, most in ERRORS_DEFAULT.items())
    for i, length in enumerate(GOLDEN["original_max_positions"]):
        for j, factor in enumerate(GOLDEN["factors"][[0, -1]]):
            rope = RopeConfig(1e4, "yarn", float(factor), int(length))
            errors = table_error(rope, GOLDEN["yarn_cos"][i, j], GOLDEN["yarn_sin"][i, j])
            assert all(errors[position] <= most + ULP for position, most in ERRORS_YARN.items())


def test_dynamic_takes_the_length_of_the_table_or_the_one_given() -> None:
    rope = RopeConfig(100.0, "dynamic", 4.0, 8)
    positions = jnp.arange(16)[None]
    for given, length in (({}, 16), ({"length": 32}, 32)):
        cos, _ = rotary_tables(rope, 8, positions, **given)
        angles = np.arange(16)[:, None] * inverse_frequencies(rope, 8, length)
        assert_close(cos[0], np.cos(angles), "float32", "forward")


def turned(x: Any, angles: list[float]) -> np.ndarray:
    cos, sin = jnp.cos(jnp.asarray([[angles]])), jnp.sin(jnp.asarray([[angles]]))
    return np.asarray(rotate(jnp.asarray(x), cos, sin))


def test_dimension_i_turns_with_its_half() -> None:
    quarter, none = math.pi / 2, 0.0
    x = [[[1.0, 2.0, 3.0, 4.0]]]
    assert_close(turned(x, [quarter, none]), [[[-3, 2, 1, 4]]], "float32", "forward")
    assert_close(turned(x, [none, quarter]), [[[1, -4, 3, 2]]], "float32", "forward")
    # The same for every head, whatever the axes of heads.
    heads = np.broadcast_to(np.asarray(x, np.float32)[:, :, None, None], (1, 1, 2, 3, 4))
    expected = np.broadcast_to([-3, 2, 1, 4], heads.shape)
    assert_close(turned(heads, [quarter, none]), expected, "float32", "forward")


def test_scores_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 8)), jnp.float32)
    score = functools.partial(np.einsum, "bte,bte->")

    def at(x: Any, position: int) -> np.ndarray:
        return np.asarray(
            rotate(x, *rotary_tables(RopeConfig(100.0), 8, jnp.full((1, 1), position)))
        )

    near = score(at(query, 9), at(key, 4))
    assert_close(score(at(query, 25), at(key, 20)), near, "float32", "forward")
    assert abs(score(at(query, 9), at(key, 5)) - near) > 0.01


def test_rotation_is_in_float32_and_keeps_the_dtype() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 3, 8)), jnp.bfloat16)
    tables = rotary_tables(RopeConfig(100.0), 8, jnp.arange(5)[None])
    wide = rotate(x.astype(jnp.float32), *tables)
    assert_close(rotate(x, *tables), wide.astype(jnp.bfloat16), "bfloat16", "exact")


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3"])
def test_what_needs_the_original_length_says_so(kind: RopeType) -> None:
    with pytest.raises(ValueError, match=f"rope type '{kind}' needs original_max_positions"):
        inverse_frequencies(RopeConfig(type=kind, factor=2.0), 8, 64)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="rope type 'longrope' is unknown"):
        inverse_frequencies(RopeConfig(type="longrope"), 8, 64)  # type: ignore[arg-type]
