"""Rotary embeddings: every length scaling against committed numbers, and rotation by hand."""

import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.errors import UserError
from sat_jax.nn.rope import (
    SCALINGS,
    RopeConfig,
    as_longrope,
    attention_scaling,
    document_lengths,
    inverse_frequencies,
    rotary_tables,
    rotate,
    scaled_by_length,
)
from tests.tolerances import assert_close

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope.npz")
SIZE = 128
ULP = float(np.finfo(np.float32).eps)

# Angles are float32 products, so the error of cos and sin grows with the position. These are the
# errors of the reference implementations, whose tables ours are no worse than: by position.
POSITIONS = (0, 1, 100, 4095, 8191, 65535)
ERRORS = {
    "default": (0.0, 4.6e-8, 3.15e-6, 1.4e-4, 4.0e-4, 1.3e-3),
    "linear": (0.0, 3.6e-8, 1.5e-6, 5.8e-5, 2.4e-4, 5.5e-4),
    "yarn": (9.6e-10, 1.0e-7, 4.24e-6, 1.84e-4, 5.4e-4, 1.75e-3),
    "ntk": (0.0, 5.2e-8, 6.3e-6, 1.8e-4, 6.6e-4, 4.4e-3),
}
# Types and the names of their golden frequencies, and of the errors of a type like it.
FREQUENCIES: dict[str, tuple[str, str]] = {
    "default": ("default", "default"),
    "linear": ("linear", "linear"),
    "ntk": ("ntk", "ntk"),
    "ntk_by_parts_paper": ("yarn_paper", "default"),
    "ntk_by_parts_code": ("yarn", "default"),
    "yarn": ("yarn", "yarn"),
    "yarn_paper": ("yarn_paper", "yarn"),
    "llama3": ("llama3", "default"),
}


def cases() -> list[tuple[tuple[int, int], int, float]]:
    """(place in the golden arrays, original length, factor)."""
    lengths, factors = GOLDEN["original_max_positions"], GOLDEN["factors"]
    return [
        ((i, j), int(length), float(factor))
        for i, length in enumerate(lengths)
        for j, factor in enumerate(factors)
    ]


def config(kind: str, factor: float, length: int, **fields: Any) -> RopeConfig:
    """The type with this factor and original length, if it has them."""
    shared = {"factor": factor, "original_max_positions": length}
    shared = {name: value for name, value in shared.items() if name in SCALINGS[kind].fields}
    return RopeConfig(10_000.0, kind, **shared, **fields)


def golden_frequencies(name: str, place: tuple[int, int]) -> np.ndarray:
    golden = GOLDEN[f"{name}_inv_freq"]
    return golden if name == "default" else golden[place]


@pytest.mark.parametrize("kind", FREQUENCIES)
def test_frequencies(kind: str) -> None:
    for place, length, factor in cases():
        actual = inverse_frequencies(config(kind, factor, length), SIZE, length=7 * length)
        expected = golden_frequencies(FREQUENCIES[kind][0], place)
        assert_close(actual / expected, np.ones(SIZE // 2), "float64", "forward")


@pytest.mark.parametrize("kind", ["yarn", "ntk_by_parts_code"])
def test_frequencies_without_truncation(kind: str) -> None:
    for place, length, factor in cases():
        rope = config(kind, factor, length, truncate=False)
        expected = GOLDEN["yarn_no_truncation_inv_freq"][place]
        ratio = inverse_frequencies(rope, SIZE, 1) / expected
        assert_close(ratio, np.ones(SIZE // 2), "float64", "forward")


def test_dynamic_yarn_has_the_factor_of_the_length() -> None:
    for place, original, factor in cases():
        length = int(factor * original)
        rope = RopeConfig(1e4, "dynamic_yarn", 1.0, original)
        ratio = inverse_frequencies(rope, SIZE, length) / GOLDEN["yarn_inv_freq"][place]
        assert_close(ratio, np.ones(SIZE // 2), "float64", "forward")
        expected = GOLDEN["yarn_attention_scaling"][place]
        assert_close(attention_scaling(rope, length), expected, "float64", "forward")
        unscaled = inverse_frequencies(rope, SIZE, original), attention_scaling(rope, original)
        assert_close(unscaled[0] / GOLDEN["default_inv_freq"], np.ones(64), "float64", "forward")
        assert unscaled[1] == 1
        # Trained at twice the length: that is the least; beyond, against float32 of the repository.
        trained = RopeConfig(1e4, "dynamic_yarn", 2.0, original)
        ratio = inverse_frequencies(trained, SIZE, 5) / GOLDEN["yarn_inv_freq"][place[0], 0]
        assert_close(ratio, np.ones(SIZE // 2), "float64", "forward")
        beyond = GOLDEN["dynamic_yarn_beyond_inv_freq"][place]
        ratio = inverse_frequencies(trained, SIZE, 2 * length) / beyond
        assert_close(ratio, np.ones(SIZE // 2), "float32", "gradient_norm")
        beyond_scaling = GOLDEN["dynamic_yarn_beyond_attention_scaling"][place]
        scaling = attention_scaling(trained, 2 * length)
        assert_close(scaling, beyond_scaling, "float64", "forward")


def test_longrope_divides_by_the_factors_of_its_length() -> None:
    rope = RopeConfig(100.0, "longrope", 4.0, 16, short_factor=(1.0, 2.0), long_factor=(4.0, 5.0))
    base = np.array([1.0, 0.1])
    for length, factors in ((1, [1, 2]), (16, [1, 2]), (17, [4, 5])):
        assert_close(inverse_frequencies(rope, 4, length), base / factors, "float64", "forward")
    # sqrt(1 + ln 4 / ln 16) = sqrt(1.5), at all lengths.
    assert_close(attention_scaling(rope, 1), math.sqrt(1.5), "float64", "forward")


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
        expected = GOLDEN["yarn_attention_scaling"][place]
        for kind in ("yarn", "yarn_paper"):
            actual = attention_scaling(config(kind, factor, length), 1)
            assert_close(actual, expected, "float64", "forward")
    for kind in ("yarn", "yarn_paper"):
        assert attention_scaling(config(kind, 16.0, 4096, attention_factor=1.5), 1) == 1.5
    for kind in FREQUENCIES.keys() - {"yarn", "yarn_paper"} | {"dynamic"}:
        assert attention_scaling(config(kind, 16.0, 4096), 1) == 1.0


@pytest.mark.parametrize("kind", FREQUENCIES)
def test_tables_are_as_accurate_as_float32_angles(kind: str) -> None:
    positions = np.array(POSITIONS)
    name, like = FREQUENCIES[kind]
    for place, length, factor in cases():
        rope = config(kind, factor, length)
        tables = rotary_tables(rope, SIZE, jnp.asarray(positions)[None])
        assert [table.dtype for table in tables] == [jnp.float32] * 2
        angles = positions[:, None] * golden_frequencies(name, place)
        expected = attention_scaling(rope, 1) * np.array([np.cos(angles), np.sin(angles)])
        errors = np.abs(np.asarray(tables, np.float64)[:, 0] - expected).max((0, 2))
        assert (errors <= np.array(ERRORS[like]) + ULP).all()


def test_tables_of_a_length_are_as_accurate() -> None:
    """Lengths are traced, so that powers of the growth are float32: frequencies (at most 1) are
    within 1.5 units of 2^-24, and their product with the position within 1."""
    for place, original, factor in cases():
        for at, length in enumerate(GOLDEN["dynamic_length"][place].tolist()):
            positions = np.array([p for p in POSITIONS if p < length])
            rope = config("dynamic", factor, original)
            lengths = jnp.full((1, len(positions)), length)
            tables = rotary_tables(rope, SIZE, jnp.asarray(positions)[None], lengths)
            angles = positions[:, None] * GOLDEN["dynamic_inv_freq"][place][at]
            errors = np.abs(np.asarray(tables)[:, 0] - [np.cos(angles), np.sin(angles)])
            assert (errors.max((0, 2)) <= positions * 2.5 * 2.0**-24 + ULP).all()


LONGROPE = RopeConfig(
    100.0, "longrope", 4.0, 8, short_factor=(1.0,) * 4, long_factor=(4.0, 3.0, 2.0, 1.5)
)


@pytest.mark.parametrize(
    "rope",
    [RopeConfig(100.0, "dynamic", 4.0, 8), RopeConfig(100.0, "dynamic_yarn", 1.0, 8), LONGROPE],
)
def test_angles_follow_the_length_of_each_document(rope: RopeConfig) -> None:
    """Traced lengths give the values of whole numbers; documents in one row have their own."""
    segment_ids = jnp.asarray([[1] * 5 + [2] * 9 + [0] * 2, [3] * 16])
    positions = jnp.asarray([[*range(5), *range(9), 0, 1], [*range(16)]])
    lengths = document_lengths(segment_ids, positions)
    assert lengths.tolist() == [[5] * 5 + [9] * 9 + [2] * 2, [16] * 16]
    for given in (lengths, None):
        tables = rotary_tables(rope, 8, positions, given)
        rows = lengths.tolist() if given is not None else [[9] * 16, [16] * 16]
        for row, column in np.ndindex(2, 16):
            length = rows[row][column]
            angles = int(positions[row, column]) * inverse_frequencies(rope, 8, length)
            expected = attention_scaling(rope, length) * np.array([np.cos(angles), np.sin(angles)])
            actual = [table[row, column] for table in tables]
            assert_close(np.array(actual), expected, "float32", "forward")
    assert [a.shape for a in scaled_by_length(rope, 8, jnp.asarray([4, 9, 30]))] == [(3, 4), (3,)]


@pytest.mark.parametrize("kind", SCALINGS.keys() - {"dynamic", "dynamic_yarn", "longrope"})
def test_longrope_expresses_types_that_do_not_depend_on_the_length(kind: str) -> None:
    rope = config(kind, 8.0, 4096)
    same = as_longrope(rope, SIZE, 32_768)
    for length in (5, 30_000):
        ratio = inverse_frequencies(same, SIZE, length) / inverse_frequencies(rope, SIZE, length)
        assert_close(ratio, np.ones(64), "float64", "forward")
        assert attention_scaling(same, length) == attention_scaling(rope, length)


def test_longrope_does_not_express_a_growing_base() -> None:
    with pytest.raises(UserError, match="'dynamic_yarn' cannot be expressed by longrope"):
        as_longrope(config("dynamic_yarn", 1.0, 4096), SIZE, 8192)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "su"}, "rope type 'su' is not supported; accepted: default, linear, ntk, .*long"),
        ({"type": "linear", "factor": 0.5}, "'linear': factor 0.5; accepted: a number of at least"),
        ({"type": "ntk", "factor": math.nan}, "factor nan"),
        ({"type": "yarn", "factor": 2.0}, "'yarn': original_max_positions None; accepted: the tr"),
        ({"type": "dynamic", "original_max_positions": 0}, "original_max_positions 0"),
        ({"type": "linear", "beta_fast": 16.0}, "beta_fast is no field .*'linear'; accepted: fac"),
        ({"type": "default", "factor": 2.0}, "factor is no field .*'default'; accepted: none"),
        ({"type": "dynamic_yarn", "attention_factor": 1.0}, "attention_factor is no field"),
        (
            {"type": "yarn", "original_max_positions": 8, "beta_slow": 32.0},
            "beta_fast 32.0; accepted: a number above beta_slow 32",
        ),
        (
            {"type": "llama3", "original_max_positions": 8, "high_freq_factor": 1.0},
            "high_freq_factor 1.0; accepted: a number above low_freq_factor 1",
        ),
        ({"type": "longrope", "original_max_positions": 8}, r"short_factor \(\); accepted: pos"),
        (
            {
                "type": "longrope",
                "original_max_positions": 8,
                "short_factor": (1.0,),
                "long_factor": (0.0,),
            },
            r"long_factor \(0.0,\)",
        ),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        RopeConfig(**fields)
    assert "\n" not in str(caught.value)


def test_longrope_has_a_factor_for_each_pair_of_dimensions() -> None:
    with pytest.raises(UserError, match="short_factor has 4 numbers; accepted: 8"):
        inverse_frequencies(LONGROPE, 16, 1)
