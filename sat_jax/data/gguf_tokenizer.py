"""Tokenizers of GGUF files, in and out."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class _PreTokenizer(NamedTuple):
    """Steps that split a text. `nfc`: it is normalized before; `whole_words`: a word that is in the
    vocabulary is one token."""

    steps: Sequence[pre_tokenizers.PreTokenizer]
    nfc: bool = False
    whole_words: bool = False


# The pre-tokenizers that `tokenizer.ggml.pre` of a GGUF file names, as in llama.cpp. Of names for
# the same, the first is written.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer([_GPT2]),
    "gpt2": _PreTokenizer([_GPT2]),
    "olmo": _PreTokenizer([_GPT2], nfc=True),  # also GPT-NeoX and Pythia
    "smollm": _PreTokenizer([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    **{name: _PreTokenizer(_split_words("{1,3}"), whole_words=True) for name in _LLAMA3},
    "qwen2": _PreTokenizer(_split_words(""), nfc=True),
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token types
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
    if model in (None, "none"):
        raise NoTokenizer(f"{path}: contains no tokenizer; accepted: the path of a tokenizer.json")
    if model == "llama":
        special_tokens = metadata.special_tokens(_SENTENCEPIECE_IDS)
        backend = _sentencepiece_of(metadata, special_tokens["unk_token"])
        adds_bos = metadata("ggml.add_bos_token", True)
    elif model == "gpt2" and pre in _PRE_TOKENIZERS:
        special_tokens = metadata.special_tokens({})
        backend = _byte_level_of(metadata, pre)
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


def _byte_level_of(metadata: _Metadata, pre: str) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of a file."""
    vocab = {token: index for index, token in enumerate(metadata.tokens)}
    pairs = (merge.partition(" ") for merge in metadata("ggml.merges", []))
    merges = [(left, right) for left, _, right in pairs]
    try:
        return _byte_level(vocab, merges, _PRE_TOKENIZERS[pre])
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(
            f"{metadata.path}: the merges of its tokenizer do not match its tokens: {error}"
        ) from error


def _byte_level(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: _PreTokenizer
) -> tokenizers.Tokenizer:
    bpe = models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=pre.whole_words)
    backend = tokenizers.Tokenizer(bpe)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(pre.steps))
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_of(metadata: _Metadata, unknown: str) -> tokenizers.Tokenizer:
    """Return the BPE of SentencePiece of a file."""
    scores = metadata("ggml.scores", [])
    if len(scores) != len(metadata.tokens):
        raise NoTokenizer(
            f"{metadata.path}: its tokenizer has {len(scores)} scores for {len(metadata.tokens)}"
            " tokens; accepted: the path of the model's tokenizer.json"
        )
    merges = _merges(_pieces(metadata.tokens, metadata.types, scores), str(metadata.path))
    return _sentencepiece(metadata.tokens, merges, unknown, metadata("ggml.add_space_prefix", True))


def _pieces(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> dict[str, float]:
    """Return the scores of the tokens that merges may produce."""
    triples = zip(tokens, types, scores, strict=True)
    return {token: score for token, kind, score in triples if kind == _NORMAL}


def _sentencepiece(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], unknown: str, space: bool
) -> tokenizers.Tokenizer:
    """Return a BPE of SentencePiece, which falls back to bytes.

    With `space`, texts, also those after a special token, begin with a space, as in llama.cpp and
    the tokenizer.json of Llama 2.
    """
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(merges),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE)] * space + [normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * space
    )
    return backend


def _merges(pieces: Mapping[str, float], path: str) -> list[tuple[str, str]]:
    """Return every pair of pieces whose union is a piece, in descending order of its score.

    SentencePiece joins the adjacent pair whose union has the highest score. Raises `NoTokenizer` if
    two unions have the same score: the order of their merges would depend on the text.
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


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the keys `tokenizer.*` of a GGUF file: the inverse of `from_gguf`.

    `vocab_size` is that of the model; ids that the tokenizer does not have become unused tokens.
    Raises `UserError` for a tokenizer that such a file cannot express.
    """
    backend, state = tokenizer.backend, json.loads(tokenizer.backend.to_str())
    tokenizer.check_fits(vocab_size)
    _check_expressible(tokenizer)
    if state["model"]["type"] != "BPE":
        raise _refuse(tokenizer.name)
    added = backend.get_added_tokens_decoder()
    texts = {index: token for token, index in backend.get_vocab().items()}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [_NORMAL if index in texts else _UNUSED for index in range(vocab_size)]
    for index, token in added.items():
        types[index] = _CONTROL if token.special else _USER_DEFINED
    keys = {
        **(
            _sentencepiece_keys(state, tokens, types, tokenizer.name)
            if state["model"]["byte_fallback"]
            else _byte_level_keys(state, tokenizer.name)
        ),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.add_bos_token": tokenizer.adds_bos,
    }
    for key, name in _SPECIAL_KEYS.items():
        token_id = backend.token_to_id(tokenizer.special_tokens.get(name, ""))
        if token_id is not None:
            keys[f"ggml.{key}_token_id"] = token_id
    if tokenizer.chat_template is not None:
        keys["chat_template"] = tokenizer.chat_template
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def _check_expressible(tokenizer: Tokenizer) -> None:
    if tokenizer.prefix not in ((), (tokenizer.bos_id,)):
        raise UserError(
            f"tokenizer {tokenizer.name}: texts begin with the tokens {list(tokenizer.prefix)},"
            " which a GGUF file cannot express; accepted: the bos, or nothing"
        )
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word:
            raise UserError(
                f"tokenizer {tokenizer.name}: token {token.content!r} depends on the text beside"
                " it, which a GGUF file cannot express; accepted: no lstrip, rstrip, single_word"
            )


def _refuse(name: str) -> UserError:
    return UserError(
        f"tokenizer {name} cannot be written to a GGUF file; accepted: a BPE of SentencePiece with"
        f" bytes, and a byte-level BPE with the pre-tokenizer of {', '.join(_PRE_TOKENIZERS)}"
    )


def _byte_level_keys(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return merges, and the first name of a pre-tokenizer with the behaviour of this one."""
    behaviour = _behaviour(state)
    for pre, settings in _PRE_TOKENIZERS.items():
        if _behaviour(json.loads(_byte_level({}, [], settings).to_str())) == behaviour:
            merges = [" ".join(pair) for pair in state["model"]["merges"]]
            return {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": merges}
    raise _refuse(name)


def _sentencepiece_keys(
    state: Mapping[str, Any], tokens: list[str], types: list[int], name: str
) -> dict[str, Any]:
    """Return scores that descend in the order of the merges, and mark bytes in `types`.

    The scores of SentencePiece themselves are not in a tokenizer.json; only their order has a
    meaning.
    """
    merges, unknown = state["model"]["merges"], state["model"]["unk_token"]
    for index, token in enumerate(tokens):
        if types[index] == _NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = _BYTE
        elif types[index] == _NORMAL and token == unknown:
            types[index] = _UNKNOWN
    ranks = {piece: rank for rank, (piece, _) in enumerate(_unions(merges))}
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    try:
        read = _merges(_pieces(tokens, types, scores), name)
    except NoTokenizer as error:  # pieces that no merge of this tokenizer produces
        raise _refuse(name) from error
    if unknown in tokens and _unions(read) == _unions(merges):
        for space in (True, False):
            backend = _sentencepiece(tokens, read, unknown, space)
            if _behaviour(json.loads(backend.to_str())) == _behaviour(state):
                return {
                    "ggml.model": "llama",
                    "ggml.pre": "default",
                    "ggml.scores": scores,
                    "ggml.unknown_token_id": tokens.index(unknown),
                    "ggml.add_space_prefix": space,
                }
    raise _refuse(name)


def _unions(merges: Sequence[Sequence[str]]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Return the union of each merge in order, with all pairs that give it."""
    groups = itertools.groupby(merges, "".join)
    return [(union, sorted(tuple(pair) for pair in pairs)) for union, pairs in groups]


def _behaviour(state: Mapping[str, Any]) -> list[Any]:
    """Return what determines the ids of a text and the text of ids, apart from tokens and merges,
    of a tokenizer.json."""
    model = dict(state["model"])
    vocab = model.pop("vocab")
    del model["merges"]
    if vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        model |= {"unk_token": None, "fuse_unk": False}  # no byte is unknown
    return [
        {name: value for name, value in model.items() if value},
        _steps(state["normalizer"], "normalizers"),
        _steps(state["pre_tokenizer"], "pretokenizers"),
        [step["type"] for step in _steps(state["decoder"], "decoders")],
    ]


def _steps(step: Mapping[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, without nested sequences."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for child in step[children] for inner in _steps(child, children)]
    # Whether white space is part of the offsets of a token does not change its id.
    return [{name: value for name, value in step.items() if name != "trim_offsets"}]
