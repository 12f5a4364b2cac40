"""The frozen model whose token distributions a run learns (`distill`)."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sat_jax.config import Config
from sat_jax.data.tokenizer import NoTokenizer, Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import Weights, locate, open_weights
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.parallel.rules import place, tree_shardings
from sat_jax.train.layouts import Teacher, teacher_layout
from sat_jax.train.run_weights import is_run, open_run
from sat_jax.train.workdir import WorkDir


def open_teacher(config: Config) -> Weights:
    """Return the weights of the teacher of a run that distills."""
    path = teacher_path(config)
    return open_run(path)[0] if is_run(path) else open_weights(path)


def teacher_path(config: Config) -> Path:
    """Return the path of the teacher's directory or file."""
    assert config.distill.teacher is not None
    return locate(config.distill.teacher)


def read_teacher(config: Config, weights: Weights, mesh: Mesh) -> Teacher:
    """Return the teacher with its parameters in the compute dtype; vectors stay float32, as in the
    trained model."""
    layout = teacher_layout(config, weights.config)
    shardings = tree_shardings(mesh, layout, dict(layout.shapes))
    params = {}
    for path, leaf in layout.leaves.items():
        dtype = "float32" if leaf.role == "vector" else config.model.dtype
        value = np.asarray(weights.read(path), jnp.dtype(dtype))
        params[path] = place(value, shardings[path])
    return Teacher(weights.config, layout, params)


def check_tokenizers(
    config: Config, teacher: DecoderConfig, tokenizer: Tokenizer, log: Callable[[str], None]
) -> None:
    """Raise `UserError` unless the ids of the run's tokenizer mean the same to the teacher.

    A teacher without tokenizer files is accepted with a message.
    """
    path = teacher_path(config)
    source = WorkDir(path).tokenizer if is_run(path) else path
    try:
        known = load_tokenizer("model", source, teacher.vocab_size)
    except NoTokenizer:
        log(f"distill.teacher {path} has no tokenizer to compare with that of the run")
        return
    tokens, own = ({i: t for t, i in x.backend.get_vocab().items()} for x in (known, tokenizer))
    if tokens != own:
        number = min(i for i in tokens.keys() | own.keys() if tokens.get(i) != own.get(i))
        raise UserError(
            f"its tokenizer is another one: token {number} is {tokens.get(number)!r}, and"
            f" {own.get(number)!r} in that of the run; accepted: a teacher with the same tokenizer"
        )
