"""What `scripts.efficiency` measures and `scripts.memory` compiles: steps of large models by case.

A case's row says what is kept and what that leaves to compute; its program comes by shapes.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sat_jax.analysis.flops import speedup_bound, training_flops
from sat_jax.analysis.rows import STEP_SETTING, append, read
from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.llama import Compute
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.presets import preset
from sat_jax.ops import BlockSparse
from sat_jax.provenance import environment
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.train.account import kept_shares
from scripts.step_program import Program, neurons_of, optimizer_program, step_program

Row = dict[str, Any]


class Case(NamedTuple):
    """One row: `part` is step or optimizer, `execution` dense, gather or kernel."""

    part: str
    execution: str
    rate: float


def checked(given: Namespace) -> LlamaConfig:
    """The model of the options. Raises `UserError` for those that cannot be."""
    model = preset(given.model)
    for name in ("rows", "row_length"):
        if getattr(given, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(given, name)}; accepted: 1 or more")
    if given.row_length > model.max_positions:
        raise UserError(f"--row-length {given.row_length}; accepted: up to {model.max_positions}")
    if bad := [rate for rate in given.rate if not 0 < rate < 1]:
        raise UserError(f"--rate {bad[0]:g}; accepted: above 0 and below 1")
    return model


def sparse_cases(part: str, given: Namespace) -> Iterator[Case]:
    """The dense one, and every rate in every execution."""
    yield Case(part, "dense", 0.0)
    for execution in given.execution:
        for rate in given.rate:
            yield Case(part, execution, rate)


def described(
    model: LlamaConfig, case: Case, given: Namespace, attention: Any
) -> tuple[Row, Program]:
    """What is known of a case before it is compiled, and its program.

    `resting_bytes`: what lies beside a compacted state, whole. `bound`: the dense step's FLOPs by
    its own, recomputation included. `model_flops`: of the model that it trains, nothing twice.
    """
    block = 1 if case.execution != "kernel" else 128 if model.d_ff > 128 else 64
    neurons = neurons_of(model)
    plan = make_plan(neurons, case.rate, case.rate, block=block)
    heads, channels = kept_shares(plan, neurons)
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
        dense = Case(case.part, "dense", 0.0)
        whole = _program(model, dense, make_plan(neurons, 0, 0), given, attention)
        row["resting_bytes"] = _gathered_from(whole.state, program.state)
    return row, program


def add_rows(
    path: Path, given: Namespace, target: str, cases: Sequence[Case], row_of: Callable[[Case], Row]
) -> Iterator[Row]:
    """Appends and yields rows for the cases that have none yet for this target and setting."""
    where = environment()  # before the file has changed
    setting = {"target": target} | {name: getattr(given, name) for name in STEP_SETTING[1:]}
    there = read(path) if path.exists() else []
    done = [{k: row.get(k) for k in (*setting, *Case._fields)} for row in there]
    for case in dict.fromkeys(cases):
        row = setting | case._asdict()
        if row not in done:
            row |= _or_error(row_of, case)
            append(path, [row], where)
            yield row


def _or_error(row_of: Callable[[Case], Row], case: Case) -> Row:
    """What cannot be compiled, or does not fit, must not end the others."""
    try:
        return row_of(case)
    except UserError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _program(
    model: LlamaConfig, case: Case, plan: Plan, given: Namespace, attention: Any
) -> Program:
    lion: dict[str, Any] = {"name": "lion", "beta2": 0.99, "momentum_dtype": "bfloat16"}
    config = OptimizerConfig(**(lion if given.optimizer == "lion" else {}))
    execution = "gather" if case.execution == "dense" else case.execution
    if case.part == "optimizer":
        return optimizer_program(model, plan, execution, config)
    kernels = BlockSparse(plan.block, given.kernels) if execution == "kernel" else None
    compute = Compute(given.dtype, given.remat, attention=attention, kernels=kernels)
    return step_program(model, plan, compute, (given.rows, given.row_length), execution, config)


def _gathered_from(whole: Any, small: Any) -> int:
    """Bytes of the arrays of which a smaller one is trained."""
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True)
    return sum(w.size * w.dtype.itemsize for w, s in pairs if w.shape != s.shape)
