"""The result of a compression, before it is written."""

from typing import Any, NamedTuple

from sat_jax.interop.quantized import formats
from sat_jax.nn.decoder import Decoder


class Outcome(NamedTuple):
    """A compressed model, its part of the report, files that are written beside it, and the
    settings of its quantization, if it is quantized."""

    model: Decoder
    report: dict[str, Any]
    files: dict[str, bytes]
    quantization: dict[str, Any] | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the formats of matrices."""
        return () if self.quantization is None else formats(self.quantization)
