"""Tokenizers: from a `tokenizer.json`, from a GGUF file, or the bytes of the text.

All three are converted to a `tokenizers.Tokenizer`, which encodes, decodes and saves.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sat_jax.errors import UserError

Offsets: TypeAlias = list[tuple[int, int]]  # of each token: first character and last + 1

ACCEPTED = "accepted: model, bytes, or the path of a tokenizer.json or its folder"

# Files of a Hugging Face folder that describe its tokenizer, besides tokenizer.json.
_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class NoTokenizer(UserError):
    """There is no tokenizer at this path, or its kind is not supported."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the special tokens that it adds to documents."""

    name: str  # in messages
    backend: tokenizers.Tokenizer
    vocab_size: int  # the largest id, plus one
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # documents and prompts begin with `bos_id`
    chat_template: str | None = None
    folder: Path | None = field(default=None, repr=False)  # with the Hugging Face files to copy

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a prompt: with the bos if the tokenizer adds one, no eos.

        Special tokens that are spelled out in a text are recognized, as in transformers.
        """
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        bos = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        # The text of a chat template often contains the bos already.
        return [ids if ids[:1] == bos else bos + ids for ids in (code.ids for code in encodings)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a document: `encode_batch`, followed by the eos."""
        eos = [] if self.eos_id is None else [self.eos_id]
        return [ids + eos for ids in self.encode_batch(texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """Return the ids of each text and their character offsets, without adding bos or eos.

        For text that a chat template has rendered.
        """
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

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Return the texts of `bos_token` and `eos_token`, if they exist, for chat templates."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        known = {name: token_id for name, token_id in ids.items() if token_id is not None}
        tokens = {name: self.backend.id_to_token(token_id) for name, token_id in known.items()}
        return {name: token for name, token in tokens.items() if token is not None}

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

    def save(self, directory: Path) -> None:
        """Write the files that transformers reads; they are copied if they were loaded."""
        if self.folder is not None:
            for name in ("tokenizer.json", *_OTHER_FILES):
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, directory / name)
            source = _chat_template(self.folder, _read_json(self.folder / "tokenizer_config.json"))
            if self.chat_template is not None and self.chat_template != source:
                file = directory / "chat_template.jinja"  # takes precedence over the other files
                file.write_text(self.chat_template, encoding="utf-8")
            return
        self.backend.save(str(directory / "tokenizer.json"))
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


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
        tokenizer = _from_gguf(Path(model_path))
    else:
        tokenizer = _from_huggingface(Path(model_path).expanduser())
    if model_vocab_size is not None:
        tokenizer.check_fits(model_vocab_size)
    return tokenizer


def _make_tokenizer(
    name: str,
    backend: tokenizers.Tokenizer,
    bos_id: int | None,
    eos_id: int | None,
    adds_bos: bool | None,
    chat_template: str | None,
    folder: Path | None = None,
) -> Tokenizer:
    # A tokenizer.json may contain truncation and padding settings, which would change documents.
    backend.no_truncation()
    backend.no_padding()
    if adds_bos is None:
        adds_bos = backend.encode("a").ids[:1] == [bos_id]
    adds_bos = adds_bos and bos_id is not None
    vocab_size = max(backend.get_vocab().values()) + 1
    return Tokenizer(name, backend, vocab_size, bos_id, eos_id, adds_bos, chat_template, folder)


# --- Bytes -----------------------------------------------------------------------------------


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
        backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return _make_tokenizer("bytes", backend, None, 256 if with_eos else None, False, None)


# --- Hugging Face ----------------------------------------------------------------------------


def _from_huggingface(path: Path) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise NoTokenizer(f"tokenizer: {file} does not exist; {ACCEPTED}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions without the path
        raise UserError(f"{file}: not a tokenizer.json: {error}") from error
    folder = file.parent
    settings = _tokenizer_settings(folder)
    return _make_tokenizer(
        name=str(path),
        backend=backend,
        bos_id=_special_id(backend, folder, "bos"),
        eos_id=_special_id(backend, folder, "eos"),
        adds_bos=settings.get("add_bos_token"),
        chat_template=_chat_template(folder, settings),
        folder=folder,
    )


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    settings = _read_json(folder / "special_tokens_map.json")
    return settings | _read_json(folder / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _special_id(backend: tokenizers.Tokenizer, folder: Path, which: str) -> int | None:
    """Return the id of "bos" or "eos" from the settings of the tokenizer, or of the model."""
    settings, config = _tokenizer_settings(folder), _read_json(folder / "config.json")
    token = settings.get(f"{which}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        ids = config.get(f"{which}_token_id")
        token_id = next(iter(ids), None) if isinstance(ids, list) else ids
        if token_id is not None and type(token_id) is not int:
            raise UserError(f"{folder}: {which}_token_id is {ids!r}; accepted: whole numbers")
        return token_id
    token_id = backend.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise UserError(f"{folder}: {which}_token {token!r}; accepted: a token of tokenizer.json")
    return token_id


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates with names
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


# --- GGUF ------------------------------------------------------------------------------------


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# The pre-tokenizers that `tokenizer.ggml.pre` of a GGUF file names, as in llama.cpp.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [_GPT2],
    "gpt2": [_GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2],
    **{name: _split_words("{1,3}") for name in _LLAMA3},
    "qwen2": _split_words(""),
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


def _from_gguf(path: Path) -> Tokenizer:
    from sat_jax.interop.gguf import open_gguf  # imported only for GGUF files

    file = open_gguf(path)

    def metadata(key: str, default: Any = None) -> Any:
        return file.value(f"tokenizer.{key}", default)

    model, pre = metadata("ggml.model"), metadata("ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise NoTokenizer(
            f"{path}: its tokenizer is {model!r} with pre-tokenizer {pre!r}; accepted: 'gpt2' with"
            f" {', '.join(_PRE_TOKENIZERS)}, or the path of the model's tokenizer.json"
        )
    tokens, merges = metadata("ggml.tokens", []), metadata("ggml.merges", [])
    try:
        bpe = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _LLAMA3,  # a word in the vocabulary is one token
        )
    except Exception as error:
        raise UserError(
            f"{path}: the merges of its tokenizer do not match its tokens: {error}"
        ) from error
    backend = tokenizers.Tokenizer(bpe)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, metadata("ggml.token_type", []), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            backend.add_tokens([AddedToken(token, normalized=False, special=special)])
    bos_id = metadata("ggml.bos_token_id")
    adds_bos = bos_id is not None and metadata("ggml.add_bos_token", pre in _LLAMA3)
    if adds_bos:
        bos = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    eos_id = metadata("ggml.eos_token_id")
    return _make_tokenizer(str(path), backend, bos_id, eos_id, adds_bos, metadata("chat_template"))
