"""GPT-2 and GPT-NeoX compute what transformers computes (tests/golden); RetNet and they compute the
same in every execution."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sat_jax.data.batch import Batch
from sat_jax.evaluate.generate import generate
from sat_jax.interop import load_model, open_weights, save_model
from sat_jax.models import registry
from sat_jax.models.build import build, layout_of
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import next_token_loss
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.choose import Criteria, choose
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import Passes, make_plan, neurons_of
from sat_jax.train.probe import observe_batch
from tests.conftest import EMITTERS_OF_USERS, slow_after
from tests.gpt_families import GOLDEN
from tests.small_models import batch, random_kept, random_params
from tests.tolerances import Direction, assert_close

# Directory of the weights, reference file, fields of the config that differ.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "gpt2/reference.npz", {}),
    "gpt2 without prefix": ("gpt2_unprefixed", "gpt2/reference.npz", {}),
    "gpt_neox": ("gpt_neox", "gpt_neox/reference.npz", {}),
    "gpt_neox, sequential residual": (
        "gpt_neox",
        "gpt_neox/reference_sequential.npz",
        {"parallel_residual": False},
    ),
}


@functools.cache
def model_of(case: str) -> Decoder:
    name, _, fields = CASES[case]
    weights = open_weights(GOLDEN / name)
    return build(dataclasses.replace(weights.config, **fields), weights.read)


def reference(case: str) -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / CASES[case][1])


def rows(ids: np.ndarray) -> Batch:
    tokens, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, targets, ones, positions, ones > 0)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    golden = reference(case)
    logits = model_of(case)(jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden["logits"], "float32", "forward")


# Of the last, logits alone are recorded.
@pytest.mark.parametrize("case", slow_after(1, "gpt_neox", "gpt2", "gpt2 without prefix"))
def test_loss_and_gradient_norms(case: str) -> None:
    golden, model = reference(case), model_of(case)
    layout, part = layout_of(model.config), rows(golden["input_ids"])

    def mean_loss(values: dict[str, jax.Array]) -> jax.Array:
        return next_token_loss(layout.bind(values), *part)[0] / part.tokens.size

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(flat_values(model))
    assert_close(loss, golden["loss"], "float32", "forward")
    norms = {}
    form = registry.format_of(model.config)
    for stored in form.stored_tensors(layout.shapes, "huggingface"):
        layer = ... if stored.layer is None else stored.layer
        held = [np.asarray(gradients[path])[layer] for path in stored.tensor.paths]
        norms[stored.name] = np.linalg.norm(stored.tensor.huggingface.join(held))
    desired = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"], strict=True))
    assert norms.keys() == desired.keys()
    for name, norm in desired.items():
        assert_close(norms[name], norm, "float32", "gradient_norm")


@pytest.mark.parametrize("case", list(CASES)[:3])
def test_greedy_continuation_with_a_cache(case: str) -> None:
    golden = reference(case)
    for prompt, expected in zip(golden["greedy_prompt"], golden["greedy_ids"], strict=True):
        ids = generate(model_of(case), [prompt.tolist()], len(expected), stop_ids=())
        assert ids == [expected.tolist()]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_saved_models_are_equal(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    save_model(model, tmp_path / "out")
    reread, ids = load_model(tmp_path / "out"), jnp.asarray(reference(name)["input_ids"])
    assert_close(reread(ids), model(ids), "float32", "exact")


def loss_and_gradients(execution: Execution, kept: Any) -> tuple[Any, Any]:
    """Loss, and gradients of the kept rows in the form of gather execution."""
    layout = execution.layout
    params = jax.device_put(random_params(layout_config(layout)))
    state, omitted = jax.jit(execution.compact)(params, kept)
    part = batch(layout_config(layout))

    def loss(trained: Any) -> jax.Array:
        options: dict[str, Any] = {}
        if execution.selection is not None:
            options = {"selection": execution.selection, "key": jax.random.key(0)}
        model = execution.bind(trained, state, omitted, kept, {})
        return next_token_loss(model, *part, **options)[0]

    program = jax.jit(jax.value_and_grad(loss), compiler_options=EMITTERS_OF_USERS)
    return program(execution.trained(state, kept))


def layout_config(layout: Any) -> Any:
    return next(config for config in CONFIGS.values() if layout_of(config) is layout)


CONFIGS = {
    name: dataclasses.replace(
        open_weights(GOLDEN / name).config,
        vocab_size=32,
        d_model=32,
        n_layers=3,
        n_heads=4,
        d_ff=256,
    )
    for name in ("gpt2", "gpt_neox", "retnet")
}
# The norm of a head divides the rounding errors of a small sum by the sum: of a gradient's largest
# entry up to 1.4e-4 with an eps of 1e-6 (1.6e-15 in float64), and 7e-6 with this one.
CONFIGS["retnet"] = dataclasses.replace(CONFIGS["retnet"], norm_eps=0.1)


# The blocks of GPT-NeoX and RetNet differ most from those of `test_passes`.
@pytest.mark.parametrize(
    ("name", "passes"),
    slow_after(
        1,
        *((name, "all") for name in ("gpt_neox", "gpt2", "retnet")),
        *((name, "backward") for name in ("gpt_neox", "retnet")),
        *((name, "weights") for name in ("gpt2", "retnet")),
    ),
)
def test_executions_agree(name: str, passes: Passes) -> None:
    layout = layout_of(CONFIGS[name])
    plan = make_plan(neurons_of(layout), 0.5, 0.5, block=64, dense_layers=(1,))
    kept = random_kept(CONFIGS[name], plan)
    gather = Gather(layout, plan, passes)
    desired, gradients = loss_and_gradients(gather, kept)
    masked, full = loss_and_gradients(Mask(layout, plan, passes), kept)
    assert_close(masked, desired, "float32", "forward")
    compact, _ = jax.jit(gather.compact)(full, kept)
    others = [compact]
    if passes != "weights":
        kernel = Kernel(layout, plan, passes, KernelConfig(64, "xla"))
        by_kernel, kept_rows = loss_and_gradients(kernel, kept)
        assert_close(by_kernel, desired, "float32", "forward")
        others.append(kept_rows)
    # Biases of queries and keys shift scores: their gradients are small differences of large sums
    # (0 for keys), whose rounding is that of the summands.
    floor = 0.01 * max(float(np.abs(x).max()) for x in jax.tree.leaves(gradients))
    direction: Direction = "retention" if name == "retnet" else "backward"
    for path, value in gradients.items():
        for found in (other[path] for other in others):
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(value), strict=True)
            for array, expected in pairs:
                with_floor = (np.append(x, np.float32(floor)) for x in (array, expected))
                assert_close(*with_floor, "float32", direction)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_metric_chooses_heads_and_channels(name: str) -> None:
    config, layout = CONFIGS[name], layout_of(CONFIGS[name])
    plan = make_plan(neurons_of(layout), 0.5, 0.5)

    @jax.jit
    def choices(params: Mapping[str, jax.Array]) -> list[Any]:
        result = []
        for criterion, metric in METRICS.items():
            stats = observe_batch(layout, params, batch(config), metric.needs)
            key = jax.random.key(0)
            result.extend(choose(layout, params, stats, plan, Criteria(criterion), key).kept)
        return result

    chosen = choices(random_params(config))
    assert len(chosen) == len(METRICS)
    for kept in chosen:
        assert kept["head" if name == "retnet" else "kv_group"].shape == (3, 2)
        assert kept["channel"].shape == (3, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_dynamic_selection_is_a_mask_of_what_it_keeps(name: str) -> None:
    layout = layout_of(CONFIGS[name])
    plan = make_plan(neurons_of(layout), 0.5, 0.5)
    criteria = Criteria("svd")
    losses = [
        loss_and_gradients(
            Dynamic(layout, plan, criteria=criteria, masked=masked), ({},) * len(plan.segments)
        )[0]
        for masked in (False, True)
    ]
    assert_close(losses[0], losses[1], "float32", "forward")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_bfloat16(name: str) -> None:
    golden = reference(name)
    model = load_model(GOLDEN / name, dtype="bfloat16")
    assert model.compute == Compute(dtype="bfloat16")
    logits = model(jnp.asarray(golden["input_ids"]))
    assert_close(logits, golden["logits"], "bfloat16", "forward")
