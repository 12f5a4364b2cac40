"""Compression of trained models. Each method is one file, and transforms one matrix at a time."""

from sat_jax.compress.input_statistics import InputStatistics
from sat_jax.compress.layers import compress_layers
from sat_jax.compress.prune import Pruning, prune_matrix

__all__ = ["InputStatistics", "Pruning", "compress_layers", "prune_matrix"]
