"""What a layout derives from the named axes of a model's parameters."""

import jax
import jax.numpy as jnp
import pytest

from sat_jax.models.build import layout_of, shapes
from sat_jax.nn.layout import Unit
from sat_jax.sparsity.importance import score_inputs
from sat_jax.sparsity.statistics import Statistics
from tests.small_models import CONFIGS, random_params

HEAD = ("layer", "kv_group", "query_head", "head_dim", "embed")
GROUP = ("layer", "kv_group", "head_dim", "embed")
CHANNEL = ("layer", "channel", "embed")
# By path of a parameter: its axes, its role, and how many axes its update count has.
LEAVES = {
    "embed": (("vocab", "embed"), "embedding", 0),
    "lm_head": (("vocab", "embed"), "embedding", 0),
    "final_norm": (("norm",), "vector", 0),
    "layers/attention_norm": (("layer", "norm"), "vector", 1),
    "layers/mlp_norm": (("layer", "norm"), "vector", 1),
    "layers/attention/query": (HEAD, "read", 3),
    "layers/attention/key": (GROUP, "read", 2),
    "layers/attention/value": (GROUP, "read", 2),
    "layers/attention/output": (HEAD, "write", 3),
    "layers/attention/query_bias": (HEAD[:-1], "vector", 3),
    "layers/attention/key_bias": (GROUP[:-1], "vector", 2),
    "layers/attention/value_bias": (GROUP[:-1], "vector", 2),
    "layers/attention/query_norm": (("layer", "head_dim"), "vector", 1),
    "layers/attention/key_norm": (("layer", "head_dim"), "vector", 1),
    "layers/mlp/gate": (CHANNEL, "read", 2),
    "layers/mlp/up": (CHANNEL, "read", 2),
    "layers/mlp/down": (CHANNEL, "write", 2),
}


def test_axes_and_roles_of_every_parameter() -> None:
    paths = set()
    for config in CONFIGS.values():
        layout = layout_of(config)
        for path, leaf in layout.leaves.items():
            assert (*leaf[:2], layout.count_axes(path)) == LEAVES[path]
            assert leaf.trained
            assert leaf.in_layers == path.startswith("layers/")
            assert len(shapes(config)[path].shape) == len(leaf.axes)
        paths |= layout.leaves.keys()
    assert paths == LEAVES.keys()


def test_units_are_nested_and_outermost_first() -> None:
    layout = layout_of(CONFIGS["gqa"])
    assert list(layout.units.values()) == [
        Unit("kv_group", 4, "attention", ()),
        Unit("query_head", 3, "attention", ("kv_group",)),
        Unit("channel", 24, "mlp", ()),
    ]
    assert {name: layout.totals(name) for name in layout.units} == {
        "kv_group": 4,
        "query_head": 12,
        "channel": 24,
    }
    assert layout.layers == 3


def test_the_unit_of_a_parameter_is_the_omitted_one() -> None:
    layout = layout_of(CONFIGS["gqa"])
    query, key, norm = (
        f"layers/{name}" for name in ("attention/query", "attention/key", "mlp_norm")
    )
    assert layout.unit_of(query, {"kv_group": 0, "channel": 0}) == "kv_group"
    assert layout.unit_of(query, {"query_head": 0}) == "query_head"
    assert layout.unit_of(key, {"query_head": 0}) is None
    assert layout.unit_of(norm, {"kv_group": 0, "channel": 0}) is None
    with pytest.raises(AssertionError, match="omitted together"):
        layout.unit_of(query, {"kv_group": 0, "query_head": 0})


@pytest.mark.parametrize(
    ("unit", "reads", "writes"),
    [
        ("kv_group", {"query": 12, "key": 4, "value": 4}, {"output": 12}),
        ("query_head", {"query": 4}, {"output": 4}),
        ("channel", {"gate": 1, "up": 1}, {"down": 1}),
    ],
)
def test_score_inputs_are_the_matrices_with_the_axis_of_the_unit(
    unit: str, reads: dict[str, int], writes: dict[str, int]
) -> None:
    """`[L, N, C, D]` with C columns a unit, in any order; biases and norms are not among them."""
    config = CONFIGS["bias"]
    layout, params = layout_of(config), jax.device_put(random_params(config))
    stats = Statistics(jnp.asarray(1.0))
    inputs = score_inputs(layout, params, stats, unit, jax.random.key(0))
    branch, total = layout.units[unit].branch, layout.totals(unit)
    for matrices, expected in ((inputs.reads, reads), (inputs.writes, writes)):
        assert len(matrices) == len(expected)
        for name, columns in expected.items():
            value = params[f"layers/{branch}/{name}"]
            desired = value.reshape(config.n_layers, total, columns, config.d_model)
            assert any(m.shape == desired.shape and (m == desired).all() for m in matrices), name
