"""The progress bars of a preparation, on stderr."""

from tqdm import tqdm


def bar(what: str, unit: str, shown: bool, total: int | None = None) -> tqdm:
    """A bar that what is over in half a second, bad input above all, never draws."""
    return tqdm(
        desc=what,
        unit=unit,
        unit_scale=True,
        total=total,
        disable=not shown,
        delay=0.5,
        leave=False,
    )
