"""All compression methods by name."""

import dataclasses
from typing import Any

from sat_jax.compress.low_rank import LOW_RANK, Factorization
from sat_jax.compress.prune import PRUNING, Pruning
from sat_jax.compress.quantize import QUANTIZATION, Quantization
from sat_jax.compress.structured import STRUCTURED, Structured
from sat_jax.errors import UserError

OfMatrices = Pruning | Factorization | Quantization
"""A method that compresses one matrix at a time."""

Method = OfMatrices | Structured

METHODS: dict[str, type[Method]] = {
    **dict.fromkeys(PRUNING, Pruning),
    **dict.fromkeys(LOW_RANK, Factorization),
    **dict.fromkeys(QUANTIZATION, Quantization),
    STRUCTURED: Structured,
}


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """Return the method with this name and these settings, of which those left out have defaults.

    Raises `UserError` for a name, a setting or a value that is not accepted.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r}; accepted: {', '.join(METHODS)}")
    accepted = [f.name for f in dataclasses.fields(METHODS[name]) if f.name != "method"]
    for setting in settings:
        if setting not in accepted:
            raise UserError(
                f"{setting} has no effect with method {name}; accepted: {', '.join(accepted)}"
            )
    return METHODS[name](name, **settings)
