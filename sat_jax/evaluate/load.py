"""A model and the tokenizer that belongs to it, from the one path that a user gives."""

from pathlib import Path
from typing import Literal

from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import load_model, locate
from sat_jax.models.llama import Llama

Dtype = Literal["float32", "bfloat16"]


def model_path(given: str) -> Path:
    """The Hugging Face directory or GGUF file that `given` means.

    `given` may also be `package:NAME`, or the work directory of a run that exported its model.
    """
    place = locate(given)
    if not (place / "metrics.jsonl").is_file():
        return place
    exported = place / "huggingface"
    if not exported.is_dir():
        raise UserError(
            f"{place}: a work directory without an exported model; the run's command with"
            " --config.export.huggingface=True adds it"
        )
    return exported


def load(given: str, dtype: Dtype, tokenizer: str = "model") -> tuple[Llama, Tokenizer]:
    """The model at `given`, and the tokenizer that `tokenizer` names (see `load_tokenizer`)."""
    path = model_path(given)
    model = load_model(path, dtype)
    return model, load_tokenizer(tokenizer, path, model.config.vocab_size)
