"""Rooflines against numbers by hand, the traced model, and XLA's cost analysis."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sat_jax.analysis.devices import Device, known_devices, read_device
from sat_jax.analysis.operators import Setting, operators, stored_matrix
from sat_jax.analysis.report import device_table, number_table
from sat_jax.analysis.roofline import (
    Kernel,
    memory_bound_share,
    overlapped_seconds,
    roofline,
    step_seconds,
)
from sat_jax.models.build import layout_of
from sat_jax.models.gpt2 import GPT2Config
from sat_jax.models.presets import preset
from sat_jax.nn.attention.xla import BLOCK
from sat_jax.nn.linear import combine, project
from sat_jax.nn.loss import next_token_loss
from sat_jax.sparsity.flops import training_flops
from tests.conftest import ROOT
from tests.small_models import CONFIGS
from tests.tolerances import assert_close
from tests.user_errors import user_error

GPT = layout_of(preset("gpt-13b"))
D, FF, T, VOCAB = 5120, 20_480, 2048, 50_257
BF16 = 2
VECTORS = BF16 * (FF + D + 2 * D)  # biases of the MLP, its norm
MLP = ("mlp up", "mlp activation", "mlp down")
FAST = {"xla_backend_optimization_level": 0}


def forward(sparsity: float) -> tuple[list[Kernel], Kernel]:
    """The three kernels of the MLP, and the fused one, in a forward pass."""
    line = roofline(GPT, Setting(T, T, sparsity, training=False))
    (group,) = [kernel for kernel in line.groups if kernel.name == "mlp forward"]
    return named(line.kernels, MLP), group


def named(kernels: Sequence[Kernel], names: Sequence[str]) -> list[Kernel]:
    return [kernel for name in names for kernel in kernels if kernel.name == name]


def moved(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.calls * kernel.bytes for kernel in kernels)


def flops(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.calls * kernel.flops for kernel in kernels)


@pytest.mark.parametrize(
    ("sparsity", "by_kernel", "fused"), [(0, 1078, 1862), (0.75, 445, 1463), (0.875, 250, 1138)]
)
def test_intensity_of_an_mlp(sparsity: float, by_kernel: int, fused: int) -> None:
    kernels, group = forward(sparsity)
    weights = 2 * D * FF * (1 - sparsity)
    assert flops(kernels) == group.calls * group.flops == 40 * 4 * T * D * FF * (1 - sparsity)
    index = sum(kernel.index_bytes for kernel in kernels)
    values = moved(kernels) / 40 - index - BF16 * FF  # without the bias of the activation
    assert values == BF16 * (2 * T * D + weights + 4 * T * FF)
    assert round(flops(kernels) / 40 / values) == by_kernel
    values = group.bytes - group.index_bytes - VECTORS
    assert values == BF16 * (2 * T * D + weights)
    assert round(group.flops / values) == fused


def test_an_index_has_a_number_for_each_block_and_row() -> None:
    kernels, group = forward(0.875)
    # 160 and 40 blocks: 5 of 40 in each of the 160 block rows, of both matrices.
    index = 4 * (160 * 5 + 160 + 1)
    assert [kernel.index_bytes for kernel in kernels] == [index, 0, index]
    assert group.index_bytes == 2 * index


def test_blocks_are_rounded_up() -> None:
    kept = stored_matrix(GPT, "layers/mlp/up", Setting(T, T, 0.99))
    assert kept.values == 160 * 128**2  # 0.4 blocks of 40 are one
    exact = stored_matrix(GPT, "layers/mlp/up", Setting(T, T, 0.7))
    assert exact.values == 160 * 12 * 128**2  # 0.3 · 40, which is 12.000000000000002


def test_partial_tiles_are_computed_in_full() -> None:
    (one, _, _), (full, _, _) = (
        named(roofline(GPT, Setting(tokens, tokens)).kernels, MLP) for tokens in (1, 128)
    )
    assert one.flops == full.flops == 2 * 128 * D * FF
    assert one.bytes == BF16 * (D + D * FF + FF)


def test_backward_pass_of_a_fused_mlp_by_hand() -> None:
    line = roofline(GPT, Setting(T, T))
    ahead, back = named(line.groups, ("mlp forward", "mlp backward"))
    wide, stream, weights = BF16 * T * FF, BF16 * T * D, BF16 * 2 * D * FF
    assert ahead.bytes == 2 * stream + weights + wide + VECTORS  # saves what GELU reads
    # Reads dy, x, what GELU reads, the weights, bias and norm; writes dx and all gradients.
    assert back.bytes == 3 * stream + wide + 2 * weights + 2 * VECTORS - BF16 * D
    assert back.flops == 2 * ahead.flops
    # On chip: x, and y in float32; of 128 channels weights and two activations; 128 of the
    # 5,120 columns of norms, the normed x and the output; the bias of 20,480 as one of 5,120.
    tiles = 128 * (2 * BF16 * D + 2 * BF16 * T + BF16 * 2 * T)
    tiles += 128 / D * BF16 * 2 * T * D + 128 / D * VECTORS
    assert ahead.on_chip is not None
    assert_close(ahead.on_chip, tiles + 3 * stream, "float64", "forward")


def test_head_and_loss_by_hand() -> None:
    line = roofline(GPT, Setting(T, T))
    (group,) = named(line.groups, ("head and loss",))
    assert group.flops == 3 * 2 * T * D * VOCAB
    # Reads x, writes dx, reads the head and writes its gradient, the norm and its gradient.
    assert group.bytes == BF16 * (2 * T * D + 2 * D * VOCAB + 4 * D)
    logits, loss = named(line.kernels, ("logits", "loss"))
    assert logits.bytes == BF16 * (T * D + D * VOCAB) + 4 * T * VOCAB
    assert loss.bytes == (4 + BF16) * T * VOCAB


def test_optimizer_and_state_by_hand() -> None:
    line = roofline(GPT, Setting(T, T, 0.75))
    norm, update = named(line.kernels, ("gradient norm", "update"))
    stored = 12_853_386_240 - 0.75 * 40 * 12 * D**2
    assert norm.bytes == BF16 * stored
    assert update.bytes == (BF16 + 3 * 4 + 3 * 4 + BF16) * stored
    assert line.state_bytes == (2 * BF16 + 3 * 4) * stored
    assert line.groups[-1].bytes == update.bytes


def test_microbatches_add_to_gradients() -> None:
    one, four = (roofline(GPT, Setting(T, T, microbatches=count)) for count in (1, 4))
    for name, gradients in (
        ("mlp forward", 0),
        ("mlp backward", BF16 * 2 * D * FF + VECTORS),
        ("head and loss", BF16 * (D * VOCAB + 2 * D)),
        ("update", 0),
    ):
        (single,), (repeated,) = (named(line.groups, [name]) for line in (one, four))
        assert repeated.bytes == single.bytes + gradients
        assert repeated.calls == single.calls * (1 if name == "update" else 4)
        assert repeated.on_chip == single.on_chip
    product = "mlp down weight gradient"
    (single,), (repeated,) = (named(line.kernels, [product]) for line in (one, four))
    assert repeated.bytes == single.bytes + BF16 * D * FF


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_a_training_step(name: str) -> None:
    layout = layout_of(CONFIGS[name])
    step = operators(layout, Setting(2 * 40, 40, block=8))
    total = sum(operator.calls * operator.flops for operator in step)
    assert_close(total, 80 * training_flops(layout, 40).total, "float64", "forward")


def device(peak: float, bandwidth: float) -> Device:
    return Device("by hand", peak, bandwidth, 1e9, 1e9, {})


@pytest.mark.parametrize("sparsity", [0.75, 0.875])
def test_ratio_of_dense_and_sparse_by_hand(sparsity: float) -> None:
    dense, sparse = forward(0), forward(sparsity)
    compute, memory = device(1.0, 1e9), device(1e9, 1.0)
    density = 1 - sparsity
    for of in (memory, compute):
        ratio = [
            step_seconds(dense[0], of) / step_seconds(sparse[0], of),
            step_seconds([dense[1]], of) / step_seconds([sparse[1]], of),
        ]
        if of is compute:  # the activation and the norms take no time
            limits = [1 / density, 1 / density]
        else:
            x, weights, wide = 2 * T * D, 2 * D * FF, 4 * T * FF
            index, vectors = 2 * 2 * (160 * 40 * density + 161), VECTORS / BF16
            limits = [
                (x + weights + wide + FF) / (x + weights * density + wide + FF + index),
                (x + weights + vectors) / (x + weights * density + vectors + index),
            ]
        for value, limit in zip(ratio, limits, strict=True):
            tolerance = ("float64" if of is memory else "float32"), "forward"
            assert_close(value, limit, *tolerance)


def test_times_by_hand() -> None:
    product = Kernel("product", "g", 2, flops=100.0, bytes=10.0, index_bytes=0.0)
    norm = Kernel("norm", "g", 1, flops=0.0, bytes=60.0, index_bytes=0.0)
    chip = device(10.0, 2.0)
    assert (product.intensity, chip.ridge) == (10.0, 5.0)
    assert (product.bound(chip), norm.bound(chip)) == ("compute", "memory")
    assert step_seconds([product, norm], chip) == 2 * 10 + 30
    assert memory_bound_share([product, norm], chip) == 30 / 50
    assert overlapped_seconds([product, norm], chip) == (2 * 10 + 60) / 2


def cost(function: Any, *shapes: tuple[int, ...]) -> dict[str, float]:
    """XLA's cost analysis of a function of float32 arrays."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile(FAST).cost_analysis()


SMALL = GPT2Config(
    vocab_size=2048, d_model=1024, n_layers=1, n_heads=16, d_ff=4096, max_positions=BLOCK
)  # fmt: skip
FLOAT32 = Setting(BLOCK, BLOCK, value_bytes=4)


def test_bytes_of_an_mlp_are_those_of_xla() -> None:
    """Our products, with an activation that is one instruction, so that nothing is fused."""
    width, channels = SMALL.d_model, SMALL.d_ff
    shapes = (channels, width), (channels, width), (1, BLOCK, width)
    found = cost(lambda up, down, x: combine(down, jnp.tanh(project(up, x))), *shapes)
    kernels = named(roofline(layout_of(SMALL), FLOAT32).kernels, MLP)
    assert found["bytes accessed"] == moved(kernels) - 4 * channels  # the bias
    assert found["flops"] == flops(kernels)  # XLA counts tanh as transcendental


def test_bytes_of_gradients_are_those_of_xla() -> None:
    width, channels = SMALL.d_model, SMALL.d_ff
    names = "mlp up input gradient", "mlp up weight gradient"
    to_input, to_weight = named(roofline(layout_of(SMALL), FLOAT32).kernels, names)
    d_out = BLOCK, channels
    found = cost(lambda dy, w: dy @ w, d_out, (channels, width))
    assert found["bytes accessed"] == to_input.bytes
    found = cost(lambda dy, x: jnp.einsum("tf,td->fd", dy, x), d_out, (BLOCK, width))
    assert found["bytes accessed"] == to_weight.bytes


def test_a_step_against_xla() -> None:
    """FLOPs agree but for the half of attention that XLA computes and a mask removes, and what is
    no product. Bytes of a step on a CPU are larger than those of kernels that move each array once:
    the scores are written, arrays are copied to be transposed, sums are float32 in loops."""
    layout = layout_of(SMALL)
    tokens = jax.ShapeDtypeStruct((1, BLOCK), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, BLOCK), jnp.bool_)

    def step(params: Any, *batch: Any) -> Any:
        return jax.value_and_grad(lambda p: next_token_loss(layout.bind(p), *batch)[0])(params)

    compiled = jax.jit(step).lower(dict(layout.shapes), *[tokens] * 4, mask).compile(FAST)
    found, line = compiled.cost_analysis(), roofline(layout, FLOAT32)
    masked = 3.5 * 4 * SMALL.d_model * BLOCK * (BLOCK - 1) / 2
    assert 0.99 < found["flops"] / (flops(line.kernels) + masked) < 1.01
    kernels, groups = (
        moved([k for k in part if k.name not in ("gradient norm", "update")])
        for part in (line.kernels, line.groups)
    )
    assert groups < kernels < found["bytes accessed"]


def test_every_number_of_a_device_has_a_source() -> None:
    devices = known_devices()
    assert {*devices} == {"a100", "h100", "h200", "tpu-v5p", "rdu"}
    for each in devices.values():
        assert all(len(source) > 20 for source in each.sources.values())
    assert round(devices["a100"].ridge) == 153


def test_a_device_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chip.json"
    number = {"value": 5, "source": "measured"}
    names = ("peak_flops", "bandwidth", "on_chip_memory", "memory")
    fields: dict[str, Any] = {"name": "chip", **dict.fromkeys(names, number)}
    path.write_text(json.dumps(fields))
    assert read_device(str(path)).peak_flops == 5.0
    path.write_text(json.dumps(fields | {"memory": {"value": 0, "source": "x"}}))
    assert "memory" in user_error(lambda: read_device(str(path)))
    del fields["bandwidth"]
    path.write_text(json.dumps(fields))
    assert user_error(lambda: read_device(str(path))).startswith(f"{path}: no field 'bandwidth'")
    path.write_text("{")
    assert user_error(lambda: read_device(str(path))).startswith(f"{path}: not JSON")


@pytest.mark.slow
def test_script(run_python, tmp_path: Path) -> None:
    out, drawing = tmp_path / "x.json", tmp_path / "x.png"
    command = "-m", "scripts.roofline", "--model", "tiny", "--block", "32"
    done = run_python(*command, "--json", str(out), "--picture", str(drawing))
    assert (done.returncode, done.stderr) == (0, "")
    steps = json.loads(out.read_text())["steps"]
    assert [step["sparsity"] for step in steps] == [0, 0.75, 0.875]
    assert "mlp down weight gradient" in done.stdout
    assert drawing.read_bytes().startswith(b"\x89PNG")
    done = run_python("-m", "scripts.roofline", "--device", "b100")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: no device 'b100'; accepted: a100, h100, h200, tpu-v5p, rdu, or a JSON file of one\n"
    )


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    message = user_error(lambda: Setting(T, T, sparsity))
    assert message == f"sparsity {sparsity:g}; accepted: from 0 to below 1"


def test_a_block_that_does_not_divide() -> None:
    message = user_error(lambda: operators(layout_of(preset("tiny")), Setting(8, 8, 0.5, 128)))
    assert message == (
        "block 128 does not divide layers/attention/key, 32 x 64; accepted: 1, 2, 4, 8, 16, 32"
    )
    assert operators(layout_of(preset("tiny")), Setting(8, 8, 0.0, 128))


def test_tables_of_the_document() -> None:
    text = (ROOT / "docs/s2d.md").read_text()
    devices = known_devices()
    assert number_table(devices) in text
    for count in (1, 32):
        settings = [Setting(T, T, s, microbatches=count) for s in (0.0, 0.75, 0.875)]
        lines = [roofline(GPT, setting) for setting in settings]
        assert device_table(lines, devices) in text
