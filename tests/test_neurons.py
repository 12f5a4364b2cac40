"""Compact and expand: the kept neurons as a smaller tree, and back, bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.llama import LlamaConfig
from sat_jax.models.params import abstract, shapes
from sat_jax.sparsity.masks import SegmentMasks
from sat_jax.sparsity.neurons import compact, expand, keep_only, mask_values, neuron_axes
from sat_jax.sparsity.plan import Plan, Segment, make_plan
from tests.conftest import RunPython
from tests.small_models import CONFIGS, neurons, random_masks, random_params

# What each neuron owns, and which axes after the layer axis say which neuron it is.
HEADS = {"query": 2, "output": 2, "query_bias": 2}
GROUPS = {"key": 1, "value": 1, "key_bias": 1, "value_bias": 1}
CHANNELS = {"gate": 1, "up": 1, "down": 1}
OTHERS = {"query_norm": 0, "key_norm": 0, "attention_norm": 0, "mlp_norm": 0}


def planned(name: str, attention: float, mlp: float, **rest: Any) -> tuple[LlamaConfig, Plan]:
    return CONFIGS[name], make_plan(neurons(CONFIGS[name]), attention, mlp, **rest)


def by_hand(kv_groups: int, query_heads: int, channels: int) -> tuple[LlamaConfig, Plan]:
    return CONFIGS["gqa"], Plan((Segment(0, 3, kv_groups, query_heads, channels),))


CASES = {
    "mha": planned("mha", 0.5, 0.5),
    "groups": planned("gqa", 0.5, 0.5),
    "query heads": planned("gqa", 0.34, 0.5, attention_unit="query_head"),
    "biases": planned("bias", 0.5, 0.5),
    "query heads with biases": planned("bias", 0.34, 0.5, attention_unit="query_head"),
    "norms": planned("norm", 0.5, 0.25),
    "heads only": planned("gqa", 0.5, 0.0),
    "channels only": planned("gqa", 0.0, 0.5),
    "first layer dense": planned("gqa", 0.5, 0.5, dense_layers=(0,)),
    "last layer dense": planned("bias", 0.5, 0.5, dense_layers=(-1,)),
    "two sparse segments": planned(
        "gqa", 0.34, 0.5, dense_layers=(1,), attention_unit="query_head"
    ),
    "balanced": planned("gqa", 0.5, 0.5, balance=2),
    "balanced segments": planned("bias", 0.5, 0.5, balance=4, block=2, dense_layers=(1,)),
    "balanced query heads": planned("gqa", 0.6, 0.5, balance=4, attention_unit="query_head"),
    "nothing kept": by_hand(0, 3, 0),
    "no query head kept": by_hand(4, 0, 0),
    "dense": planned("gqa", 0.0, 0.0),
}


def trees(config: LlamaConfig) -> Iterator[dict[str, Any]]:
    """Parameters, moments, and update counts, which have the neuron axes alone."""
    yield random_params(config)
    yield random_params(config, seed=1)
    yield {
        path: np.random.default_rng(2).integers(0, 99, shape.shape[: neuron_axes(path)], np.int32)
        for path, shape in shapes(config).items()
    }


def indices_of(path: str, mask: SegmentMasks) -> Any:
    """The kept indices of a parameter, said once more: None for what is kept whole."""
    leaf = path.rsplit("/", 1)[-1]
    if leaf in CHANNELS:
        return mask.channels
    grouped = mask.heads is not None and mask.heads.ndim == 2
    return mask.heads if leaf in HEADS or (leaf in GROUPS and grouped) else None


def kept_rows(mask: SegmentMasks, path: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(place in the compact array, place in the whole array) of every kept row of a segment."""
    indices = np.asarray(indices_of(path, mask))
    for place in np.ndindex(indices.shape):
        yield place, (*place[:-1], int(indices[place]))


def omitted_rows(
    mask: SegmentMasks, path: str, rows: np.ndarray
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(layer and group, the rows that are not kept) of a segment."""
    indices = np.asarray(indices_of(path, mask))
    for place in np.ndindex(indices.shape[:-1]):
        yield place, np.delete(rows[place], indices[place], axis=0)


def equal(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path, strict=True)


jit_compact = jax.jit(compact, static_argnames="plan")
jit_expand = jax.jit(expand, static_argnames="plan")


@pytest.mark.parametrize("case", CASES)
def test_compact_parts_kept_and_omitted_rows_and_expand_puts_them_together(case: str) -> None:
    config, plan = CASES[case]
    masks = random_masks(config, plan)
    for whole in trees(config):
        small, resting = jit_compact(whole, masks, plan=plan)
        equal(jit_expand(small, resting, masks, plan=plan), whole)

        changed = {path: value + 1 for path, value in small.items()}
        expected = {path: np.array(value) + 1 for path, value in whole.items()}
        omitted = set()
        for path, value in whole.items():
            if not path.startswith("layers/"):
                np.testing.assert_array_equal(small[path], value, strict=True)
                continue
            for number, (segment, mask) in enumerate(zip(plan.segments, masks, strict=True)):
                part = np.asarray(small[f"layers/{number}/{path.removeprefix('layers/')}"])
                rows = np.asarray(value[segment.start : segment.stop])
                if indices_of(path, mask) is None:
                    np.testing.assert_array_equal(part, rows, strict=True)
                    continue
                name = f"layers/{number}/omitted/{path.removeprefix('layers/')}"
                omitted.add(name)
                for place, others in omitted_rows(mask, path, rows):
                    np.testing.assert_array_equal(np.asarray(resting[name])[place], others)
                expected[path][segment.start : segment.stop] = rows
                lead = indices_of(path, mask).shape
                assert part.shape == lead + rows.shape[len(lead) :]
                for place, origin in kept_rows(mask, path):
                    np.testing.assert_array_equal(part[place], rows[origin])
                    expected[path][segment.start : segment.stop][origin] = rows[origin] + 1
        assert resting.keys() == omitted
        equal(jit_expand(changed, resting, masks, plan=plan), expected)


def test_all_indices_are_the_same_as_no_mask() -> None:
    config, dense = CASES["dense"]
    plan = Plan(dense.segments, balance=2)
    everything = random_masks(config, plan, always=True)
    assert everything[0].heads.shape == (3, 4)
    small, resting = jit_compact(random_params(config), everything, plan=plan)
    none, nothing = compact(random_params(config), (SegmentMasks(None, None),), dense)
    equal(small, none)
    assert not nothing and all(not value.size for value in resting.values())
    equal(jit_expand(small, resting, everything, plan=plan), random_params(config))


def test_what_is_not_gathered_is_moved_and_not_copied() -> None:
    config, plan = CASES["channels only"]
    whole = {path: jnp.asarray(value) for path, value in random_params(config).items()}
    masks = random_masks(config, plan)
    small, resting = compact(whole, masks, plan)
    again = expand(small, resting, masks, plan)
    for path, value in whole.items():
        inside = path.replace("layers/", "layers/0/")
        if not path.startswith("layers/mlp/"):
            assert small[inside] is value
            assert again[path] is value


@pytest.mark.parametrize(
    "case", ["groups", "query heads with biases", "balanced segments", "norms"]
)
def test_keep_only_changes_kept_rows_alone(case: str) -> None:
    config, plan = CASES[case]
    masks = random_masks(config, plan)
    nothing = tuple(SegmentMasks(None, None) for _ in plan.segments)
    for whole in trees(config):
        old = {path: np.asarray(value) for path, value in compact(whole, nothing, plan)[0].items()}
        expected = {}
        for path, value in old.items():
            mask = masks[int(path.split("/")[1])] if path.startswith("layers/") else None
            if mask is None or indices_of(path, mask) is None:
                expected[path] = value + 1
                continue
            expected[path] = value.copy()
            for _, origin in kept_rows(mask, path):
                expected[path][origin] += 1
        new = {path: jnp.asarray(value + 1) for path, value in old.items()}
        equal(keep_only(new, old, masks), expected)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"nothing kept", "no query head kept"}))
def test_small_trees_and_masks_fit_the_models(case: str) -> None:
    """Shape for shape the parameters of a model in the plan's segments, plain or masked."""
    config, plan = CASES[case]
    masks = random_masks(config, plan)

    def said(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {path: (leaf.shape, leaf.dtype) for path, leaf in tree.items()}

    small, _ = compact(random_params(config), masks, plan)
    assert said(small) == said(abstract(config, plan.segments)[1])
    nothing = tuple(SegmentMasks(None, None) for _ in plan.segments)
    cut, _ = compact(random_params(config), nothing, plan)
    assert said(cut | mask_values(masks)) == said(abstract(config, plan.segments, masked=True)[1])


def test_neuron_axes_are_the_layer_axis_and_the_neurons() -> None:
    expected = {"embed": 0, "lm_head": 0, "final_norm": 0}
    for folder, leaves in {"attention": HEADS | GROUPS, "mlp": CHANNELS}.items():
        expected |= {f"layers/{folder}/{leaf}": 1 + axes for leaf, axes in leaves.items()}
    expected |= {f"layers/{leaf}": 1 for leaf in ("attention_norm", "mlp_norm")}
    expected |= {f"layers/attention/{leaf}": 1 for leaf in ("query_norm", "key_norm")}
    known = {path for config in CONFIGS.values() for path in shapes(config)}
    assert known == expected.keys()
    assert {path: neuron_axes(path) for path in known} == expected


ON_EIGHT_DEVICES = """
import re
import jax, numpy as np
from sat_jax.config import MeshConfig
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import tree_shardings
from sat_jax.sparsity.neurons import compact, expand
from sat_jax.sparsity.plan import make_plan
from tests.small_models import CONFIGS, neurons, random_masks, random_params

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
config = CONFIGS["bias"]
whole = jax.device_put(random_params(config), tree_shardings(mesh, random_params(config)))


def compiled(function, *args):
    with jax.set_mesh(mesh):
        out = tree_shardings(mesh, jax.eval_shape(function, *args))
        return jax.jit(function, out_shardings=out).lower(*args).compile()


def collectives(balance, **rest):
    plan = make_plan(neurons(config), 0.5, 0.5, balance=balance, **rest)
    masks = random_masks(config, plan)
    masks = jax.device_put(masks, tree_shardings(mesh, masks))
    shrink = compiled(lambda whole, masks: compact(whole, masks, plan), whole, masks)
    small, resting = shrink(whole, masks)
    grow = compiled(lambda *args: expand(*args, plan), small, resting, masks)
    for path, value in grow(small, resting, masks).items():
        np.testing.assert_array_equal(value, random_params(config)[path])
    return sum(len(COLLECTIVE.findall(program.as_text())) for program in (shrink, grow))


print(collectives(2), collectives(4), collectives(2, dense_layers=(1,)),
      collectives(2, attention_unit="query_head"), collectives(1) > 0)
"""


def test_with_balance_no_weight_leaves_its_device(run_python: RunPython) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, devices=8)
    assert (done.stdout.strip(), done.returncode) == ("0 0 0 0 True", 0), done.stderr
