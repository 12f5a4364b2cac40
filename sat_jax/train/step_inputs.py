"""The inputs of each training step, from prepared rows: a pure function of the step."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from sat_jax.data.batch import Batch
from sat_jax.data.batches import batches, open_split, row_numbers
from sat_jax.nn.top_tokens import TopTokens
from sat_jax.train.setup import Task

StepInputs: TypeAlias = tuple[Batch] | tuple[Batch, TopTokens]
"""A batch, and the tokens of a stored teacher for it, if there is one."""


def step_inputs(task: Task, share: tuple[int, int]) -> Callable[[int], StepInputs]:
    """Return a function from the step to this process's share of its inputs, on the host."""
    config, stored = task.config, task.top_tokens
    rows = open_split(task.data, "train")
    order = (config.train.rows_per_step, config.seed, *share)
    batch_of = batches(rows, *order, pose_length=config.data.pose_length)
    if stored is None:
        return lambda step: (batch_of(step),)
    numbers = row_numbers(len(rows), *order)
    return lambda step: (batch_of(step), stored.of_rows(numbers(step)))


def place(share: Any, shapes: Any) -> Any:
    """Return global arrays with the shardings of `shapes` from the shares of all processes."""
    return jax.tree.map(
        lambda full, local: jax.make_array_from_process_local_data(
            full.sharding, local, full.shape
        ),
        shapes,
        share,
    )
