"""A stored model with its tokenizer, opened from one path for evaluation, generation or export."""

import dataclasses
from pathlib import Path
from typing import Literal

from sat_jax.compress.adapters import adapted_weights
from sat_jax.config import Config
from sat_jax.data.conversations import training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, build_model, locate, open_weights
from sat_jax.models.presets import extended
from sat_jax.nn.decoder import Decoder
from sat_jax.train.run_weights import is_run, open_run
from sat_jax.train.workdir import WorkDir


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """Stored weights, and the tokenizer and data format that they were trained with."""

    weights: Weights
    tokenizer_source: Path  # where the tokenizer named `model` is
    config: Config | None = None  # of the run, if the weights are those of a run

    @property
    def data_format(self) -> DataFormat:
        """The format of the training data of a run; plain text for other models."""
        return DataFormat() if self.config is None else DataFormat.from_settings(self.config.data)

    def extended(self, rope_type: str, factor: float) -> "EvalModel":
        """Return the model with another scaling of rotary positions (`models.presets.extended`)."""
        config = extended(self.weights.config, rope_type, factor)
        weights = dataclasses.replace(self.weights, config=config)
        return dataclasses.replace(self, weights=weights)

    def model(self, dtype: Literal["float32", "bfloat16"]) -> Decoder:
        """Return the model with computation in `dtype`, and float32 parameters or those that
        `scripts.compress` quantized."""
        return build_model(self.weights, dtype)

    def tokenizer(self, name: str | None = None) -> Tokenizer:
        """Return the model's tokenizer, or the one that `name` means (see `load_tokenizer`)."""
        vocab_size = self.weights.config.vocab_size
        tokenizer = load_tokenizer(name or "model", self.tokenizer_source, vocab_size)
        # That of a run has the chat template of the training already.
        is_own = name in (None, "model")
        return tokenizer if is_own else training_tokenizer(tokenizer, self.data_format)

    def system_prompt(self, override: str | None) -> str | None:
        """Return the system prompt of a chat: `override` ("": none), or that of the training."""
        return self.data_format.system if override is None else override or None


def open_eval_model(source: str, step: int | None = None, adapter: str | None = None) -> EvalModel:
    """Open a Hugging Face directory, a .gguf file, `package:NAME`, or the work directory of a run.

    Of a run, the checkpoint after `step` steps is opened (None: the newest one). The adapters of a
    directory `adapter` are merged. Raises `UserError` for anything else, for a `step` of a model
    that is not a run, and for an adapter of another base model.
    """
    path, config, tokenizer = locate(source), None, None
    if is_run(path):
        weights, config = open_run(path, step)
        tokenizer = WorkDir(path).tokenizer
    elif step is not None:
        raise UserError(f"--step needs the work directory of a run; {path} is not one")
    else:
        weights = open_weights(path)
    if adapter is not None:
        weights = adapted_weights(weights, adapter)
    return EvalModel(weights, tokenizer or path, config)
