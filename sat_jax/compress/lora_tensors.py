"""Factors of adapted parameters ↔ the matrices A `[r, in]` and B `[out, r]` of a module in PEFT.

The functions convert one layer of one tensor that a model type declares. It may hold several
parameters (query, key and value), of which some have no adapter.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sat_jax.models.formats import Shape, Stored


class PeftTensors(NamedTuple):
    """The tensors of a module; `magnitude` `[out]` is that of DoRA."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


class Adapter(NamedTuple):
    """`left` `[*units, r]`, `right` `[r, D]` and `magnitude` of one parameter in one layer."""

    left: np.ndarray
    right: np.ndarray
    magnitude: np.ndarray | None
    scale: float = 1.0


def to_peft(
    place: Stored, shapes: Sequence[Shape], adapters: Sequence[Adapter | None], writes: bool
) -> PeftTensors:
    """Return the tensors of a module from the adapters of its parameters, which `place` stores with
    these shapes; None: no adapter.

    Each A has rows of its own, which only its own parameter reads. The scale is that of the first
    adapter; B of others is multiplied where theirs differs.
    """
    rows, used = _rows(place), [adapter for adapter in adapters if adapter is not None]
    if writes:
        return PeftTensors(rows.join([used[0].left]).T, used[0].right.T, used[0].magnitude)
    right = np.concatenate([adapter.right for adapter in used])
    start, lefts = 0, []
    for shape, adapter in zip(shapes, adapters, strict=True):
        left = np.zeros((*shape[:-1], len(right)), np.float32)
        if adapter is not None:
            stop = start + len(adapter.right)
            left[..., start:stop] = adapter.scale / used[0].scale * adapter.left
            start = stop
        lefts.append(left)
    columns = [a.magnitude[..., None] for a in used if a.magnitude is not None]
    magnitude = rows.join(columns)[:, 0] if columns else None
    return PeftTensors(right, rows.join(lefts), magnitude)


def from_peft(
    place: Stored, shapes: Sequence[Shape], tensors: PeftTensors, writes: bool
) -> list[Adapter]:
    """Return the adapter of each parameter, all with scale 1: the inverse of `to_peft`, but every
    parameter has the whole A."""
    rows, a, b = _rows(place), tensors.a, tensors.b
    columns = [(*shape[:-1], len(a)) for shape in shapes]
    if writes:
        return [Adapter(rows.split(a.T, columns)[0], b.T, tensors.magnitude)]
    magnitudes: list[np.ndarray | None] = [None] * len(shapes)
    if tensors.magnitude is not None:
        ones = [(*shape[:-1], 1) for shape in shapes]
        magnitudes = [part[..., 0] for part in rows.split(tensors.magnitude[:, None], ones)]
    lefts = rows.split(b, columns)
    return [Adapter(left, a, magnitude) for left, magnitude in zip(lefts, magnitudes, strict=True)]


def sizes(place: Stored, shapes: Sequence[Shape], writes: bool) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of the module."""
    out, inner = _rows(place).shape(shapes)
    return (out, inner) if writes else (inner, out)


def _rows(place: Stored) -> Stored:
    """Return the place of factors, which PEFT stores as `[out, r]` also where the weight of the
    module is transposed."""
    return dataclasses.replace(place, layout="rows")
