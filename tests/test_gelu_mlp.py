"""The fused GELU MLP against its reference, forward and backward, by lists and composed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.block_sparse_matmul import BlockMask, gelu_mlp, reference
from tests.conftest import slow_after
from tests.test_block_sparse_matmul import normal, with_gradients
from tests.tolerances import Direction, assert_close

BLOCK, TOKENS = 16, 40
EQUAL = np.tile(np.eye(4) + np.roll(np.eye(4), 1, 1), (2, 1))
DIAGONAL, NONE = np.eye(3, 2), np.zeros((3, 2))
# Up and down masks, not square, and whether the loop computes them.
PAIRS: dict[str, tuple[Any, Any, bool]] = {
    "equal counts": (EQUAL, EQUAL[::-1], True),
    "unequal counts, empty rows and columns": (
        [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0]],
        [[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]],
        True,
    ),
    "one block each": ([[0, 0], [0, 0], [0, 1]], [[1, 0], [0, 0], [0, 0]], True),
    "a long list in up": ([[1, 1, 1, 0], [0, 0, 0, 1]], [[1, 0, 0, 0], [0, 0, 0, 1]], False),
    "a long list in down": ([[1, 0, 0, 0], [0, 0, 0, 1]], [[1, 1, 1, 0], [0, 0, 0, 1]], False),
    "all": (NONE + 1, NONE + 1, False),
    "none in up": (NONE, DIAGONAL, True),
    "none in down": (DIAGONAL, NONE, True),
    "none": (NONE, NONE, True),
}
LOOP_AND_COMPOSED = ["unequal counts, empty rows and columns", "a long list in down"]


def pair(name: str, block: int = BLOCK) -> tuple[BlockMask, BlockMask]:
    up, down, _ = PAIRS[name]
    return BlockMask.of(np.array(up), block), BlockMask.of(np.array(down), block)


def operands(masks: tuple[BlockMask, BlockMask], tokens: int = TOKENS) -> list[jax.Array]:
    """Return x, the blocks of up, the bias and the blocks of down."""
    up, down = masks
    rows, columns = (count * up.block for count in up.shape)
    blocks = [
        normal(n, mask.nonzero, mask.block, mask.block) / 8 for n, mask in ((1, up), (2, down))
    ]
    return [normal(0, tokens, columns), blocks[0], normal(3, rows), blocks[1]]


def check(
    masks: tuple[BlockMask, BlockMask],
    dtype: str = "float32",
    activation: Any = "gelu",
    implementation: str | None = "xla",
    tokens: int = TOKENS,
) -> None:
    """Compare the value and its gradients by a random cotangent with the reference.

    The reference has float32 operands of the same values. The bias is float32, as in the models.
    """
    arrays = [a if n == 2 else a.astype(dtype) for n, a in enumerate(operands(masks, tokens))]

    def call(*operands: jax.Array) -> jax.Array:
        return gelu_mlp(*operands, *masks, activation=activation, implementation=implementation)

    def definition(*operands: jax.Array) -> jax.Array:
        return reference.gelu_mlp(*operands, *masks, activation=activation)

    actual = with_gradients(call, arrays, dtype)
    expected = with_gradients(definition, [a.astype(jnp.float32) for a in arrays], dtype)
    assert [a.dtype for a in actual] == [arrays[0].dtype, *(a.dtype for a in arrays)]
    for number, (value, desired) in enumerate(zip(actual, expected, strict=True)):
        direction: Direction = "product"
        if dtype == "bfloat16":  # where two products are composed, the hidden features are rounded
            direction = "backward" if number else "forward"
        assert_close(value.astype(jnp.float32), desired, dtype, direction)


@pytest.mark.parametrize(
    ("masks", "activation"),
    slow_after(
        len(LOOP_AND_COMPOSED),
        *((name, "gelu") for name in LOOP_AND_COMPOSED),
        *((name, "gelu_new") for name in LOOP_AND_COMPOSED),
        *((name, "gelu") for name in PAIRS if name not in LOOP_AND_COMPOSED),
    ),
)
def test_values_and_gradients(masks: str, activation: str) -> None:
    check(pair(masks), activation=activation)


@pytest.mark.parametrize("dtype", slow_after(1, "bfloat16", "float16"))
@pytest.mark.parametrize("masks", slow_after(1, *LOOP_AND_COMPOSED))
def test_half_precision(masks: str, dtype: str) -> None:
    check(pair(masks), dtype)


def test_no_tokens_and_the_default_implementation() -> None:
    check(pair("equal counts"), tokens=0)
    check(pair("equal counts"), implementation=None)


@pytest.mark.parametrize("masks", slow_after(1, "one block each", "none in up"))
def test_pallas(masks: str) -> None:
    check(pair(masks, 128), implementation="pallas_tpu")


@pytest.mark.usefixtures("made_up_gpu")
def test_pallas_gpu() -> None:
    check(pair("one block each", 64), "bfloat16", implementation="pallas_gpu")


def test_blocks_of_different_sizes() -> None:
    check((BlockMask.of(EQUAL, BLOCK), BlockMask.of(np.eye(16, 8), BLOCK // 2)))


def program(masks: str, platform: str) -> str:
    """Return the program of the value and the gradients."""

    def gradients(*operands: Any) -> Any:
        mlp = functools.partial(gelu_mlp, activation="gelu")
        value, vjp = jax.vjp(lambda *operands: mlp(*operands, *pair(masks)), *operands)
        return value, vjp(value)

    traced = jax.jit(gradients).trace(*operands(pair(masks)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "masks", slow_after(2, *LOOP_AND_COMPOSED, *(n for n in PAIRS if n not in LOOP_AND_COMPOSED))
)
def test_no_array_of_all_hidden_features_where_a_cpu_has_short_lists(masks: str) -> None:
    hidden = f"tensor<{TOKENS}x{pair(masks)[0].shape[0] * BLOCK}xf32>"
    assert (hidden not in program(masks, "cpu")) == PAIRS[masks][2]
    if pair(masks)[1].nonzero:
        assert hidden in program(masks, "cuda")


def test_second_derivatives() -> None:
    masks = pair("unequal counts, empty rows and columns")
    arrays = operands(masks, tokens=8)

    def second_derivatives(mlp: Callable[..., jax.Array]) -> Any:
        def gradient_sum(*operands: jax.Array) -> jax.Array:
            def loss(*operands: jax.Array) -> jax.Array:
                return jnp.sum(jnp.sin(mlp(*operands, *masks, activation="gelu")))

            gradients = jax.grad(loss, range(4))(*operands)
            return sum(jnp.sum(jnp.sin(gradient)) for gradient in gradients)

        return jax.jit(jax.grad(gradient_sum, range(4)))(*arrays)

    expected = second_derivatives(reference.gelu_mlp)
    for derivative, desired in zip(second_derivatives(gelu_mlp), expected, strict=True):
        assert_close(derivative, desired, "float32", "backward")


def test_layers_in_a_scan() -> None:
    masks, others = pair("equal counts"), pair("equal counts")[::-1]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), masks, others)
    x, *weights = operands(masks)
    layers = [jnp.stack([w, w / 2]) for w in weights]

    def scanned(x: jax.Array, layers: Any) -> jax.Array:
        def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            weights, masks = layer
            return x + gelu_mlp(x, *weights, *masks, activation="gelu"), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (layers, stacked))[0]))

    def unrolled(x: jax.Array, layers: Any) -> jax.Array:
        for n, pair in enumerate((masks, others)):
            weights = [w[n] for w in layers]
            x = x + reference.gelu_mlp(x, *weights, *pair, activation="gelu")
        return jnp.sum(jnp.sin(x))

    actual = jax.jit(jax.grad(scanned, (0, 1)))(x, layers)
    expected = jax.grad(unrolled, (0, 1))(x, layers)
    for gradient, desired in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(gradient, desired, "float32", "backward")


MASK = BlockMask.of(np.eye(2), BLOCK)
X, W, B = jnp.zeros((4, 32)), jnp.zeros((2, BLOCK, BLOCK)), jnp.zeros(32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[:, :9], W, B, W), {}, r"x: shape \[4, 9\], expected \[..., 32\]"),
        ((X, W[:1], B, W), {}, r"up: shape \[1, 16, 16\], expected \[2, 16, 16\]"),
        ((X, W, B, W[:1]), {}, r"down: shape \[1, 16, 16\], expected \[2, 16, 16\]"),
        ((X, W, B[:9], W), {}, r"bias: float32\[9\], expected floats \[32\]"),
        ((X, W, B.astype(int), W), {}, r"bias: int32\[32\], expected floats"),
        ((X, W, B, W.astype("bfloat16")), {}, "down: bfloat16, expected that of up, float32"),
        ((X.astype("bfloat16"), W, B, W), {}, "x: bfloat16, and the other operand is float32"),
        ((X, W, None, W), {}, "bias: NoneType, expected an array"),
        ((X, W, B, W), {"down_mask": B}, "down_mask: ArrayImpl, expected a BlockMask"),
        (
            (X, W, B, W),
            {"down_mask": BlockMask.of(np.array([[1, 1, 0]]), BLOCK)},
            r"down_mask: a matrix \[16, 48\], expected that of up, \[32, 32\]",
        ),
        ((X, W, B, W), {"activation": "relu"}, "activation: 'relu', accepted gelu, gelu_new"),
        (
            (X, W, B, W),
            {"implementation": "triton"},
            "implementation: 'triton', accepted xla, pallas_tpu, pallas_gpu",
        ),
        ((X, W, B, W), {"implementation": "pallas_tpu"}, "blocks of 16, accepted 128, 256 and"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, options: Any, message: str) -> None:
    defaults = {"up_mask": MASK, "down_mask": MASK, "activation": "gelu"}
    with pytest.raises((ValueError, TypeError), match=message):
        gelu_mlp(*arguments, **defaults | options)
