"""The parts of `scripts.benchmark` that train: steps, peer and moves.

Nothing of the data pipeline is imported, so that a machine with little more than jax can run them.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from sat_jax.models.params import abstract, whole
from sat_jax.sparsity.masks import Criteria, choose
from sat_jax.train.account import kept_shares
from sat_jax.train.state import keyed_trees

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute
from sat_jax.sparsity.flops import speedup_bound
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.statistics import Statistics
from sat_jax.train.moves import compile_moves
from sat_jax.train.probe import ProbeSettings, make_probe
from scripts.step_program import filled, neurons_of, step_program

RATES = (0.2, 0.4, 0.5, 0.6)


class Cost(NamedTuple):
    """Seconds of one step: wall clock, and processor time of the whole process."""

    wall: float
    cpu: float


Variant = Callable[[], Cost]


def steps(model: DecoderConfig, given: Any) -> list[dict[str, Any]]:
    """The SAT step at every rate against the dense step, beside the FLOP bound; the other
    executions."""
    neurons = neurons_of(model)
    wanted = [("dense", 0.0), *(("gather", rate) for rate in RATES)]
    wanted += [("kernel", 0.5), ("mask", 0.5)]
    blocks = {"kernel": 128 if model.d_ff > 128 else 64}
    plans = {
        (execution, rate): make_plan(neurons, rate, rate, block=blocks.get(execution, 1))
        for execution, rate in wanted
    }
    variants = {
        key: _training_step(model, plan, given, key[0] if key[1] else "gather")
        for key, plan in plans.items()
    }
    costs = _take_turns(variants, given.turns)
    rows = []
    for key, plan in plans.items():
        heads, channels = kept_shares(plan, neurons)
        execution, rate = key
        wall, cpu = (_ratio(costs[wanted[0]], costs[key], field) for field in ("wall", "cpu"))
        bound = speedup_bound(model, given.row_length, plan.segments, given.remat)
        rows.append(
            {
                "execution": execution,
                "rate": rate,
                "kept_heads": heads,
                "kept_channels": channels,
                **_medians(costs[key]),
                "speedup_wall": wall,
                "speedup_cpu": cpu,
                "bound": bound,
                "share_of_bound": wall / bound,
            }
        )
    return rows


def peer(model: DecoderConfig, given: Any) -> list[dict[str, Any]]:
    """Our dense step against transformers' (torch, sdpa attention) on the same shapes."""
    shape = json.dumps(
        {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.n_kv_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.d_ff,
            "tie_word_embeddings": model.tie_embeddings,
            "max_position_embeddings": model.max_positions,
        }
    )
    command = [sys.executable, "-m", "scripts.benchmark_peer", shape]
    command += [str(given.rows), str(given.row_length), given.dtype, given.remat]
    # Its threads must sleep, not spin, while the other side takes its turn.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def transformers() -> Cost:
            with contextlib.suppress(BrokenPipeError):
                stdin.write("step\n")
                stdin.flush()
            if not (answer := stdout.readline()):
                raise UserError("transformers' side has ended; what it said is above")
            return Cost(*json.loads(answer))

        dense = _training_step(model, make_plan(neurons_of(model), 0, 0), given)
        costs = _take_turns({"sat_jax": dense, "transformers": transformers}, given.turns)
        stdin.close()
    return [
        {
            "library": name,
            "torch": version("torch"),
            "transformers": version("transformers"),
            **_medians(costs[name]),
            "speed_against_transformers_wall": _ratio(costs["transformers"], costs[name], "wall"),
            "speed_against_transformers_cpu": _ratio(costs["transformers"], costs[name], "cpu"),
        }
        for name in costs
    ]


def moves(model: DecoderConfig, given: Any) -> list[dict[str, Any]]:
    """What a refresh costs (probe, selection, compact, expand) against a SAT step, at r = 0.4."""
    neurons = neurons_of(model)
    plan = make_plan(neurons, 0.4, 0.4)
    graph, _ = abstract(model, compute=_compute(given))
    program = step_program(
        model, make_plan(neurons, 0, 0), _compute(given), (given.rows, given.row_length)
    )
    state, _, batch = filled(program, model, make_plan(neurons, 0, 0))
    trees, structure = keyed_trees(state)
    state = jax.tree.unflatten(structure, [whole(x) if isinstance(x, dict) else x for x in trees])
    empty = Statistics(
        jnp.zeros(()),
        heads=jnp.zeros((model.n_layers, model.n_kv_heads, model.query_heads, model.query_heads)),
        channels=jnp.zeros((model.n_layers, model.d_ff)),
    )
    probe = jax.jit(make_probe(graph, ProbeSettings(("outputs",), 0.0, 1024)))
    select = jax.jit(
        lambda params, stats: choose(params, stats, plan, neurons, Criteria(), jax.random.key(0))
    )
    stats = probe(state.params, empty, batch, state.step)
    masks = select(state.params, stats)
    moves = compile_moves(
        *jax.eval_shape(lambda: (state, masks)),
        plan,
        True,
        placed=lambda tree: tree,
        compiled=lambda function, *args, **jit: jax.jit(function, **jit).lower(*args).compile(),
    )
    parted: Any = None

    def compact() -> Any:
        nonlocal parted
        parted = moves.enter(state, masks)
        return parted

    def expand() -> Any:
        nonlocal state
        state = moves.leave(*parted, masks)
        return state

    # In each turn in this order: what is whole when a turn begins is whole again when it ends.
    costs = _take_turns(
        {
            "step": _training_step(model, plan, given),
            "probe": _timed(lambda: probe(state.params, empty, batch, state.step)),
            "select": _timed(lambda: select(state.params, stats)),
            "compact": _timed(compact),
            "expand": _timed(expand),
        },
        given.turns,
    )
    return [
        {"move": name, "rate": 0.4, **_medians(costs[name])}
        | {"share_of_a_step": 1 / _ratio(costs["step"], costs[name], "wall")}
        for name in costs
    ]


def _training_step(
    model: DecoderConfig, plan: Plan, given: Any, execution: str = "gather"
) -> Variant:
    """One optimizer step of what a plan trains, timed."""
    shape = given.rows, given.row_length
    program = step_program(model, plan, _compute(given), shape, execution)
    state, masks, batch = filled(program, model, plan)
    compiled = jax.jit(program.function, donate_argnums=0).lower(state, masks, batch).compile()

    def step() -> Any:
        nonlocal state
        state, loss = compiled(state, masks, batch)
        return loss

    return _timed(step)


def _timed(work: Callable[[], Any]) -> Variant:
    def timed() -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(work())
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)

    return timed


def _take_turns(variants: Mapping[Any, Variant], turns: int) -> dict[Any, list[Cost]]:
    """One step of each variant in turn, `turns` times, after one turn that is not counted."""
    costs: dict[Any, list[Cost]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, variant in variants.items():
            cost = variant()
            if turn:
                costs[name].append(cost)
        print(f"turn {turn}/{turns}", file=sys.stderr, flush=True)
    return costs


def _ratio(numerators: list[Cost], denominators: list[Cost], field: str) -> float:
    """Median over the turns of one variant's seconds by the other's."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)


def _medians(costs: list[Cost]) -> dict[str, float]:
    return {
        "wall_seconds": statistics.median(cost.wall for cost in costs),
        "cpu_seconds": statistics.median(cost.cpu for cost in costs),
    }


def _compute(given: Any) -> Compute:
    return Compute(dtype=given.dtype, remat=given.remat)
