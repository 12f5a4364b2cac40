"""What `scripts.efficiency` measures and `scripts.memory` compiles: steps of large models by case.

A case's row says what is kept and what that leaves to compute; its program comes by shapes.
"""

import contextlib
import dataclasses
import faulthandler
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from sat_jax.analysis.rows import STEP_SETTING, append, read
from sat_jax.train.account import kept_shares
from sat_jax.train.state import TrainState

from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import preset
from sat_jax.nn.decoder import Compute
from sat_jax.ops import KernelConfig
from sat_jax.provenance import environment
from sat_jax.sparsity.flops import speedup_bound, training_flops
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.train.moves import compile_moves
from scripts.step_program import (
    Program,
    masks_of,
    neurons_of,
    optimizer_program,
    step_program,
    whole_state,
)

Row = dict[str, Any]
_LIMIT = 300.0  # seconds that one row may take, compiling included
_STDERR = 2


class Case(NamedTuple):
    """One row: `part` is step or optimizer, `execution` dense, gather or kernel."""

    part: str
    execution: str
    rate: float


def checked(given: Namespace) -> DecoderConfig:
    """The model of the options. Raises `UserError` for those that cannot be."""
    model = preset(given.model)
    for name in ("rows", "row_length"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(given, name)}; accepted: 1 or more")
    if bad := [rate for rate in given.rate if not 0 < rate < 1]:
        raise UserError(f"--rate {bad[0]:g}; accepted: above 0 and below 1")
    # Weights are random, so that rows may be longer than what the model was trained on.
    longest = max(model.max_positions, given.row_length)
    return dataclasses.replace(model, max_positions=longest)


def sparse_cases(part: str, given: Namespace) -> Iterator[Case]:
    """The dense one, and every rate in every execution."""
    yield Case(part, "dense", 0.0)
    for execution in given.execution:
        for rate in given.rate:
            yield Case(part, execution, rate)


def described(
    model: DecoderConfig, case: Case, given: Namespace, attention: Any
) -> tuple[Row, Program]:
    """What is known of a case before it is compiled, and its program.

    `resting_bytes`: omitted neurons beside a compacted state. `bound`: the dense step's FLOPs by
    its own, recomputation included. `model_flops`: of the model that it trains, nothing twice.
    """
    plan = plan_of(model, case)
    heads, channels = kept_shares(plan, neurons_of(model))
    length, tokens = given.row_length, given.rows * given.row_length
    program = _program(model, case, plan, given, attention)
    row = {
        "kept_heads": heads,
        "kept_channels": channels,
        "bound": speedup_bound(model, length, plan.segments, given.remat),
        "model_flops": tokens * training_flops(model, length, plan.segments).total,
        "resting_bytes": 0,
    }
    if case.execution == "gather":
        whole = whole_state(model, optimizer_of(given))
        row["resting_bytes"] = bytes_of(whole) - bytes_of(program.state)
    return row, program


def plan_of(model: DecoderConfig, case: Case) -> Plan:
    """What a case keeps."""
    block = 1 if case.execution != "kernel" else 128 if model.d_ff > 128 else 64
    return make_plan(neurons_of(model), case.rate, case.rate, block=block)


def optimizer_of(given: Namespace) -> OptimizerConfig:
    """The optimizer of the options; Lion's momentum is bfloat16."""
    lion: dict[str, Any] = {"name": "lion", "beta2": 0.99, "momentum_dtype": "bfloat16"}
    return OptimizerConfig(**(lion if given.optimizer == "lion" else {}))


def refresh_bytes(
    model: DecoderConfig, case: Case, given: Namespace, analysed: Callable[..., Any]
) -> int:
    """The most memory while kept and omitted neurons are parted or put together: the whole state,
    and what is made of one parcel before its source is freed. `analysed(function, shapes,
    given_up)` compiles and returns XLA's analysis of memory."""
    state, plan = whole_state(model, optimizer_of(given)), plan_of(model, case)
    made = [0]

    def compiled(function: Callable[..., Any], *shapes: Any, donate_argnums: Any) -> Any:
        found = analysed(function, shapes, donate_argnums)
        anew = found.output_size_in_bytes - found.alias_size_in_bytes
        made.append(anew + found.temp_size_in_bytes)
        return function

    compile_moves(state, masks_of(model, plan), plan, True, lambda tree: tree, compiled)
    return bytes_of(state) + max(made)


def bytes_of(state: TrainState) -> int:
    """Of a state or its shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def add_rows(
    path: Path,
    given: Namespace,
    target: str,
    cases: Sequence[Case],
    row_of: Callable[[Case], Row],
    again: bool = False,
) -> Iterator[Row]:
    """Appends and yields rows for the cases that have none yet for this target and setting, or at
    this commit an error; or for all, `again`."""
    where = environment()  # before the file has changed
    setting = {"target": target} | {name: getattr(given, name) for name in STEP_SETTING[1:]}
    there = read(path) if path.exists() and not again else []
    there = [row for row in there if "error" not in row or row["commit"] == where["commit"]]
    done = [{k: row.get(k) for k in (*setting, *Case._fields)} for row in there]
    for case in dict.fromkeys(cases):
        row = setting | case._asdict()
        if row not in done:
            with _begun(path, row, where):
                row |= _or_error(row_of, case)
            append(path, [row], where)
            yield row


@contextlib.contextmanager
def _begun(path: Path, row: Row, where: Mapping[str, Any]) -> Iterator[None]:
    """A row with an error, for as long as the body takes, or for good where that ends the process:
    the same command goes on behind it. Five minutes end it."""
    size = path.stat().st_size if path.exists() else 0
    append(path, [row | {"error": "begun, and has not ended"}], where)
    faulthandler.dump_traceback_later(_LIMIT, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.truncate(path, size)
        if not size:
            path.unlink()


def _or_error(row_of: Callable[[Case], Row], case: Case) -> Row:
    """What cannot be compiled, or does not fit, must not end the others."""
    try:
        return row_of(case)
    except UserError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _program(
    model: DecoderConfig, case: Case, plan: Plan, given: Namespace, attention: Any
) -> Program:
    config = optimizer_of(given)
    execution = "gather" if case.execution == "dense" else case.execution
    if case.part == "optimizer":
        return optimizer_program(model, plan, execution, config)
    kernels = KernelConfig(plan.block, given.kernels) if execution == "kernel" else None
    compute = Compute(given.dtype, given.remat, attention=attention, kernels=kernels)
    return step_program(model, plan, compute, (given.rows, given.row_length), execution, config)
