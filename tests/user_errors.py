"""Messages of expected user errors."""

from collections.abc import Callable

import pytest

from sat_jax.errors import UserError


def user_error(call: Callable[[], object]) -> str:
    """Return the message of the `UserError` that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
