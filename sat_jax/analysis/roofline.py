"""Bytes, bounds and times of operators, kernel by kernel and fused (Williams et al., 2009).

A kernel moves each array that it reads or writes once, and its time is the larger of FLOPs ÷ peak
and bytes ÷ bandwidth. Kernels follow each other. This is a lower limit of the time: it leaves out
launches, communication, products smaller than the matrix units, and operands that are read again
because they do not fit on the chip.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from sat_jax.analysis.devices import Device
from sat_jax.analysis.operators import (
    Kind,
    Operator,
    Setting,
    Tensor,
    operators,
    stored_share,
    stored_values,
)
from sat_jax.models.build import layout_of
from sat_jax.models.presets import preset, resized
from sat_jax.nn.layout import Layout

_FLOAT32 = 4

Bound = Literal["compute", "memory"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of an operator of `group` or of the fused group, and how often a step calls it.

    `bytes`: from and to device memory, with `index_bytes` of block indices. `on_chip`: bytes that
    must fit on the chip so that each array moves once; None where nothing is fused.
    """

    name: str
    group: str
    calls: int
    flops: float
    bytes: float
    index_bytes: float
    on_chip: float | None = None

    @property
    def intensity(self) -> float:
        """Operational intensity, FLOP/byte."""
        return self.flops / self.bytes

    def bound(self, device: Device) -> Bound:
        """Return what limits a call."""
        return "compute" if self.intensity >= device.ridge else "memory"

    def seconds(self, device: Device) -> float:
        """Return the least time of all calls of a step."""
        return self.calls * max(self.flops / device.peak_flops, self.bytes / device.bandwidth)


class Roofline(NamedTuple):
    """A step kernel by kernel and with fused groups. `state_bytes`: weights in the dtype of the
    products; with training also gradients, float32 parameters and both moments. `stored_share`: of
    the layers' matrices."""

    setting: Setting
    kernels: list[Kernel]
    groups: list[Kernel]
    state_bytes: float
    stored_share: float


def roofline(layout: Layout[Any], setting: Setting) -> Roofline:
    """Return the kernels of a step. Raises `UserError` as `operators` does."""
    step = operators(layout, setting)
    # Of each value: the copy for products; with training its gradient, and three float32.
    value = 2 * setting.value_bytes + 3 * _FLOAT32 if setting.training else setting.value_bytes
    state = stored_values(layout, setting) * value
    kernels, groups = [_kernel(operator) for operator in step], fused(step, setting)
    return Roofline(setting, kernels, groups, state, stored_share(layout, setting))


def step_seconds(kernels: Iterable[Kernel], device: Device) -> float:
    """Return the least time of kernels that run one after the other."""
    return sum(kernel.seconds(device) for kernel in kernels)


def mlp_seconds(width: int, channels: int, setting: Setting, device: Device) -> tuple[float, float]:
    """Return the least time of a GELU MLP with its gradients: kernel by kernel, without norm and
    residual, and fused with them."""
    sizes = {"d_model": width, "d_ff": channels, "n_layers": 1, "n_heads": 1}
    result = roofline(layout_of(resized(preset("gpt-13b"), sizes)), setting)
    alone = [k for k in result.kernels if k.name.startswith("mlp") and not _is_of_stream(k.name)]
    groups = [group for group in result.groups if group.name.startswith("mlp")]
    return step_seconds(alone, device), step_seconds(groups, device)


def _is_of_stream(name: str) -> bool:
    return "norm" in name or "residual" in name


def overlapped_seconds(kernels: Sequence[Kernel], device: Device) -> float:
    """Return the least time if all kernels ran at the same time, as a pipeline over several
    microbatches could at best: all FLOPs ÷ peak or all bytes ÷ bandwidth."""
    flops = sum(kernel.calls * kernel.flops for kernel in kernels)
    moved = sum(kernel.calls * kernel.bytes for kernel in kernels)
    return max(flops / device.peak_flops, moved / device.bandwidth)


def memory_bound_share(kernels: Sequence[Kernel], device: Device) -> float:
    """Return the share of the step's time in kernels that memory limits."""
    memory = [kernel for kernel in kernels if kernel.bound(device) == "memory"]
    return step_seconds(memory, device) / step_seconds(kernels, device)


def _kernel(operator: Operator) -> Kernel:
    arrays = (*operator.reads, *operator.writes)
    return Kernel(
        operator.name,
        operator.group,
        operator.calls,
        operator.flops,
        _bytes(arrays),
        _bytes(arrays, "index"),
    )


def fused(step: Sequence[Operator], setting: Setting) -> list[Kernel]:
    """Return one kernel for each group of operators.

    It reads once what it does not compute itself, and writes gradients and what other groups read.
    """
    groups: dict[str, list[Operator]] = {}
    for operator in step:
        groups.setdefault(operator.group, []).append(operator)
    inputs = {group: _inputs(members) for group, members in groups.items()}
    kernels = []
    for group, members in groups.items():
        elsewhere = {a for other in groups if other != group for a in inputs[other]}
        written = dict.fromkeys(array for operator in members for array in operator.writes)
        outputs = [a for a in written if a in elsewhere or a.kind in ("weight", "gradient")]
        moved = [*inputs[group], *outputs]
        on_chip = _on_chip(members, inputs[group], outputs, setting) if len(members) > 1 else None
        flops = sum(operator.flops for operator in members)
        sizes = _bytes(moved), _bytes(moved, "index")
        kernels.append(Kernel(group, group, members[0].calls, flops, *sizes, on_chip))
    return kernels


def _bytes(arrays: Iterable[Tensor], *kinds: Kind) -> float:
    """Return the bytes of the arrays of these kinds; none: of all."""
    return sum(array.bytes for array in arrays if not kinds or array.kind in kinds)


def _inputs(members: Sequence[Operator]) -> list[Tensor]:
    """Return the arrays that a fused group reads from memory. It computes again what follows
    element by element from others."""
    written = {array for operator in members for array in operator.writes}

    def stored(array: Tensor) -> Iterator[Tensor]:
        if array.sources and array not in written:
            for source in array.sources:
                yield from stored(source)
        elif array not in written:
            yield array

    reads = (array for operator in members for array in operator.reads)
    return [*dict.fromkeys(a for array in reads for a in stored(array))]


def _on_chip(
    members: Sequence[Operator],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    setting: Setting,
) -> float:
    """Return the least bytes on chip with which each array moves once, of two ways to do so.

    Weights stay on chip, and gradients of weights in float32, while tiles of tokens pass; attention
    needs what it reads of a row. Or the tokens of the residual stream stay, sums over channels in
    float32, while tiles of channels and their weights pass.
    """
    block, exact = setting.block, _FLOAT32 / setting.value_bytes
    arrays = [*dict.fromkeys(a for op in members for a in (*op.reads, *op.writes))]
    rows = {a for op in members if op.mixes for a in op.reads if a.kind == "unit"}

    def tokens_of(array: Tensor) -> int:
        return setting.row_length if array in rows else min(block, setting.tokens)

    weights_stay = _bytes(arrays, "weight", "index") + exact * _bytes(arrays, "gradient")
    weights_stay += sum(
        a.bytes * tokens_of(a) / setting.tokens for a in arrays if a.kind in ("stream", "unit")
    )
    tokens_stay = _bytes(inputs, "stream") + exact * _bytes(outputs, "stream")
    for array in arrays:
        if array.kind == "sum":  # in the place of the gradient
            continue
        tile = array.bytes * min(1, block / array.width)
        tokens_stay += exact * tile if array.kind == "gradient" else tile
    return min(weights_stay, tokens_stay)
