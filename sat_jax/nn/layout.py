"""A model as a graph definition and a flat dictionary of arrays, with the named axes of each.

Everything outside the modules works on `path → array` dictionaries ("layers/attention/query") and
derives what it has to know of a model from a `Layout`: sharding, update counts, rows of units,
scores, operations. One graph definition serves every execution: it contains neither sizes nor the
number of segments nor the types of weights, which are values of variables.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from sat_jax.nn.branch import Branch, branches
from sat_jax.nn.linear import Axes, Weight
from sat_jax.nn.param import LAYER, Mask, Role

Flat = dict[str, Any]
Model = TypeVar("Model", bound=nnx.Module)


class Leaf(NamedTuple):
    """One array of a model: its named axes, the role of its parameter, whether it is trained."""

    axes: Axes
    role: Role
    trained: bool

    @property
    def in_layers(self) -> bool:
        """Whether the array has an entry for each layer."""
        return self.axes[0] == LAYER

    def axis(self, unit: str) -> int:
        """Return the number of the axis of this name."""
        return self.axes.index(unit)


class Unit(NamedTuple):
    """What can be omitted of a branch: the axis name, how many there are within each unit around
    them, and the names of those, outermost first."""

    name: str
    size: int
    branch: str
    within: Axes


@dataclasses.dataclass(frozen=True, eq=False)
class Layout(Generic[Model]):
    """Graph definition of a model, and by path the metadata and the shape of each array.

    `units` by name, in the order of the branches and outermost first within a branch. `branches`
    are those of the abstract model.
    """

    graph: nnx.GraphDef[Model]
    masks: nnx.State
    structure: Any
    leaves: Mapping[str, Leaf]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    units: Mapping[str, Unit]
    branches: Mapping[str, Branch]

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return next(self.shapes[p].shape[0] for p, leaf in self.leaves.items() if leaf.in_layers)

    def bind(self, values: Mapping[str, Any], masks: Mapping[str, Array] = {}) -> Model:
        """Return the model with these values by path: arrays, weights, or tuples of them with one
        entry for each segment; `masks` by unit, all units of others being kept."""
        state = jax.tree.unflatten(self.structure, [values[path] for path in self.leaves])
        # New variables: those of the layout are shared, and a mask may be set inside a trace.
        model = nnx.merge(self.graph, jax.tree.map(lambda mask: mask, self.masks), state)
        for branch in branches(model.layers).values():  # type: ignore[attr-defined]
            for unit in branch.masks.keys() & masks.keys():
                branch.masks[unit].set_value(masks[unit])
        return model

    def with_role(self, *roles: Role) -> Iterator[tuple[str, Leaf]]:
        """Yield path and metadata of the arrays in the layers with one of these roles."""
        for path, leaf in self.leaves.items():
            if leaf.in_layers and leaf.role in roles:
                yield path, leaf

    def count_axes(self, path: str) -> int:
        """Return how many leading axes identify the unit that an entry of the array belongs to: the
        layer and its units for heads and channels, the layer for other arrays of a layer."""
        names = self.leaves[path].axes
        return max((i + 1 for i, n in enumerate(names) if n == LAYER or n in self.units), default=0)

    def unit_of(self, path: str, omitted: Mapping[str, Any]) -> str | None:
        """Return the unit among `omitted` that the array has an axis of; None: it has none. Two
        units of one branch are never omitted together."""
        units = [name for name in self.leaves[path].axes if name in omitted]
        assert len(units) < 2, f"{path}: {units} are omitted together"
        return units[0] if units else None

    def totals(self, unit: str) -> int:
        """Return how many units of this name a layer has."""
        names = (*self.units[unit].within, unit)
        return math.prod(self.units[name].size for name in names)


def make_layout(abstract_model: Model) -> Layout[Model]:
    """Return the layout of a model, whose values may be abstract. Its layers are one block, called
    `layers`."""
    graph, masks, state = nnx.split(abstract_model, Mask, ...)  # type: ignore[misc]
    leaves: dict[str, Leaf] = {}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in nnx.to_flat_state(state):
        value, metadata = variable.get_value(), variable.get_metadata()
        axes, trained = metadata["axes"], isinstance(variable, nnx.Param)
        within = value.describe(axes) if isinstance(value, Weight) else {"": (axes, trained)}
        for keys, array in jax.tree_util.tree_leaves_with_path(value):
            inside = jax.tree_util.keystr(keys, simple=True, separator="/")
            name = _joined(path, inside)
            leaves[name] = Leaf(within[inside][0], metadata["role"], within[inside][1])
            shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    parts = branches(abstract_model.layers)  # type: ignore[attr-defined]
    sizes: dict[str, int] = {}
    for name, leaf in leaves.items():
        sizes |= dict(zip(leaf.axes, shapes[name].shape, strict=True))
    units = {
        unit: Unit(unit, sizes[unit], part, branch.units[:number])
        for part, branch in parts.items()
        for number, unit in enumerate(branch.units)
    }
    return Layout(graph, masks, jax.tree.structure(state), leaves, shapes, units, parts)


def flat_values(model: nnx.Module) -> Flat:
    """Return the arrays of a model by path."""
    _, _, state = nnx.split(model, Mask, ...)  # type: ignore[misc]
    values: Flat = {}
    for path, variable in nnx.to_flat_state(state):
        for keys, array in jax.tree_util.tree_leaves_with_path(variable.get_value()):
            inside = jax.tree_util.keystr(keys, simple=True, separator="/")
            values[_joined(path, inside)] = array
    return values


def _joined(path: tuple[Any, ...], inside: str) -> str:
    """Return the path of an array inside the weight that a parameter holds."""
    return "/".join(map(str, (*path, inside) if inside else path))


def branch_values(branch: Branch, name: str) -> Flat:
    """Return the arrays of the branch with this name by path."""
    return {f"layers/{name}/{path}": array for path, array in flat_values(branch).items()}
