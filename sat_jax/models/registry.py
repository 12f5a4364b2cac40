"""Model families by Hugging Face model type and by GGUF architecture."""

from typing import TypeVar

from sat_jax.models import gpt2, gpt_neox, llama, retnet
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.formats import Family, ModelFormat

T = TypeVar("T")

FAMILIES: dict[str, Family] = {}
MODEL_TYPES: dict[str, ModelFormat] = {}
GGUF_ARCHITECTURES: dict[str, ModelFormat] = {}


def register(family: Family) -> None:
    """Add a family. Raises `ValueError` if a model type or architecture is already taken."""
    for form in family.formats:
        _add(FAMILIES, form.model_type, family)
        _add(MODEL_TYPES, form.model_type, form)
        if form.gguf:
            _add(GGUF_ARCHITECTURES, form.gguf.architecture, form)


def _add(table: dict[str, T], name: str, entry: T) -> None:
    if name in table:
        raise ValueError(f"{name!r} is registered twice")
    table[name] = entry


def format_of(config: DecoderConfig) -> ModelFormat:
    """Return the declared file formats of the model that a config describes."""
    return MODEL_TYPES[config.family]


register(Family(llama.Llama, llama.FORMATS))
register(Family(gpt2.GPT2, gpt2.FORMATS))
register(Family(gpt_neox.GPTNeoX, gpt_neox.FORMATS))
register(Family(retnet.RetNet, retnet.FORMATS))
