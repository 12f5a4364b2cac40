"""Floating-point operations of a step, counted from the axes of a model's parameters.

Counted are matrix products, two operations a multiply-add. Left out, all of them O(D) a token or
less: norms, rotary embedding, softmax, activations, embedding look-up, loss, input statistics, the
optimizer, and the scoring of units at a refresh.

Attention is counted for the causal half: query t of a row of T tokens meets t keys, (T + 1) / 2 on
average. A row that packs several documents needs less and is counted the same, as throughput
figures in the literature are.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from sat_jax.nn.layout import Layout
from sat_jax.nn.param import CHANNEL, EMBED_PAIR
from sat_jax.nn.sampled_tokens import sampled_tokens
from sat_jax.nn.stack import Remat
from sat_jax.sparsity.plan import Dropped, Neurons, Passes, Segment, neurons_of


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Operations a token. Of all branches: products with weights that read the residual stream and
    with weights that write to it, and what mixes tokens (q · k and weights · v). `last_write` is
    the part of `write` of each layer's last branch, whose value no gradient needs; `mlp_read` the
    part of `read` of MLPs. `head`: logits.

    `frozen` is the part of all products with weights whose weights are not trained.
    """

    read: float = 0.0
    write: float = 0.0
    mixing: float = 0.0
    head: float = 0.0
    last_write: float = 0.0
    mlp_read: float = 0.0
    frozen: float = 0.0

    @property
    def products(self) -> float:
        """Products with the weights of layers."""
        return self.read + self.write

    @property
    def layers(self) -> float:
        """What heads and channels cost: all but the logits."""
        return self.products + self.mixing

    @property
    def total(self) -> float:
        """All operations."""
        return self.layers + self.head

    def __add__(self, other: "FlopCount") -> "FlopCount":
        names = [field.name for field in dataclasses.fields(self)]
        return FlopCount(*(getattr(self, n) + getattr(other, n) for n in names))


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
    """Operations a token of one step: forward, backward, and what the backward pass computes
    again."""

    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.forward + self.backward + self.recomputed


def forward_flops(
    layout: Layout[Any],
    row_length: int,
    segments: Sequence[Segment] | None = None,
    sparse_base: float | None = None,
) -> FlopCount:
    """Return the operations a token of a forward pass with logits, on rows of `row_length` tokens.

    `segments` None: the dense model. Units that the segments omit are left out. `sparse_base`: of
    frozen weights alone, and for all tokens but this share; None: of all weights, and of attention.
    """
    neurons = neurons_of(layout)
    head = _head_flops(layout)
    count = FlopCount(head=head, frozen=0.0 if _trains_head(layout) else head)
    for segment in segments or (neurons.dense_segment(),):
        kept = {name: neurons.kept_share(segment, name) for name in layout.branches}
        sizes = _kept_sizes(segment)
        if sparse_base is None:
            count += _segment_flops(layout, row_length, segment, sizes, kept)
            continue
        mean = {n: sparse_base * neurons.size(n) + (1 - sparse_base) * k for n, k in sizes.items()}
        all_units = (_sizes(neurons), dict.fromkeys(kept, 1.0))
        count += _segment_flops(layout, row_length, segment, *all_units, frozen_sizes=mean)
    return count


def training_flops(
    layout: Layout[Any],
    row_length: int,
    segments: Sequence[Segment] | None = None,
    remat: Remat = "none",
    *,
    kernels: bool = False,
    fused_mlp: bool = False,
    passes: Passes = "all",
    dropped: Dropped = (),
    token_rate: float = 0.0,
    sparse_base: float | None = None,
) -> TrainingFlops:
    """Return the operations a token of a training step; `segments` as in `forward_flops`.

    Every matrix product costs its double in the backward pass: one product for each operand's
    gradient, of which frozen weights have none. Attention scores are always computed again there
    (Dao et al., arXiv:2205.14135). What `remat` adds: `dots` saves products with weights but not
    attention, which runs again; `full` runs the layer again, all but its last product, whose value
    no gradient needs. The logits are never computed again: the loss forms its gradient in the
    forward pass. `kernels`: segments that omit channels save nothing of the MLP, and what its
    channels read runs again whatever `remat` is. `fused_mlp`: so do all MLPs. `passes`: `backward`
    computes the omitted units in the forward pass too, and `weights` all but the gradients of their
    weights. For products with weights alone and a share k of kept units, a dense step then costs at
    most 3 / (1 + 2k) and 3 / (2 + k) times as much. `dropped`: backward passes of branches that are
    left out, on average.
    `token_rate`: share of the tokens that weight gradients of branches leave out. `sparse_base`: as
    in `forward_flops`.
    """
    kept = forward = forward_flops(layout, row_length, segments, sparse_base)
    if passes == "weights" and segments:
        units = neurons_of(layout).dense_segment().counts
        dense_segments = [dataclasses.replace(segment, counts=units) for segment in segments]
        forward = forward_flops(layout, row_length, dense_segments)
    sampled = sampled_tokens(token_rate, row_length) / row_length
    backward = 2 * forward.total - (forward.products - sampled * kept.products)
    backward -= kept.frozen
    again = forward.mixing / 2
    if remat != "none":
        again += forward.mixing
    if remat == "full":
        again += forward.products - forward.last_write
    neurons = neurons_of(layout)
    omitting = [s for s in segments or () if neurons.omitted(s)]
    if kernels and remat != "full":
        sparse = [s for s in omitting if s.kept(CHANNEL) < neurons.size(CHANNEL)]
        again += forward_flops(layout, row_length, sparse).mlp_read if sparse else 0.0
    if fused_mlp and remat != "full":
        again += forward.mlp_read
    total = forward.total
    if passes == "backward":
        for segment in omitting:
            # The backward pass needs the residual stream behind each branch but the last.
            beside = _omitted_flops(layout, neurons, row_length, segment)
            total += beside.layers
            if remat == "full":
                again += beside.layers - beside.last_write - beside.mlp_read
    saved = _dropped_flops(layout, row_length, segments, remat, passes, dropped, sampled)
    return TrainingFlops(total, backward - saved.backward, again - saved.recomputed)


def _dropped_flops(
    layout: Layout[Any],
    row_length: int,
    segments: Sequence[Segment] | None,
    remat: Remat,
    passes: Passes,
    dropped: Dropped,
    sampled: float,
) -> TrainingFlops:
    """Return the mean operations of the backward passes of branches that are left out, with what
    these alone compute again: later branches need the output of all but the last branch."""
    last = list(layout.branches)[-1]
    neurons = neurons_of(layout)
    backward = recomputed = 0.0
    for segment in segments or (neurons.dense_segment(),):
        for name, rates in dropped:
            kept = _branch_flops(layout, row_length, segment, name, _kept_sizes(segment))
            full = kept
            if passes == "weights":
                full = _branch_flops(layout, row_length, segment, name, _sizes(neurons))
            rate = statistics.fmean(rates[segment.start : segment.stop])
            backward += rate * (2 * full.layers - (full.products - sampled * kept.products))
            again = full.mixing / 2
            if remat == "dots" or (remat == "full" and name == last):
                again += full.mixing
            if remat == "full" and name == last:
                again += full.products - full.last_write
            recomputed += rate * again
    return TrainingFlops(0.0, backward, recomputed)


def probe_flops(layout: Layout[Any], row_length: int, gradients: bool = False) -> float:
    """Return the operations a token of a probe without its observations: a dense forward pass
    without logits. With `gradients`, one with the loss and its gradient, and a backward pass to
    activations but not to weights: half of a full one, with attention scores computed again."""
    forward = forward_flops(layout, row_length)
    if not gradients:
        return forward.layers
    mixing = forward.mixing
    return forward.total + (forward.total - mixing) + 2 * mixing + mixing / 2


def traced_flops(
    function: Callable[..., Any],
    *arguments: Any,
    conditional: Callable[[Sequence[float]], float] = min,
) -> float:
    """Return the operations of all matrix products of a function: every iteration of a scan, but
    one of a loop whose length is not known. `conditional` chooses among the cases of a conditional:
    the fewest operations are those of stored blocks alone, or without a backward pass. Inner
    products of vectors are sums, and not counted."""
    return _products_of(jax.make_jaxpr(function)(*arguments).jaxpr, conditional)


def _products_of(jaxpr: Any, conditional: Callable[[Sequence[float]], float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            if equation.outvars[0].aval.ndim > len(batch):
                total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        inner = [_products_of(part, conditional) for part in _inner_jaxprs(equation.params)]
        if equation.primitive.name == "cond":
            total += conditional(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr"):
                yield part.jaxpr


def correction_flops(layout: Layout[Any], segments: Sequence[Segment]) -> float:
    """Return the operations of the least-squares corrections of a selection, once: k kept columns
    of C have k² / 2 products of their own (Cholesky, k³ / 3), with the others k (C - k), and D
    right sides."""
    total, neurons = 0.0, neurons_of(layout)
    for segment in segments:
        for (name, _), columns in zip(layout.branches.items(), _columns(layout), strict=True):
            kept = columns * neurons.kept_share(segment, name)
            if kept < columns:
                sides = 2 * _width(layout) * (kept * (columns - kept) + kept**2)
                total += segment.layers * (kept**3 / 3 + sides)
    return total


def speedup_bound(
    layout: Layout[Any],
    row_length: int,
    segments: Sequence[Segment],
    remat: Remat = "none",
    **options: Any,
) -> float:
    """Return the operations of a dense step ÷ those of one with `segments`: the highest possible
    speed-up. `options` are those of `training_flops`."""
    dense = training_flops(layout, row_length, remat=remat)
    return dense.total / training_flops(layout, row_length, segments, remat, **options).total


def _kept_sizes(segment: Segment) -> dict[str, float]:
    return {name: float(kept) for name, kept in segment.counts}


def _sizes(neurons: Neurons) -> dict[str, float]:
    return {unit.name: float(unit.size) for unit in neurons.units}


def _branch_flops(
    layout: Layout[Any], row_length: int, segment: Segment, name: str, sizes: dict[str, float]
) -> FlopCount:
    """Return the operations of one branch in a segment's layers where units have these sizes."""
    share = math.prod(sizes[unit] / layout.units[unit].size for unit in layout.branches[name].units)
    shares = dict.fromkeys(layout.branches, 0.0) | {name: share}
    return _segment_flops(layout, row_length, segment, sizes, shares)


def _omitted_flops(
    layout: Layout[Any], neurons: Neurons, row_length: int, segment: Segment
) -> FlopCount:
    """Return what computing the segment's omitted units costs: in each branch that omits some, all
    its arrays with an axis of theirs at the omitted size, its other arrays in full."""
    sizes = _sizes(neurons)
    shares = dict.fromkeys(layout.branches, 0.0)
    for unit in neurons.omitted(segment):
        sizes[unit.name] = float(unit.size - segment.kept(unit.name))
        shares[unit.branch] = 1 - neurons.kept_share(segment, unit.branch)
    return _segment_flops(layout, row_length, segment, sizes, shares)


def _segment_flops(
    layout: Layout[Any],
    row_length: int,
    segment: Segment,
    sizes: dict[str, float],
    shares: dict[str, float],
    frozen_sizes: dict[str, float] | None = None,
) -> FlopCount:
    """Return the operations of a segment's layers where units have these sizes, in frozen weights
    `frozen_sizes` if given; branches whose share of innermost units is 0 are left out. Tokens that
    skip the layers cost nothing there, and the others meet fewer tokens in them."""
    tokens = segment.tokens(row_length)
    last = list(layout.branches)[-1]
    count = FlopCount()

    def product(path: str) -> float:
        own = frozen_sizes if frozen_sizes and not layout.leaves[path].trained else sizes
        return 2 * _size(layout, path, own)

    for name, branch in layout.branches.items():
        if shares[name] == 0:
            continue
        read, write = (
            sum(map(product, _matrices(layout, name, role))) for role in ("read", "write")
        )
        frozen = sum(
            product(path)
            for path in _matrices(layout, name, "read", "write")
            if not layout.leaves[path].trained
        )
        units = shares[name] * layout.totals(branch.units[-1])
        one = FlopCount(
            read,
            write,
            units * branch.mixing_flops(tokens),
            last_write=write if name == last else 0.0,
            mlp_read=read if branch.units[-1] == CHANNEL else 0.0,
            frozen=frozen,
        )
        count += _times(one, segment.layers * tokens / row_length)
    return count


def _matrices(layout: Layout[Any], branch: str, *roles: Any) -> Iterator[str]:
    for path, _ in layout.with_role(*roles):
        if path.startswith(f"layers/{branch}/"):
            yield path


def _size(layout: Layout[Any], path: str, sizes: dict[str, float]) -> float:
    """Return how many weights a layer of an array has where units have these sizes."""
    leaf, shape = layout.leaves[path], layout.shapes[path].shape
    axes = zip(leaf.axes[1:], shape[1:], strict=True)
    entries = math.prod(sizes.get(name, float(size)) for name, size in axes)
    return 2 * entries if EMBED_PAIR in leaf.axes else entries


def _times(count: FlopCount, factor: float) -> FlopCount:
    values = dataclasses.asdict(count)
    return FlopCount(**{name: factor * value for name, value in values.items()})


def _head_flops(layout: Layout[Any]) -> float:
    """Return the operations of the logits; the output embedding may be that of the tokens."""
    shape = next(
        layout.shapes[path].shape for path, leaf in layout.leaves.items() if "vocab" in leaf.axes
    )
    return 2.0 * math.prod(shape)


def _trains_head(layout: Layout[Any]) -> bool:
    """Whether the output embedding is trained; all embeddings are, or none."""
    return next(leaf.trained for leaf in layout.leaves.values() if "vocab" in leaf.axes)


def _columns(layout: Layout[Any]) -> list[int]:
    """Return how many columns the activations of each branch have."""
    width = _width(layout)
    return [
        sum(
            math.prod(layout.shapes[p].shape[1:]) // width for p in _matrices(layout, name, "write")
        )
        for name in layout.branches
    ]


def _width(layout: Layout[Any]) -> int:
    path, _ = next(layout.with_role("write"))
    return layout.shapes[path].shape[-1]
