"""Block-sparse matrix products; `api` and `gelu_mlp` describe the functions."""

from kernels.block_sparse_matmul.api import (
    column_matmul,
    row_matmul,
    sampled_matmul,
    swiglu_mlp,
)
from kernels.block_sparse_matmul.backends import choose, explain
from kernels.block_sparse_matmul.gelu_mlp import gelu_mlp
from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern, kept_rows
from kernels.block_sparse_matmul.reference import ACTIVATIONS, Activation
from kernels.block_sparse_matmul.tuned import Matrix

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "BlockMask",
    "KeptRows",
    "Matrix",
    "Pattern",
    "choose",
    "column_matmul",
    "explain",
    "gelu_mlp",
    "kept_rows",
    "row_matmul",
    "sampled_matmul",
    "swiglu_mlp",
]
