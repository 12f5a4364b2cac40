"""config.json of Hugging Face directories: both forms, defaults, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest

from sat_jax.errors import UserError
from sat_jax.interop.huggingface_config import config_from_json, config_to_json
from sat_jax.models import registry
from sat_jax.models.formats import HUGGINGFACE_FILES
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.presets import preset
from sat_jax.nn.rope import RopeConfig, attention_scaling
from tests.tolerances import assert_close

SMALL: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 48}
SMALL |= {"n_kv_heads": 2, "head_dim": 4, "max_positions": 64}
ROPES = [
    RopeConfig(5e5),
    RopeConfig(1e4, "linear", 4.0),
    RopeConfig(1e4, "dynamic", 2.0, 4096),
    RopeConfig(1e6, "yarn", 4.0, 1024, attention_factor=1.5, truncate=False),
    RopeConfig(1e6, "yarn", 4.0, 1024, beta_fast=16.0, beta_slow=2.0),
    RopeConfig(5e5, "llama3", 8.0, 1024, low_freq_factor=1.5, high_freq_factor=3.0),
    RopeConfig(1e4, "longrope", 4.0, 1024, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0)),
    # Types that transformers does not have: the work directory of a run has them.
    RopeConfig(1e4, "ntk", 4.0),
    RopeConfig(1e4, "ntk_by_parts_paper", 4.0, 1024, beta_fast=16.0),
    RopeConfig(1e4, "ntk_by_parts_code", 4.0, 1024, truncate=False),
    RopeConfig(1e4, "yarn_paper", 4.0, 1024, attention_factor=1.5),
    RopeConfig(1e4, "dynamic_yarn", 1.0, 1024),
]
OF_TRANSFORMERS = [
    name for name, form in registry.MODEL_TYPES.items() if form.files == HUGGINGFACE_FILES
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.type)
@pytest.mark.parametrize("form", ["old", "new", "both"])
def test_either_form_of_config_is_complete(rope: RopeConfig, form: str) -> None:
    """transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters."""
    config = LlamaConfig(**SMALL | {"max_positions": 4096, "rope": rope, "eos_token_ids": (3, 4)})
    raw = config_to_json(config, "float32")
    scaling = raw["rope_scaling"] or {"rope_type": "default"}
    new = {"rope_parameters": {"rope_theta": raw["rope_theta"], **scaling}, "dtype": "float32"}
    if form == "new":
        del raw["rope_theta"], raw["rope_scaling"], raw["torch_dtype"]
        raw.pop("original_max_position_embeddings", None)  # within rope_parameters
    assert config_from_json(raw if form == "old" else raw | new, "config.json") == config


def test_the_oldest_configs() -> None:
    """KV heads, head size, RoPE base, tying and token ids have the defaults of transformers."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "pretraining_tp": 2,
    }
    expected = LlamaConfig(
        **SMALL | {"n_kv_heads": 4, "rope": RopeConfig(1e4, "linear", 2.0), "norm_eps": 1e-6},
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert config_from_json(raw, "config.json") == expected


LLAMA = config_to_json(preset("llama-3.1-8b"), "bfloat16")
QWEN2 = config_to_json(preset("qwen2-0.5b"), "bfloat16")
QWEN3 = config_to_json(preset("qwen3-0.6b"), "bfloat16")
MISTRAL = config_to_json(preset("mistral-7b"), "bfloat16")
WINDOW = {"sliding_window": 64, "use_sliding_window": True}
NESTED = {"full_attention": {"rope_theta": 1e4}}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}
PARTIAL = {"partial_rotary_factor": 0.5}
LENGTH = {"original_max_position_embeddings": 8192}


def scaled(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **fields}}


FACTORS: dict[str, Any] = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LONG = scaled("longrope", **LENGTH, **FACTORS)
OLD: dict[str, Any] = {}
NEW = {"rope_scaling": None}


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    [
        (MISTRAL, {"sliding_window": 4096}, "sliding_window = 4096"),
        (QWEN2, WINDOW | {"max_window_layers": 9}, "sliding_window = 64"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"] * 14}, "layer_types"),
        (LLAMA, {"attention_bias": True}, "attention_bias = true"),
        (QWEN3, {"attention_bias": True}, "attention_bias = true"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = true"),
        (LLAMA, PARTIAL, "partial_rotary_factor = 0.5"),
        (LLAMA, {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = true"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"model_type": "gemma2"}, 'model_type = "gemma2".*llama, mistral, qwen2, qwen3'),
        (LLAMA, {"model_type": None}, "model_type = null"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (LLAMA, {"hidden_size": None}, "hidden_size = null"),
        (LLAMA, {"vocab_size": 1.5}, "vocab_size = 1.5"),
        (LLAMA, {"num_key_value_heads": 7}, "num_key_value_heads = 7"),
        (QWEN3, {"head_dim": None}, "head_dim = null"),
        (LLAMA, {"head_dim": 7}, "head_dim = 7"),
        (LLAMA, {"head_dim": None, "hidden_size": 4097}, "head_dim = null"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN"),
        (LLAMA, {"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no"'),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
        (
            LLAMA,
            OLD | {"rope_scaling": {"type": "su", "factor": 4.0}},
            '"su".*accepted: default, l',
        ),
        (LLAMA, scaled("linear", factor=0.5), "factor 0.5; accepted: a number of at least 1"),
        (LLAMA, scaled("linear", factor=2.0, beta_fast=16.0), "beta_fast is no field.*accepted: f"),
        (
            LLAMA,
            scaled("linear", factor=2.0, mscale=0.7),
            "mscale is no field of rope type 'linear",
        ),
        (LLAMA, scaled("yarn", factor=None), "original_max_position_embeddings = null"),
        (LLAMA, scaled("yarn", factor="4"), 'factor = "4"'),
        (LLAMA, scaled("yarn", factor=4.0, beta_fast=1.0), "beta_fast 1.0; accepted: a number abo"),
        (LLAMA, scaled("llama3", factor=8.0), "low_freq_factor = null"),
        (LLAMA, scaled("longrope", long_factor=[1.0]), "original_max_position_embeddings = null"),
        (
            LLAMA,
            LONG | {"original_max_position_embeddings": 9},
            r"= 8192 is not .* accepted: 9, as in",
        ),
        (LLAMA, scaled("longrope", **LENGTH, short_factor=1.0), "short_factor = 1.0"),
        (LLAMA, scaled("longrope", **LENGTH, short_factor=[1.0, -1.0]), "a list of positive numb"),
        (LLAMA, scaled("longrope", **LENGTH, short_factor=[1.0]), r"long_factor \(\); accepted"),
        (LLAMA, scaled("longrope", **FACTORS, factor=4.0) | LENGTH, "factor = 4.0.*: 16.0, as in"),
        (LLAMA, OLD | {"rope_scaling": {"rope_type": ["yarn"]}}, r'rope type \["yarn"\] is not'),
        (LLAMA, LONG | {"head_dim": 64}, "short_factor has 64 numbers; accepted: 32, one for"),
        (LLAMA, OLD | {"rope_scaling": {"rope_type": "linear"}}, "factor = null"),
        (LLAMA, OLD | {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, NEW | {"rope_parameters": NESTED}, "between layers"),
        (LLAMA, NEW | {"rope_parameters": PARTIAL}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling differ"),
        (
            LLAMA,
            NEW | {"rope_parameters": {"rope_theta": 9.0}},
            "rope_theta = 500000.0.*9.0, as in",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "type ="),
        (LLAMA, {"dtype": "float16"}, 'torch_dtype = "bfloat16".*"float16", as in another field'),
        (LLAMA, OLD | {"rope_scaling": DYNAMIC}, "original_max_position_embeddings = 9"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    raw: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    config_from_json(raw, "config.json")
    with pytest.raises(UserError, match=named) as caught:
        config_from_json(raw | change, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "change"),
    [
        (QWEN2, WINDOW | {"use_sliding_window": False}),
        (QWEN2, WINDOW | {"max_window_layers": 24}),
        (QWEN3, WINDOW | {"layer_types": ["full_attention"] * 28}),
        (MISTRAL, {"sliding_window": 32_768}),
        (LLAMA, {"dtype": "bfloat16"}),
        (LLAMA, {"rope_parameters": LLAMA["rope_scaling"] | {"type": "llama3"}}),
        (LLAMA, {"pretraining_tp": 4, "attention_dropout": 0.1, "hidden_act": "swish"}),
        (LLAMA, {"partial_rotary_factor": 1.0, "rope_interleaved": False}),
        (LLAMA, {"quantization_config": None, "auto_map": None, "unknown": 1}),
    ],
)
def test_what_changes_nothing_is_accepted(raw: dict[str, Any], change: dict[str, Any]) -> None:
    assert config_from_json(raw | change, "x") == config_from_json(raw, "x")


@pytest.mark.parametrize("model_type", OF_TRANSFORMERS)
def test_missing_fields_have_the_defaults_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    reference = transformers.CONFIG_MAPPING[model_type]().to_dict()
    defaults = dict(registry.MODEL_TYPES[model_type].defaults)
    if model_type == "llama":  # null: as many as heads
        assert defaults.pop("num_key_value_heads") is None
    assert defaults == {field: reference[field] for field in defaults}
    raw: dict[str, Any] = {"model_type": model_type}
    if model_type == "mistral":
        with pytest.raises(UserError, match="sliding_window = 4096, the default of a missing"):
            config_from_json(raw, "x")
        raw["sliding_window"] = None
    config = config_from_json(raw, "x")
    # A file with all fields of the class is the same model.
    assert config_from_json(reference | raw, "x") == config
    for field, value in {"rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5}.items():
        assert field not in defaults or config.norm_eps == value


def test_kv_heads_that_are_null_are_those_of_the_queries() -> None:
    for raw in (QWEN2, MISTRAL, LLAMA):
        config = config_from_json(raw | {"num_key_value_heads": None}, "x")
        assert config.n_kv_heads == config.n_heads  # type: ignore[attr-defined]


def test_written_configs_have_each_value_once() -> None:
    for raw in (LLAMA, QWEN2, QWEN3, MISTRAL):
        assert not raw.keys() & {"dtype", "rope_parameters"}
        assert "rope_theta" not in (raw["rope_scaling"] or {})


def test_yarn_with_mscale() -> None:
    """The quotient of both scalings replaces the attention factor (as in DeepSeek's files)."""
    yarn = {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 0.8}
    raw = LLAMA | OLD | {"rope_scaling": yarn | {"original_max_position_embeddings": 4096}}
    rope = config_from_json(raw, "x").rope
    expected = (0.1 * np.log(16) + 1) / (0.08 * np.log(16) + 1)
    assert rope.attention_factor is not None
    assert_close(rope.attention_factor, expected, "float32", "forward")
    assert rope.original_max_positions == 4096


def rope_of(change: dict[str, Any]) -> RopeConfig:
    rope = config_from_json(LLAMA | change, "x").rope
    assert rope is not None
    return rope


def test_a_missing_factor_is_the_quotient_of_the_lengths() -> None:
    """As in transformers 5; the model has 131,072 positions."""
    yarn = RopeConfig(500_000.0, "yarn", 16.0, 8192)
    assert rope_of(scaled("yarn", factor=None, **LENGTH)) == yarn
    assert rope_of(scaled("yarn", factor=None) | LENGTH) == yarn
    rope = rope_of(LONG)
    assert (rope.factor, rope.original_max_positions) == (16.0, 8192)


def test_the_original_length_of_yarn_is_by_default_the_longest_row() -> None:
    assert rope_of(scaled("yarn", factor=4.0)).original_max_positions == 131_072


def test_mscale_alone_changes_nothing() -> None:
    """The golden `yarn_mscale_only_1.5` has the attention factor 0.1 ln 16 + 1."""
    rope = rope_of(scaled("yarn", factor=16.0, mscale=1.5, **LENGTH))
    assert rope.attention_factor is None
    assert_close(attention_scaling(rope, 1), 1.2772588722239782, "float64", "forward")


def test_longrope_is_written_so_that_both_versions_scale_attention_alike() -> None:
    """transformers 4 replaces the factor by the quotient of the lengths, transformers 5 does not:
    the attention factor is written where the two differ."""
    factors = {"short_factor": (1.0, 2.0), "long_factor": (3.0, 4.0)}
    for factor, attention in ((4.0, None), (2.0, math.sqrt(1.1))):  # ln 2 / ln 1024 = 0.1
        rope = RopeConfig(1e4, "longrope", factor, 1024, **factors)  # type: ignore[arg-type]
        config = LlamaConfig(**SMALL | {"max_positions": 4096, "rope": rope})
        raw = config_to_json(config, "float32")
        assert raw["original_max_position_embeddings"] == 1024
        assert raw["rope_scaling"]["original_max_position_embeddings"] == 1024
        assert raw["rope_scaling"]["attention_factor"] == attention
