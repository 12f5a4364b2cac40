"""Progress bars of data preparation, written to stderr."""

from tqdm import tqdm


def progress_bar(description: str, unit: str, enabled: bool, total: int | None = None) -> tqdm:
    """Return a bar that appears after half a second, so that quick work and errors show none."""
    return tqdm(
        desc=description,
        unit=unit,
        unit_scale=True,
        total=total,
        disable=not enabled,
        delay=0.5,
        leave=False,
    )
