"""The moves between the whole state and the one that a rung trains, a few arrays at a time.

A program keeps what it is given until it ends, so that one program for all would need both states
at once. Here each moves a parcel, whose source is freed before the next begins: beside the state
itself only one parcel lies in memory twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import compact, expand
from sat_jax.sparsity.plan import Plan
from sat_jax.train.state import Resting, TrainState, keyed_trees

Compiled = Callable[..., Any]
Tree = Mapping[str, Array]

_PARCEL = 2**30  # bytes; an array that is larger makes a parcel alone


class _Programs(NamedTuple):
    """Of a parcel: paths of what is kept and of what is omitted, the move to both and back."""

    kept: tuple[str, ...]
    omitted: tuple[str, ...]
    enter: Compiled
    leave: Compiled


class _Parcel(NamedTuple):
    """Entries of one of the state's trees, by their paths in it while it is whole."""

    tree: int
    whole: tuple[str, ...]
    programs: _Programs


class Moves(NamedTuple):
    """`enter(whole, masks)` → (working, resting), and `leave(working, resting, masks)` → whole.
    Both give away the buffers of what they move. Scalars between the trees are passed on."""

    parcels: tuple[_Parcel, ...]

    def enter(self, whole: TrainState, masks: Masks) -> tuple[TrainState, Resting]:
        """The state that is trained, and what rests."""
        trees, structure = keyed_trees(whole)
        small: list[Any] = [{} if isinstance(tree, dict) else tree for tree in trees]
        resting: Resting = [{} for _ in trees]
        for number, paths, programs in self.parcels:
            part = {path: trees[number][path] for path in paths}
            kept, omitted = _given_away(programs.enter, part, masks=masks)
            small[number] |= kept
            resting[number] |= omitted
        return jax.tree.unflatten(structure, small), resting

    def leave(self, working: TrainState, resting: Resting, masks: Masks) -> TrainState:
        """The whole state."""
        trees, structure = keyed_trees(working)
        whole: list[Any] = [{} if isinstance(tree, dict) else tree for tree in trees]
        for number, _, programs in self.parcels:
            kept = {path: trees[number][path] for path in programs.kept}
            omitted = {path: resting[number][path] for path in programs.omitted}
            whole[number] |= _given_away(programs.leave, kept, omitted, masks=masks)
        return jax.tree.unflatten(structure, whole)


def compile_moves(
    state: TrainState,
    masks: Masks,
    plan: Plan,
    gathers: bool,
    placed: Callable[[Any], Any],
    compiled: Callable[..., Compiled],
) -> Moves:
    """Of shapes. `gathers`: neurons are parted by the masks; else layers are only cut into the
    plan's segments. `placed` gives shapes their shardings, `compiled(function, *shapes, **jit)`
    compiles. Parcels of the same arrays (parameters and their moments) share programs."""

    def enter(whole: Tree, masks: Masks) -> tuple[Tree, Tree]:
        return compact(whole, masks if gathers else cut_only(plan), plan)

    def leave(kept: Tree, omitted: Tree, masks: Masks) -> Tree:
        return expand(kept, omitted, masks if gathers else cut_only(plan), plan)

    def programs(part: Tree) -> _Programs:
        kept, omitted = placed(jax.eval_shape(enter, part, masks))
        return _Programs(
            tuple(kept),
            tuple(omitted),
            _compile_move(compiled, enter, part, masks),
            _compile_move(compiled, leave, kept, omitted, masks),
        )

    made: dict[Any, _Programs] = {}
    parcels = []
    for number, tree in enumerate(keyed_trees(state)[0]):
        for part in _parcels(tree) if isinstance(tree, dict) else ():
            same = tuple((path, leaf.shape, leaf.dtype) for path, leaf in part.items())
            if same not in made:
                made[same] = programs(part)
            parcels.append(_Parcel(number, tuple(part), made[same]))
    return Moves(tuple(parcels))


def cut_only(plan: Plan) -> Masks:
    """What mask and kernel execution and live layers do to the state: it is cut into segments,
    nothing is gathered."""
    return tuple(SegmentMasks(None, None) for _ in plan.segments)


def _parcels(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries in turn, as many together as fit a parcel."""
    parcel: dict[str, Any] = {}
    for path, leaf in tree.items():
        if parcel and sum(map(_bytes, parcel.values())) + _bytes(leaf) > _PARCEL:
            yield parcel
            parcel = {}
        parcel[path] = leaf
    if parcel:
        yield parcel


def _bytes(leaf: Any) -> int:
    return int(leaf.size * leaf.dtype.itemsize)


def _compile_move(compiled: Callable[..., Compiled], function: Compiled, *args: Any) -> Compiled:
    """Compiles a program that mostly moves arrays, giving away the buffers it can reuse.

    A buffer of any argument but the last (the masks) is reused where an output has its shape
    and type; giving away others would free nothing and only warn.
    """
    leaves, structure = jax.tree.flatten(args)
    free = Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(function, *args))
    )
    given = []
    for number, leaf in enumerate(jax.tree.leaves(args[:-1])):
        if free[leaf.shape, leaf.dtype]:
            free[leaf.shape, leaf.dtype] -= 1
            given.append(number)

    def on_leaves(*flat: Any) -> Any:
        return function(*jax.tree.unflatten(structure, flat))

    program = compiled(on_leaves, *leaves, donate_argnums=tuple(given))
    return lambda *values: program(*jax.tree.leaves(values))


def _given_away(program: Compiled, *trees: Tree, masks: Masks) -> Any:
    """What the program makes of the trees, whose buffers are freed as soon as it has: before the
    next one's results are allocated, which would be as it is called."""
    made = jax.block_until_ready(program(*trees, masks))
    for leaf in jax.tree.leaves(trees):
        leaf.delete()
    return made
