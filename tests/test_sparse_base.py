"""SparseLoRA: frozen weights omit the units that a layer chooses, and adapters keep all of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from sat_jax.compress.lora import add_lora, lora_layout
from sat_jax.config import Config
from sat_jax.config_values import from_config_dict
from sat_jax.models.build import layout_of
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.nn.branch import Branch, branches
from sat_jax.nn.context import Context
from sat_jax.nn.decoder import Compute, Decoder, Remat
from sat_jax.nn.layout import Layout
from sat_jax.nn.lora import Lora, LoraSettings
from sat_jax.nn.loss import next_token_loss
from sat_jax.nn.omitted_rows import OmittedRows
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import parameter_spec
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.sparse_base import SparseBase
from sat_jax.sparsity.flops import _products_of, forward_flops, training_flops
from sat_jax.sparsity.plan import make_plan
from sat_jax.sparsity.predictors import add_predictors, predictor_layout
from sat_jax.sparsity.rows import Kept, indicator
from sat_jax.train import costs
from sat_jax.train.programs import Programs
from sat_jax.train.setup import controller_of
from tests.executions import Result, assert_gradients_close, differentiate
from tests.small_models import CONFIGS, batch, neurons, nothing_omitted, random_params
from tests.test_config import nested
from tests.tolerances import assert_close
from tests.user_errors import user_error

KEY = jax.random.key(7)
MODELS: dict[str, Any] = {
    "gqa": dataclasses.replace(CONFIGS["gqa"], n_layers=2),
    "bias": dataclasses.replace(CONFIGS["bias"], n_layers=2),
    "gpt2": GPT2Config(vocab_size=32, d_model=16, n_layers=2, n_heads=4, d_ff=24, max_positions=32),
}
ROWS = batch(CONFIGS["mha"])
ANSWERS = ROWS.loss_mask & (ROWS.positions > 2)  # three of row 0, seven of row 1, none of row 2
SHARE = 0.7
ALL, SOME = LoraSettings(rank=2, alpha=6.0), LoraSettings(rank=2, targets=("query", "up"))
RANK = 3


@functools.cache
def adapted(name: str, settings: LoraSettings = ALL, rank: int = RANK) -> Any:
    """Layout and arrays of a model with predictors, and adapters that change its function."""
    plain, rng = layout_of(MODELS[name]), np.random.default_rng(7)
    layout = lora_layout(plain, settings)

    @jax.jit
    def add(params: Any) -> Any:
        values = add_lora(plain, params, settings, 0)
        return add_predictors(layout, values, rank)

    values = {path: np.asarray(value) for path, value in add(random_params(MODELS[name])).items()}
    for path in values:
        if "/update/" in path:
            values[path] = 0.3 * rng.normal(size=values[path].shape).astype(np.float32)
    return predictor_layout(layout, rank), values


GROUPS: dict[str, Any] = {"balance": 2, "block": 2}
HEADS: dict[str, Any] = {"attention_unit": "query_head", "dense_layers": (0,)}


def sparse_base(
    name: str,
    settings: LoraSettings = ALL,
    rates: tuple[float, float] = (0.5, 0.5),
    plan: dict[str, Any] = GROUPS,
    *,
    remat: Remat = "none",
    rank: int = RANK,
    metric: str = "sparselora",
    **options: Any,
) -> SparseBase:
    layout = adapted(name, settings, rank)[0]
    if remat != "none":
        compute = Compute(remat=remat)
        layout = predictor_layout(lora_layout(layout_of(MODELS[name], compute), settings), rank)
    chosen = make_plan(neurons(MODELS[name]), *rates, **plan)
    return SparseBase(layout, chosen, criteria=Criteria(metric), **options)


@functools.partial(jax.jit, static_argnums=0)
def differentiated(execution: SparseBase, values: Any) -> Result:
    """The result of a model, of which gradients are those of the adapters, by full arrays."""
    kept = nothing_omitted(execution.plan)
    params, omitted = execution.compact(values, kept)
    trained = execution.trained(params, kept)
    options = {"selection": execution.selection.for_tokens(ANSWERS), "key": KEY}
    done = differentiate(
        lambda trained: execution.bind(trained, params, omitted, kept, {}), trained, **options
    )
    return done._replace(gradients=execution.expand(done.gradients, {}, kept))


def kept_of(done: Result) -> Kept:
    return tuple(segment.get("kept", {}) for segment in done.observed)


def without_omitted_rows(
    layout: Layout[Any], values: dict[str, Any], execution: SparseBase, kept: Kept
) -> dict[str, Any]:
    """Arrays whose frozen matrices have zeros in the rows of omitted units."""
    changed = dict(values)
    for path, leaf in layout.with_role("read", "write"):
        if leaf.trained:
            continue
        array = np.array(values[path])
        for segment, units in zip(execution.plan.segments, kept, strict=True):
            for unit in units.keys() & set(leaf.axes):
                mask = np.asarray(indicator(units[unit], layout.units[unit].size))
                part = array[segment.start : segment.stop]
                part *= mask.reshape(*mask.shape, *(1,) * (part.ndim - mask.ndim))
        changed[path] = array
    return changed


SLOW = pytest.mark.slow  # every case compiles two backward passes
CASES: list[tuple[Any, ...]] = [
    ("bias", ALL, GROUPS, "none"),
    ("gqa", SOME, HEADS, "full"),
    ("gpt2", ALL, GROUPS, "dots"),
]


@pytest.mark.parametrize(
    ("name", "settings", "plan", "remat"),
    [CASES[0], *(pytest.param(*case, marks=SLOW) for case in CASES[1:])],
)
def test_it_equals_lora_on_a_base_without_the_rows_of_omitted_units(
    name: str, settings: LoraSettings, plan: dict[str, Any], remat: Remat
) -> None:
    """Logits, and gradients of all adapters, those of omitted units too."""
    layout, values = adapted(name, settings)
    execution = sparse_base(name, settings, plan=plan, remat=remat)
    actual = differentiated(execution, values)
    assert any(kept_of(actual))
    changed = without_omitted_rows(layout, values, execution, kept_of(actual))

    @jax.jit
    def masked(values: Any) -> Result:
        trained = {path: x for path, x in values.items() if layout.leaves[path].trained}
        return differentiate(lambda trained: layout.bind({**values, **trained}), trained)

    expected = masked(changed)
    assert_close(actual.logits, expected.logits, "float32", "forward")
    assert_gradients_close(actual.gradients, expected.gradients)
    full = masked(values).logits
    assert np.abs(np.asarray(full) - np.asarray(expected.logits)).max() > 0.1


@SLOW
@pytest.mark.parametrize(("name", "settings", "plan", "remat"), CASES)
def test_answer_tokens_are_computed_as_with_masks(
    name: str, settings: LoraSettings, plan: dict[str, Any], remat: Remat
) -> None:
    options: dict[str, Any] = {"plan": plan, "remat": remat, "dense_share": SHARE}
    gathered, masked, sparse = (
        differentiated(sparse_base(name, settings, **options | more), adapted(name, settings)[1])
        for more in ({}, {"masked": True}, {"dense_share": 0.0})
    )
    assert_close(gathered.logits, masked.logits, "float32", "forward")
    assert_gradients_close(gathered.gradients, masked.gradients)
    difference = np.abs(np.asarray(gathered.logits) - np.asarray(sparse.logits)).max(-1)
    assert (difference[np.asarray(ANSWERS)] > 1e-3).all()


# --- selection ---


def layer_of(layout: Layout[Any], values: Any, name: str, layer: int = 0) -> Branch:
    """A branch of one layer."""
    graph, state = nnx.split(branches(layout.bind(values).layers)[name])
    branch: Branch = nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(x)[layer], state))
    return branch


def expected_scores(values: Any, name: str, x: np.ndarray) -> np.ndarray:
    """Of query heads `[K, G]` or channels `[F]`, unit by unit, from the frozen matrices of the
    first layer at full rank."""
    rows = x[np.asarray(ROWS.segment_ids) > 0].astype(np.float64)

    def norm(path: str, *place: int) -> np.floating[Any]:
        """Of one column over tokens."""
        return np.linalg.norm(rows @ values[f"layers/{name}/{path}/base"][0][place])

    if name == "mlp":
        gate, up = (rows @ values[f"layers/mlp/{n}/base"][0].T for n in ("gate", "up"))
        return np.linalg.norm(gate / (1 + np.exp(-gate)) * up, axis=0)
    _, groups, heads, size, _ = values["layers/attention/query/base"].shape
    scores = np.zeros((groups, heads))
    for k, g in np.ndindex(groups, heads):
        pairs = sum(norm("query", k, g, e) * norm("key", k, e) for e in range(size))
        scores[k, g] = pairs * math.sqrt(sum(norm("value", k, e) ** 2 for e in range(size)))
    return scores


@pytest.mark.parametrize(
    ("branch", "plan"),
    [("attention", {}), ("attention", HEADS | {"dense_layers": ()}), ("mlp", {})],
)
def test_the_best_units_of_the_batch_are_kept(branch: str, plan: dict[str, Any]) -> None:
    """Against loops over units: a query head has the key of its own group."""
    layout, values = adapted("gqa", ALL, 16)
    x = np.random.default_rng(1).normal(size=(3, 10, 16)).astype(np.float32)
    x[2] *= 1e3  # padding, which has no say
    execution = sparse_base("gqa", plan=plan, rank=16)
    context = Context(ROWS.segment_ids, key=KEY)
    chosen, kept = execution.selection(layer_of(layout, values, branch), jnp.asarray(x), context)
    ((unit, indices),) = kept.items()
    scores = expected_scores(values, branch, x)
    if unit == "kv_group":
        scores = scores.sum(-1)
    number = execution.plan.segments[0].kept(unit)
    best = np.sort(np.argsort(-scores, axis=-1)[..., :number], axis=-1)
    np.testing.assert_array_equal(indices, best)
    weight = chosen.output_weight.get_value()
    assert isinstance(weight, Lora) and isinstance(weight.base, OmittedRows)


def test_predictors_approximate_the_frozen_matrices() -> None:
    """They are constants, split over a mesh as these are."""
    layout, values = adapted("gqa", ALL, 16)
    paths = [path for path in layout.leaves if "/predictors/" in path]
    assert len(paths) == 2 * 5  # query, key, value, gate and up
    assert not any(layout.leaves[path].trained for path in paths)
    for name in ("attention/query", "attention/key", "mlp/gate"):
        branch, matrix = name.split("/")
        factors = layer_of(layout, values, branch, 1).predictor(matrix)
        assert_close(factors.dense(), values[f"layers/{name}/base"][1], "float32", "forward")
    left = "layers/attention/predictors/query/left"
    base = parameter_spec(layout, "layers/attention/query/base", 4)
    assert parameter_spec(layout, left, 4) == base


# --- costs ---

SETTINGS: dict[str, Any] = {
    "lora.rank": 2,
    "data.row_length": 40,
    "train.rows_per_step": 2,
    "sparsity.rate": 0.5,
    "sparsity.refresh_every": 0,
    "sparsity.metric": "sparselora",
    "sparsity.adapters": "dense",
    "sparsity.schedule": "constant",
}


def config_of(**changes: Any) -> Config:
    values = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return from_config_dict(nested(values))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity__attention_unit": "query_head", "sparsity__dense_answers": 0.5},
        {"sparsity__metric": "svd", "sparsity__rate_attention": 0.0},
        {"model__remat": "full", "lora__targets": ("query", "up")},
    ],
)
def test_every_matrix_product_is_counted(changes: dict[str, Any]) -> None:
    """Those of a step, the choice of units included, but no product that is not used."""
    config, model = config_of(**changes), MODELS["gqa"]
    programs = Programs(config, model, make_mesh(config.mesh), controller_of(config, model))
    (rung,) = controller_of(config, model).rungs
    execution = programs.execution(rung.plan)
    programs.close()
    assert isinstance(execution, SparseBase)
    numbers = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 40), jnp.bool_)
    kept = nothing_omitted(rung.plan)
    params, _ = jax.eval_shape(lambda v: execution.compact(v, kept), dict(programs.layout.shapes))

    def gradients(params: Any, *rows: Any) -> Any:
        options = {"selection": execution.selection.for_tokens(rows[-1]), "key": KEY}

        def loss(trained: Any) -> Any:
            model: Decoder = execution.bind(trained, params, {}, kept, {})
            return next_token_loss(model, *rows, **options)[0]

        return jax.value_and_grad(loss)(execution.trained(params, kept))

    traced = jax.make_jaxpr(gradients)(params, *[numbers] * 4, mask)
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    # In one block of attention every query meets every key, as many pairs as in rows of 79.
    options: Any = {"remat": config.model.remat, "sparse_base": config.sparsity.dense_answers}
    blocks, length = (
        training_flops(programs.layout, length, rung.plan.segments, **options)
        for length in (79, 40)
    )
    expected = costs.step_flops(config, model, rung) + blocks.total - length.total
    assert_close(_products_of(used, min), 80 * expected, "float64", "forward")


def test_flops_by_hand() -> None:
    """Half of the frozen weights of channels, for seven tenths of the tokens: adapters, attention
    and the head have all units."""
    layout = lora_layout(layout_of(MODELS["gqa"]), ALL)
    half = make_plan(neurons(MODELS["gqa"]), 0.0, 0.5).segments
    full, sparse = forward_flops(layout, 8), forward_flops(layout, 8, half, 0.3)
    omitted = 2 * 2 * 0.7 * 3 * 12 * 16
    assert_close(full.total - sparse.total, omitted, "float64", "forward")
    assert_close(full.frozen - sparse.frozen, omitted, "float64", "forward")
    assert sparse.mixing == full.mixing


# --- settings ---


def test_without_omission_the_step_is_that_of_lora() -> None:
    def text(config: Config) -> str:
        model = MODELS["gqa"]
        programs = Programs(config, model, make_mesh(config.mesh), controller_of(config, model))
        lowered = programs.lower_step(controller_of(config, model).rungs[0].plan).as_text()
        programs.close()
        return lowered

    of_lora = ("lora.rank", "data.row_length", "train.rows_per_step")
    plain = from_config_dict(nested({key: SETTINGS[key] for key in of_lora}))
    assert text(config_of(sparsity__rate=0.0)) == text(plain)
    assert text(config_of()) != text(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 0}, "sparsity.adapters 'dense' needs lora.rank 1 or more, not 0"),
        (
            {"sparsity.refresh_every": 4, "sparsity.metric": "output"},
            "sparsity.adapters 'dense' needs sparsity.refresh_every 0, not 4",
        ),
        (
            {"sparsity.adapters": "sparse", "sparsity.dense_answers": 0.5},
            "sparsity.dense_answers 0.5 needs sparsity.adapters 'dense', not 'sparse'",
        ),
        (
            {"sparsity.adapters": "sparse", "sparsity.predictor_rank": 4},
            "sparsity.predictor_rank 4 needs sparsity.adapters 'dense', not 'sparse'",
        ),
        (
            {"sparsity.metric": "wanda", "sparsity.predictor_rank": 4},
            "sparsity.metric 'wanda' does not use sparsity.predictor_rank 4; accepted: 8, or metric"
            " svd, sparselora",
        ),
        (
            {"sparsity.dense_answers": 0.5, "mesh.context": 2},
            "sparsity.dense_answers 0.5 excludes mesh.context 2: devices would have different"
            " numbers of these tokens; accepted: 1",
        ),
        (
            {"sparsity.execution": "mask", "optimizer.moments": "decay"},
            "sparsity.adapters 'dense' excludes optimizer.moments 'decay': adapters of omitted"
            " neurons are updated, too; accepted: freeze",
        ),
        (
            {"sparsity.token_skip_rate": 0.5},
            "sparsity.token_skip_rate 0.5 excludes sparsity.refresh_every 0; accepted: 1 or more",
        ),
        (
            {"lora.dora": True},
            "lora.dora excludes omission rates above 0 (0.5): norms of outputs need all units;"
            " accepted: one of the two",
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert user_error(lambda: from_config_dict(nested(SETTINGS | changes))) == message
