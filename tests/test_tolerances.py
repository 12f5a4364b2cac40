"""The helper that every numeric test leans on fails where it should."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import TOLERANCES, Direction, assert_close


@pytest.mark.parametrize(("dtype", "direction"), TOLERANCES)
def test_an_error_just_inside_passes_and_just_outside_fails(
    dtype: str, direction: Direction
) -> None:
    desired = np.array([0.0, -4.0, 1.0])
    absolute, relative = TOLERANCES[dtype, direction]
    limit = absolute + relative * 4.0
    assert_close(desired + 0.99 * limit, desired, dtype, direction)
    for place in range(3):
        with pytest.raises(AssertionError, match=f"{dtype} {direction}"):
            assert_close(desired + 1.01 * limit * np.eye(3)[place], desired, dtype, direction)


def test_shapes_do_not_broadcast() -> None:
    for actual in (np.zeros((2, 1)), np.zeros(())):
        with pytest.raises(AssertionError, match="shape"):
            assert_close(actual, np.zeros((2, 2)), "float32", "forward")


def test_what_is_not_finite_never_passes_for_close() -> None:
    for actual, desired in ((np.nan, 0.0), (0.0, np.nan), (np.inf, np.inf), (1.0, np.inf)):
        with pytest.raises(AssertionError):
            assert_close(actual, desired, "float32", "forward")


def test_exact_means_values_and_dtype() -> None:
    value = jnp.array([1.0, jnp.nan], jnp.bfloat16)
    assert_close(value, value, "bfloat16", "exact")
    for other in (value.at[0].set(1.0078125), value.at[1].set(0)):
        with pytest.raises(AssertionError):
            assert_close(other, value, "bfloat16", "exact")
    ones = jnp.ones(2)
    with pytest.raises(AssertionError):
        assert_close(ones.astype(jnp.bfloat16), ones, "float32", "exact")


def test_an_unknown_pair_is_refused() -> None:
    with pytest.raises(KeyError, match="float16"):
        assert_close(1.0, 1.0, "float16", "forward")
