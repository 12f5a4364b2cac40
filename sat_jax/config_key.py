"""Settings as fields of dataclasses."""

import dataclasses
from collections.abc import Iterable
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    free: bool = False,
) -> Any:
    """Return a dataclass field with help text, bounds of numbers, and accepted names.

    `low` and `high` are accepted themselves, `above` is not.
    `free`: no result depends on the setting, so that a resumed run may change it.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "above": above,
            "high": high,
            "choices": tuple(choices),
            "free": free,
        },
    )
