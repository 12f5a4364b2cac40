"""Budgets of a compression: the setting of each matrix that fits, by its measured sensitivity."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sat_jax.compress.allocation import Option, allocate
from sat_jax.compress.layers import Matrix, check_matrices, matrices
from sat_jax.compress.method import ByMatrix
from sat_jax.compress.methods import OfMatrices
from sat_jax.compress.prune import Pruning
from sat_jax.compress.quantize import Quantization
from sat_jax.compress.sensitivity import Increases
from sat_jax.errors import UserError
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.flops import forward_flops

Setting = float | None
_UNIFORM_STEPS = 1000


class Allocation(NamedTuple):
    """The `method` of each matrix; its varied setting `values` by path and layer, None where the
    matrix stays as it is; and the `increase` of the loss in nats per token that the sum of the
    measured ones predicts, and that of the `uniform` setting that fits (None: no setting does)."""

    method: ByMatrix
    values: dict[str, list[Setting]]
    increase: float
    uniform: Setting
    uniform_increase: float | None


@dataclasses.dataclass(frozen=True)
class Budget:
    """The share of the bytes or of the FLOPs of the whole model before that a model may have after
    a compression of its matrices by `method`, whose varied setting is left open.

    Embeddings, norms, biases and the output head stay, and count. FLOPs are those of a forward pass
    with logits on rows of `row_length` tokens; zeros are neither stored nor multiplied, and factors
    are. `itemsize`: bytes of a weight that is not quantized. Raises `UserError` for a share that is
    not accepted, or that no choice of settings has.
    """

    method: OfMatrices
    kind: Literal["size", "flops"]
    share: float
    layout: Layout[Any]
    row_length: int
    itemsize: int

    def __post_init__(self) -> None:
        option = f"target {self.kind} {self.share:g}"
        if not 0 < self.share < 1:
            raise UserError(f"{option}; accepted: a share between 0 and 1")
        if self.kind == "flops" and isinstance(self.method, Quantization):
            raise UserError(
                f"{option} with method {self.method.method}: weights are dequantized when they are"
                " multiplied, so that FLOPs do not fall; accepted: a target size"
            )
        if isinstance(self.method, Pruning) and ":" in (self.method.pattern or ""):
            raise UserError(
                f"{option} with pattern {self.method.pattern}, which has one sparsity; accepted: no"
                " pattern, or a block pattern"
            )
        for setting in self.settings:
            if setting is not None:
                check_matrices(self.layout, self.with_setting(setting))
        lowest, highest = self.limits
        if not lowest <= self.share <= highest:
            raise UserError(
                f"{option}: {self.method.method} reaches {lowest:.3f} to {highest:.3f} of the"
                " model, whose embeddings and head stay; accepted: a share in between"
            )

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest share that a choice of settings has."""
        costs = [[self._cost(s, matrix) for s in self.settings] for matrix, _ in self._matrices()]
        lowest, highest = (sum(map(pick, costs)) for pick in (min, max))
        return (self._rest + lowest) / self._total, (self._rest + highest) / self._total

    @property
    def settings(self) -> list[Setting]:
        """The values of the varied setting that a matrix may get."""
        varied = self.method.varied
        if varied.step is None:
            return list(varied.measured)
        first, last = varied.measured[0], varied.measured[-1]
        count = round((last - first) / varied.step) + 1
        return [round(first + varied.step * n, 6) for n in range(count)] + [None]

    def with_setting(self, setting: Setting) -> Any:
        """Return the method with this value of its varied setting; None of None."""
        if setting is None:
            return None
        varied: dict[str, Any] = {self.method.varied.name: setting}
        return dataclasses.replace(self.method, **varied)

    def measured(self) -> list[OfMatrices]:
        """Return the methods whose effect on each matrix is to be measured."""
        return [self.with_setting(value) for value in self.method.varied.measured]

    def allocate(self, increases: Increases) -> Allocation:
        """Return the setting of each matrix, given the increase of the loss at the settings of
        `measured()`, between which its logarithm is interpolated."""
        items = list(self._matrices())
        options = [
            [
                Option(self._cost(setting, matrix), self._loss(setting, increases, matrix, layer))
                for setting in self.settings
            ]
            for matrix, layer in items
        ]
        chosen = allocate(options, self.share * self._total - self._rest)
        values: dict[str, list[Setting]] = {matrix.path: [] for matrix, _ in items}
        for (matrix, _), number in zip(items, chosen, strict=True):
            values[matrix.path].append(self.settings[number])
        methods = {path: [self.with_setting(s) for s in of] for path, of in values.items()}
        increase = sum(of_item[n].loss for of_item, n in zip(options, chosen, strict=True))
        uniform, expected = self.uniform(), None
        measured = self.method.varied.measured
        if uniform is not None and measured[0] <= uniform <= measured[-1]:
            expected = sum(self._loss(uniform, increases, *item) for item in items)
        by_matrix = ByMatrix(methods, self.method.needs)
        return Allocation(by_matrix, values, increase, uniform, expected)

    def uniform(self) -> Setting:
        """Return the value of the varied setting, equal for all matrices, with the highest cost
        that fits; None if there is none."""
        varied = self.method.varied
        values: Iterable[float] = varied.measured
        if varied.step is not None:
            values = (n / _UNIFORM_STEPS for n in range(1, _UNIFORM_STEPS))
        paths = [matrix.path for matrix in matrices(self.layout)]
        shares = {
            value: self.share_of(dict.fromkeys(paths, [value] * self.layout.layers))
            for value in values
        }
        fitting = [value for value, share in shares.items() if share <= self.share]
        return max(fitting, key=shares.__getitem__, default=None)

    def share_of(self, values: Mapping[str, Sequence[Setting]]) -> float:
        """Return the share of a model whose matrices have these settings, by path and layer."""
        costs = (self._cost(values[m.path][layer], m) for m, layer in self._matrices())
        return (self._rest + sum(costs)) / self._total

    def _matrices(self) -> Iterator[tuple[Matrix, int]]:
        for matrix in matrices(self.layout):
            for layer in range(self.layout.layers):
                yield matrix, layer

    def _loss(self, setting: Setting, increases: Increases, matrix: Matrix, layer: int) -> float:
        if setting is None:
            return 0.0
        logs = np.log(np.maximum(increases[matrix.path][layer], np.finfo(float).tiny))
        return math.exp(np.interp(setting, self.method.varied.measured, logs))

    def _cost(self, setting: Setting, matrix: Matrix) -> float:
        method = self.with_setting(setting)
        if isinstance(method, Quantization):
            return method.bytes(matrix.rows, matrix.columns)
        removed = method.count(matrix.rows, matrix.columns) if method else 0
        return self._unit * (matrix.rows * matrix.columns - removed)

    @property
    def _unit(self) -> int:
        """The cost of a weight: its bytes, or its two operations for a token."""
        return self.itemsize if self.kind == "size" else 2

    @property
    def _total(self) -> float:
        if self.kind == "flops":
            return forward_flops(self.layout, self.row_length).total
        return self.itemsize * sum(math.prod(s.shape) for s in self.layout.shapes.values())

    @property
    def _rest(self) -> float:
        """The cost of what is not compressed."""
        return self._total - sum(self._unit * m.rows * m.columns for m, _ in self._matrices())
