"""Compression of trained models. Each method is one file, and transforms one matrix at a time."""

from sat_jax.compress.factors import load_factored, merge_factors
from sat_jax.compress.input_statistics import InputStatistics
from sat_jax.compress.layers import compress_layers
from sat_jax.compress.low_rank import Factorization, factorize_matrix
from sat_jax.compress.methods import METHODS, make_method
from sat_jax.compress.prune import Pruning, prune_matrix

__all__ = [
    "METHODS",
    "Factorization",
    "InputStatistics",
    "Pruning",
    "compress_layers",
    "factorize_matrix",
    "load_factored",
    "make_method",
    "merge_factors",
    "prune_matrix",
]
