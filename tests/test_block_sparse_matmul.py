"""Block-sparse products: every backend against the reference, forward and backward."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_sparse_matmul import (
    BlockMask,
    Matrix,
    Pattern,
    column_matmul,
    explain,
    kept_rows,
    reference,
    row_matmul,
    sampled_matmul,
    swiglu_mlp,
    tuned,
)
from kernels.block_sparse_matmul.tiles import DEFAULTS, TpuTiles
from kernels.block_sparse_matmul.workloads import LLAMA_2, MODELS, programs
from tests.conftest import slow_after
from tests.tolerances import assert_close

BLOCK = 128
MASKS = {
    "some": [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]],  # an empty row
    "diagonal": [[1, 0], [0, 1]],
    "a row": [[0, 0], [1, 1], [0, 0]],
    "a column": [[0, 1, 0], [0, 1, 0]],  # empty columns
    "one block": [[0, 0], [0, 1]],
    "all": [[1, 1], [1, 1]],
    "none": [[0, 0], [0, 0]],
}
PATTERNS: dict[str, Callable[[], Pattern]] = {
    "kept rows": lambda: kept_rows(jnp.array([0, 2, 3]), BLOCK),
    "all rows": lambda: kept_rows(jnp.arange(4), BLOCK),
    "no rows": lambda: kept_rows(jnp.array([], jnp.int32), BLOCK),
} | {
    f"mask: {name}": lambda kept=kept: BlockMask.of(np.array(kept), BLOCK)  # type: ignore[misc]
    for name, kept in MASKS.items()
}
ROWS = 4 * BLOCK  # of the matrix with kept rows

REPRESENTATIVE = ["kept rows", "mask: some"]
# Name → function, reference, and the operands by their keys in `operands`.
OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "column": (column_matmul, reference.column, "xw"),
    "row": (row_matmul, reference.row, "hw"),
    "sampled": (sampled_matmul, reference.sampled, "hx"),
    "swiglu_mlp": (swiglu_mlp, reference.swiglu_mlp, "xwvu"),
}
# The gradients of a column product are a row and a sampled product: it has every pattern, and the
# others have two, and those without blocks.
FEW = [*REPRESENTATIVE, "no rows", "mask: none"]
CASES = [(name, pattern) for name in OPERATIONS for pattern in FEW]
MORE = [("column", pattern) for pattern in PATTERNS if pattern not in FEW]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def operands(pattern: Pattern, tokens: int, width: int) -> dict[str, jax.Array]:
    """Return x [T, D], h [T, N], and three weights w, v and u of the pattern."""
    if isinstance(pattern, BlockMask):
        rows, columns = (count * pattern.block for count in pattern.shape)
        weights = (pattern.nonzero, pattern.block, pattern.block)
    else:
        rows, columns, weights = pattern.kept, width, (ROWS, width)
    return {
        "x": normal(0, tokens, columns),
        "h": normal(1, tokens, rows),
        "w": normal(2, *weights) / 8,
        "v": normal(3, *weights) / 8,
        "u": normal(4, *weights) / 8,
    }


def with_gradients(
    call: Callable[..., jax.Array], operands: Sequence[jax.Array], dtype: str
) -> list[jax.Array]:
    """Return the value and its gradients by a random cotangent of this dtype."""

    @jax.jit
    def program(*operands: jax.Array) -> list[jax.Array]:
        value, vjp = jax.vjp(call, *operands)
        return [value, *vjp(normal(9, *value.shape).astype(dtype).astype(value.dtype))]

    return program(*operands)


def check(
    name: str, backends: Sequence[str], dtype: str, pattern: Pattern, arrays: dict[str, jax.Array]
) -> None:
    """Compare each backend's value and gradients with the reference.

    The reference has float32 operands of the same values.
    """
    function, definition, keys = OPERATIONS[name]
    operands = [arrays[key].astype(dtype) for key in keys]
    float32 = [operand.astype(jnp.float32) for operand in operands]
    expected = with_gradients(lambda *x: definition(*x, pattern), float32, dtype)
    for backend in backends:
        call = functools.partial(function, implementation=backend)
        results = with_gradients(lambda *x, call=call: call(*x, pattern), operands, dtype)
        for actual, desired in zip(results, expected, strict=True):
            assert actual.dtype == dtype, backend
            assert_close(actual.astype(jnp.float32), desired, dtype, "product")


@pytest.mark.parametrize(("name", "pattern"), slow_after(len(CASES), *CASES, *MORE))
def test_values_and_gradients(name: str, pattern: str) -> None:
    instance = PATTERNS[pattern]()
    arrays = operands(instance, tokens=40, width=256)
    check(name, ["xla", "pallas_tpu"], "float32", instance, arrays)


@pytest.mark.parametrize("pattern", REPRESENTATIVE)
@pytest.mark.parametrize("name", ["column", "swiglu_mlp"])
def test_bfloat16(name: str, pattern: str) -> None:
    instance = PATTERNS[pattern]()
    arrays = operands(instance, tokens=40, width=256)
    check(name, ["xla", "pallas_tpu"], "bfloat16", instance, arrays)


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        *((name, pattern, "bfloat16") for name, pattern in (*CASES, *MORE)),
        ("column", "mask: some", "float16"),
        ("swiglu_mlp", "kept rows", "float16"),
    ],
)
@pytest.mark.usefixtures("made_up_gpu")
def test_gpu(name: str, pattern: str, dtype: str) -> None:
    instance = PATTERNS[pattern]()
    check(name, ["pallas_gpu"], dtype, instance, operands(instance, tokens=40, width=192))


@pytest.mark.parametrize(
    ("name", "block"), slow_after(1, ("column", 512), ("column", 256), ("swiglu_mlp", 512))
)
def test_large_blocks(name: str, block: int) -> None:
    kept, mask = kept_rows(jnp.array([1]), block), BlockMask.of(np.array([[0, 1], [1, 1]]), block)
    weights = {key: normal(seed, 2 * block, 256) / 8 for seed, key in enumerate("wvu", 4)}
    check(name, ["pallas_tpu"], "float32", kept, operands(kept, tokens=40, width=256) | weights)
    check(name, ["pallas_tpu"], "float32", mask, operands(mask, tokens=40, width=256))


@pytest.mark.parametrize("name", ["column", "swiglu_mlp"])
def test_several_tiles_of_every_axis(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of tokens, two along the rows, and two of tokens in sampled products."""
    tiles = TpuTiles(row_bytes=512, token_bytes=128, sampled_bytes=128)
    monkeypatch.setitem(DEFAULTS, "pallas_tpu", tiles)
    for pattern in (kept_rows(jnp.array([0, 3]), BLOCK), PATTERNS["mask: some"]()):
        arrays = operands(pattern, tokens=40, width=256)
        check(name, ["pallas_tpu"], "float32", pattern, arrays)


@pytest.mark.usefixtures("made_up_gpu")
def test_several_tiles_on_gpu() -> None:
    """A tile has 256 tokens, and 128 where a product has two matrices."""
    kept = kept_rows(jnp.array([0, 3, 6]), 64)
    mask = BlockMask.of(np.array(MASKS["some"]), 64)
    check("column", ["pallas_gpu"], "bfloat16", mask, operands(mask, tokens=300, width=0))
    check("swiglu_mlp", ["pallas_gpu"], "bfloat16", kept, operands(kept, tokens=130, width=192))


@pytest.mark.parametrize("name", ["column", "row", "swiglu_mlp"])
@pytest.mark.parametrize("backend", ["xla", "pallas_tpu"])
def test_gradients_of_rows(backend: str, name: str) -> None:
    """`rows` get the gradient that the matrices would have; their values are not read."""
    check_rows(backend, name, "float32")


@pytest.mark.usefixtures("made_up_gpu")
def test_gradients_of_rows_on_gpu() -> None:
    check_rows("pallas_gpu", "swiglu_mlp", "bfloat16")


def check_rows(backend: str, name: str, dtype: str) -> None:
    """Compare with the reference, which has float32 operands of the same values."""
    function, definition, keys = OPERATIONS[name]
    pattern = kept_rows(jnp.array([0, 2, 3]), BLOCK)
    arrays = operands(pattern, tokens=40, width=256)
    x, *ws = (arrays[key].astype(dtype) for key in keys)
    kept = reference.dense(jnp.arange(ROWS)[:, None], pattern)[:, 0]

    def call(x: jax.Array, ws: list[jax.Array], rows: list[jax.Array]) -> jax.Array:
        copies = tuple(rows) if name == "swiglu_mlp" else rows[0]
        return function(x, *ws, pattern, rows=copies, implementation=backend)

    def agree(actual: jax.Array, desired: jax.Array) -> None:
        assert actual.dtype == dtype
        assert_close(actual.astype(jnp.float32), desired, dtype, "product")

    value, vjp = jax.vjp(jax.jit(call), x, ws, [jnp.full_like(w[kept], jnp.nan) for w in ws])
    float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (x, ws))
    expected, expected_vjp = jax.vjp(lambda x, ws: definition(x, *ws, pattern), *float32)
    agree(value, expected)
    dy = normal(9, *value.shape).astype(dtype)
    dx, dws, drows = vjp(dy)
    expected_dx, expected_dws = expected_vjp(dy.astype(jnp.float32))
    agree(dx, expected_dx)
    for dw, drow, desired in zip(dws, drows, expected_dws, strict=True):
        assert not np.any(dw)
        agree(drow, desired[kept])


def test_second_derivatives_with_rows_are_refused() -> None:
    def loss(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(column_matmul(x, W, KEPT, rows=rows)))

    with pytest.raises(TypeError, match="rows: gradients of kept rows cannot be differentiated"):
        jax.grad(lambda x: jnp.sum(jax.grad(loss, 1)(x, W[:256])))(X)


@pytest.mark.slow
@given(
    st.integers(0, 70),
    st.sampled_from([128, 192, 256, 320]),
    st.sets(st.integers(0, 3)),
    st.sampled_from(list(OPERATIONS)),
)
@settings(max_examples=5)
def test_any_shape(tokens: int, width: int, ids: set[int], name: str) -> None:
    pattern = kept_rows(jnp.array(sorted(ids), jnp.int32), BLOCK)
    check(name, ["pallas_tpu"], "float32", pattern, operands(pattern, tokens, width))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", REPRESENTATIVE)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("backend", ["xla", "pallas_tpu"])
def test_second_derivatives(backend: str, name: str, pattern: str) -> None:
    instance = PATTERNS[pattern]()
    function, definition, keys = OPERATIONS[name]
    arrays = operands(instance, tokens=16, width=128)
    values = [arrays[key] / 8 for key in keys]

    def second_derivatives(product: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        def gradient_sum(*operands: jax.Array) -> jax.Array:
            def loss(*operands: jax.Array) -> jax.Array:
                return jnp.sum(jnp.sin(product(*operands, instance)))

            gradients = jax.grad(loss, range(len(values)))(*operands)
            return sum(jnp.sum(jnp.sin(gradient)) for gradient in gradients)

        return jax.grad(gradient_sum, range(len(values)))(*values)

    actual = second_derivatives(functools.partial(function, implementation=backend))
    for derivative, desired in zip(actual, second_derivatives(definition), strict=True):
        assert_close(derivative, desired, "float32", "product")


@pytest.mark.parametrize(("platform", "backend"), [("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")])
@pytest.mark.parametrize("model", slow_after(1, *(workload.model for workload in LLAMA_2)))
def test_kernels_lower_at_llama_2_sizes(platform: str, backend: str, model: str) -> None:
    """Programs have the expected number of kernels, and profiles show the names of the operations.

    The kernels of `mlp_gradients` are swiglu, row, column, swiglu_gradients and row_pairs. Its
    weight gradients are dense products.
    """
    expected = {"column": 1, "row": 1, "mlp": 2, "mlp_gradients": 5}
    expected |= {"mask": 1, "mask_gradients": 3}
    counts, names, operations = {}, set(), {operation for _, operation in tuned.OPERATIONS}
    for name, program in programs(MODELS[model], backend).items():
        traced = jax.jit(program.function).trace(*program.arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        counts[name] = len(re.findall("custom_call @(tpu_custom_call|mosaic_gpu)", text))
        names |= {name for name in operations if re.search(rf'"{name}"|{name}_mosaic_gpu', text)}
    assert counts == expected and names == operations


KEPT = kept_rows(jnp.array([0, 2]), BLOCK)
MASK = BlockMask.of(np.eye(2), BLOCK)
X, W, BLOCKS = jnp.zeros((4, 256)), jnp.zeros((512, 256)), jnp.zeros((2, BLOCK, BLOCK))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: column_matmul(X[:, :9], W, KEPT), r"x: shape \[4, 9\], expected \[..., 256\]"),
        (lambda: row_matmul(X[:, :9], W, KEPT), r"x: shape \[4, 9\], expected \[..., 256\]"),
        (lambda: column_matmul(X, W[:500], KEPT), r"w: shape \[500, 256\], expected \[F, D\], F a"),
        (lambda: column_matmul(X, W[:128], KEPT), "ids: 2 blocks of 128 rows, but w has 128 rows"),
        (lambda: column_matmul(X, W, MASK), r"w: shape \[512, 256\], expected \[2, 128, 128\]"),
        (lambda: column_matmul(X[:, :128], BLOCKS, MASK), r"expected \[..., 256\]"),
        (
            lambda: column_matmul(X.astype("bfloat16"), W, KEPT),
            "x: bfloat16, and the other operand is float32",
        ),
        (lambda: column_matmul(X.astype(int), W.astype(int), KEPT), "expected one float dtype"),
        (
            lambda: swiglu_mlp(X, W, W[:256], W, KEPT),
            r"up: float32\[256, 256\], expected that of gate",
        ),
        (
            lambda: swiglu_mlp(X, W, W, W[:256], KEPT),
            r"down: float32\[256, 256\], expected that of",
        ),
        (lambda: sampled_matmul(X, X[:3], KEPT), "c: .*, expected the leading axes of a"),
        (
            lambda: column_matmul(X, W, KEPT, rows=W),
            r"rows: float32\[512, 256\], expected the kept",
        ),
        (
            lambda: swiglu_mlp(X, W, W, W, KEPT, rows=(W[:256], W[:256], W)),
            r"rows: .*, float32\[256, 256\]",
        ),
        (
            lambda: swiglu_mlp(X, W, W, W, KEPT, rows=(W[:256],)),  # type: ignore[arg-type]
            "rows: 1 matrices, expected 3, one for each of gate, up and down",
        ),
        (lambda: row_matmul(X, BLOCKS, MASK, rows=X), "rows: accepted with kept rows"),
        (lambda: kept_rows(jnp.zeros((2, 2), int), 128), r"ids: int32\[2, 2\], expected a list"),
        (lambda: kept_rows(jnp.zeros(2), 128), r"ids: float32\[2\], expected a list of integers"),
        (lambda: kept_rows(None, 128), "ids: NoneType, expected an array"),  # type: ignore[arg-type]
        (
            lambda: swiglu_mlp(X, W, None, W, KEPT),  # type: ignore[arg-type]
            "up: NoneType, expected an array",
        ),
        (lambda: kept_rows(jnp.array([0]), 12), "block: 12, expected an int, a multiple of 8"),
        (lambda: kept_rows(jnp.array([0]), "128"), "block: '128', expected an int"),
        (lambda: BlockMask.of(np.full((2, 2), 0.5), 128), "kept: other values than 0 and 1"),
        (lambda: column_matmul(X, W, jnp.array([0])), "pattern: .*, expected KeptRows or a"),
        (lambda: sampled_matmul(X[0, 0], X[0, 0], KEPT), "c: .*, expected the leading axes"),
        (lambda: BlockMask.of(np.zeros((0, 3)), 128), r"kept: shape \(0, 3\), expected"),
        (
            lambda: explain(jnp.dtype("float32"), 64, Matrix(256, 512, 0.5), 128, kind="dense"),  # type: ignore[arg-type]
            "kind: 'dense', accepted rows, mask",
        ),
        (
            lambda: column_matmul(X, W, KEPT, implementation="triton"),
            "implementation: 'triton', accepted xla, pallas_tpu, pallas_gpu",
        ),
        (
            lambda: column_matmul(X, W, KEPT, implementation="pallas_gpu"),
            "implementation pallas_gpu: float32 operands, accepted bfloat16 and float16",
        ),
        (
            lambda: column_matmul(X, W, kept_rows(jnp.array([0]), 64), implementation="pallas_tpu"),
            "implementation pallas_tpu: blocks of 64, accepted 128, 256 and 512",
        ),
    ],
)
def test_invalid_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("ids", [[2, 1], [1, 1], [-1, 2], [2, 4]])
def test_invalid_ids_are_refused_under_jax_enable_checks(ids: list[int]) -> None:
    message = "expected sorted, unique, from 0 to 3"
    with jax.enable_checks(True):
        with pytest.raises(ValueError, match=message):
            column_matmul(X, W, kept_rows(jnp.array(ids), BLOCK))
        with pytest.raises(Exception, match=message):
            call = jax.jit(lambda ids: column_matmul(X, W, kept_rows(ids, BLOCK)))
            jax.block_until_ready(call(jnp.array(ids)))
            jax.effects_barrier()


def test_explain() -> None:
    def column(dtype: str, block: int, *platform: str) -> tuple[str, str | None]:
        return explain(jnp.dtype(dtype), 64, Matrix(256, 512, 0.5), block, *platform)["column"]

    no_kernels = ("xla", "there are no kernels for cpu")
    assert column("float32", BLOCK) == column("float32", BLOCK, "cpu") == no_kernels
    for arguments, expected in (
        (("float32", BLOCK, "tpu"), "not timed on an unspecified tpu"),
        (("float32", 64, "tpu"), "accepted 128, 256 and 512"),
        (("float32", BLOCK, "gpu"), "accepted bfloat16"),
        (("bfloat16", BLOCK, "gpu"), "not timed"),
    ):
        name, reason = column(*arguments)
        assert name == "xla" and expected in str(reason)


def test_vmap_and_scan() -> None:
    pattern, other = (kept_rows(jnp.array(ids), BLOCK) for ids in ([0, 2], [1, 3]))
    x, w = normal(0, 16, 256), normal(1, 512, 256)
    call = functools.partial(column_matmul, implementation="pallas_tpu")
    both = jax.tree.map(lambda *ids: jnp.stack(ids), pattern, other)
    expected = jnp.stack([call(x, w, pattern), call(x, w, other)])
    mapped = jax.vmap(call, in_axes=(None, None, 0))(x, w, both)
    scanned = jax.lax.map(lambda pattern: jax.checkpoint(call)(x, w, pattern), both)
    for actual in (mapped, scanned):
        assert_close(actual, expected, "float32", "product")


def test_any_leading_axes() -> None:
    x = normal(0, 2, 3, 256)
    y = column_matmul(x, W + 1, KEPT)
    assert y.shape == (2, 3, 256)
    flat = column_matmul(x.reshape(6, -1), W + 1, KEPT)
    assert_close(y.reshape(6, -1), flat, "float32", "exact")
