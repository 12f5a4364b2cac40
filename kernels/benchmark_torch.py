"""The other side of `kernels.benchmark`: products with block-sparse matrices by PyTorch.

`torch_bsr` multiplies by matrices in its BSR layout, by Triton on CUDA; `torch_dense` by whole
ones, by cuBLAS. Of `mask` and `mask, both ways` alone. torch is imported where these are called,
and no other part of the kernels needs it.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax

from kernels.block_sparse_matmul.arg_specs import Spec
from kernels.measure import median_seconds

PROGRAMS = ("mask", "mask, both ways")
NOTE = "no autograd of BSR values: linear, linear by the transposed blocks, sampled_addmm (private)"


def absence() -> str | None:
    """Why there is nothing to measure; None: there is."""
    if jax.default_backend() != "gpu":
        return f"jax runs on {jax.default_backend()}, and they are compared on a GPU"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    torch: Any = importlib.import_module("torch")
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def measure(spec: Spec, program: str, implementation: str, repeat: int) -> dict[str, Any]:
    """The figures of a row, in bfloat16. Raises what torch does."""
    torch: Any = importlib.import_module("torch")
    made = {"torch_bsr": bsr, "torch_dense": dense}[implementation]
    call = made(spec, program, "cuda", torch.bfloat16)
    taken = median_seconds(call, lambda _: torch.cuda.synchronize(), repeat)
    row = {"seconds": taken, "repeat": repeat}
    both_by_parts = implementation == "torch_bsr" and program != "mask"
    return row | ({"note": NOTE} if both_by_parts else {})


def dense(spec: Spec, program: str, device: str, dtype: Any) -> Callable[[], Any]:
    """x · Wᵀ of whole matrices, and with both gradients by autograd."""
    torch: Any = importlib.import_module("torch")
    linear = torch.nn.functional.linear
    both = program != "mask"
    sizes = (spec.tokens, spec.width), (spec.neurons, spec.width)
    x, w = (torch.randn(*size, device=device, dtype=dtype, requires_grad=both) for size in sizes)

    def pulled() -> Any:
        y = linear(x, w)
        return (y, *torch.autograd.grad(y, (x, w), torch.sin(y.detach())))

    return pulled if both else lambda: linear(x, w)


def bsr(spec: Spec, program: str, device: str, dtype: Any) -> Callable[[], Any]:
    """The same where W is `[nonzero, block, block]` at the places of `spec.mask()`.

    Of the gradient by x and by these values torch has the parts alone: the second is returned as a
    matrix in BSR, and exists on CUDA only.
    """
    torch: Any = importlib.import_module("torch")
    linear = torch.nn.functional.linear
    kept = _kept(spec).to(device)
    x = torch.randn(spec.tokens, spec.width, device=device, dtype=dtype)
    values = torch.randn(int(kept.sum()), spec.block, spec.block, device=device, dtype=dtype)
    rows, columns = kept.nonzero(as_tuple=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout is in beta, said once
        w = _matrix(_starts(kept), columns, values, spec.neurons, spec.width)
    if program == "mask":
        return lambda: linear(x, w)
    # Where each block stands in the transposed matrix is known before, as it is to our kernels.
    order = torch.argsort(columns, stable=True)
    starts, columns = _starts(kept.T), rows[order]
    sampled = importlib.import_module("torch.sparse._triton_ops").sampled_addmm

    def pulled() -> Any:
        y = linear(x, w)
        dy = torch.sin(y)
        blocks = values[order].mT.contiguous()
        turned = _matrix(starts, columns, blocks, spec.width, spec.neurons)
        return y, linear(dy, turned), sampled(w, dy.T, x, beta=0.0)

    return pulled


def _kept(spec: Spec) -> Any:
    """The pattern as a matrix of 0 and 1, one entry a block."""
    torch: Any = importlib.import_module("torch")
    mask = spec.mask()
    kept = torch.zeros(mask.shape, dtype=torch.bool)
    kept[torch.tensor(mask.rows.tolist()), torch.tensor(mask.columns.tolist())] = True
    return kept


def _starts(kept: Any) -> Any:
    """How many blocks stand before each row of blocks, and before the end."""
    torch: Any = importlib.import_module("torch")
    counts = kept.sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _matrix(starts: Any, columns: Any, values: Any, height: int, width: int) -> Any:
    """In BSR."""
    torch: Any = importlib.import_module("torch")
    size = height, width
    return torch.sparse_bsr_tensor(starts, columns, values, size, check_invariants=False)
