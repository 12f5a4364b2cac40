"""Programs that convert a state between its full form and the one a rung trains, in chunks.

A program holds its arguments until it ends, so that one program for all arrays would need both
states at once. Here each converts a chunk, whose source is freed before the next begins: beside the
state itself only one chunk exists twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.state import OmittedState, TrainState, path_trees
from sat_jax.sparsity.rows import Kept

Compiled = Callable[..., Any]
Tree = Mapping[str, Any]

_CHUNK = 2**30  # bytes; an array that is larger is a chunk alone


class _Programs(NamedTuple):
    """The programs that move a chunk there and back, and the paths of what they move."""

    trained: tuple[str, ...]
    omitted: tuple[str, ...]
    compact: Compiled
    expand: Compiled


class _Chunk(NamedTuple):
    """Entries of one of the state's trees, by their paths."""

    tree: int
    paths: tuple[str, ...]
    programs: _Programs


class Moves(NamedTuple):
    """`compact(full, kept)` → (state, omitted), and `expand(state, omitted, kept)` → full. Both
    give away the buffers of what they convert. Scalars between the trees are passed on."""

    chunks: tuple[_Chunk, ...]

    def compact(self, full: TrainState, kept: Kept) -> tuple[TrainState, OmittedState]:
        """Return the state that is trained, and the rows that are not in it."""
        trees, structure = path_trees(full)
        compact: list[Any] = [{} if isinstance(tree, dict) else tree for tree in trees]
        omitted: OmittedState = [{} for _ in trees]
        for number, paths, programs in self.chunks:
            part = {path: trees[number][path] for path in paths}
            trained, rest = _run_and_free(programs.compact, part, kept=kept)
            compact[number] |= trained
            omitted[number] |= rest
        return jax.tree.unflatten(structure, compact), omitted

    def expand(self, state: TrainState, omitted: OmittedState, kept: Kept) -> TrainState:
        """Return the full state."""
        trees, structure = path_trees(state)
        full: list[Any] = [{} if isinstance(tree, dict) else tree for tree in trees]
        for number, _, programs in self.chunks:
            part = {path: trees[number][path] for path in programs.trained}
            rest = {path: omitted[number][path] for path in programs.omitted}
            full[number] |= _run_and_free(programs.expand, part, rest, kept=kept)
        return jax.tree.unflatten(structure, full)


def compile_moves(
    state: TrainState,
    kept: Kept,
    execution: Execution,
    placed: Callable[[Any], Any],
    compiled: Callable[..., Compiled],
) -> Moves:
    """Return the programs for the shapes of a full state. `placed` gives shapes their shardings,
    `compiled(function, *shapes, **jit)` compiles. Chunks of the same arrays (parameters and their
    moments) share programs."""

    def programs(part: Tree) -> _Programs:
        trained, omitted = placed(jax.eval_shape(execution.compact, part, kept))
        return _Programs(
            tuple(trained),
            tuple(omitted),
            _compile_move(compiled, execution.compact, part, kept),
            _compile_move(compiled, execution.expand, trained, omitted, kept),
        )

    known: dict[Any, _Programs] = {}
    chunks = []
    for number, tree in enumerate(path_trees(state)[0]):
        for part in _chunks(tree) if isinstance(tree, dict) else ():
            signature = tuple((path, leaf.shape, leaf.dtype) for path, leaf in part.items())
            if signature not in known:
                known[signature] = programs(part)
            chunks.append(_Chunk(number, tuple(part), known[signature]))
    return Moves(tuple(chunks))


def _chunks(tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries in turn, as many together as fit a chunk."""
    chunk: dict[str, Any] = {}
    for path, leaf in tree.items():
        if chunk and sum(map(_bytes, chunk.values())) + _bytes(leaf) > _CHUNK:
            yield chunk
            chunk = {}
        chunk[path] = leaf
    if chunk:
        yield chunk


def _bytes(leaf: Any) -> int:
    return int(leaf.size * leaf.dtype.itemsize)


def _compile_move(compiled: Callable[..., Compiled], function: Compiled, *args: Any) -> Compiled:
    """Compile a program that mostly moves arrays, giving away the buffers it can reuse.

    A buffer of any argument but the last (the kept indices) is reused where an output has its shape
    and type; giving away others would free nothing and only warn.
    """
    leaves, structure = jax.tree.flatten(args)
    free = Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(function, *args))
    )
    donated = []
    for number, leaf in enumerate(jax.tree.leaves(args[:-1])):
        if free[leaf.shape, leaf.dtype]:
            free[leaf.shape, leaf.dtype] -= 1
            donated.append(number)

    def on_leaves(*flat: Any) -> Any:
        return function(*jax.tree.unflatten(structure, flat))

    program = compiled(on_leaves, *leaves, donate_argnums=tuple(donated))
    return lambda *values: program(*jax.tree.leaves(values))


def _run_and_free(program: Compiled, *trees: Tree, kept: Kept) -> Any:
    """Return what the program computes of the trees, whose buffers are freed before the results of
    the next program are allocated, which happens when it is called."""
    results = jax.block_until_ready(program(*trees, kept))
    for leaf in jax.tree.leaves(trees):
        leaf.delete()
    return results
