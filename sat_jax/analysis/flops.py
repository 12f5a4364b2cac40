"""Floating-point operations of a step, counted from shapes.

Counted are matrix products, two operations a multiply-add. Left out, all of them O(D) a token or
less: norms, rotary embedding, softmax, activations, embedding look-up, loss, input statistics, the
optimizer, and the scoring of neurons, at a refresh or inside a layer.

Attention is counted for the causal half: query t of a row of T tokens meets t keys, (T + 1) / 2 on
average. A row that packs several documents needs less and is counted the same, as throughput
figures in the literature are.
"""

import dataclasses
from collections.abc import Sequence

from sat_jax.models.llama import Remat
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.sparsity.plan import Segment


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Operations a token: query, key, value and output projections; q·k and weights·v; gate, up and
    down; logits."""

    attention_projections: float
    attention_scores: float
    mlp: float
    head: float

    @property
    def neurons(self) -> float:
        """What heads and channels cost: all but the logits."""
        return self.attention_projections + self.attention_scores + self.mlp

    @property
    def total(self) -> float:
        return self.neurons + self.head

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            self.attention_projections + other.attention_projections,
            self.attention_scores + other.attention_scores,
            self.mlp + other.mlp,
            self.head + other.head,
        )


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
    """Operations a token of one step: forward, backward, and what the backward pass computes
    again."""

    forward: FlopCount
    backward: FlopCount
    recomputed: FlopCount

    @property
    def all(self) -> FlopCount:
        """The three together."""
        return self.forward + self.backward + self.recomputed

    @property
    def total(self) -> float:
        return self.all.total


def forward_flops(
    config: LlamaConfig, row_length: int, segments: Sequence[Segment] | None = None
) -> FlopCount:
    """Operations a token of a forward pass with logits, on rows of `row_length` tokens.

    `segments` None: the dense model. What only the backward pass omits is left out.
    """
    keys = (row_length + 1) / 2
    projections = scores = mlp = 0.0
    for segment in segments or (config.dense,):
        heads = segment.kv_groups * segment.query_heads
        queries, key_values = heads * config.head_dim, segment.kv_groups * config.head_dim
        projections += segment.layers * 2 * config.d_model * (2 * queries + 2 * key_values)
        scores += segment.layers * 2 * 2 * queries * keys
        mlp += segment.layers * 3 * 2 * config.d_model * segment.channels
    return FlopCount(projections, scores, mlp, 2 * config.d_model * config.vocab_size)


def training_flops(
    config: LlamaConfig,
    row_length: int,
    segments: Sequence[Segment] | None = None,
    remat: Remat = "none",
    kernels: bool = False,
) -> TrainingFlops:
    """Operations a token of a training step; `segments` as in `forward_flops`.

    Every matrix product costs its double in the backward pass: one product for each operand's
    gradient. Attention scores are always computed again there (Dao et al., arXiv:2205.14135). What
    `remat` adds: `dots` saves projections and MLP products but not attention, which runs again;
    `full` runs the layer again, all but the down projection, whose value no gradient needs. The
    logits are never computed again: the loss forms its gradient in the forward pass. `kernels`:
    segments that omit channels save nothing of the MLP, and gate and up run again whatever `remat`
    is.
    """
    forward = forward_flops(config, row_length, segments)
    backward = forward + forward
    again = FlopCount(0.0, forward.attention_scores / 2, 0.0, 0.0)
    if remat != "none":
        again += FlopCount(0.0, forward.attention_scores, 0.0, 0.0)
    if remat == "full":
        again += FlopCount(forward.attention_projections, 0.0, forward.mlp * 2 / 3, 0.0)
    if kernels and remat != "full":
        sparse = [s for s in segments or () if s.channels < config.d_ff]
        mlp = forward_flops(config, row_length, sparse).mlp if sparse else 0.0
        again += FlopCount(0.0, 0.0, mlp * 2 / 3, 0.0)
    # Of omitted neurons that the forward pass has, the backward pass needs what heads have added.
    beside = [config.omitted(s) for s in segments or () if s.forward_all]
    for one in (forward_flops(config, row_length, [segment]) for segment in beside):
        forward += FlopCount(one.attention_projections, one.attention_scores, one.mlp, 0.0)
        if remat == "full":
            again += FlopCount(one.attention_projections, one.attention_scores, 0.0, 0.0)
    return TrainingFlops(forward, backward, again)


def probe_flops(
    config: LlamaConfig, row_length: int, gradients: bool = False, products: bool = False
) -> float:
    """Operations a token of a probe: a dense forward pass without logits. With `gradients`, one
    with the loss and its gradient, and a backward pass to activations but not to weights: half of
    a whole one, with the attention scores computed again. `products`: those of all pairs of a
    layer's columns, of heads and of channels."""
    forward = forward_flops(config, row_length)
    columns = (config.n_heads * config.head_dim) ** 2 + config.d_ff**2
    pairs = config.n_layers * 2.0 * columns if products else 0.0
    if not gradients:
        return forward.neurons + pairs
    scores = forward.attention_scores
    return forward.total + (forward.total - scores) + 2 * scores + scores / 2 + pairs


def compensation_flops(config: LlamaConfig, segments: Sequence[Segment]) -> float:
    """Operations of solving for what the kept rows of output matrices get, once: k kept columns of
    C have k² / 2 products of their own (Cholesky, k³ / 3), with the others k (C - k), and D right
    sides."""
    total = 0.0
    for segment in segments:
        heads = segment.kv_groups * segment.query_heads * config.head_dim
        for kept, columns in (
            (heads, config.n_heads * config.head_dim),
            (segment.channels, config.d_ff),
        ):
            if kept < columns:
                sides = 2 * config.d_model * (kept * (columns - kept) + kept**2)
                total += segment.layers * (kept**3 / 3 + sides)
    return total


def speedup_bound(
    config: LlamaConfig, row_length: int, segments: Sequence[Segment], remat: Remat = "none"
) -> float:
    """Operations of a dense step ÷ operations of one with `segments`: the speed-up that is possible
    at most."""
    dense = training_flops(config, row_length, remat=remat)
    return dense.total / training_flops(config, row_length, segments, remat).total
