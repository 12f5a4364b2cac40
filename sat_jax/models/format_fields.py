"""Typed access to config.json and GGUF metadata, and values that all decoders accept.

Every error names the file, the field, its value and what is accepted.
"""

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.mlp import Activation

Json = dict[str, Any]
T = TypeVar("T")

# Fields of config.json that no family here implements, with the values that change nothing.
JSON_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["is_encoder_decoder", "alibi", "use_qk_norm", "qk_layernorm"], (False, None)),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"], (None,)),
    **dict.fromkeys(["quantization_config", "compression_config", "auto_map"], (None,)),
    **dict.fromkeys(["embedding_multiplier", "residual_multiplier"], (1.0, None)),
    **dict.fromkeys(["logits_scaling", "logit_scale"], (1.0, None)),
    **dict.fromkeys(["num_experts", "num_local_experts"], (0, None)),
    "attention_multiplier": (None,),
}

# Names of activations in config.json.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
}

# GGUF keys that `GgufFields.decoder` reads or that change nothing.
GGUF_KEYS = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "vocab_size",
    ]
)
# GGUF keys that no family here implements, with the values that change nothing.
GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["attention.clamp_kqv", "attention.max_alibi_bias"], (0.0,)),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping"], (0.0,)),
    **dict.fromkeys(["embedding_scale", "logit_scale", "residual_scale"], (0.0, 1.0)),
    **dict.fromkeys(["expert_count", "expert_used_count", "pooling_type"], (0,)),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
}


class JsonFields:
    """Typed access to a JSON object.

    `defaults` has the values of missing fields. The default of a method stands for a null field,
    and for a missing one that `defaults` does not have.
    """

    def __init__(self, raw: Json, where: str, defaults: Mapping[str, Any] = MappingProxyType({})):
        self.raw, self.where = {**defaults, **raw}, where
        self._given = raw.keys()

    def refuse(self, field: str, accepted: str) -> UserError:
        """Return the error that refuses the value of `field`."""
        value = json.dumps(self.raw.get(field))
        if field in self.raw and field not in self._given:
            value += ", the default of a missing field,"
        return UserError(f"{self.where}: {field} = {value} is not supported; accepted: {accepted}")

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Raise `UserError` for a field that is given and not null, and has another value than in
        `values`: other fields of the file have the same meaning."""
        for field, value in values.items():
            if self.raw.get(field) not in (None, value):
                raise self.refuse(field, f"{json.dumps(value)}, as in another field of the file")

    def check_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise `UserError` for a field of `neutral` that has another value than listed."""
        for field, accepted in neutral.items():
            if field in self.raw and self.raw[field] not in accepted:
                raise self.refuse(field, " or ".join(json.dumps(value) for value in accepted))

    def count(self, field: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.raw.get(field)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self.refuse(field, "a positive whole number")
        return value

    def number(self, field: str, default: float | None = None, above: float = 0.0) -> float:
        """Return a finite number greater than `above`."""
        value: Any = self.raw.get(field)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.refuse(field, f"a number above {above:g}")
        return float(value)

    def numbers(self, field: str) -> tuple[float, ...]:
        """Return a list of positive numbers."""
        value = self.raw.get(field)
        if not isinstance(value, list) or not all(
            type(v) in (int, float) and 0 < v < math.inf for v in value
        ):
            raise self.refuse(field, "a list of positive numbers")
        return tuple(map(float, value))

    def flag(self, field: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.raw.get(field)
        if value is not None and type(value) is not bool:
            raise self.refuse(field, "true or false")
        return default if value is None else value

    def choice(self, field: str, choices: Mapping[str, T], default: str) -> T:
        """Return the entry of `choices` for the text of a field."""
        value = self.raw.get(field)
        key = default if value is None else value
        if not isinstance(key, str) or key not in choices:
            raise self.refuse(field, ", ".join(choices))
        return choices[key]

    def token_ids(self, field: str) -> tuple[int, ...]:
        """Return token ids: none for null."""
        value = self.raw.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int for i in ids):
            raise self.refuse(field, "a token id, a list of token ids or null")
        return tuple(ids)


class GgufFields:
    """Typed access to the metadata of a GGUF file.

    `metadata` has the keys below the architecture's prefix, `shapes` the shapes of tensors in
    row-major order, and `fetch(name)` dequantizes a tensor.
    """

    def __init__(
        self,
        architecture: str,
        metadata: Mapping[str, Any],
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        shapes: Mapping[str, tuple[int, ...]],
        fetch: Callable[[str], np.ndarray],
        where: str,
    ):
        self.architecture, self.metadata, self.where = architecture, metadata, where
        self.bos_token_id, self.eos_token_ids = bos_token_id, eos_token_ids
        self.shapes, self.fetch = shapes, fetch

    def refuse(self, key: str, accepted: str) -> UserError:
        """Return the error that refuses the value of `key`."""
        value = self.metadata.get(key, "missing")
        return UserError(
            f"{self.where}: {self.architecture}.{key} ({value}) is not supported; "
            f"accepted: {accepted}"
        )

    def check_neutral(self, keys: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise `UserError` for a key that is neither in `keys` nor has a neutral value."""
        for key, value in self.metadata.items():
            if key not in keys and value not in neutral.get(key, ()):
                raise self.refuse(key, " or ".join(map(str, neutral.get(key, ("no such key",)))))

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.metadata.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "one positive whole number for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive float32, as its shortest decimal (1e-05, not 9.99…e-06)."""
        value: Any = self.metadata.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.refuse(key, "a positive number")
        return float(str(np.float32(value)))

    def flag(self, key: str) -> bool:
        """Return a truth value, which must be present."""
        value = self.metadata.get(key)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def decoder(self) -> dict[str, Any]:
        """Return the arguments of `DecoderConfig` that all architectures store in the same way."""
        if "token_embd.weight" not in self.shapes:
            raise UserError(f"{self.where}: token_embd.weight is missing")
        return {
            "vocab_size": self.shapes["token_embd.weight"][0],
            "d_model": self.count("embedding_length"),
            "n_layers": self.count("block_count"),
            "n_heads": self.count("attention.head_count"),
            "d_ff": self.count("feed_forward_length"),
            "max_positions": self.count("context_length"),
            "tie_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
        }

    def multi_head_decoder(self) -> dict[str, Any]:
        """Return `decoder()` of an architecture whose heads each have their own key and value."""
        decoder = self.decoder()
        d_model, n_heads = decoder["d_model"], decoder["n_heads"]
        if d_model % n_heads:
            raise self.refuse("attention.head_count", f"a divisor of {d_model}")
        if self.count("attention.head_count_kv", n_heads) != n_heads:
            raise self.refuse("attention.head_count_kv", f"{n_heads}, one for each head")
        return decoder


def decoder_keys(config: DecoderConfig) -> Json:
    """Return the metadata that all GGUF architectures have: the inverse of `GgufFields.decoder`."""
    return {
        "block_count": config.n_layers,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "vocab_size": config.vocab_size,
    }
