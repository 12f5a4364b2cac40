"""Rows filled from long documents alone."""

from pathlib import Path
from typing import Any

import pytest

from sat_jax.data import corpus
from sat_jax.data.data_format import DataFormat
from tests.test_data_prepare import data_of, documents_in, write
from tests.user_errors import user_error


def test_short_documents_are_left_out(tmp_path: Path) -> None:
    sizes = (15, 16, 17, 40, 3, 20, 30, 5)  # letters; a document has one more token
    documents = [letter * size for letter, size in zip("abcdefgh", sizes, strict=True)]
    folder = write(tmp_path / "in", documents)
    settings = {"row_length": 120, "held_out": 3}
    prepared = data_of(folder, data_format=DataFormat(min_document_tokens=17), **settings)
    splits = prepared.info.splits
    assert (prepared.info.documents, prepared.info.left_out) == (5, {"fewer than 17 tokens": 3})
    kept = [text for split in splits for text in documents_in(prepared, split)]
    assert sorted(kept) == [text for text in documents if len(text) >= 16]
    lengths = [len(text) for text in documents_in(prepared, "train")]
    assert len(lengths) == 4 and splits["train"].rows == 1
    assert splits["train"].longest_share == pytest.approx(max(lengths) / sum(lengths))
    assert data_of(folder, **settings).info.fingerprint != prepared.info.fingerprint
    message = user_error(lambda: data_of(folder, data_format=DataFormat(min_document_tokens=99)))
    assert message == "no example can be used: 8 fewer than 99 tokens"


def test_a_token_budget_of_long_documents_needs_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text of 40 has 60 tokens, the others have 6."""
    documents = [f"{n:05}" + "x" * (54 if n % 40 == 0 else 0) for n in range(2000)]
    passes: list[int] = []
    read = corpus._read_selected

    def counted(sources: Any, reader: Any, index: Any, numbers: Any) -> Any:
        passes.append(len(numbers))
        return read(sources, reader, index, numbers)

    monkeypatch.setattr(corpus, "_read_selected", counted)
    long_texts = DataFormat(min_document_tokens=60)
    folder = write(tmp_path / "in", documents)
    prepared = data_of(folder, data_format=long_texts, max_tokens=1000, row_length=80)
    assert sum(split.tokens for split in prepared.info.splits.values()) == 1000
    assert len(passes) <= 6 and sum(passes) < 1000
