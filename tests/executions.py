"""Logits and gradients of a model in an execution, under a random cotangent of the logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.nn.decoder import Decoder
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.plan import Plan
from sat_jax.sparsity.rows import Kept
from tests.small_models import CONFIGS, batch
from tests.tolerances import assert_close

ROWS = batch(CONFIGS["mha"])  # the same for all configs: their vocabulary has one size


class Result(NamedTuple):
    """Logits, what was observed, and gradients by path in the form of the trained arrays."""

    logits: np.ndarray
    observed: Any
    gradients: dict[str, Any]


def differentiate(
    bind: Callable[[Any], Decoder], trained: Mapping[str, Any], **options: Any
) -> Result:
    """Return the result of a model, to be run under jit; `options` are those of `hidden`."""

    def scalar(trained: Mapping[str, Any]) -> tuple[jax.Array, Any]:
        model = bind(trained)
        x, observed = model.hidden(ROWS.tokens, ROWS.segment_ids, ROWS.positions, **options)
        logits = jnp.einsum("BTD,VD->BTV", x, model.head(), preferred_element_type=jnp.float32)
        cotangent = jax.random.normal(jax.random.key(11), logits.shape)
        return jnp.sum(logits * cotangent), (logits, observed)

    (_, (logits, observed)), gradients = jax.value_and_grad(scalar, has_aux=True)(trained)
    return Result(logits, observed, gradients)


@functools.partial(jax.jit, static_argnames=("execution", "observe"))
def _differentiate(
    execution: Execution,
    observe: tuple[Any, ...],
    trained: Any,
    params: Any,
    omitted: Any,
    kept: Kept,
    corrections: Any,
    key: Any,
) -> Result:
    options = {"observe": observe}
    if execution.selection is not None:
        options |= {"selection": execution.selection, "key": key}

    def bind(trained: Any) -> Decoder:
        return execution.bind(trained, params, omitted, kept, corrections)

    return differentiate(bind, trained, **options)


def run(
    execution: Execution,
    full: Mapping[str, Any],
    kept: Kept,
    *,
    observe: tuple[Any, ...] = (),
    corrections: Mapping[str, Any] = {},
    key: Any = None,
) -> Result:
    """Return the result of full parameters in an execution."""
    params, omitted, trained = _compact(execution, dict(full), kept)
    if isinstance(execution, Kernel):
        trained = _unused_as_nan(execution, trained, kept)
    return _differentiate(
        execution, observe, trained, params, omitted, kept, dict(corrections), key
    )


@functools.partial(jax.jit, static_argnums=0)
def _compact(execution: Execution, full: Any, kept: Kept) -> tuple[Any, Any, Any]:
    params, omitted = execution.compact(full, kept)
    return params, omitted, execution.trained(params, kept)


def _unused_as_nan(execution: Kernel, trained: Any, kept: Kept) -> dict[str, Any]:
    """Return the trained arrays with NaN for the kept rows, which are differentiated by but whose
    values must not be used."""

    def unused(path: str, number: int, rows: jax.Array) -> Any:
        is_full = execution.kept_of(path, kept[number]) is None
        return rows if is_full else np.full(rows.shape, np.nan, rows.dtype)

    return execution.map_segments(unused, trained)


def plain(layout: Any, params: Mapping[str, Any]) -> Result:
    """Return the result of the model with nothing omitted, without any execution."""
    return jax.jit(lambda params: differentiate(layout.bind, params))(dict(params))


def kept_rows(layout: Any, plan: Plan, tree: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the rows of kept units of full arrays, by path and segment."""
    return _compact(Gather(layout, plan), dict(tree), kept)[0]


def assert_gradients_close(
    actual: Mapping[str, Any], desired: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """Fail unless gradients by path agree, segment by segment."""
    assert actual.keys() == desired.keys()
    for path, expected in desired.items():
        assert isinstance(actual[path], tuple) == isinstance(expected, tuple), path
        for a, b in zip(*map(jax.tree.leaves, (actual[path], expected)), strict=True):
            assert_close(a, b, dtype, "backward")


def equal(actual: Any, desired: Any) -> None:
    """Fail unless both trees have one structure, and each leaf the same type, shape and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(desired), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path), strict=True)
