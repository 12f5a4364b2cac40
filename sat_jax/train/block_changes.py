"""Changes of the stored blocks of a run between its steps: first patterns, growth, exchange, and
the conversion to dense matrices."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sat_jax.config import Config
from sat_jax.data.batch import Batch
from sat_jax.parallel.processes import on_host
from sat_jax.sparsity.block_patterns import fill, initial_blocks
from sat_jax.sparsity.block_updates import drop_fraction, prune_grow
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.execution.state import TrainState
from sat_jax.sparsity.flops import traced_flops
from sat_jax.sparsity.plan import Stored
from sat_jax.sparsity.stored_blocks import Columns, block_norms, change_blocks, columns_of
from sat_jax.train.block_gradients import block_gradients
from sat_jax.train.counters import RunCounters
from sat_jax.train.probe import first_tokens
from sat_jax.train.programs import Compiled, Programs
from sat_jax.train.run_state import RunState

Kept = Bool[np.ndarray, "L R C"]
Norms = Float[np.ndarray, "L R C"]


class BlockChanges:
    """Changes the stored blocks of full states; programs are compiled when they are first needed.

    All processes call the same methods and choose the same blocks, since norms are replicated.
    """

    def __init__(self, config: Config, programs: Programs, counters: RunCounters):
        self._config, self._programs, self._counters = config, programs, counters
        self._gradients = functools.cache(self._compile_gradients)
        self._norms = functools.cache(self._compile_norms)
        self._change = functools.cache(self._compile_change)

    def initial(self, params: dict[str, Array], stored: Stored) -> dict[str, Array]:
        """Return dense parameters with the first blocks of a run alone."""
        if not stored:
            return params
        columns = self._placed(self._first_columns(params, stored), stored)
        shapes = self._programs.layout.shapes
        zero = jnp.zeros((), jnp.int32)
        after = self._programs.form(stored).state.params

        def take(params: dict[str, Array], columns: Columns) -> dict[str, Array]:
            return change_blocks(TrainState(zero, params, ()), columns, shapes).params

        placed = jax.tree.map(lambda leaf: leaf.sharding, after)
        blocks: dict[str, Array] = jax.jit(take, out_shardings=placed)(params, columns)
        return blocks

    def enter(self, state: RunState, stored: Stored, batch: Batch) -> None:
        """Convert the full state to the blocks of a rung. Blocks that are new in a sparse matrix
        are those with the largest gradients on the batch."""
        if state.stored == stored:
            return
        columns: dict[str, np.ndarray] = {}
        if stored and not state.stored:
            columns = self._first_columns(state.full.params, stored)
        elif stored:
            gradients = self._measure_gradients(state, batch)
            before = self._kept(state)
            columns = {
                path: _columns_of_layers(
                    [fill(k, g, counts) for k, g in zip(before[path], gradients[path], strict=True)]
                )
                for path, counts in stored
            }
        self._convert(state, stored, columns)

    def enter_anew(self, state: RunState, stored: Stored, batch: Batch) -> None:
        """Convert the full state to these blocks as if it had been dense before: any form can
        follow any other."""
        if state.stored != stored:
            self.enter(state, (), batch)
        self.enter(state, stored, batch)

    def exchange(self, state: RunState, rung: Rung, step: int, batch: Batch) -> float:
        """Exchange stored blocks before a step; return the share of them that are new."""
        stored, weights = state.stored, self._config.sparsity.weights
        fraction = drop_fraction(step - rung.start, rung.stop - rung.start, weights.drop_fraction)
        gradients, before = self._measure_gradients(state, batch), self._kept(state)
        norms = _by_path(stored, self._norms(stored, stored)(state.full.params))
        columns, new, total = {}, 0, 0
        for path, counts in stored:
            after = [
                prune_grow(kept, norm, gradient, fraction, counts)
                for kept, norm, gradient in zip(
                    before[path], norms[path], gradients[path], strict=True
                )
            ]
            new += int((np.stack(after) & ~before[path]).sum())
            total += int(before[path].sum())
            columns[path] = _columns_of_layers(after)
        self._convert(state, stored, columns)
        return new / total

    def _convert(self, state: RunState, stored: Stored, columns: Mapping[str, np.ndarray]) -> None:
        change = self._change(state.stored, stored)
        state.replace(change(state.full, self._placed(columns, stored)), stored)

    def _first_columns(self, params: dict[str, Array], stored: Stored) -> dict[str, np.ndarray]:
        """Return the first block columns of each matrix, on the host."""
        norms = _by_path(stored, self._norms((), stored)(params))
        config = self._config
        pattern, seed = config.sparsity.weights.pattern, config.seed
        return {
            path: _columns_of_layers([*initial_blocks(pattern, path, counts, norms[path], seed)])
            for path, counts in stored
        }

    def _measure_gradients(self, state: RunState, batch: Batch) -> dict[str, Norms]:
        program, flops = self._gradients(state.stored)
        self._counters.block_gradient_flops += flops
        return _by_path(state.stored, program(state.full.params, batch))

    def _kept(self, state: RunState) -> dict[str, Kept]:
        """Return the stored blocks as bool arrays `[L, R, C]`."""
        read = on_host(columns_of(state.full.params))
        kept = {}
        for path, counts in state.stored:
            columns = read(path)
            kept[path] = np.zeros((len(columns), *counts.grid), bool)
            np.put_along_axis(kept[path], columns, True, axis=-1)
        return kept

    def _placed(self, columns: Mapping[str, np.ndarray], stored: Stored) -> dict[str, Array]:
        """Return the columns on the devices."""
        shapes = columns_of(self._programs.form(stored).state.params)

        def place(path: str, value: np.ndarray) -> Array:
            sharding = shapes[path].sharding
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

        return {path: place(path, value) for path, value in columns.items()}

    def _compile_change(self, old: Stored, new: Stored) -> Compiled:
        programs = self._programs
        before, after = programs.form(old), programs.form(new)

        def change(state: TrainState, columns: Columns) -> TrainState:
            return change_blocks(state, columns, programs.layout.shapes)

        columns = columns_of(after.state.params)
        options: Any = {"layout": after.layout, "donate_argnums": 0 if old == new else ()}
        return programs.compile(change, before.state, columns, **options)

    def _compile_norms(self, old: Stored, wanted: Stored) -> Compiled:
        programs = self._programs

        def norms(params: dict[str, Array]) -> list[Array]:
            values = block_norms(params, wanted, programs.layout.shapes)
            return [values[path] for path, _ in wanted]

        return programs.compile(norms, programs.form(old).state.params)

    def _compile_gradients(self, stored: Stored) -> tuple[Compiled, float]:
        """Return the program for the norms of all blocks' gradients, and its FLOPs."""
        programs, config = self._programs, self._config

        def gradients(params: dict[str, Array], batch: Batch) -> list[Array]:
            part = first_tokens(batch, config.sparsity.probe_tokens)
            values = block_gradients(programs.probed, stored, params, part)
            return [values[path] for path, _ in stored]

        shapes = programs.form(stored).state.params, programs.batch(config.train.rows_per_step)
        return programs.compile(gradients, *shapes), traced_flops(gradients, *shapes)


def _by_path(stored: Stored, values: Sequence[Array]) -> dict[str, Norms]:
    """Return replicated arrays, one for each matrix, on the host."""
    return {path: np.asarray(value) for (path, _), value in zip(stored, values, strict=True)}


def _columns_of_layers(kept: Sequence[Bool[np.ndarray, "R C"]]) -> Int[np.ndarray, "L R k"]:
    """Return the block columns of the kept blocks, sorted; all block rows keep equally many."""
    per_row = int(kept[0][0].sum())
    order = np.argsort(~np.stack(kept), axis=-1, kind="stable")
    return order[..., :per_row].astype(np.int32)
