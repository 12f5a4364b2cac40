"""Settings → the execution of a plan."""

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from sat_jax.errors import UserError
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.ops import Implementation, KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.sparse_base import SparseBase
from sat_jax.sparsity.plan import Plan, neurons_of

if TYPE_CHECKING:
    from sat_jax.config import Config


def make_execution(
    config: "Config", layout: Layout[Decoder], plan: Plan, mesh: Mesh, criteria: Criteria
) -> Execution:
    """Return how the plan is trained. Raises `UserError` for kernels that cannot run here."""
    sparse, freeze = config.sparsity, config.optimizer.moments == "freeze"
    for path, counts in plan.stored:
        width = counts.grid[1] * counts.block
        _check_kernel(config, f"sparsity.weights of {path}", counts.block, width, mesh)
    if neurons_of(layout).keeps_all(plan) and sparse.execution != "mask":
        return Gather(layout, plan)
    if sparse.refresh_every == 0:
        masked = sparse.execution == "mask"
        if sparse.adapters == "dense":
            share = sparse.dense_answers
            return SparseBase(layout, plan, criteria=criteria, masked=masked, dense_share=share)
        return Dynamic(layout, plan, criteria=criteria, masked=masked, freeze=freeze)
    match sparse.execution:
        case "gather":
            return Gather(layout, plan, sparse.passes)
        case "mask":
            return Mask(layout, plan, sparse.passes, freeze)
        case _:
            if mesh.size > 1:
                raise UserError(
                    f"sparsity.execution 'kernel' on {mesh.size} devices; accepted: one, or another"
                    " execution"
                )
            path, leaf = next(layout.with_role("write"))
            width = layout.shapes[path].shape[leaf.axis("embed")]
            _check_kernel(config, "sparsity.execution 'kernel'", sparse.block, width, mesh)
            kernel = KernelConfig(sparse.block, config.model.kernels)
            return Kernel(layout, plan, sparse.passes, kernel)


def kernels_of(config: "Config", mesh: Mesh) -> Implementation | None:
    """Return the kernels of block-sparse matrices by name; None chooses. On several devices only
    XLA can split products."""
    return "xla" if config.model.kernels is None and mesh.size > 1 else config.model.kernels


def _check_kernel(config: "Config", setting: str, block: int, width: int, mesh: Mesh) -> None:
    name = config.model.kernels
    if mesh.size > 1 and name not in (None, "xla"):
        raise UserError(
            f"{setting}: model.kernels {name!r} on {mesh.size} devices; accepted: one, or 'xla'"
        )
    kernel = KernelConfig(block, name)
    if reason := kernel.refusal(config.model.dtype, width, mesh.devices.flat[0]):
        raise UserError(f"{setting}: {reason}")
