"""Items of an evaluation that cannot be used: they are named, counted and left out."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from sat_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def usable(
    convert: Callable[[T], R],
    items: Iterable[T],
    faults: list[str] | None,
    name: Callable[[T], str] | None = None,
) -> list[R]:
    """Return `convert(item)` of all items for which it raises no `UserError`.

    The messages of the others are added to `faults`; None: the first one is raised. They begin with
    the `name` of the item. Raises `UserError` if no item can be used.
    """
    results: list[R] = []
    messages: list[str] = []
    for item in items:
        try:
            results.append(convert(item))
        except UserError as error:
            message = str(error) if name is None else f"{name(item)}: {error}"
            if faults is None:
                raise UserError(message) from error
            messages.append(message)
    if messages and not results:
        first = messages[0]
        raise UserError(f"none of {len(messages)} can be used: {first}" if messages[1:] else first)
    if faults is not None:
        faults += messages
    return results
