"""A model as a graph definition and a flat dictionary of arrays, with the named axes of each.

Code outside the modules works on `path → array` dictionaries ("layers/attention/query"). A `Layout`
has what this code needs to know of a model, for sharding, update counts, rows of units, scores and
FLOPs. All executions use the same graph definition: sizes, the number of segments and the types of
weights are in the values of variables, not in the graph definition.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from sat_jax.nn.branch import Branch, branches
from sat_jax.nn.linear import Axes, Weight, dense
from sat_jax.nn.param import BLOCK, INDEX, LAYER, Control, Role

Flat = dict[str, Any]
Model = TypeVar("Model", bound=nnx.Module)


class Leaf(NamedTuple):
    """One array of a model: its named axes, its role, whether it is trained."""

    axes: Axes
    role: Role
    trained: bool

    @property
    def in_layers(self) -> bool:
        """Whether the array has an entry for each layer."""
        return self.axes[0] == LAYER

    def axis(self, unit: str) -> int:
        """Return the index of the axis with this name."""
        return self.axes.index(unit)


class Unit(NamedTuple):
    """A kind of unit that a branch can omit.

    `name` is its axis. `within` are the names of the units that contain it, outermost first, and
    `size` is how many there are in each of these: query heads per KV group, or channels per layer.
    """

    name: str
    size: int
    branch: str
    within: Axes


@dataclasses.dataclass(frozen=True, eq=False)
class Layout(Generic[Model]):
    """Graph definition of a model, and the metadata and shape of each array by path.

    `masks`: the mask variables, without values. `structure`: the tree structure of all other
    variables. `units` by name, in the order of the branches and outermost first within a branch.
    `branches` of the abstract model by name.
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
        """Number of layers."""
        return next(self.shapes[p].shape[0] for p, leaf in self.leaves.items() if leaf.in_layers)

    def bind(self, values: Mapping[str, Any], masks: Mapping[str, Array] = {}) -> Model:
        """Return the model with these values and masks.

        `values` by path: arrays, weights, or tuples of them with one entry for each segment.
        `masks` by unit; all units without a mask are kept.
        """
        state = jax.tree.unflatten(self.structure, [values[path] for path in self.leaves])
        # Copy the mask variables: the layout is shared, and a mask may be a tracer.
        model = nnx.merge(self.graph, jax.tree.map(lambda mask: mask, self.masks), state)
        for branch in branches(model.layers).values():  # type: ignore[attr-defined]
            for unit in branch.masks.keys() & masks.keys():
                branch.masks[unit].set_value(masks[unit])
        return model

    def with_role(self, *roles: Role) -> Iterator[tuple[str, Leaf]]:
        """Yield path and metadata of the layers' arrays that have one of these roles."""
        for path, leaf in self.leaves.items():
            if leaf.in_layers and leaf.role in roles:
                yield path, leaf

    def count_axes(self, path: str) -> int:
        """Return how many leading axes an update count of the array has.

        They identify the layer and the unit or stored block that an entry belongs to, the layer
        alone for arrays of neither, and are none for arrays outside the layers.
        """
        counted = {LAYER, BLOCK, *self.units}
        return max((i + 1 for i, n in enumerate(self.leaves[path].axes) if n in counted), default=0)

    def unit_of(self, path: str, omitted: Mapping[str, Any]) -> str | None:
        """Return the unit among `omitted` that is an axis of the array, or None.

        There is at most one: two units of one branch are never omitted together.
        """
        units = [name for name in self.leaves[path].axes if name in omitted]
        assert len(units) < 2, f"{path}: {units} are omitted together"
        return units[0] if units else None

    def totals(self, unit: str) -> int:
        """Return the number of units of this name in a layer."""
        names = (*self.units[unit].within, unit)
        return math.prod(self.units[name].size for name in names)


def make_layout(abstract_model: Model) -> Layout[Model]:
    """Return the layout of a model, whose values may be abstract.

    The attribute `layers` of the model is one block with all layers stacked.
    """
    graph, masks, state = nnx.split(abstract_model, Control, ...)  # type: ignore[misc]
    leaves: dict[str, Leaf] = {}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    sizes: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(state):
        value, metadata = variable.get_value(), variable.get_metadata()
        axes, trained = metadata["axes"], isinstance(variable, nnx.Param)
        sizes |= dict(zip(axes, value.shape, strict=True))
        within = value.describe(axes) if isinstance(value, Weight) else {"": (axes, trained)}
        for keys, array in jax.tree_util.tree_leaves_with_path(value):
            inside = jax.tree_util.keystr(keys, simple=True, separator="/")
            name = _joined(path, inside)
            own_axes, own_trained = within[inside]
            own_trained = own_trained and trained
            role: Role = "index" if INDEX in own_axes else metadata["role"]
            if keys and _stays_float32(value, keys):
                role = "vector"
            leaves[name] = Leaf(own_axes, role, own_trained)
            shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    parts = branches(abstract_model.layers)  # type: ignore[attr-defined]
    units = {
        unit: Unit(unit, sizes[unit], part, branch.units[:number])
        for part, branch in parts.items()
        for number, unit in enumerate(branch.units)
    }
    return Layout(graph, masks, jax.tree.structure(state), leaves, shapes, units, parts)


def flat_values(model: nnx.Module) -> Flat:
    """Return the arrays of a model by path."""
    _, _, state = nnx.split(model, Control, ...)  # type: ignore[misc]
    values: Flat = {}
    for path, variable in nnx.to_flat_state(state):
        values |= flat_arrays(path, variable.get_value())
    return values


def parameters(model: nnx.Module) -> dict[str, Any]:
    """Return the arrays and weights of a model by the path of their parameter."""
    _, _, state = nnx.split(model, Control, ...)  # type: ignore[misc]
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}


def weight_reader(read: Callable[[str], Any], layout: Layout[Any]) -> Callable[[str], Any]:
    """Return a function that returns a parameter by path: an array or a `Weight`. `read` returns
    the arrays of the model with this layout."""
    names = parameters(layout.bind({name: name for name in layout.leaves}))
    return lambda path: jax.tree.map(read, names[path])


def merged_reader(
    read: Callable[[str], np.ndarray], layout: Layout[Any]
) -> Callable[[str], np.ndarray]:
    """Return a function that returns a parameter by path as one array. `read` returns the arrays of
    the model with this layout, on the host."""
    weight = weight_reader(read, layout)
    return lambda path: np.asarray(dense(weight(path)))


def flat_arrays(path: tuple[Any, ...], value: Any) -> Flat:
    """Return the arrays of the parameter at `path`, an array or a `Weight`, by their paths."""
    arrays = jax.tree_util.tree_leaves_with_path(value)
    return {
        _joined(path, jax.tree_util.keystr(keys, simple=True, separator="/")): array
        for keys, array in arrays
    }


def _stays_float32(weight: Weight, keys: tuple[Any, ...]) -> bool:
    """Return whether the array at `keys` in the weight is not cast to the compute dtype."""
    *outer, name = (key.name for key in keys)
    return name in functools.reduce(getattr, outer, weight).float32


def _joined(path: tuple[Any, ...], inside: str) -> str:
    """Return the path of an array, which is `inside` the weight of the parameter at `path`."""
    return "/".join(map(str, (*path, inside) if inside else path))


def branch_values(branch: Branch, name: str) -> Flat:
    """Return the arrays of the branch with this name by path."""
    return {f"layers/{name}/{path}": array for path, array in flat_values(branch).items()}
