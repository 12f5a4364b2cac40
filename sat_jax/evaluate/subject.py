"""What is evaluated: a model and its tokenizer, from the one path that a user gives."""

import dataclasses
from pathlib import Path
from typing import Literal

from sat_jax.config import Config
from sat_jax.data.conversations import trained_with
from sat_jax.data.form import Form
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.interop import Weights, locate, open_weights
from sat_jax.models.build import build
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.train.trained import is_run, open_run


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model at rest. `tokenizer_name` and `owner` say which tokenizer it was trained with."""

    weights: Weights
    tokenizer_name: str
    owner: Path | None  # whose tokenizer is meant by the name `model`
    config: Config | None = None  # of the run whose work directory it is

    @property
    def form(self) -> Form:
        """Of the data that it was trained on."""
        return Form() if self.config is None else Form.of(self.config.data)

    def model(self, dtype: Literal["float32", "bfloat16"]) -> Decoder:
        """The model, with float32 parameters, computing in `dtype`."""
        return build(self.weights.config, self.weights.read, Compute(dtype=dtype))

    def tokenizer(self, name: str | None = None) -> Tokenizer:
        """Its tokenizer, or another one by `name` (see `load_tokenizer`)."""
        vocab_size = self.weights.config.vocab_size
        loaded = load_tokenizer(name or self.tokenizer_name, self.owner, vocab_size)
        return trained_with(loaded, self.form)

    def system(self, given: str | None) -> str | None:
        """The system prompt of a chat with it: `given`, none for "", else the one that it was
        trained with."""
        return self.form.system if given is None else given or None


def open_subject(given: str) -> Subject:
    """What `given` names: a Hugging Face directory, a .gguf file, `package:NAME`, or a run.

    The work directory of a run stands for its newest checkpoint. Raises `UserError` for anything
    else.
    """
    place = locate(given)
    if not is_run(place):
        return Subject(open_weights(place), "model", place)
    weights, config = open_run(place)
    owner = None if config.model.path is None else locate(config.model.path)
    return Subject(weights, config.data.tokenizer, owner, config)
