"""Settings → the execution of a plan."""

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from sat_jax.errors import UserError
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import Layout
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.plan import Plan, neurons_of

if TYPE_CHECKING:
    from sat_jax.config import Config


def make_execution(
    config: "Config", layout: Layout[Decoder], plan: Plan, mesh: Mesh, criteria: Criteria
) -> Execution:
    """Return how the plan is trained. Raises `UserError` for kernels that cannot run here."""
    sparse, freeze = config.sparsity, config.optimizer.moments == "freeze"
    if neurons_of(layout).keeps_all(plan) and sparse.execution != "mask":
        return Gather(layout, plan)
    if sparse.refresh_every == 0:
        masked = sparse.execution == "mask"
        return Dynamic(layout, plan, criteria=criteria, masked=masked, freeze=freeze)
    match sparse.execution:
        case "gather":
            return Gather(layout, plan, sparse.dense_forward)
        case "mask":
            return Mask(layout, plan, sparse.dense_forward, freeze)
        case _:
            kernel = KernelConfig(sparse.block, config.model.kernels)
            _check_kernel(config, kernel, layout, mesh)
            return Kernel(layout, plan, sparse.dense_forward, kernel)


def _check_kernel(
    config: "Config", kernel: KernelConfig, layout: Layout[Decoder], mesh: Mesh
) -> None:
    if mesh.size > 1:
        raise UserError(
            f"sparsity.execution 'kernel' on {mesh.size} devices; accepted: one, or another"
            " execution"
        )
    _, leaf = next(layout.with_role("write"))
    width = layout.shapes[next(layout.with_role("write"))[0]].shape[leaf.axis("embed")]
    if reason := kernel.refusal(config.model.dtype, width, mesh.devices.flat[0]):
        raise UserError(f"sparsity.execution 'kernel': {reason}")
