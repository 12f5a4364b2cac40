"""Tokenizers that are trained on text."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.data.train_tokenizer import END_OF_TEXT, SMALLEST, train_tokenizer
from scripts.train_tokenizer import main
from tests.user_errors import user_error

TEXT = "low low low lower lowest newer newer wider\n" * 3
OTHER = "Größe 数 🙂\tlow\r\n\x00"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def test_the_most_frequent_pairs_are_merged(corpus: Path) -> None:
    tokenizer = train_tokenizer([str(corpus)], SMALLEST + 3)
    tokens = [tokenizer.backend.id_to_token(SMALLEST + n) for n in range(3)]
    assert tokens[:2] == ["lo", "low"]  # l·o and o·w occur 15 times, no other pair more than 12
    assert tokenizer.backend.encode("low").tokens == ["low"]


def test_any_text_is_encoded_and_decoded_again(corpus: Path) -> None:
    tokenizer = train_tokenizer([str(corpus)], 300)
    (ids,) = tokenizer.encode_documents([OTHER])
    assert tokenizer.decode(ids) == OTHER + END_OF_TEXT
    assert ids[-1] == tokenizer.eos_id and not tokenizer.adds_bos


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer", *map(str, arguments)])
    main()


def test_what_is_written_is_read_again(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, corpus, "--vocab-size", 280, "--out", out)
    printed = capsys.readouterr()
    written, trained = load_tokenizer(str(out)), train_tokenizer([str(corpus)], 280)
    assert written.fingerprint == trained.fingerprint
    assert trained.fingerprint[:12] in printed.out
    (ids,) = trained.encode_documents([TEXT])
    assert written.encode_documents([TEXT]) == [ids]
    assert Backend.from_file(str(out / "tokenizer.json")).decode(ids[:-1]) == TEXT
    message = user_error(lambda: run(monkeypatch, corpus, "--vocab-size", 280, "--out", out))
    assert message == f"{out}: exists and is not an empty folder; accepted: a new one"


def test_fewer_tokens_than_asked_for_are_reported(corpus: Path) -> None:
    lines: list[str] = []
    tokenizer = train_tokenizer([str(corpus)], 5000, log=lines.append)
    assert SMALLEST < tokenizer.vocab_size < 300
    assert lines == [
        f"{tokenizer.vocab_size} tokens instead of 5000: no other pair of tokens occurs twice"
    ]


def test_bad_input_is_one_line(corpus: Path, tmp_path: Path) -> None:
    message = user_error(lambda: train_tokenizer([str(corpus)], 256))
    assert message == (
        "vocabulary of 256 tokens; accepted: 257 or more (256 bytes and <|endoftext|>)"
    )
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    message = user_error(lambda: train_tokenizer([str(tmp_path / "empty.jsonl")], 300))
    assert message == f"{tmp_path / 'empty.jsonl'}: contains no text"


def test_skipped_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "ab ab"}\n{"text": null}\n{"text": ""}\n')
    lines: list[str] = []
    train_tokenizer([str(tmp_path / "x.jsonl")], SMALLEST, log=lines.append)
    assert lines == ["skipped documents: 2 empty"]
