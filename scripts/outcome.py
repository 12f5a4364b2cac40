"""The result of a compression, before it is written."""

from typing import Any, NamedTuple

from sat_jax.nn.decoder import Decoder


class Outcome(NamedTuple):
    """A compressed model, its part of the report, files that are written beside it, and the
    settings of its quantization, if it is quantized."""

    model: Decoder
    report: dict[str, Any]
    files: dict[str, bytes]
    quantization: dict[str, Any] | None = None

    @property
    def dtypes(self) -> list[str]:
        """Names of the integers of matrices."""
        if self.quantization is None:
            return []
        bits = self.quantization["bits"]
        by_matrix = bits.values() if isinstance(bits, dict) else [[bits]]
        return [f"int{number}" for number in sorted(set().union(*by_matrix))]
