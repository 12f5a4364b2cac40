"""SparseLoRA: frozen weights omit the units that a layer chooses, and adapters keep all of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.models.build import layout_of
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.nn.decoder import Decoder, Remat
from sat_jax.nn.layout import Layout
from sat_jax.nn.lora import LoraSettings
from sat_jax.nn.decoder import Compute
from sat_jax.compress.lora import add_lora, lora_layout
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.sparse_base import SparseBase
from sat_jax.sparsity.plan import Plan, make_plan
from sat_jax.sparsity.predictors import add_predictors, predictor_layout
from sat_jax.sparsity.rows import Kept
from tests.executions import ROWS, Result, assert_gradients_close, differentiate
from tests.small_models import CONFIGS, neurons, nothing_omitted, random_params
from tests.tolerances import assert_close

KEY = jax.random.key(7)
MODELS = {
    **CONFIGS,
    "gpt2": GPT2Config(
        vocab_size=32, d_model=16, n_layers=3, n_heads=4, d_ff=24, max_positions=32
    ),
}
ALL = LoraSettings(rank=2, alpha=6.0)
SOME = LoraSettings(rank=2, targets=("query", "up"))
RANK = 3


@functools.cache
def adapted(name: str, settings: LoraSettings, remat: Remat = "none") -> tuple[Layout[Any], Any]:
    """Layout and arrays of a model with predictors and adapters that change its function."""
    plain, rng = layout_of(MODELS[name], Compute(remat=remat)), np.random.default_rng(7)
    layout = lora_layout(plain, settings)
    values = dict(add_lora(plain, random_params(MODELS[name]), settings, 0))
    for path in values:
        if "/update/" in path:
            values[path] = 0.3 * rng.normal(size=values[path].shape).astype(np.float32)
    return predictor_layout(layout, RANK), add_predictors(layout, values, RANK)


GROUPS: dict[str, Any] = {"dense_layers": (0,), "balance": 2, "block": 2}
HEADS: dict[str, Any] = {"attention_unit": "query_head"}


def sparse_base(
    name: str,
    settings: LoraSettings = ALL,
    rate: float = 0.5,
    plan: dict[str, Any] = GROUPS,
    remat: Remat = "none",
    **options: Any,
) -> SparseBase:
    layout = adapted(name, settings, remat)[0]
    criteria = Criteria(options.pop("metric", "sparselora"))
    chosen = make_plan(neurons(MODELS[name]), rate, rate, **plan)
    return SparseBase(layout, chosen, criteria=criteria, **options)


def result(execution: SparseBase, name: str, settings: LoraSettings = ALL) -> Result:
    """With all parameters as the batch of `ROWS` has them; gradients are those of the adapters."""
    return _differentiate(execution, adapted(name, settings)[1])


@functools.partial(jax.jit, static_argnums=0)
def _differentiate(execution: SparseBase, values: Any) -> Result:
    kept = nothing_omitted(execution.plan)
    params, omitted = execution.compact(values, kept)
    trained = execution.trained(params, kept)
    options = {"selection": execution.selection.for_tokens(ROWS.loss_mask), "key": KEY}
    done = differentiate(
        lambda trained: execution.bind(trained, params, omitted, kept, {}), trained, **options
    )
    return done._replace(gradients=execution.expand(done.gradients, {}, kept))


def kept_of(done: Result) -> Kept:
    return tuple(segment.get("kept", {}) for segment in done.observed)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "settings", "plan", "remat"),
    [("bias", ALL, GROUPS, "none"), ("gqa", SOME, HEADS, "full"), ("gpt2", ALL, GROUPS, "dots")],
)
def test_gathered_rows_equal_masks(
    name: str, settings: LoraSettings, plan: dict[str, Any], remat: Remat, share: float
) -> None:
    options: dict[str, Any] = {"plan": plan, "remat": remat, "dense_share": share}
    gathered, masked = (
        result(sparse_base(name, settings, masked=masked, **options), name, settings)
        for masked in (False, True)
    )
    for actual, expected in zip(
        jax.tree.leaves(kept_of(gathered)), jax.tree.leaves(kept_of(masked)), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    assert_close(gathered.logits, masked.logits, "float32", "forward")
    assert_gradients_close(gathered.gradients, masked.gradients)
