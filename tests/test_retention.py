"""Retention: three forms of one function, documents, memory, and what torchscale computes."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.nn.context import Context
from sat_jax.nn.retention import Normalization, Retention, decay_norms, head_norm, log_decays
from sat_jax.nn.retention_forms import (
    Inputs,
    State,
    absolute_sums,
    chunkwise,
    parallel,
    recurrent,
    timeline,
)
from tests.conftest import slow_after
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden" / "retnet"
HEADS, KEY, VALUE = 3, 4, 6
# Two documents with padding around and inside them; a document, then another of the same row.
SEGMENT_IDS = jnp.asarray(
    [[0] * 3 + [1] * 7 + [0] * 2 + [1] * 8 + [2] * 13 + [0] * 4, [1] * 5 + [3] * 32], jnp.int32
)
Form = Callable[..., tuple[jax.Array, State]]
FORMS: dict[str, Form] = {
    "parallel": parallel,
    "recurrent": recurrent,
    "chunks of 8": functools.partial(chunkwise, chunk=8),
    "chunks of 5": functools.partial(chunkwise, chunk=5),
    "one chunk": functools.partial(chunkwise, chunk=64),
}


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def inputs(dtype: Any) -> tuple[jax.Array, ...]:
    """Return queries, keys, values and logarithms of decays."""
    rng = np.random.default_rng(0)
    sizes = (KEY, KEY, VALUE)
    arrays = [rng.normal(size=(*SEGMENT_IDS.shape, HEADS, size)) for size in sizes]
    return tuple(jnp.asarray(x, dtype) for x in (*arrays, log_decays(HEADS)))


def by_definition(q: Any, k: Any, v: Any, log_decay: Any) -> np.ndarray:
    """Return the sums with one addition for each pair of tokens of a document, in NumPy."""
    q, k, v, segments = (np.asarray(x) for x in (q, k, v, SEGMENT_IDS))
    decay = np.exp(np.asarray(log_decay))
    o = np.zeros(v.shape, v.dtype)
    for b, t in np.ndindex(segments.shape):
        if segments[b, t] == 0:
            o[b, t] = np.sum(q[b, t] * k[b, t], axis=-1, keepdims=True) * v[b, t]
            continue
        same = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        for age, s in enumerate(reversed(same)):
            weight = decay**age * np.sum(q[b, t] * k[b, s], axis=-1)
            o[b, t] += weight[:, None] * v[b, s]
    return o


def normalised(form: Form, q: Any, k: Any, v: Any, log_decay: Any, eps: float) -> Any:
    o, state = form(Inputs(q, k, v, log_decay, SEGMENT_IDS))
    scale = decay_norms(log_decay, timeline(SEGMENT_IDS).age)
    return head_norm(o, scale, eps), state.memory


@functools.partial(jax.jit, static_argnames=("form", "eps"))
def outputs_and_gradients(form: Form, arrays: Any, eps: float) -> Any:
    """Return normalised sums and last states, and gradients under random cotangents of both."""

    def scalar(*qkv: jax.Array) -> Any:
        outputs = normalised(form, *qkv, arrays[3], eps)
        random = [
            jnp.asarray(np.random.default_rng(n).normal(size=x.shape), x.dtype)
            for n, x in enumerate(outputs)
        ]
        return sum(jnp.sum(x * y) for x, y in zip(outputs, random, strict=True)), outputs

    gradients, outputs = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(*arrays[:3])
    return outputs, gradients


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FORMS)
def test_forms_agree_in_float64(name: str) -> None:
    arrays = inputs(np.float64)
    o, state = FORMS[name](Inputs(*arrays, SEGMENT_IDS))
    assert_close(o, by_definition(*arrays), "float64", "forward")
    np.testing.assert_array_equal(state.segment_id, [2, 3])
    np.testing.assert_array_equal(state.tokens, [13, 32])
    actual = jax.tree.leaves(outputs_and_gradients(FORMS[name], arrays, 0.0))
    desired = jax.tree.leaves(outputs_and_gradients(parallel, arrays, 0.0))
    for a, b in zip(actual, desired, strict=True):
        assert a.dtype == np.float64
        assert_close(a, b, "float64", "retention")


@pytest.mark.parametrize("name", slow_after(1, *(n for n in FORMS if n != "parallel")))
def test_forms_agree_in_float32(name: str) -> None:
    arrays = inputs(np.float32)
    actual = jax.tree.leaves(outputs_and_gradients(FORMS[name], arrays, 1e-6))
    desired = jax.tree.leaves(outputs_and_gradients(parallel, arrays, 1e-6))
    for a, b in zip(actual, desired, strict=True):
        assert_close(a, b, "float32", "retention")


def test_sums_of_half_precision_are_float32() -> None:
    arrays = inputs(jnp.bfloat16)
    for form in FORMS.values():
        o, state = form(Inputs(*arrays[:3], arrays[3].astype(jnp.float32), SEGMENT_IDS))
        assert (o.dtype, state.memory.dtype) == (jnp.float32, jnp.float32)


@functools.partial(jax.jit, static_argnames="cuts")
def sums_in_parts(cuts: tuple[int, ...], qkv: Any, log_decay: jax.Array) -> Any:
    """Return sums and last state of a row in parts that end at `cuts`: one token recurrently, more
    in chunks."""
    parts, state = [], None
    for start, stop in itertools.pairwise((0, *cuts)):
        form = recurrent if stop == start + 1 else FORMS["chunks of 5"]
        q, k, v, segment_ids = (x[:, start:stop] for x in (*qkv, SEGMENT_IDS))
        o, state = form(Inputs(q, k, v, log_decay, segment_ids), state)
        parts.append(o)
    return jnp.concatenate(parts, axis=1), state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cuts", [(9, 18, 35, 36, 37), (1, 2, 30, 37), (11, 20, *range(33, 38))])
def test_a_row_in_parts(cuts: tuple[int, ...]) -> None:
    """Prefill in chunks of other sizes, then token by token; also the gradients."""
    *qkv, log_decay = inputs(np.float64)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=qkv[2].shape))

    def both(cuts: tuple[int, ...]) -> Any:
        sums, pullback, state = jax.vjp(
            lambda *qkv: sums_in_parts(cuts, qkv, log_decay), *qkv, has_aux=True
        )
        return sums, state, pullback(cotangent)

    desired = parallel(Inputs(*qkv, log_decay, SEGMENT_IDS))
    actual, state, gradients = both(cuts)
    assert_close(actual, desired[0], "float64", "forward")
    for a, b in zip(state, desired[1], strict=True):
        assert_close(a, b, "float64", "forward")
    for a, b in zip(gradients, both((37,))[2], strict=True):
        assert_close(a, b, "float64", "retention")


@pytest.mark.parametrize("name", FORMS)
def test_no_gradient_between_documents(name: str) -> None:
    *qkv, log_decay = inputs(np.float32)

    def of_documents(*qkv: jax.Array) -> jax.Array:
        o, _ = FORMS[name](Inputs(*qkv, log_decay, SEGMENT_IDS))
        return jnp.sum(o[0, 20:33] ** 2) + jnp.sum(o[1, 5:] ** 2)

    for gradient in jax.grad(of_documents, argnums=(0, 1, 2))(*qkv):
        inside = np.zeros(SEGMENT_IDS.shape, bool)
        inside[0, 20:33] = inside[1, 5:] = True
        assert np.all(np.asarray(gradient)[~inside] == 0)
        assert np.all(np.abs(np.asarray(gradient)[inside]).max(axis=(-1, -2)) > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [8, 64])
def test_absolute_sums(chunk: int) -> None:
    q, k, v, log_decay = inputs(np.float64)
    # |q · k| is a sum over a document like any other: of one key of size 1 at a time.
    ones = jnp.ones((*SEGMENT_IDS.shape, HEADS, 1))
    scores = jnp.abs(jnp.einsum("BTHE,BSHE->BTSH", q, k))
    desired = [
        parallel(Inputs(ones, scores[:, t][..., None], ones, log_decay, SEGMENT_IDS))[0][:, t, :, 0]
        for t in range(SEGMENT_IDS.shape[1])
    ]
    actual = absolute_sums(Inputs(q, k, v, log_decay, SEGMENT_IDS), chunk=chunk)
    assert_close(actual, jnp.stack(desired, axis=1), "float64", "forward")


def test_long_rows_do_not_overflow() -> None:
    """The power γ^(t - s) of a pair in the wrong order, which is masked, exceeds float32."""
    length = 4096
    q = k = v = jnp.ones((1, length, 1, 1))
    ones = jnp.ones((1, length), jnp.int32)
    log_decay = jnp.asarray(log_decays(1))
    assert (length * -log_decay[0]) > np.log(np.finfo(np.float32).max)

    def total(q: jax.Array, log_decay: jax.Array) -> jax.Array:
        return jnp.sum(parallel(Inputs(q, k, v, log_decay, ones))[0])

    # An overflow would make the gradient of the decay NaN.
    value, (gradient, of_decay) = jax.value_and_grad(total, argnums=(0, 1))(q, log_decay)
    assert np.isfinite(value) and np.isfinite(of_decay)
    assert_close(gradient[0, -1], jnp.full((1, 1), 32.0), "float32", "forward")  # 1 / (1 - γ)


def test_memory_of_a_backward_pass_is_linear_in_length() -> None:
    def temporary_bytes(length: int, form: Form) -> int:
        shapes = [(1, length, 2, size) for size in (16, 16, 32)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        log_decay, ones = jnp.asarray(log_decays(2)), jnp.ones((1, length), jnp.int32)

        def scalar(*qkv: jax.Array) -> jax.Array:
            o, _ = form(Inputs(*qkv, log_decay, ones))
            return jnp.sum(o * o)

        compiled = jax.jit(jax.grad(scalar, argnums=(0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    form = functools.partial(chunkwise, chunk=64)
    sizes = [temporary_bytes(length, form) for length in (1024, 2048, 4096, 8192)]
    for small, large in itertools.pairwise(sizes):
        assert large < 2.1 * small
    assert temporary_bytes(2048, parallel) > 3 * temporary_bytes(1024, parallel)


# --- torchscale's MultiScaleRetention ---


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "retention.npz"))


def layer(case: str, normalization: Normalization, dtype: Any) -> Retention:
    """Return one layer with the weights of a case; adjacent rows of q and k become halves."""
    module = Retention(
        layers=1,
        heads=4,
        head_dim=16,
        value_dim=32,
        embed=64,
        out_scale=1.0,
        norm_eps=1e-6,
        normalization=normalization,
        chunk=16,
        rngs=nnx.Rngs(0),
    )
    halves = np.r_[0:16:2, 1:16:2]
    for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("gate", "g")):
        weight = golden()[f"{case}_w_{short}_proj.weight"].reshape(4, -1, 64)
        weight = weight[:, halves] if short in "qk" else weight
        getattr(module, name).set_value(jnp.asarray(weight, dtype))
    output = golden()[f"{case}_w_out_proj.weight"].T.reshape(4, 32, 64)
    module.output.set_value(jnp.asarray(output, dtype))
    module.log_decay.set_value(jnp.asarray(log_decays(4), dtype))
    return module


def context(length: int, dtype: Any) -> Context:
    positions = np.arange(length)[None, :, None]
    angles = np.broadcast_to(positions * 10_000.0 ** -np.linspace(0, 1, 8), (2, length, 8))
    rotary = (jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype))
    return Context(jnp.ones((2, length), jnp.int32), rotary)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", ["init", "scaled"])
@pytest.mark.parametrize(
    ("normalization", "name"),
    slow_after(
        1, ("absolute_sum", "git_parallel"), ("sum", "pypi_parallel"), ("decay", "recurrent")
    ),
)
def test_a_layer_is_that_of_torchscale(case: str, normalization: Normalization, name: str) -> None:
    x = jnp.asarray(golden()[f"{case}_x"], np.float64)
    module = layer(case, normalization, np.float64)
    y = jax.jit(lambda x: module(x, context(40, np.float64)))(x)
    assert_close(y, golden()[f"{case}_{name}_f64"], "float64", "forward")


@pytest.mark.parametrize("case", ["init", "scaled"])
@pytest.mark.parametrize(
    ("normalization", "name"), slow_after(1, ("absolute_sum", "git"), ("sum", "pypi"))
)
def test_gradients_of_a_layer_are_those_of_torchscale(
    case: str, normalization: Normalization, name: str
) -> None:
    module, probe = layer(case, normalization, np.float32), golden()[f"{case}_probe"]

    def scalar(x: jax.Array) -> jax.Array:
        return jnp.sum(module(x, context(40, np.float32)) * probe)

    gradient = jax.jit(jax.grad(scalar))(jnp.asarray(golden()[f"{case}_x"]))
    desired = golden()[f"{case}_{name}_grad_parallel_x"]
    assert_close(gradient, desired, "float32", "retention")
