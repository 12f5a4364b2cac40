"""A new type of weight, a LoRA (arXiv:2106.09685): all it takes is this one class."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float

from sat_jax.config import OptimizerConfig
from sat_jax.models.build import layout_of
from sat_jax.models.llama import Llama
from sat_jax.nn.decoder import Compute, Decoder, Remat
from sat_jax.nn.layout import Layout, flat_values, make_layout
from sat_jax.nn.linear import Axes, Weight, combine, dense, project, swiglu
from sat_jax.nn.norms import rms_norm
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.execution.state import PARAMS, new_state
from sat_jax.sparsity.plan import make_plan
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.step import StepSettings, make_step
from tests.conftest import slow_after
from tests.executions import (
    ROWS,
    assert_gradients_close,
    equal,
    kept_rows,
    plain,
    run,
)
from tests.small_models import (
    CONFIGS,
    compact_state,
    expand_state,
    neurons,
    nothing_omitted,
    random_kept,
    random_params,
)
from tests.tolerances import assert_close

RANK = 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Lora(Weight):
    """`base + b · a`, of which `base` is not trained. `b` has the axes of units, and is gathered
    with them."""

    base: Float[Array, "*units D"]
    a: Float[Array, "rank D"]
    b: Float[Array, "*units rank"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def dense(self) -> Array:
        return dense(self.base) + jnp.tensordot(dense(self.b), dense(self.a), 1)

    def describe(self, axes: Axes) -> dict[str, tuple[Axes, bool]]:
        return {
            "base": (axes, False),
            "a": ((axes[0], "rank", axes[-1]), True),
            "b": ((*axes[:-1], "rank"), True),
        }

    def project(self, x: Float[Array, "B T D"]) -> Array:
        return project(self.base, x) + project(self.b, project(self.a, x))

    def combine(self, a: Array) -> Float[Array, "B T D"]:
        return combine(self.base, a) + combine(self.a, combine(self.b, a))


CONFIG = CONFIGS["gqa"]
ADAPTED = ("attention/query", "attention/output", "mlp/up", "mlp/down")
PLAIN = layout_of(CONFIG)


def adapted_layout(compute: Compute = Compute()) -> Layout[Decoder]:
    """The layout of the model with adapters of some matrices."""

    def model() -> Decoder:
        decoder = Llama(CONFIG, compute, rngs=nnx.Rngs(0))
        for name in ADAPTED:
            branch, leaf = name.split("/")
            parameter = getattr(getattr(decoder.layers, branch), leaf)
            base = parameter.get_value()
            a = jnp.zeros((base.shape[0], RANK, base.shape[-1]))
            parameter.set_value(Lora(base, a, jnp.zeros((*base.shape[:-1], RANK))))
        return decoder

    return make_layout(nnx.eval_shape(model))


LAYOUT = adapted_layout()


@functools.cache
def params() -> dict[str, np.ndarray]:
    """Random base weights and adapters, whose product is about a fifth of them."""
    rng, base = np.random.default_rng(4), random_params(CONFIG)
    return {
        path: base[path.removesuffix("/base")]
        if path.removesuffix("/base") in base
        else (0.2 * rng.normal(size=LAYOUT.shapes[path].shape)).astype(np.float32)
        for path in LAYOUT.leaves
    }


def merged() -> dict[str, Any]:
    """The plain model with the same function: `base + b · a` in place of each adapted matrix."""
    result: dict[str, Any] = {}
    for path in PLAIN.leaves:
        if path.removeprefix("layers/") in ADAPTED:
            parts = (params()[f"{path}/{name}"] for name in ("base", "b", "a"))
            base, b, a = (np.asarray(part, np.float64) for part in parts)
            flat = np.einsum("lnr,lrd->lnd", b.reshape(len(b), -1, RANK), a)
            result[path] = (base + flat.reshape(base.shape)).astype(np.float32)
        else:
            result[path] = params()[path]
    return result


def test_a_layout_has_each_array_with_its_axes() -> None:
    for name in ADAPTED:
        path = f"layers/{name}"
        axes, role, _ = PLAIN.leaves[path]
        assert LAYOUT.leaves[f"{path}/base"] == (axes, role, False)
        assert LAYOUT.leaves[f"{path}/a"] == (("layer", "rank", "embed"), role, True)
        assert LAYOUT.leaves[f"{path}/b"] == ((*axes[:-1], "rank"), role, True)
        assert LAYOUT.count_axes(f"{path}/b") == PLAIN.count_axes(path)
    not_adapted = PLAIN.leaves.keys() - {f"layers/{name}" for name in ADAPTED}
    for path in not_adapted:
        assert LAYOUT.leaves[path] == PLAIN.leaves[path]
    assert LAYOUT.units == PLAIN.units
    assert LAYOUT.graph == PLAIN.graph  # weight types are values
    assert flat_values(LAYOUT.bind(params())).keys() == params().keys()


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_an_adapted_model_equals_the_merged_one(remat: Remat) -> None:
    """Through split, merge, scan, remat and grad."""
    layout = LAYOUT if remat == "none" else adapted_layout(Compute(remat=remat))
    adapted, expected = plain(layout, params()), plain(PLAIN, merged())
    assert_close(adapted.logits, expected.logits, "float32", "forward")
    without = plain(PLAIN, random_params(CONFIG))
    assert np.abs(np.asarray(adapted.logits - without.logits)).max() > 0.1
    for path, gradient in expected.gradients.items():
        if path.removeprefix("layers/") not in ADAPTED:
            assert_close(adapted.gradients[path], gradient, "float32", "backward")
            continue
        a, b = (np.asarray(params()[f"{path}/{name}"], np.float64) for name in "ab")
        flat = np.asarray(gradient, np.float64).reshape(len(a), -1, a.shape[-1])
        of_b = np.einsum("lnd,lrd->lnr", flat, a).reshape(b.shape)
        of_a = np.einsum("lnd,lnr->lrd", flat, b.reshape(len(b), -1, RANK))
        assert_close(adapted.gradients[f"{path}/b"], of_b, "float32", "backward")
        assert_close(adapted.gradients[f"{path}/a"], of_a, "float32", "backward")


KERNEL = KernelConfig(8, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_gather_mask_and_kernel_agree_and_train_the_adapters_alone(unit: Any) -> None:
    rates = (neurons(CONFIG), 0.5, 0.5)
    plan = make_plan(*rates, attention_unit=unit, block=8, dense_layers=(0,))
    kept = random_kept(CONFIG, plan)
    mask, gather, kernel = (
        run(execution, params(), kept)
        for execution in (
            Mask(LAYOUT, plan),
            Gather(LAYOUT, plan),
            Kernel(LAYOUT, plan, False, KERNEL),
        )
    )
    expected = run(Mask(PLAIN, plan), merged(), kept)
    trained = {path for path, leaf in LAYOUT.leaves.items() if leaf.trained}
    for result in (mask, gather, kernel):
        assert_close(result.logits, expected.logits, "float32", "forward")
        assert result.gradients.keys() == trained
    of_kept = kept_rows(LAYOUT, plan, mask.gradients, kept)
    assert_gradients_close(gather.gradients, of_kept)
    assert_gradients_close(kernel.gradients, of_kept)
    of_omitted = Gather(LAYOUT, plan).compact(mask.gradients, kept)[1]
    assert "layers/mlp/up/b" in of_omitted and "layers/mlp/up/a" not in of_omitted
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(of_omitted))


OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    "kind",
    [
        Kernel,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Gather, Mask, Dynamic)),
    ],
)
def test_a_step_changes_trained_arrays_alone(kind: type[Execution]) -> None:
    """The frozen arrays have no moments, and stay the same bit for bit."""
    plan = make_plan(neurons(CONFIG), 0.5, 0.5, block=8, balance=1, dense_layers=(0,))
    options: dict[str, Any] = {
        Kernel: {"kernel": KERNEL},
        Dynamic: {"criteria": Criteria("svd")},
    }.get(kind, {})
    execution = kind(LAYOUT, plan, **options)
    kept = nothing_omitted(plan) if kind is Dynamic else random_kept(CONFIG, plan)
    optimizer = make_optimizer(OPTIMIZER, 9, LAYOUT)
    before = new_state(jax.device_put(params()), optimizer)
    adam, trained = before.optimizer[0], {p for p, leaf in LAYOUT.leaves.items() if leaf.trained}
    assert adam.mu.keys() == adam.nu.keys() == adam.counts.keys() == trained
    state, omitted = compact_state(execution, before, kept)
    equal(expand_state(execution, state, omitted, kept), before)
    settings = StepSettings(optimizer, clipping(OPTIMIZER), learning_rate(OPTIMIZER, 9))
    step = jax.jit(make_step(execution, settings))
    state, _, _ = step(state, None, kept, ROWS, omitted[PARAMS])
    after = expand_state(execution, state, omitted, kept)
    assert after.params.keys() == before.params.keys()
    for path, value in before.params.items():
        changed = bool((value != after.params[path]).any())
        assert changed == (path in trained), path


@pytest.mark.parametrize("dtype", slow_after(1, "float32", "bfloat16"))
@pytest.mark.parametrize("units", [(6,), (2, 3, 4)])
def test_derivatives_equal_those_of_the_plain_formulas(units: tuple[int, ...], dtype: Any) -> None:
    """With random cotangents; the formulas are differentiated by jax in float32."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    gate, up, x, dn, dy, da = (
        (2 * jax.random.normal(next(keys), shape)).astype(dtype)
        for shape in [(*units, 5)] * 2 + [(2, 7, 5)] * 2 + [(2, 7, *units)] * 2
    )

    def plain_project(w: Array, x: Array) -> Array:
        return jnp.einsum("btd,nd->btn", x, w.reshape(-1, 5)).reshape(2, 7, *units)

    def plain_swiglu(gate: Array, up: Array, x: Array) -> Array:
        return jax.nn.silu(plain_project(gate, x)) * plain_project(up, x)

    def plain_rms_norm(x: Array, scale: Array) -> Array:
        mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
        return x / jnp.sqrt(mean_square + 0.5) * scale[None, None]

    scale = jnp.linspace(-1.0, 2.0, 5)
    cases = [(project, plain_project, (gate, x), dy), (swiglu, plain_swiglu, (gate, up, x), da)]
    cases.append((functools.partial(rms_norm, eps=0.5), plain_rms_norm, (x, scale), dn))
    for function, formula, arguments, cotangent in cases:
        actual, pullback = jax.vjp(function, *arguments)
        float32 = [jnp.float32(array) for array in (*arguments, cotangent)]
        desired, plain_pullback = jax.vjp(formula, *float32[:-1])
        assert_close(actual, desired, dtype, "forward")
        for argument, gradient, expected in zip(
            arguments, pullback(cotangent), plain_pullback(float32[-1]), strict=True
        ):
            assert gradient.dtype == argument.dtype
            assert_close(gradient, expected, dtype, "backward")
