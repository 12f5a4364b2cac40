"""Parameters that training quantizes: the base of adapters (QLoRA, arXiv:2305.14314), and the
result of quantization-aware training."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sat_jax.compress.layers import NOTHING, check_matrices, matrices, stack_layers
from sat_jax.compress.quantize import Quantization
from sat_jax.errors import UserError
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.quantized import NORMAL_FLOAT, Bits

_METHODS: dict[str, tuple[str, Bits]] = {
    NORMAL_FLOAT: (NORMAL_FLOAT, 4),
    "int4": ("rtn", 4),
    "int8": ("rtn", 8),
}


def base_method(base: str | None, group: int) -> Quantization | None:
    """Return the method of the setting `lora.base`; None for None."""
    return None if base is None else Quantization(*_METHODS[base], group)


def check_groups(layout: Layout[Decoder], method: Quantization, setting: str) -> None:
    """Raise `UserError` that names the setting if some matrix cannot be quantized."""
    try:
        check_matrices(layout, method)
    except UserError as error:
        raise UserError(f"{setting} {method.group}: {error}") from error


def quantized_reader(
    read: Callable[[str], Any], layout: Layout[Decoder], method: Quantization
) -> Callable[[str], Any]:
    """Return a function that returns a parameter by path: a matrix of layers quantized, as
    `scripts.compress` stores it, others as `read` returns them. All arrays are on the host."""
    by_path = {matrix.path: matrix for matrix in matrices(layout)}

    def quantized(path: str) -> Any:
        weight = read(path)
        if path not in by_path:
            return weight
        # One layer is on the device at a time.
        matrix = by_path[path]
        layers = (
            {path: matrix.quantized(method.quantize(matrix.flatten(jnp.asarray(layer)), NOTHING))}
            for layer in weight
        )
        return stack_layers(list(layers))[path]

    return quantized
