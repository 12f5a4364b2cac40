"""Attention: every backend equals the formula; no gradient crosses a document boundary."""

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sat_jax.errors import UserError
from sat_jax.nn.attention import cudnn as attention_cudnn
from sat_jax.nn.attention import dot_product, splash, xla
from sat_jax.nn.attention.documents import number_documents
from sat_jax.nn.attention.dot_product import dot_product_attention
from tests.tolerances import assert_close

# Rows of several blocks and tiles, none of which divides the length. Padding is at the end of the
# first row and in the middle of the second.
LENGTH = 299
ROWS = ([1] * 130 + [2] * 3 + [3] + [4] * 120 + [0] * 45, [7] * 200 + [0] * 50 + [8] * 49)
SEGMENTS = np.array(ROWS, np.int32)
HEADS = (2, 3, 8)  # KV groups, query heads in each, head size


def arrays(rows: int, length: int, heads: tuple[int, int, int], seed: int = 0) -> list[np.ndarray]:
    """q, k, v and a cotangent of the output, float32."""
    groups, queries, size = heads
    random = np.random.default_rng(seed)
    wide, narrow = (rows, length, groups, queries, size), (rows, length, groups, size)
    return [random.standard_normal(s).astype(np.float32) for s in (wide, narrow, narrow, wide)]


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, segments: np.ndarray
) -> list[np.ndarray]:
    """Output and gradients of q, k and v by the formula, in float64."""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    scale = q.shape[-1] ** -0.5
    o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, t in np.ndindex(segments.shape):
        first = t
        while first and segments[b, first - 1] == segments[b, t]:
            first -= 1
        seen = slice(first, t + 1)
        for h, g in np.ndindex(q.shape[2:4]):
            scores = k[b, seen, h] @ q[b, t, h, g] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            o[b, t, h, g] = weights @ v[b, seen, h]
            dweights = v[b, seen, h] @ do[b, t, h, g]
            dscores = weights * (dweights - weights @ dweights) * scale
            dq[b, t, h, g] = dscores @ k[b, seen, h]
            dk[b, seen, h] += np.outer(dscores, q[b, t, h, g])
            dv[b, seen, h] += np.outer(weights, do[b, t, h, g])
    return [o, dq, dk, dv]


def with_gradients(attend: Callable) -> Callable:
    """Return a jitted function of (q, k, v, cotangent, segments): output and gradients."""

    @jax.jit
    def run(q, k, v, do, segments):
        documents = number_documents(segments)
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, documents), q, k, v)
        return o, *pull(do)

    return run


def packed_kernel(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """The documented result of the fused kernel, without cuDNN: causal in segments, NaN outside."""
    assert mask_type == attention_cudnn.fused.MaskType.PADDING_CAUSAL
    assert kv_seqlen is q_seqlen and kv_offsets is q_offsets
    place = jnp.arange(q.shape[1])[None, :, None]
    begins, lengths = q_offsets[:, None, :-1], q_seqlen[:, None, :]
    inside = (lengths >= 0) & (place >= begins) & (place < begins + lengths)
    same = jnp.einsum("BTM,BSM->BTS", inside.astype(int), inside.astype(int)) > 0
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool))[None]
    o = xla_kernel(q, k, v, mask=(same & earlier)[:, None], scale=scale)
    return jnp.where(inside.any(axis=-1)[..., None, None], o, jnp.nan)


def xla_kernel(*operands, implementation: str = "cudnn", **settings):
    """The XLA implementation of jax in place of the cuDNN kernel."""
    assert implementation == "cudnn"
    return PUBLIC(*operands, implementation="xla", **settings)


PUBLIC = jax.nn.dot_product_attention
HOPPER = attention_cudnn.Device(cudnn=91_200, capability=(9, 0))
AMPERE = attention_cudnn.Device(cudnn=91_200, capability=(8, 0))


def cudnn(device: attention_cudnn.Device, max_documents: int, *operands):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cudnn, "device", lambda: device)
        patch.setattr(attention_cudnn, "MAX_DOCUMENTS", max_documents)
        patch.setattr(attention_cudnn.fused, "dot_product_attention", packed_kernel)
        patch.setattr(jax.nn, "dot_product_attention", xla_kernel)
        return attention_cudnn.attend(*operands)


BACKENDS = {
    "xla": xla.attend,
    "splash": functools.partial(splash.attend, interpret=True),
    # The kernel is replaced: the arguments that it gets are tested. Rows have up to 5 documents.
    "cudnn offsets": functools.partial(cudnn, HOPPER, 5),
    "cudnn too many documents": functools.partial(cudnn, HOPPER, 4),
    "cudnn bias": functools.partial(cudnn, AMPERE, 5),
}


@pytest.fixture(scope="module", params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Callable:
    return with_gradients(BACKENDS[request.param])


@functools.cache
def expected() -> list[np.ndarray]:
    return reference(*arrays(len(SEGMENTS), LENGTH, HEADS), SEGMENTS)


def assert_matches(got: list, desired: list[np.ndarray], dtype: str) -> None:
    assert_close(np.asarray(got[0], np.float32), desired[0], dtype, "forward")
    # Concatenated: the gradient of a query that sees only itself is 0, which gives no scale.
    flat = [np.concatenate([np.ravel(x) for x in part[1:]]) for part in (got, desired)]
    assert_close(flat[0].astype(np.float32), flat[1], dtype, "backward")


def test_backends_equal_the_formula(run: Callable) -> None:
    assert_matches(run(*arrays(len(SEGMENTS), LENGTH, HEADS), SEGMENTS), expected(), "float32")


def test_documents_receive_exactly_no_gradient_from_each_other(run: Callable) -> None:
    q, k, v, do = arrays(len(SEGMENTS), LENGTH, HEADS)
    documents = np.asarray(number_documents(jnp.asarray(SEGMENTS)))  # including padding
    for parity in (0, 1):  # every second document has a loss
        chosen = documents % 2 == parity
        o, *grads = run(q, k, v, np.where(chosen[..., None, None, None], do, 0), SEGMENTS)
        assert np.isfinite(o).all()
        for grad in grads:
            grad = np.asarray(grad).reshape(*chosen.shape, -1)
            assert np.isfinite(grad).all()
            assert (grad[~chosen] == 0).all()
            for number in np.unique(documents[chosen]):
                assert (grad[documents == number] != 0).any()


def test_bfloat16() -> None:
    operands = [jnp.asarray(x, jnp.bfloat16) for x in arrays(len(SEGMENTS), LENGTH, HEADS)]
    got = with_gradients(xla.attend)(*operands, SEGMENTS)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    rounded = reference(*(np.asarray(x, np.float32) for x in operands), SEGMENTS)
    assert_matches(got, rounded, "bfloat16")


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[Callable]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "BLOCK", 8)
        yield with_gradients(xla.attend)


@given(data=st.data())
@settings(max_examples=40, phases=[Phase.generate])  # examples are small enough without shrinking
def test_small_blocks_equal_the_formula_for_any_row(
    small_blocks: Callable, data: st.DataObject
) -> None:
    length = data.draw(st.sampled_from([1, 20]), "length")
    heads = data.draw(st.sampled_from([(1, 1, 4), (2, 3, 2)]), "heads")
    ids = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    if data.draw(st.booleans(), "long documents"):
        ids = ids.map(sorted)
    segments = np.array([data.draw(ids, "row") for _ in range(2)], np.int32)
    operands = arrays(2, length, heads, data.draw(st.integers(0, 2**16), "seed"))
    assert_matches(small_blocks(*operands, segments), reference(*operands, segments), "float32")


def test_large_scores_stay_finite(small_blocks: Callable) -> None:
    q, k, v, do = arrays(2, 20, (2, 3, 2))
    got = small_blocks(1e3 * q, 1e3 * k, v, do, np.ones((2, 20), np.int32))
    assert all(np.isfinite(x).all() for x in got)


def test_documents_are_runs_of_segment_ids() -> None:
    ids = jnp.array([[5, 5, 2, 2, 5, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        number_documents(ids), [[0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 0, 0]]
    )


def test_blocks_that_no_document_reaches_are_skipped() -> None:
    # Two rows in four blocks of two tokens. From block 2 on, the second row sees more blocks.
    documents = jnp.array([[0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 2, 2, 2, 3, 3, 3]])
    blocks = documents.reshape(2, 4, 2).swapaxes(0, 1)
    first, end = xla._visible_blocks(xla.Places(blocks, blocks, jnp.asarray(0)))
    np.testing.assert_array_equal([first, end], [[0, 1, 1, 2], [1, 2, 3, 4]])
    # Queries at the positions 3 to 6, in blocks (3, 4) and (5, 6).
    queries = documents[:, 3:7].reshape(2, 2, 2).swapaxes(0, 1)
    first, end = xla._visible_blocks(xla.Places(queries, blocks, jnp.asarray(3)))
    np.testing.assert_array_equal([first, end], [[1, 2], [3, 4]])


def test_the_full_score_matrix_is_never_stored() -> None:
    length, heads = 1024, (2, 2, 16)
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(1, length, heads)]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = with_gradients(xla.attend).lower(*operands, segments).compile()
    scores = 4 * heads[0] * heads[1] * length**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


# Choice and refusal


def on(patch: pytest.MonkeyPatch, platform: str, device: attention_cudnn.Device | None = None):
    """Make tracing behave as on `platform`, which is absent."""
    patch.setattr(dot_product, "_platform", lambda: platform)
    patch.setattr(attention_cudnn, "device", lambda: device)
    patch.setattr(attention_cudnn, "_FIRST_JAX", (0,))
    patch.setattr(attention_cudnn.fused, "check_cudnn_version", lambda: 91_200)
    patch.setattr(attention_cudnn.fused, "check_compute_capability", lambda _: True)


def queries(dtype: str, size: int = 64) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, 8, 1, 1, size), dtype)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "name"),
    [
        ("cpu", "bfloat16", 64, "xla"),
        ("tpu", "bfloat16", 64, "splash"),
        ("tpu", "float32", 80, "splash"),
        ("tpu", "float32", 1024, "xla"),
        ("gpu", "bfloat16", 256, "cudnn"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 60, "xla"),
    ],
)
def test_none_chooses_by_platform_dtype_and_shape(
    monkeypatch: pytest.MonkeyPatch, platform: str, dtype: str, size: int, name: str
) -> None:
    on(monkeypatch, platform, HOPPER if platform == "gpu" else None)
    reasons = dot_product.refusals(queries(dtype, size))
    assert next(backend for backend, reason in reasons.items() if reason is None) == name


@pytest.mark.parametrize(
    ("platform", "device", "dtype", "size", "name", "message"),
    [
        ("cpu", None, "float32", 64, "flash", "'flash'; accepted: splash, cudnn, xla"),
        ("cpu", None, "float32", 64, "splash", "'splash': it needs a TPU, this is cpu"),
        ("cpu", None, "bfloat16", 64, "cudnn", "'cudnn': it needs an NVIDIA GPU with cuDNN, this"),
        ("gpu", None, "bfloat16", 64, "cudnn", "this is gpu"),
        ("tpu", None, "float16", 64, "splash", "dtype float16; accepted: bfloat16, float32"),
        ("tpu", None, "float32", 520, "splash", "head size 520; accepted: up to 512"),
        ("gpu", HOPPER, "float32", 64, "cudnn", "dtype float32; accepted: bfloat16, float16"),
        (
            "gpu",
            HOPPER,
            "bfloat16",
            60,
            "cudnn",
            "head size 60; accepted: multiples of 8 up to 256",
        ),
        (
            "gpu",
            AMPERE,
            "bfloat16",
            136,
            "cudnn",
            "head size 136; accepted: multiples of 8 up to 128",
        ),
    ],
)
def test_a_backend_by_name_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    device: attention_cudnn.Device | None,
    dtype: str,
    size: int,
    name: str,
    message: str,
) -> None:
    on(monkeypatch, platform, device)
    q, kv = jnp.zeros((1, 8, 1, 1, size), dtype), jnp.zeros((1, 8, 1, size), dtype)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        dot_product_attention(q, kv, kv, jnp.ones((1, 8), jnp.int32), implementation=name)
    assert "\n" not in str(caught.value)


def test_a_jax_version_with_wrong_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "gpu", HOPPER)
    monkeypatch.setattr(attention_cudnn, "_FIRST_JAX", (99, 1, 0))
    reason = dot_product.refusals(queries("bfloat16"))["cudnn"]
    assert reason == f"it needs jax 99.1.0 or newer, this is {jax.__version__}"


def test_the_platform_is_the_default_device() -> None:
    assert dot_product._platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert dot_product._platform() == "cpu"
