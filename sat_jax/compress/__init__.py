"""Compression of trained models. Each method is one file, and transforms one matrix at a time."""

from sat_jax.compress.adapters import load_adapter, save_adapter
from sat_jax.compress.factors import load_factored, merge_factors
from sat_jax.compress.input_statistics import InputStatistics
from sat_jax.compress.layers import compress_layers
from sat_jax.compress.lora import with_new_adapters, without_adapters
from sat_jax.compress.low_rank import Factorization, factorize_matrix
from sat_jax.compress.methods import METHODS, make_method
from sat_jax.compress.prune import Pruning, prune_matrix
from sat_jax.nn.lora import LoraSettings

__all__ = [
    "METHODS",
    "Factorization",
    "InputStatistics",
    "LoraSettings",
    "Pruning",
    "compress_layers",
    "factorize_matrix",
    "load_adapter",
    "load_factored",
    "make_method",
    "merge_factors",
    "prune_matrix",
    "save_adapter",
    "with_new_adapters",
    "without_adapters",
]
