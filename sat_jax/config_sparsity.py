"""The settings of what training leaves out."""

import dataclasses
from typing import Literal

from sat_jax.config_key import key
from sat_jax.nn.low_rank import RANK
from sat_jax.sparsity.block_patterns import Pattern
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import Passes
from sat_jax.sparsity.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class WeightSparsityConfig:
    density: float = key(
        1.0,
        "share of the blocks of matrices that are stored and trained where the schedule is at r0;"
        " 1: dense matrices",
        above=0.0,
        high=1.0,
    )
    block: int = key(64, "rows and columns of a block", low=8)
    matrices: Literal["all", "attention", "mlp"] = key(
        "all", "block-sparse matrices: those of all branches, of attention, or of MLPs"
    )
    pattern: Pattern = key(
        "random",
        "first blocks: random ones (random), with"
        " densities by the shapes of the matrices (erk), the largest (magnitude), or a flat block"
        " butterfly; blocks that a schedule adds later are those with the largest gradients",
    )
    update: Literal["none", "rigl"] = key(
        "none", "exchange of the smallest blocks for those with the largest gradients (rigl)"
    )
    update_every: int = key(100, "steps between exchanges of blocks", low=1)
    drop_fraction: float = key(
        0.3,
        "share of the blocks of a layer's matrix that an exchange drops: a cosine from this value"
        " to 0 at the end of the rung",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    rate: float = key(
        0.0, "omission rate r0 of heads and channels; 0: dense training", low=0.0, high=1.0
    )
    rate_attention: float | tuple[float, ...] | None = key(
        None, "r0 of heads, or one r0 per layer; None: rate", low=0.0, high=1.0
    )
    rate_mlp: float | tuple[float, ...] | None = key(
        None, "r0 of MLP channels, or one r0 per layer; None: rate", low=0.0, high=1.0
    )
    metric: str = key("output", "importance metric of neurons", choices=METRICS)
    selection: Literal["topk", "sample"] = key(
        "topk",
        "keep the neurons with the highest importance, or sample without replacement in proportion"
        " to importance",
    )
    schedule: Schedule = key(
        "ladder",
        "omission rate over steps; auto: a ladder whose phases end early at a loss plateau",
    )
    rungs: int = key(4, "number of phases in which the rate decreases to 0", low=1)
    dense_start: float = key(
        0.0, "fraction of the steps at the start that are dense", low=0.0, high=1.0
    )
    split: float = key(
        0.5, "fraction of the steps after which the rate starts to decrease", low=0.0, high=1.0
    )
    min_gain: float = key(
        0.005,
        "schedule auto: minimum relative decrease of the held-out loss; a phase ends below it",
        low=0.0,
        high=0.99,
    )
    refresh_every: int = key(
        10,
        "steps between selections of neurons; 0: per-batch selection inside each layer, with a"
        " metric of inputs or weights",
        low=0,
    )
    probe_tokens: int = key(1024, "tokens of the batch that a probe processes", low=1)
    stats_decay: float = key(
        0.9, "decay rate of the running statistics of probes", low=0.0, high=0.9999
    )
    attention_unit: Literal["kv_group", "query_head"] = key(
        "kv_group",
        "unit that is omitted in attention: KV groups, or query heads in each group; the same in"
        " multi-head attention",
    )
    dense_layers: tuple[int, ...] = key((), "layers in which nothing is omitted; -1 is the last")
    max_segments: int = key(
        4, "maximum number of segments (runs of layers that keep equal numbers)", low=1
    )
    block: int = key(1, "channels are selected in aligned blocks of this size", low=1)
    balance: int | None = key(
        None,
        "number of equal parts of a layer that keep equal numbers of neurons; None: mesh.tensor",
        low=1,
    )
    branch_rate: float | tuple[float, ...] = key(
        0.0,
        "probability r0 that a step omits the backward pass of a whole branch of a layer; or one"
        " r0 per layer",
        low=0.0,
        high=1.0,
    )
    branches: Literal["all", "attention", "mlp"] = key(
        "all", "branches to which branch_rate applies: all, those of attention, or MLPs"
    )
    token_rate: float = key(
        0.0,
        "share r0 of the tokens of a row that weight gradients omit; the others are sampled by"
        " importance and weighted, so that gradients are unbiased",
        low=0.0,
        high=0.99,
    )
    token_skip_rate: float = key(
        0.0,
        "share r0 of the tokens of a row that skip a layer, at random and in every layer anew; the"
        " first and the last layer process all tokens",
        low=0.0,
        high=0.99,
    )
    least_squares_correction: bool = key(
        False,
        "correct the kept output weights by least squares for the omitted neurons, from outputs"
        " observed by probes",
    )
    passes: Passes = key(
        "all",
        "passes in which neurons are omitted: all, the backward pass alone (backward), or the"
        " gradients of their weights alone (weights)",
    )
    adapters: Literal["sparse", "dense"] = key(
        "sparse",
        "adapters (lora) of omitted neurons: omitted as well (sparse), or computed and trained in"
        " all steps, so that frozen weights alone omit neurons (dense; SparseLoRA)",
    )
    predictor_rank: int = key(
        RANK,
        "adapters dense: rank of the approximations of frozen matrices by which the metrics svd and"
        " sparselora predict activations",
        low=1,
    )
    dense_answers: float = key(
        0.0,
        "adapters dense: share of the tokens of a row that may bear loss and are computed with all"
        " neurons; 0: none is, otherwise no row may have more",
        low=0.0,
        high=1.0,
    )
    execution: Literal["gather", "mask", "kernel"] = key(
        "gather",
        "gather the kept weights into a compact model (gather), multiply activations by 0 or 1"
        " (mask), or compute with blocks of the full weights (kernel)",
    )
    weights: WeightSparsityConfig = WeightSparsityConfig()
