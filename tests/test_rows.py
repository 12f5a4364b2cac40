"""Rows of kept and omitted units in gather execution, and back, bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of, shapes
from sat_jax.models.llama import LlamaConfig
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.plan import Plan, Segment, make_plan
from sat_jax.sparsity.rows import (
    add_at_rows,
    complement,
    gather_layer,
    gather_rows,
    scatter_layer,
)
from tests.conftest import RunPython, slow_after
from tests.executions import equal
from tests.small_models import CONFIGS, neurons, nothing_omitted, random_kept, random_params

# Parameters whose rows belong to a unit.
HEADS = {"query", "output", "query_bias"}
GROUPS = {"key", "value", "key_bias", "value_bias"}
CHANNELS = {"gate", "up", "down"}


def planned(name: str, attention: float, mlp: float, **rest: Any) -> tuple[LlamaConfig, Plan]:
    return CONFIGS[name], make_plan(neurons(CONFIGS[name]), attention, mlp, **rest)


def by_hand(kv_groups: int, query_heads: int, channels: int) -> tuple[LlamaConfig, Plan]:
    counts = (("kv_group", kv_groups), ("query_head", query_heads), ("channel", channels))
    return CONFIGS["gqa"], Plan((Segment(0, 3, counts),))


CASES = {
    "groups": planned("gqa", 0.5, 0.5),
    "query heads with biases": planned("bias", 0.34, 0.5, attention_unit="query_head"),
    "norms": planned("norm", 0.5, 0.25),
    "heads only": planned("gqa", 0.5, 0.0),
    "channels only": planned("gqa", 0.0, 0.5),
    "two sparse segments": planned(
        "gqa", 0.34, 0.5, dense_layers=(1,), attention_unit="query_head"
    ),
    "balanced segments": planned("bias", 0.5, 0.5, balance=4, block=2, dense_layers=(1,)),
    "balanced query heads": planned("gqa", 0.6, 0.5, balance=4, attention_unit="query_head"),
    "nothing kept": by_hand(0, 3, 0),
    "no query head kept": by_hand(4, 0, 0),
    "dense": planned("gqa", 0.0, 0.0),
}


def trees(config: LlamaConfig) -> Iterator[dict[str, Any]]:
    """Parameters, and update counts, which have the axes of units alone."""
    layout = layout_of(config)
    yield random_params(config)
    yield {
        path: np.random.default_rng(2).integers(
            *(0, 99), shape.shape[: layout.count_axes(path)], np.int32
        )
        for path, shape in shapes(config).items()
    }


def indices_of(path: str, kept: Mapping[str, Any]) -> Any:
    """The kept indices of a parameter; None: all its rows are kept."""
    leaf = path.rsplit("/", 1)[-1]
    if leaf in CHANNELS:
        return kept.get("channel")
    if leaf in GROUPS:
        return kept.get("kv_group")
    return kept.get("kv_group", kept.get("query_head")) if leaf in HEADS else None


def kept_places(indices: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (place in the compact array, place in the full array) of each kept row."""
    indices = np.asarray(indices)
    for place in np.ndindex(indices.shape):
        yield place, (*place[:-1], int(indices[place]))


@pytest.mark.parametrize("case", slow_after(2, *sorted(CASES, key=lambda n: "segments" not in n)))
def test_compact_splits_kept_from_omitted_rows_and_expand_merges_them(case: str) -> None:
    config, plan = CASES[case]
    kept, execution = random_kept(config, plan), Gather(layout_of(config), plan)
    compact, expand = jax.jit(execution.compact), jax.jit(execution.expand)
    for full in trees(config):
        rows, omitted = compact(full, kept)
        equal(expand(rows, omitted, kept), full)

        changed = jax.tree.map(lambda value: value + 1, rows)
        expected = {path: np.array(value) + 1 for path, value in full.items()}
        for path, value in full.items():
            if not path.startswith("layers/"):
                np.testing.assert_array_equal(rows[path], value, strict=True)
                continue
            for number, segment in enumerate(plan.segments):
                part, indices = rows[path][number], indices_of(path, kept[number])
                full_part = value[segment.start : segment.stop]
                if indices is None:
                    np.testing.assert_array_equal(part, full_part, strict=True)
                    assert path not in omitted or omitted[path][number] is None
                    continue
                assert part.shape == indices.shape + full_part.shape[indices.ndim :]
                for place in np.ndindex(indices.shape[:-1]):
                    others = np.delete(full_part[place], indices[place], axis=0)
                    np.testing.assert_array_equal(omitted[path][number][place], others)
                expected[path][segment.start : segment.stop] = full_part
                for place, origin in kept_places(indices):
                    np.testing.assert_array_equal(part[place], full_part[origin])
                    expected[path][segment.start : segment.stop][origin] = full_part[origin] + 1
        assert all(any(part is not None for part in parts) for parts in omitted.values())
        equal(expand(changed, omitted, kept), expected)


def test_keeping_all_indices_equals_no_indices() -> None:
    config, dense = CASES["dense"]
    plan = Plan(dense.segments, balance=2)
    execution, params = Gather(layout_of(config), plan), jax.device_put(random_params(config))
    everything = random_kept(config, plan, always=True)
    assert everything[0]["kv_group"].shape == (3, 4)
    rows, omitted = execution.compact(params, everything)
    expected, nothing = execution.compact(params, nothing_omitted(dense))
    equal(rows, expected)
    assert not nothing and omitted
    assert all(not value.size for value in jax.tree.leaves(omitted))
    equal(execution.expand(rows, omitted, everything), params)


def test_arrays_without_omitted_rows_are_passed_on_without_a_copy() -> None:
    config, plan = CASES["channels only"]
    full = jax.device_put(random_params(config))
    execution, kept = Gather(layout_of(config), plan), random_kept(config, plan)
    rows, omitted = execution.compact(full, kept)
    expanded = execution.expand(rows, omitted, kept)
    for path, value in full.items():
        if not path.startswith("layers/mlp/"):
            assert (rows[path][0] if path.startswith("layers/") else rows[path]) is value
            assert expanded[path] is value


def test_complement_is_sorted() -> None:
    kept = jnp.asarray([[0, 3], [1, 2]], jnp.int32)
    np.testing.assert_array_equal(complement(kept, 5), np.int32([[1, 2, 4], [0, 3, 4]]))
    assert complement(kept, 5).dtype == jnp.int32


@pytest.mark.parametrize("within", [(), (2,)])
def test_rows_of_one_layer_are_read_and_written_alone(within: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(size=(3, *within, 5, 4)).astype(np.float32)
    draw = [np.sort(rng.permutation(5)[:2]) for _ in range(3 * int(np.prod(within)))]
    kept = jnp.asarray(np.reshape(draw, (3, *within, 2)), jnp.int32)
    rows = gather_rows(jnp.asarray(value), kept)
    expected_sum = value.copy()
    for place, origin in kept_places(kept):
        np.testing.assert_array_equal(rows[place], value[origin])
        expected_sum[origin] += 1
    np.testing.assert_array_equal(
        add_at_rows(jnp.asarray(value), 1.0 + 0 * rows, kept), expected_sum
    )
    for layer in range(3):
        one = gather_layer(jnp.asarray(value), kept, jnp.asarray(layer))
        np.testing.assert_array_equal(one[0], rows[layer])
        expected = value.copy()
        expected[layer] = expected_sum[layer]
        written = scatter_layer(jnp.asarray(value), one + 1, kept, jnp.asarray(layer))
        np.testing.assert_array_equal(written, expected)
        all_rows = gather_layer(jnp.asarray(value), None, jnp.asarray(layer))
        np.testing.assert_array_equal(all_rows[0], value[layer])
        expected[layer] = value[layer] + 1
        written = scatter_layer(jnp.asarray(value), all_rows + 1, None, jnp.asarray(layer))
        np.testing.assert_array_equal(written, expected)


ON_EIGHT_DEVICES = """
import re
import jax, numpy as np
from sat_jax.config import MeshConfig
from sat_jax.models.build import layout_of
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import tree_shardings
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.plan import make_plan
from tests.small_models import CONFIGS, neurons, random_kept, random_params

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
config = CONFIGS["bias"]
layout = layout_of(config)


def placed(tree):
    return jax.device_put(tree, tree_shardings(mesh, layout, tree))


full = placed(random_params(config))


def compiled(function, *args):
    with jax.set_mesh(mesh):
        out = tree_shardings(mesh, layout, jax.eval_shape(function, *args))
        return jax.jit(function, out_shardings=out).lower(*args).compile()


def collectives(balance, **rest):
    plan = make_plan(neurons(config), 0.5, 0.5, balance=balance, **rest)
    kept, execution = placed(random_kept(config, plan)), Gather(layout, plan)
    compact = compiled(execution.compact, full, kept)
    rows, omitted = compact(full, kept)
    expand = compiled(execution.expand, rows, omitted, kept)
    for path, value in expand(rows, omitted, kept).items():
        np.testing.assert_array_equal(value, random_params(config)[path])
    return sum(len(COLLECTIVE.findall(program.as_text())) for program in (compact, expand))


print(collectives(2), collectives(4), collectives(2, dense_layers=(1,)),
      collectives(2, attention_unit="query_head"), collectives(1) > 0)
"""


@pytest.mark.slow
def test_with_balance_no_weight_leaves_its_device(run_python: RunPython) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, devices=8)
    assert (done.stdout.strip(), done.returncode) == ("0 0 0 0 True", 0), done.stderr
