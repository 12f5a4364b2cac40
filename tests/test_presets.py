"""Presets: the published sizes, and helpful misses."""

import pytest

from sat_jax.errors import UserError
from sat_jax.interop.huggingface_config import config_from_json, config_to_json
from sat_jax.models.build import layout_of
from sat_jax.models.presets import PRESETS, extended, preset, resized
from sat_jax.nn.rope import RopeConfig
from tests.user_errors import user_error

# Parameters in the published checkpoints, tied embeddings counted once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # No checkpoint: 40 · (12 d² + 13 d) + (50,257 + 2,048 + 2) · d with d = 5,120.
    "gpt-13b": 12_853_386_240,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    # No checkpoints: L · (2 d² + 6 d f + 2 d) + 50,257 d + d; f is the width of values and MLP.
    "retnet-1.3b": 1_323_569_152,
    "retnet-2.7b": 2_651_960_320,
    "retnet-6.7b": 6_715_678_720,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    layout = layout_of(preset(name))
    trained = [layout.shapes[path].size for path, leaf in layout.leaves.items() if leaf.trained]
    assert sum(trained) == PUBLISHED[name]


def test_every_preset_is_checked() -> None:
    assert set(PRESETS) == {"tiny", "retnet-tiny", *PUBLISHED}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_config_json(name: str) -> None:
    raw = config_to_json(preset(name), "bfloat16")
    assert config_from_json(raw, name) == preset(name)


@pytest.mark.parametrize(
    ("name", "theta", "factor", "positions"),
    [
        ("llama-2-7b", 1e4, 1.0, 4096),
        ("llama-3-8b", 5e5, 1.0, 8192),
        ("llama-3.1-8b", 5e5, 8.0, 131_072),
        ("llama-3.2-1b", 5e5, 32.0, 131_072),
        ("tinyllama-1.1b", 1e4, 1.0, 2048),
        ("smollm2-135m", 1e5, 1.0, 8192),
        ("smollm2-1.7b", 1.3e5, 1.0, 8192),
        ("mistral-7b", 1e6, 1.0, 32_768),
        ("qwen2.5-1.5b", 1e6, 1.0, 131_072),
        ("qwen3-0.6b", 1e6, 1.0, 40_960),
    ],
)
def test_positions(name: str, theta: float, factor: float, positions: int) -> None:
    """What the number of parameters cannot show."""
    config = preset(name)
    assert (config.rope.theta, config.rope.factor, config.max_positions) == (
        theta,
        factor,
        positions,
    )
    assert config.rope.type == ("default" if factor == 1 else "llama3")


def test_a_miss_names_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"'llama-2-7B-hf'; near: llama-2-7b"):
        preset("llama-2-7B-hf")
    with pytest.raises(UserError, match=r"'zzz'; accepted: tiny, llama-2-7b"):
        preset("zzz")


def test_sizes_of_a_preset_are_replaced() -> None:
    sizes = {"d_model": 256, "n_layers": 2, "n_heads": 8, "d_ff": 512, "vocab_size": 300}
    sizes["max_positions"] = 64
    config = resized(preset("llama-3.2-1b"), sizes)
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.n_kv_heads, config.head_dim) == (2, 32)  # four query heads for each KV head
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert layout_of(config).shapes["layers/mlp/up"].shape == (2, 512, 256)
    assert resized(preset("gpt2"), {"n_heads": 6}).head_dim == 128
    assert resized(preset("gpt2"), {}) is preset("gpt2")
    assert resized(preset("llama-3.2-1b"), {"d_ff": 64}).n_kv_heads == 8


def test_heads_that_do_not_fit_are_refused() -> None:
    assert user_error(lambda: resized(preset("gpt2"), {"n_heads": 7})) == (
        "model.n_heads 7 does not divide model.d_model 768"
    )
    assert user_error(lambda: resized(preset("llama-3.2-1b"), {"n_heads": 2})) == (
        "model.n_heads 2 with 4 query heads for each KV head; accepted: multiples of 4"
    )


def test_heads_of_retention_divide_its_widths() -> None:
    tiny = preset("retnet-tiny")  # values of twice the width
    assert resized(tiny, {"n_heads": 8}).head_dim == 8
    assert user_error(lambda: resized(tiny, {"d_model": 60})) == (
        "retnet with d_model 60, d_value 120 and 4 heads; accepted: multiples of 8 and of 4"
    )
    assert user_error(lambda: resized(tiny, {"d_model": 66, "n_heads": 6})) == (
        "retnet with d_model 66, d_value 132 and 6 heads; accepted: multiples of 12 and of 6"
    )


def test_values_of_retention_keep_their_ratio_to_the_width() -> None:
    config = resized(preset("retnet-1.3b"), {"d_model": 384, "n_heads": 6, "d_ff": 648})
    assert (config.d_value, config.head_dim, config.d_ff) == (648, 64, 648)
    assert resized(preset("retnet-1.3b"), {"d_ff": 64}).d_value == 3456
    assert user_error(lambda: resized(preset("retnet-1.3b"), {"d_model": 200})) == (
        "model.d_model 200 with values of 3456 / 2048 of it; accepted: multiples of 16"
    )


@pytest.mark.parametrize(
    ("rope_type", "factor", "first", "positions"),
    [("yarn", 4.0, 2048, 8192), ("linear", 2.0, None, 4096), ("dynamic", 4.0, 2048, 2048)],
)
def test_a_model_is_extended(
    rope_type: str, factor: float, first: int | None, positions: int
) -> None:
    """TinyLlama has 2,048 positions; the reach of `dynamic` does not depend on its factor."""
    model = extended(preset("tinyllama-1.1b"), rope_type, factor)
    assert model.rope == RopeConfig(10_000.0, rope_type, factor, original_max_positions=first)
    assert model.max_positions == positions


def test_extensions_that_are_refused() -> None:
    tiny = preset("tinyllama-1.1b")
    message = user_error(lambda: extended(tiny, "longrope", 2.0))
    assert message.startswith("rope type 'longrope'; accepted: default, linear, ntk, ")
    message = user_error(lambda: extended(tiny, "default", 0.5))
    assert message == "rope factor 0.5; accepted: 1 or more"


def test_factors_are_relative_to_the_first_training() -> None:
    once = extended(preset("tinyllama-1.1b"), "yarn", 2.0)
    assert extended(once, "yarn", 4.0) == extended(preset("tinyllama-1.1b"), "yarn", 4.0)
    once = extended(preset("tinyllama-1.1b"), "linear", 2.0)
    assert extended(once, "default", 1.0) == preset("tinyllama-1.1b")


def test_a_model_without_rotary_positions_is_not_extended() -> None:
    message = user_error(lambda: extended(preset("gpt2"), "yarn", 2.0))
    assert message == (
        "model.rope_type 'yarn': a gpt2 model has no rotary positions; accepted: None"
    )
