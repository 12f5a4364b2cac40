"""Which layers can spare neurons: the rise of the loss where one block of layers alone omits some.

Everything is measured by one compiled program: a forward pass whose gates are 0 for what a block
omits and 1 for the rest.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sat_jax.data.batch import Batch
from sat_jax.data.batches import in_order, open_split
from sat_jax.errors import UserError
from sat_jax.models.llama import Compute
from sat_jax.models.params import abstract, bind, numbered
from sat_jax.sparsity.budget import Sensitivity
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.masks import Criteria, Masks, choose
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.statistics import Gates
from sat_jax.train.account import Account, kept_shares
from sat_jax.train.probe import observed
from sat_jax.train.setup import Task, initial_params, shape_of

Loss = Callable[[Gates], float]


def calibrate(task: Task, blocks: int, rows: int, log: Callable[[str], None]) -> Sensitivity:
    """Measures a model at the rates of its settings, on `rows` training rows; neurons are chosen by
    the settings' metric, from the first rows.

    `blocks` runs of layers, of equal length but for one layer. Raises `UserError` for settings that
    omit no heads or no channels.
    """
    config, neurons = task.config, task.controller.neurons
    attention, mlp = config.rates
    if not (attention and mlp):
        raise UserError(
            "a calibration is made at the rates of a run; accepted: sparsity.rate above 0, and no 0"
            " in sparsity.rate_attention and rate_mlp"
        )
    plan = make_plan(
        neurons,
        attention,
        mlp,
        attention_unit=config.sparsity.attention_unit,
        block=config.sparsity.block,
        balance=config.sparsity.balance or config.mesh.tensor,
    )
    kept = kept_shares(plan, neurons)
    for module, rate, share in zip(("attention", "mlp"), (attention, mlp), kept, strict=True):
        if share == 1:
            raise UserError(
                f"sparsity.rate_{module} {rate} omits nothing: it rounds to no whole unit of a"
                " layer; accepted for a calibration: a higher one"
            )
    at_once = min(rows, config.train.rows_per_step // config.train.accumulate)
    batches = list(in_order(open_split(task.data, "train"), at_once, rows))
    with jax.set_mesh(task.mesh):
        params = initial_params(task)
        omitting = _gates(task, plan, params, batches[0])
        loss = _loss(task, params, batches)
        borders = [round(b * neurons.layers / blocks) for b in range(blocks + 1)]
        heads, channels = _rises(loss, omitting, borders, log)
    return Sensitivity(
        tuple(borders),
        *(1 - kept[0], 1 - kept[1]),
        *(tuple(heads), tuple(channels)),
        *(shape_of(task.model), config.sparsity.metric),
    )


def _rises(
    loss: Loss, omitting: Gates, borders: Sequence[int], log: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """By how much the loss rises without what each block omits: heads, and channels."""
    whole = jax.tree.map(jnp.ones_like, omitting)
    dense = loss(whole)
    log(f"dense: loss {dense:.4f}")
    heads, channels = [], []
    for start, stop in itertools.pairwise(borders):
        some = slice(start, stop)
        without_heads = whole.heads.at[some].set(omitting.heads[some])
        without_channels = whole.channels.at[some].set(omitting.channels[some])
        heads.append(loss(whole._replace(heads=without_heads)) - dense)
        channels.append(loss(whole._replace(channels=without_channels)) - dense)
        log(
            f"layers {start} to {stop - 1}: {heads[-1]:+.4f} without heads,"
            f" {channels[-1]:+.4f} without channels"
        )
    return heads, channels


def _gates(task: Task, plan: Plan, params: dict[str, Array], batch: Batch) -> Gates:
    """0 for what every layer omits by the settings' metric, 1 for what it keeps."""
    config, neurons = task.config, task.controller.neurons
    sparse = config.sparsity
    graph, _ = abstract(task.model, compute=_compute(task))
    criteria = Criteria(sparse.metric, sparse.aggregate, sparse.selection, sparse.temperature)

    def masks(params: dict[str, Array], batch: Batch) -> Masks:
        needs = METRICS[sparse.metric].needs
        stats = observed(bind(graph, numbered(params)), batch, needs)
        return choose(params, stats, plan, neurons, criteria, jax.random.key(config.seed))

    # The counts of kept neurons that an account makes of one selection are its gates: every layer
    # omits some heads and some channels, so that each has been counted.
    account = Account(task.controller)
    account.count(plan, jax.jit(masks)(params, batch))
    return Gates(
        jnp.asarray(account.kept["heads"], jnp.float32),
        jnp.asarray(account.kept["channels"], jnp.float32),
    )


def _loss(task: Task, params: dict[str, Array], batches: Sequence[Batch]) -> Loss:
    """Gates → mean loss a token over the batches."""
    graph, _ = abstract(task.model, compute=_compute(task))
    tokens = sum(int(np.sum(batch.loss_mask)) for batch in batches)

    @jax.jit
    def total(params: dict[str, Array], batch: Batch, gates: Gates) -> Array:
        return bind(graph, numbered(params)).loss(*batch, gates=gates)[0]

    return lambda gates: sum(float(total(params, batch, gates)) for batch in batches) / tokens


def _compute(task: Task) -> Compute:
    model = task.config.model
    return Compute(model.dtype, model.remat, model.loss_chunk, model.attention)
