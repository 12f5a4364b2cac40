"""Peak FLOP/s, memory bandwidth and memory sizes of devices, each with its source."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError

_FILE = Path(__file__).with_name("devices.json")


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip.

    `peak_flops`: dense products in bfloat16, FLOP/s. `bandwidth`: of device memory, bytes/s.
    `on_chip_memory` and `memory` (device memory): bytes. `sources`: the document of each number, by
    field, or that it is not public and how it was derived.
    """

    name: str
    peak_flops: float
    bandwidth: float
    on_chip_memory: float
    memory: float
    sources: Mapping[str, str]

    @property
    def ridge(self) -> float:
        """The operational intensity in FLOP/byte above which compute is the limit."""
        return self.peak_flops / self.bandwidth


NUMBERS = ("peak_flops", "bandwidth", "on_chip_memory", "memory")


def known_devices() -> dict[str, Device]:
    """Return the devices of `devices.json` by name."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    return {name: _device(fields, f"{_FILE.name}: {name}") for name, fields in table.items()}


def read_device(name: str) -> Device:
    """Return a known device, or the one that a JSON file describes.

    Such a file has the fields of one entry of `devices.json`. Raises `UserError` for an unknown
    name, and for a field that is missing, unknown, or not a positive number with a source.
    """
    known = known_devices()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no device {name!r}; accepted: {', '.join(known)}, or a JSON file of one")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding too
        raise UserError(f"{name}: not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    return _device(fields, name)


def _device(fields: Any, origin: str) -> Device:
    expected = {"name", *NUMBERS}
    if not isinstance(fields, dict) or fields.keys() != expected:
        keys = fields.keys() if isinstance(fields, dict) else set()
        missing, unknown = sorted(expected - keys), sorted(keys - expected)
        wrong = [f"no field {n!r}" for n in missing] + [f"unknown field {n!r}" for n in unknown]
        raise UserError(f"{origin}: {', '.join(wrong)}; accepted: {', '.join(sorted(expected))}")
    values = {name: _number(fields[name], f"{origin}: {name}") for name in NUMBERS}
    sources = {name: fields[name]["source"] for name in NUMBERS}
    return Device(str(fields["name"]), **values, sources=sources)


def _number(field: Any, origin: str) -> float:
    match field:
        case {"value": int() | float() as value, "source": str()} if 0 < value < float(
            "inf"
        ) and not isinstance(value, bool):
            return float(value)
    raise UserError(
        f'{origin}: {json.dumps(field)}; accepted: {{"value": NUMBER above 0, "source": TEXT}}'
    )
