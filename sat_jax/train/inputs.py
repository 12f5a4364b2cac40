"""The parts of a run's inputs that its work directory keeps, and their comparison by content.

With them, a run can be evaluated and exported without the base model and the texts, and continued
with the same content at another path.
"""

import hashlib
from pathlib import Path

from sat_jax.compress.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import locate
from sat_jax.interop.huggingface_config import config_to_json
from sat_jax.interop.quantized import packing_to_json
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.quantized import Packing
from sat_jax.train.files import read_json, write_json
from sat_jax.train.manifest import digests
from sat_jax.train.run_weights import generation_settings, model_fingerprint
from sat_jax.train.setup import Task
from sat_jax.train.teacher import teacher_path
from sat_jax.train.workdir import WorkDir

# Settings that may be paths: their contents are compared instead.
BY_CONTENT = (
    *("model.path", "model.adapter", "distill.teacher"),
    *("data.sources", "data.tokenizer", "data.chat_template"),
)


def check_inputs(workdir: WorkDir, task: Task) -> None:
    """Raise `UserError` if a run is continued with other contents than it was started with."""
    if not workdir.config.exists():
        return
    before = read_json(workdir.inputs)
    for setting, fingerprint in _fingerprints(task).items():
        if before.get(setting) != fingerprint:
            raise UserError(
                f"{workdir.path}: the content of {setting} is not that of the start of the run;"
                " accepted: the old content at any path, or a new work directory"
            )


def write_inputs(workdir: WorkDir, task: Task) -> None:
    """Write what a new run keeps of its inputs, and their fingerprints."""
    if not workdir.config.exists():
        write_model(workdir, task.model, task.tokenizer, task.stored)
        if generation := generation_settings(task.config, task.weights):
            write_json(workdir.generation, generation)
        write_json(workdir.inputs, _fingerprints(task))


def write_model(
    workdir: WorkDir, model: DecoderConfig, tokenizer: Tokenizer, stored: Packing | None = None
) -> None:
    """Write the shape of the model and how its `model.path` is quantized, and the tokenizer with
    the chat template of the training."""
    packing = {} if stored is None else packing_to_json(stored)
    write_json(workdir.model, config_to_json(model, "float32") | packing)
    workdir.tokenizer.mkdir(exist_ok=True)
    tokenizer.save(workdir.tokenizer)
    # Read where the tokenizer's own files do not name these tokens.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(workdir.tokenizer / "config.json", ids)


def _fingerprints(task: Task) -> dict[str, str | None]:
    """Return the hash of the content of each setting in `BY_CONTENT`.

    The hash of the data includes that of the tokenizer, which is therefore compared before.
    """
    config = task.config
    template = task.tokenizer.chat_template if config.data.format != "text" else None
    path, adapter = config.model.path, config.model.adapter
    return {
        "model.path": None if path is None else model_fingerprint(locate(path)),
        "model.adapter": None if adapter is None else _adapter_fingerprint(locate(adapter)),
        "distill.teacher": model_fingerprint(teacher_path(config)) if config.distills else None,
        "data.tokenizer": task.tokenizer.fingerprint,
        "data.chat_template": None if template is None else _sha256(template),
        "data.sources": task.data.info.fingerprint,
    }


def _adapter_fingerprint(path: Path) -> str:
    """Return the hash of the files of an adapter directory."""
    return _sha256("".join(digests(path, [CONFIG_FILE, WEIGHTS_FILE])))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
