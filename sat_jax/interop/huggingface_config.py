"""config.json of Hugging Face directories, read and written as the families declare it.

Written files have the fields of transformers 4, which transformers 5 reads too: each value once.
A field that changes the function and is not implemented is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from sat_jax.errors import UserError
from sat_jax.models import registry
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.format_fields import Json, JsonFields

# Second names of fields that every model type has; both are written by transformers.
_ALIASES = {"dtype": "torch_dtype"}


def read_json(path: Path) -> Json:
    """Return the JSON object in a file. Raises `UserError` if the file cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def config_from_json(raw: Json, where: str, default_type: str | None = None) -> DecoderConfig:
    """Return the model that a config.json describes; `where` names the file in errors.

    `default_type`: the model type of a file without one.
    """
    fields = JsonFields(raw, where)
    model_type: Any = raw.get("model_type", default_type)
    if not isinstance(model_type, str) or model_type not in registry.MODEL_TYPES:
        raise fields.refuse("model_type", ", ".join(registry.MODEL_TYPES))
    declared = registry.MODEL_TYPES[model_type]
    if raw.get("architectures") not in (None, [declared.architecture]):
        raise fields.refuse("architectures", declared.architecture)
    for alias, name in {**declared.aliases, **_ALIASES}.items():
        if raw.get(alias) is not None:
            fields.check_equal({name: raw[alias]})
            raw = {name: raw[alias], **raw}
    fields = JsonFields(raw, where, declared.defaults)
    fields.check_neutral(declared.neutral)
    return declared.read_config(fields)


def config_to_json(config: DecoderConfig, dtype: str) -> Json:
    """Return the config.json of `config` with weights in `dtype`, for transformers 4 and 5."""
    declared, eos = registry.format_of(config), config.eos_token_ids
    return {
        "architectures": [declared.architecture],
        "model_type": declared.model_type,
        "vocab_size": config.vocab_size,
        **declared.write_config(config),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
