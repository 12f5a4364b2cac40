"""Tokenizers of GGUF files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sat_jax.data.tokenizer import NoTokenizer, Tokenizer, make_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop.gguf import open_gguf

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
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types
# Keys of special tokens, and their names in transformers.
_SPECIAL_KEYS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
# The ids that llama.cpp assumes for SentencePiece if a key is missing.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_SPACE = "▁"  # U+2581, the space in SentencePiece


class _Metadata:
    """The keys `tokenizer.*` of a file, and its tokens."""

    def __init__(self, path: Path):
        self.path, self._file = path, open_gguf(path)
        self.tokens: list[str] = self("ggml.tokens", [])
        types = self("ggml.token_type", [])
        self.types = types or [_NORMAL] * len(self.tokens)

    def __call__(self, key: str, default: Any = None) -> Any:
        return self._file.value(f"tokenizer.{key}", default)

    def special_tokens(self, default_ids: Mapping[str, int]) -> dict[str, str]:
        """Return the texts of the special tokens by name."""
        special_tokens = {}
        for key, name in _SPECIAL_KEYS.items():
            token_id = self(f"ggml.{key}_token_id", default_ids.get(key))
            if token_id is None:
                continue
            if not 0 <= token_id < len(self.tokens):
                raise UserError(
                    f"{self.path}: tokenizer.ggml.{key}_token_id {token_id}; accepted: 0 to"
                    f" {len(self.tokens) - 1}"
                )
            special_tokens[name] = self.tokens[token_id]
        return special_tokens


def from_gguf(path: Path) -> Tokenizer:
    """Return the tokenizer of a GGUF file: a byte-level BPE, or a BPE of SentencePiece.

    Raises `NoTokenizer` if the file has none or one of another kind.
    """
    metadata = _Metadata(path)
    model, pre = metadata("ggml.model"), metadata("ggml.pre")
    if model is None:
        raise NoTokenizer(f"{path}: contains no tokenizer; accepted: the path of a tokenizer.json")
    if model == "llama":
        special_tokens = metadata.special_tokens(_SENTENCEPIECE_IDS)
        backend = _sentencepiece(metadata, special_tokens["unk_token"])
        adds_bos = metadata("ggml.add_bos_token", True)
    elif model == "gpt2" and pre in _PRE_TOKENIZERS:
        special_tokens = metadata.special_tokens({})
        backend = _byte_level(metadata, pre)
        adds_bos = metadata("ggml.add_bos_token", pre in _LLAMA3)
    else:
        raise NoTokenizer(
            f"{path}: its tokenizer is {model!r} with pre-tokenizer {pre!r}; accepted: 'llama',"
            f" 'gpt2' with {', '.join(_PRE_TOKENIZERS)}, or the path of the model's tokenizer.json"
        )
    for token, kind in zip(metadata.tokens, metadata.types, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            backend.add_tokens([AddedToken(token, normalized=False, special=special)])
    if adds_bos and (bos := special_tokens.get("bos_token")) is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return make_tokenizer(str(path), backend, special_tokens, metadata("chat_template"))


def _byte_level(metadata: _Metadata, pre: str) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with its merges and pre-tokenizer."""
    try:
        bpe = models.BPE(
            vocab={token: index for index, token in enumerate(metadata.tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in metadata("ggml.merges", [])],
            ignore_merges=pre in _LLAMA3,  # a word in the vocabulary is one token
        )
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(
            f"{metadata.path}: the merges of its tokenizer do not match its tokens: {error}"
        ) from error
    backend = tokenizers.Tokenizer(bpe)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: _Metadata, unknown: str) -> tokenizers.Tokenizer:
    """Return a BPE of SentencePiece, which falls back to bytes.

    SentencePiece joins the adjacent pair whose union has the highest score. Texts, also those after
    a special token, begin with a space, as in llama.cpp and the tokenizer.json of Llama 2.
    """
    scores = metadata("ggml.scores", [])
    if len(scores) != len(metadata.tokens):
        raise NoTokenizer(
            f"{metadata.path}: its tokenizer has {len(scores)} scores for {len(metadata.tokens)}"
            " tokens; accepted: the path of the model's tokenizer.json"
        )
    pieces = {
        token: score
        for token, score, kind in zip(metadata.tokens, scores, metadata.types, strict=True)
        if kind == _NORMAL
    }
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(metadata.tokens)},
        merges=_merges(pieces, metadata.path),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    space = metadata("ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE)] * space + [normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * space
    )
    return backend


def _merges(pieces: Mapping[str, float], path: Path) -> list[tuple[str, str]]:
    """Return every pair of pieces whose union is a piece, in descending order of its score.

    Raises `NoTokenizer` if two unions have the same score: the order of their merges would depend
    on the text.
    """
    merges: list[tuple[str, str]] = []
    last = None
    for piece in sorted(pieces, key=lambda piece: -pieces[piece]):
        halves = [(piece[:size], piece[size:]) for size in range(1, len(piece))]
        pairs = [pair for pair in halves if pieces.keys() >= set(pair)]
        if pairs and last is not None and pieces[piece] == pieces[last]:
            raise NoTokenizer(
                f"{path}: {last!r} and {piece!r} of its tokenizer have the same score, so that the"
                " order of its merges is unknown; accepted: the path of the model's tokenizer.json"
            )
        merges += sorted(pairs, key=lambda pair: len(pair[1]))
        last = piece if pairs else last
    return merges
