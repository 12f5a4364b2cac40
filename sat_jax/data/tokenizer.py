"""Tokenizers: from a `tokenizer.json`, from a GGUF file, or the bytes of the text.

All three are converted to a `tokenizers.Tokenizer`, which encodes, decodes and saves.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from sat_jax.errors import UserError
from sat_jax.tokenizer_files import SETTINGS, read_tokenizer_files

Offsets: TypeAlias = list[tuple[int, int]]  # of each token: first character and last + 1

ACCEPTED = "accepted: model, bytes, or the path of a tokenizer.json or its folder"


class NoTokenizer(UserError):
    """There is no tokenizer at this path, or its kind is not supported."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the special tokens that it adds to documents."""

    name: str  # in messages
    backend: tokenizers.Tokenizer
    vocab_size: int  # the largest id, plus one
    special_tokens: Mapping[str, str]  # texts by name, as chat templates use them: bos_token, ...
    bos_id: int | None
    eos_id: int | None
    prefix: tuple[int, ...]  # what precedes each document and prompt: the bos, or nothing
    chat_template: str | None = None
    loaded_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # by name

    @property
    def adds_bos(self) -> bool:
        """Whether documents and prompts begin with a bos."""
        return bool(self.prefix)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a prompt: with the bos if the tokenizer adds one, no eos.

        Special tokens that are spelled out in a text are recognized, as in transformers.
        """
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        prefix = list(self.prefix)
        # A text may contain the bos already.
        return [
            ids if ids[: len(prefix)] == prefix else prefix + ids
            for ids in (code.ids for code in encodings)
        ]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a document: `encode_batch`, followed by the eos."""
        eos = [] if self.eos_id is None else [self.eos_id]
        return [ids + eos for ids in self.encode_batch(texts)]

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text that a chat template has rendered, without adding bos or eos.

        The template itself writes them, if the model was trained with them.
        """
        return [ids for ids, _ in self.encode_with_offsets(texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """Return the ids of `encode_rendered`, and their character offsets."""
        encodings = self._offset_backend.encode_batch(list(texts), add_special_tokens=False)
        return [(code.ids, code.offsets) for code in encodings]

    @cached_property
    def _offset_backend(self) -> tokenizers.Tokenizer:
        # Some post-processors exclude white space from the offsets; the ids stay the same.
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return backend

    @cached_property
    def special_ids(self) -> set[int]:
        """Return the ids of all special tokens."""
        added_tokens = self.backend.get_added_tokens_decoder()
        return {token_id for token_id, token in added_tokens.items() if token.special}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` with special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of everything that determines the ids of a document."""
        special_tokens = json.dumps([self.bos_id, self.eos_id, self.adds_bos])
        return hashlib.sha256((special_tokens + self.backend.to_str()).encode()).hexdigest()

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise `UserError` if this tokenizer has ids outside the vocabulary of the model."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer {self.name} has ids up to {self.vocab_size - 1}, but the model's"
                f" vocabulary ends at {model_vocab_size - 1}: they do not match"
            )

    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that transformers reads, by name.

        They are those that were loaded, with this tokenizer's chat template.
        """
        files = dict(self.loaded_files)
        if not files:
            files["tokenizer.json"] = self.backend.to_str(pretty=True).encode()
            settings: dict[str, Any] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "add_bos_token": self.adds_bos,
                **self.special_tokens,
            }
        else:
            settings = json.loads(files.get("tokenizer_config.json", b"{}"))
            if self.chat_template == _chat_template(files, settings):
                return files
        # All versions of transformers read the template here; another file would replace it.
        files.pop("chat_template.jinja", None)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        return files | {"tokenizer_config.json": (text + "\n").encode()}

    def save(self, directory: Path) -> None:
        """Write `files` into a new or existing directory."""
        directory.mkdir(exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)


def load_tokenizer(
    spec: str, model_path: str | Path | None = None, model_vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names.

    `model` is the tokenizer of `model_path`, a Hugging Face directory or a GGUF file. `bytes` has
    the ids 0 to 255 and, if the model's vocabulary is large enough, the eos 256. Anything else is
    the path of a tokenizer.json or of its folder. Raises `NoTokenizer` if it does not exist, and
    another `UserError` if it is damaged or does not fit `model_vocab_size`.
    """
    if spec == "bytes":
        tokenizer = _byte_tokenizer(with_eos=model_vocab_size is None or model_vocab_size > 256)
    elif spec != "model":
        tokenizer = _from_huggingface(Path(spec).expanduser())
    elif model_path is None:
        raise NoTokenizer(f"tokenizer 'model' needs the path of a pretrained model; {ACCEPTED}")
    elif Path(model_path).is_file():
        from sat_jax.data.gguf_tokenizer import from_gguf  # imported only for GGUF files

        tokenizer = from_gguf(Path(model_path))
    else:
        tokenizer = _from_huggingface(Path(model_path).expanduser())
    if model_vocab_size is not None:
        tokenizer.check_fits(model_vocab_size)
    return tokenizer


def make_tokenizer(
    name: str,
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    chat_template: str | None = None,
    loaded_files: Mapping[str, bytes] | None = None,
) -> Tokenizer:
    """Return the tokenizer of `backend`, whose post-processor determines what it adds to texts."""
    # A tokenizer.json may contain truncation and padding settings, which would change documents.
    backend.no_truncation()
    backend.no_padding()
    code = backend.encode("a")
    leading = itertools.takewhile(
        itemgetter(1), zip(code.ids, code.special_tokens_mask, strict=True)
    )
    return Tokenizer(
        name,
        backend,
        vocab_size=max(backend.get_vocab().values()) + 1,
        special_tokens=special_tokens,
        bos_id=backend.token_to_id(special_tokens.get("bos_token", "")),
        eos_id=backend.token_to_id(special_tokens.get("eos_token", "")),
        prefix=tuple(token for token, _ in leading),
        chat_template=chat_template,
        loaded_files=loaded_files or {},
    )


# --- Bytes -----------------------------------------------------------------------------------


_END_OF_TEXT = "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """Return the printable character for each byte in byte-level BPE (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _byte_tokenizer(with_eos: bool) -> Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without merges, splitting into words does not change the ids; it enables the library's cache.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    if with_eos:
        backend.add_special_tokens([AddedToken(_END_OF_TEXT, normalized=False)])
    return make_tokenizer("bytes", backend, {"eos_token": _END_OF_TEXT} if with_eos else {})


# --- Hugging Face ----------------------------------------------------------------------------

# Special tokens of the classes of transformers that have defaults, with a tokenizer.json.
_EOS_AND_UNK = {"eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}
_CLASS_TOKENS: dict[str, Mapping[str, str]] = {
    "GPT2Tokenizer": {**_EOS_AND_UNK, "bos_token": _END_OF_TEXT},
    "GPTNeoXTokenizer": {**_EOS_AND_UNK, "bos_token": _END_OF_TEXT, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {**_EOS_AND_UNK, "pad_token": _END_OF_TEXT},
}
_CLASS_OF_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


def _from_huggingface(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json with the settings beside it.

    As in transformers 5, the post-processor of tokenizer.json determines whether texts begin with a
    bos; the setting add_bos_token has no effect.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise NoTokenizer(f"tokenizer: {file} does not exist; {ACCEPTED}")
    folder = file.parent
    files = read_tokenizer_files(folder)
    if file.name != "tokenizer.json":
        # The other vocabulary files of the folder describe another tokenizer.
        files = {name: content for name, content in files.items() if name in SETTINGS}
        files["tokenizer.json"] = file.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises plain exceptions without the path
        raise UserError(f"{file}: not a tokenizer.json: {error}") from error
    config = folder / "config.json"
    model = _json(config.read_bytes(), config) if config.is_file() else {}
    settings, special_map = (
        _json(files.get(name, b"{}"), folder / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    class_of_model = _CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")))
    class_name = str(settings.get("tokenizer_class") or class_of_model).removesuffix("Fast")
    if class_name == "GPTNeoXTokenizer" and backend.num_special_tokens_to_add(False):
        backend.post_processor = processors.ByteLevel()  # as this class does
    defaults = {
        name: token
        for name, token in _CLASS_TOKENS.get(class_name, {}).items()
        if backend.token_to_id(token) is not None
    }
    if "added_tokens_decoder" in settings:  # then transformers does not read the older file
        special_map = {}
    special_tokens = _special_tokens(backend, defaults | settings | special_map, model, folder)
    template = _chat_template(files, settings)
    return make_tokenizer(str(path), backend, special_tokens, template, files)


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _special_tokens(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], model: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Return the texts of the special tokens, by name.

    A bos or eos that no setting mentions is that of the model; null means that there is none.
    """
    special_tokens = {}
    for name, token in settings.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str) and text:
            special_tokens[name] = text
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        known = backend.token_to_id(special_tokens.get(name, "")) is not None
        if token is not None and token != "" and not known:
            raise UserError(f"{folder}: {name} {token!r}; accepted: a token of tokenizer.json")
        ids = model.get(f"{name}_id")
        token_id = next(iter(ids), None) if isinstance(ids, list) else ids
        if name in settings or token_id is None:
            continue
        text = backend.id_to_token(token_id) if type(token_id) is int and token_id >= 0 else None
        if text is None:
            raise UserError(f"{folder}: {name}_id is {ids!r}; accepted: ids of tokenizer.json")
        special_tokens[name] = text
    return special_tokens


def _chat_template(files: Mapping[str, bytes], settings: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates with names
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
