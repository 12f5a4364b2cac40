"""Block-sparse matrix products: see `api`."""

from kernels.block_sparse_matmul.api import (
    column_matmul,
    row_matmul,
    sampled_matmul,
    swiglu_mlp,
)
from kernels.block_sparse_matmul.backends import choose, explain
from kernels.block_sparse_matmul.patterns import BlockMask, KeptRows, Pattern, kept_rows

__all__ = [
    "BlockMask",
    "KeptRows",
    "Pattern",
    "choose",
    "column_matmul",
    "explain",
    "kept_rows",
    "row_matmul",
    "sampled_matmul",
    "swiglu_mlp",
]
