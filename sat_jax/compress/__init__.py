"""Compression of trained models. Each method is one file.

Names are imported when first used: training reads layouts of adapters, and not their files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_jax.compress.adapters import load_adapter, save_adapter
    from sat_jax.compress.factors import load_factored, merge_factors
    from sat_jax.compress.input_statistics import InputStatistics
    from sat_jax.compress.layers import compress_layers
    from sat_jax.compress.lora import with_new_adapters, without_adapters
    from sat_jax.compress.low_rank import Factorization, factorize_matrix
    from sat_jax.compress.methods import METHODS, make_method
    from sat_jax.compress.prune import Pruning, prune_matrix
    from sat_jax.compress.quantize import Quantization, quantize_matrix
    from sat_jax.compress.structured import Structured, prune_units
    from sat_jax.nn.lora import LoraSettings

__all__ = [
    "METHODS",
    "Factorization",
    "InputStatistics",
    "LoraSettings",
    "Pruning",
    "Quantization",
    "Structured",
    "compress_layers",
    "factorize_matrix",
    "load_adapter",
    "load_factored",
    "make_method",
    "merge_factors",
    "prune_matrix",
    "prune_units",
    "quantize_matrix",
    "save_adapter",
    "with_new_adapters",
    "without_adapters",
]

_MODULES = {
    "sat_jax.compress.adapters": ("load_adapter", "save_adapter"),
    "sat_jax.compress.factors": ("load_factored", "merge_factors"),
    "sat_jax.compress.input_statistics": ("InputStatistics",),
    "sat_jax.compress.layers": ("compress_layers",),
    "sat_jax.compress.lora": ("with_new_adapters", "without_adapters"),
    "sat_jax.compress.low_rank": ("Factorization", "factorize_matrix"),
    "sat_jax.compress.methods": ("METHODS", "make_method"),
    "sat_jax.compress.prune": ("Pruning", "prune_matrix"),
    "sat_jax.compress.quantize": ("Quantization", "quantize_matrix"),
    "sat_jax.compress.structured": ("Structured", "prune_units"),
    "sat_jax.nn.lora": ("LoraSettings",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
