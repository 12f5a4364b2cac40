"""Attention for absent devices: lowered for TPUs and NVIDIA GPUs, and split over meshes."""

import contextlib
import json
import re

import jax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sat_jax.models.build import layout_of
from sat_jax.nn.attention import cudnn as attention_cudnn
from sat_jax.nn.attention.dot_product import dot_product_attention
from sat_jax.nn.mesh_axes import GROUP_AXES
from sat_jax.parallel.rules import BATCH, parameter_spec
from tests.small_models import CONFIGS
from tests.test_attention import AMPERE, HOPPER, on

# Programs for absent devices: lowered, not run


def lowered(platform: str, mesh: Mesh | None = None) -> str:
    """The program of output and gradients of four rows, in bfloat16, for `platform`."""

    @jax.jit
    def run(q, k, v, do, segments):
        o, pull = jax.vjp(lambda *qkv: dot_product_attention(*qkv, segments), q, k, v)
        return o, *pull(do)

    def shape(*sizes: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        axes = (*BATCH, "tensor")[: len(sizes) - 1]
        sharding = None if mesh is None else NamedSharding(mesh, P(*axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    q, kv = shape(4, 256, 2, 3, 64), shape(4, 256, 2, 64)
    operands = (q, kv, kv, q, shape(4, 256, dtype="int32"))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return run.trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def operand_shapes(text: str, kernel: str) -> set[str]:
    """Types of the operands and results of every custom call whose line names `kernel`."""
    calls = [line for line in text.splitlines() if "custom_call" in line and kernel in line]
    return {kind for line in calls for kind in re.findall(r"tensor<[\w]+>", line.split(" : ")[-1])}


def test_splash_lowers_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "tpu")
    text = lowered("tpu")
    for kernel in ("fwd_segmented_residuals", "dq_segmented", "dkv_segmented"):
        assert f"splash_mha_{kernel}" in text
    shapes = operand_shapes(text, "tpu_custom_call")
    assert {"tensor<4x6x256x64xbf16>", "tensor<4x2x256x64xbf16>"} <= shapes


def cudnn_calls(text: str) -> list[dict]:
    """Configuration of every call of cuDNN, with its name."""
    calls = []
    for line in text.splitlines():
        if name := re.search(r"@__cudnn\$(\w+)", line):
            config = re.search(r'backend_config = "(.*?)"[,}]', line).group(1)
            config = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
            results = line.split(" -> ")[-1].count("tensor<")
            calls.append({"name": name.group(1), "results": results, **config})
    return calls


def test_cudnn_lowers_for_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "gpu", AMPERE)
    calls = cudnn_calls(lowered("cuda"))
    assert [call["name"] for call in calls] == [
        "fmhaScaleBiasSoftmax",
        "fmhaScaleBiasSoftmaxBackward",
    ]
    assert {call["mask_type"] for call in calls} == {"CAUSAL"}

    on(monkeypatch, "gpu", HOPPER)
    calls = cudnn_calls(lowered("cuda"))
    packed = [call for call in calls if "Bias" not in call["name"]]
    # Two branches of a choice at run time, each with a forward and a backward kernel.
    assert len(calls) == 4
    assert [call["name"] for call in packed] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for call in packed:
        assert call["mask_type"] == "PADDING_CAUSAL"
        assert call["max_seg_per_batch"] == attention_cudnn.MAX_DOCUMENTS
        assert call["fmha_scale"] == 64**-0.5


@pytest.mark.skipif(
    jax.__version_info__ < attention_cudnn._FIRST_JAX, reason="this jax version is refused"
)
def test_no_gradient_of_the_bias_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "gpu", AMPERE)
    backward = cudnn_calls(lowered("cuda"))[-1]
    assert backward["name"] == "fmhaScaleBiasSoftmaxBackward"
    assert backward["results"] == 4  # gradients of q, k and v, and the kernel's workspace


# Meshes


def test_the_group_axis_is_split_as_in_parameters() -> None:
    for leaf in ("query", "key", "value"):
        assert (
            parameter_spec(layout_of(CONFIGS["gqa"]), f"layers/attention/{leaf}", 4)[1]
            == (GROUP_AXES[0])
        )


ON_EIGHT_DEVICES = """
import re
import jax, numpy as np, pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from sat_jax.config import MeshConfig
from sat_jax.nn.attention.dot_product import dot_product_attention
from sat_jax.parallel.mesh import make_mesh
from tests.test_attention import HOPPER, arrays, on
from tests.test_attention_devices import lowered, operand_shapes
from tests.tolerances import assert_close

def run(q, k, v, do, segments):
    o, pull = jax.vjp(lambda *qkv: dot_product_attention(*qkv, segments), q, k, v)
    return o, *pull(do)

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
for rows, groups in ((4, 2), (3, 3)):
    operands = arrays(rows, 20, (groups, 2, 4))
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (rows, 20), np.int32))
    with jax.set_mesh(mesh):
        if rows == 4:
            heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
            rows_only = NamedSharding(mesh, P(("data", "fsdp")))
            operands = [jax.device_put(x, heads) for x in operands]
            segments = jax.device_put(segments, rows_only)
        compiled = jax.jit(run).lower(*operands, segments).compile()
        got = compiled(*operands, segments)
    if rows == 4:
        assert not re.search(r"all-\\w+|permute|reduce-scatter", compiled.as_text())
        assert got[0].sharding.is_equivalent_to(heads, 5)
    one = jax.jit(run)(*map(np.asarray, operands), np.asarray(segments))
    for actual, desired in zip(got, one, strict=True):
        assert_close(actual, desired, "float32", "backward")

# Four rows of two KV groups: each device's kernel takes one row, one group, its three query heads.
with pytest.MonkeyPatch.context() as patch:
    on(patch, "tpu")
    shapes = operand_shapes(lowered("tpu", mesh), "tpu_custom_call")
    assert {"tensor<3x256x64xbf16>", "tensor<1x256x64xbf16>"} <= shapes
    assert not any("x6x" in shape or "<6x" in shape for shape in shapes)
    on(patch, "gpu", HOPPER)
    shapes = operand_shapes(lowered("cuda", mesh), "__cudnn")
    assert {"tensor<1x256x3x64xbf16>", "tensor<1x256x1x64xbf16>"} <= shapes
    assert not any("x6x" in shape for shape in shapes)
"""


def test_devices_attend_without_communication(run_python) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, devices=8)
    assert done.returncode == 0, done.stderr
