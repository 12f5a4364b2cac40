"""SentencePiece tokenizers of GGUF files: a BPE by scores, with bytes for unknown characters."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, trainers

from sat_jax.data.gguf_tokenizer import from_gguf
from sat_jax.data.tokenizer import NoTokenizer, Tokenizer, load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.text_stream import TextStream

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Types of tokens in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

CORPUS = [
    "The theorem that 2024 = 2 * 1012, isn't it?   It's 12345 of them, and then some more.",
    "def f(x):\n    return x ** 2 + 10\n\n\nHELLO WORLD'S ÜBER naïve straße; the other thing",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Это было давно.",
    "日本語の文章をここに書きます。日本の言葉はとても面白いです。今日は天気がいい。",
    "नमस्ते दुनिया, यह एक परीक्षण है। مرحبا بالعالم، هذا اختبار. שלום עולם",
] * 4
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "a",
    "  two leading spaces, and one at the end ",
    "many          spaces\t\ttabs\r\n\r\nlines",
    "unknown: 🙂 ✨ ᚠᛇᚻ 한국어 \x00 \u200d",
    "e\u0301 ½ ﬁ Ⅻ",  # no normalization of characters
]


@functools.cache
def pieces() -> dict[str, float]:
    """Return the pieces of a trained BPE with their scores, which descend in the merges' order."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, max_token_length=8)
    backend.train_from_iterator([w for text in CORPUS for w in text.split(" ")], trainer)
    spaces = {SPACE * size: -(1000.0 + size) for size in range(2, 6)}
    return {token: -float(i) for token, i in backend.get_vocab().items()} | spaces


def write(path: Path, scores: dict[str, float] | None = None, **more: Any) -> Path:
    """Write the tokenizer of a GGUF file as the converters of llama.cpp do."""
    scores = pieces() if scores is None else scores
    tokens = [*SPECIAL, *BYTES, *scores, "[INST]", "<think>"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(scores)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(more.pop("model", "llama"))
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([*types, CONTROL, USER_DEFINED])
    if scores:
        writer.add_token_scores([0.0] * 259 + list(scores.values()) + [0.0, -1000.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def sentencepiece(text: str) -> list[str]:
    """Return the pieces of a text, by the definition of SentencePiece's BPE.

    Of all adjacent pairs whose union is a piece, the one with the highest score is joined, the
    first one among equals. Characters that are no piece become their bytes.
    """
    scores = pieces()
    parts = list((" " + text if text else "").replace(" ", SPACE))
    while True:
        unions = [left + right for left, right in itertools.pairwise(parts)]
        places = [index for index, union in enumerate(unions) if union in scores]
        if not places:
            break
        best = max(places, key=lambda index: (scores[unions[index]], -index))
        parts[best : best + 2] = [unions[best]]
    return [
        token
        for part in parts
        for token in ([part] if part in scores else [BYTES[byte] for byte in part.encode()])
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return from_gguf(write(tmp_path_factory.mktemp("gguf") / "model.gguf"))


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str]:
    (ids,) = tokenizer.encode_batch([text])
    assert ids[0] == 1
    return [tokenizer.backend.id_to_token(token) for token in ids[1:]]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_and_text(text: str, tokenizer: Tokenizer) -> None:
    assert tokens_of(tokenizer, text) == sentencepiece(text)
    assert tokenizer.decode(tokenizer.encode_rendered([text])[0]) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("".join(CORPUS[:5]) + "  🙂"), max_size=40))
def test_any_text(text: str, tokenizer: Tokenizer) -> None:
    assert tokens_of(tokenizer, text) == sentencepiece(text)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_ids_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The tokenizer class of Llama, from the same pieces, scores and, of its own, merges."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    write(tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        if not text.startswith(" "):  # before which this class writes no further space
            assert tokenizer.encode_batch([text]) == [theirs(text).input_ids], text
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "[INST] Hi [/INST] <think>a"]:
        assert tokenizer.encode_batch([text]) == [exported(text).input_ids], text
        ids = tokenizer.encode_rendered([text])[0]
        assert exported.decode(ids) == tokenizer.decode(ids)


def test_settings_of_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = from_gguf(write(tmp_path / "a.gguf", add_bos_token=False, add_space_prefix=False))
    assert not other.adds_bos
    assert other.decode(other.encode_batch(["the a"])[0]) == "the a"
    assert other.backend.id_to_token(other.encode_batch(["a"])[0][0]) == "a"
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with_pad = from_gguf(write(tmp_path / "b.gguf", pad_token_id=2, chat_template="C"))
    assert with_pad.special_tokens["pad_token"] == "</s>"
    assert with_pad.chat_template == "C"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": "t5"}, "its tokenizer is 't5'"),
        ({"scores": {}}, "has 0 scores for 261 tokens"),
        ({"scores": {"a": -3.0, "b": -3.0, "ab": -1.0, "ba": -1.0}}, "'ab' and 'ba' .* same score"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.gguf", **settings)
    with pytest.raises(NoTokenizer, match=problem) as error:
        load_tokenizer("model", file)
    assert "the path of the model's tokenizer.json" in str(error.value)


def test_a_special_token_outside_the_vocabulary(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", pad_token_id=5000)
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.padding_token_id 5000; accepted: 0 to"):
        from_gguf(file)


def test_streamed_text_does_not_repeat_the_prompt(tokenizer: Tokenizer) -> None:
    """Bytes that are not UTF-8, after a prompt that ends in the bytes of a character."""
    (prompt,) = tokenizer.encode_batch(["the 🙂"])
    invalid = tokenizer.backend.token_to_id("<0xFF>")
    stream = TextStream(tokenizer.decode, prompt)
    new = [invalid, *tokenizer.encode_rendered(["the 🙂"])[0]]
    assert "".join(stream.push([token]) for token in new) + stream.close() == "\ufffd the 🙂"
