"""Perplexity: every token is predicted once, with the context of its window."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_jax.data.prepare import prepare
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.perplexity import (
    perplexity,
    prepared_data,
    read_text,
    text_data,
    windows,
)
from sat_jax.evaluate.result_rows import evaluation_row
from sat_jax.nn.loss import perplexity_of
from scripts import evaluate as script
from scripts.evaluation_modes import Meter
from tests.golden_model import GOLDEN, golden, logits_of, run_evaluate
from tests.tolerances import assert_close

TEXTS = ["It is a truth universally acknowledged,", "that", "a single man in possession of é€"]


@functools.cache
def log_probabilities(tokens: tuple[int, ...]) -> np.ndarray:
    """Return log p of every token after the first, given all tokens before it, in float64."""
    logits = logits_of(tokens, 64).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(tokens) - 1), tokens[1:]]


def by_hand(document: Sequence[int], length: int, stride: int) -> float:
    """Return the negative log-likelihood, window by window, from the definition."""
    total, predicted, start = 0.0, 1, 0
    while predicted < len(document):
        window = tuple(document[start : start + length + 1])
        total -= log_probabilities(window)[predicted - start - 1 :].sum()
        predicted, start = start + len(window), start + stride
    return total


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_token_but_the_first_is_predicted_once(
    sizes: list[int], length: int, stride: int, rows: int
) -> None:
    stride = min(stride, length)
    documents = [list(range(100 * n, 100 * n + size)) for n, size in enumerate(sizes, 1)]
    predicted = []
    for batch in windows(documents, length, stride, rows):
        assert {array.shape for array in batch} == {(rows, length)}
        for segments, mask in zip(batch.segment_ids, batch.loss_mask, strict=True):
            # Every window predicts a token.
            assert set(segments[mask]) == set(segments[segments > 0])
        for row, column in zip(*batch.loss_mask.nonzero(), strict=True):
            target, position = batch.targets[row, column], batch.positions[row, column]
            assert batch.tokens[row, column] == target - 1
            predicted.append(int(target))
            # All inputs of the document, or at least length - stride + 1 of them.
            assert position + 1 >= min(target % 100, length - stride + 1)
    assert sorted(predicted) == [token for document in documents for token in document[1:]]


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (8, 1), (64, 64)])
def test_windows_give_the_expected_score(length: int, stride: int) -> None:
    documents = [list(text.encode()) for text in TEXTS]
    score = perplexity(golden(), windows(documents, length, stride, 2))
    expected = sum(by_hand(document, length, stride) for document in documents)
    assert score.tokens == sum(len(document) - 1 for document in documents)
    assert_close(score.nll / score.tokens, expected / score.tokens, "float32", "forward")


def test_loss_of_the_reference() -> None:
    reference = np.load(GOLDEN / "llama_gqa" / "reference.npz")
    score = perplexity(golden(), windows(reference["input_ids"].tolist(), 32, 32, 2))
    assert score.tokens == 64
    assert_close(score.nll / 64, reference["loss"], "float32", "forward")


def test_perplexity_is_deterministic() -> None:
    documents = [list(text.encode()) for text in TEXTS]
    first, second = (perplexity(golden(), windows(documents, 16, 5, 2)) for _ in range(2))
    assert first == second


def test_text_counts_tokens_and_bytes() -> None:
    tokenizer = load_tokenizer("bytes", None, 256)
    data = text_data(TEXTS, tokenizer, 16, 16, 2)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (data.text_bytes, data.tokens) == (size, size - 3)
    assert sum(int(batch.loss_mask.sum()) for batch in data.batches) == data.tokens


def test_rows_are_no_longer_than_the_longest_document_needs() -> None:
    documents = [list(range(66)), [1, 2, 3]]
    (batch,) = windows(documents, 20_000, 20_000, 1)
    assert batch.tokens.shape == (1, 128)
    assert batch.loss_mask.sum() == 67


@pytest.mark.parametrize(
    ("length", "stride", "rows", "message"),
    [
        (4, 5, 1, "length 4 and stride 5"),
        (4, 0, 1, "length 4 and stride 0"),
        (0, 0, 1, "length 0"),
        (4, 4, 0, "rows 0"),
    ],
)
def test_invalid_windows(length: int, stride: int, rows: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        windows([[1, 2]], length, stride, rows)  # raised by the call, not by the first batch


def test_nothing_to_predict() -> None:
    with pytest.raises(UserError, match="no token to predict"):
        perplexity(golden(), windows([[1], []], 4, 4, 1))


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        *((None, ["aé", "b€"]), (9, ["aé", "b€"]), (7, ["aé", "b€"]), (6, ["aé", "b"])),
        *((4, ["aé", "b"]), (3, ["aé"]), (2, ["a"])),
    ],
)
def test_text_is_truncated_at_a_character(
    tmp_path: Path, max_bytes: int | None, expected: list[str]
) -> None:
    lines = [json.dumps({"story": text}) for text in ("aé", "", "b€")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert read_text(str(tmp_path / "x.jsonl"), "story", max_bytes) == expected


def test_prepared_data(tmp_path: Path) -> None:
    for name, text in enumerate(["held " * 3, "some text to train on " * 2, "another one of them"]):
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer = load_tokenizer("bytes", None, 256)
    prepared = prepare(
        sources=str(tmp_path / "*.txt"),
        tokenizer=tokenizer,
        row_length=16,
        held_out=0.3,
        root=tmp_path / "out",
    )
    total_bytes, config = 0, golden().config
    for split, info in prepared.info.splits.items():
        data = prepared_data(prepared.path, split, config, 2)
        score = perplexity(golden(), data.batches)
        assert score.tokens == data.tokens == info.targets
        assert data.text_bytes == info.text_bytes
        total_bytes += data.text_bytes
        if info.documents == 1:
            (document,) = [
                text.encode()
                for text in read_text(str(tmp_path / "*.txt"))
                if len(text) == info.text_bytes
            ]
            assert_close(
                score.nll / score.tokens,
                by_hand(document, 16, 16) / score.tokens,
                "float32",
                "forward",
            )
    assert total_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.txt"))
    with pytest.raises(UserError, match="tokenizer of 256 ids, but the model has 255"):
        prepared_data(prepared.path, "train", replace(config, vocab_size=255), 2)
    with pytest.raises(UserError, match="the row length 16 exceeds the model's 15 positions"):
        prepared_data(prepared.path, "train", replace(config, max_positions=15), 2)
    # A folder that contains one folder of prepared data is accepted too.
    assert prepared_data(tmp_path / "out", "train", config, 2).text_bytes > 0
    other = tmp_path / "out" / "other"
    other.mkdir()
    (other / "info.json").write_text("{}")
    with pytest.raises(UserError, match=f"one of {prepared.path.name}, other"):
        prepared_data(tmp_path / "out", "train", config, 2)
    with pytest.raises(UserError, match=r"no prepared data: it has no info\.json$"):
        prepared_data(tmp_path, "train", config, 2)


# --- The script ------------------------------------------------------------------------------


def test_script_prints_a_table_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[0])
    run_evaluate(
        monkeypatch,
        *(GOLDEN / "llama_gqa_sharded", "--text", tmp_path / "x.txt", "--tokenizer", "bytes"),
        *("--length", "16", "--stride", "5", "--rows", "2", "--json", tmp_path / "out.json"),
    )
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["settings"]["stride"] == 5
    assert (content["models"][0]["length"], content["models"][0]["stride"]) == (16, 5)
    first, second = content["models"]
    assert Path(second["model"]).name == "llama_gqa_sharded"
    assert first["nll"] == second["nll"]  # the same weights
    document = TEXTS[0].encode()
    assert (first["tokens"], first["bytes"]) == (len(document) - 1, len(document))
    nll = by_hand(document, 16, 5)
    assert_close(math.log(first["perplexity"]), nll / first["tokens"], "float32", "forward")
    assert_close(math.log(first["byte_perplexity"]), nll / first["bytes"], "float32", "forward")
    assert_close(first["bits_per_byte"], nll / first["bytes"] / math.log(2), "float32", "forward")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", *(key for key in first if key != "model")]
    assert lines[0].split()[1:4] == [str(len(document) - 1), str(len(document)), f"{nll:,.4f}"]


def test_perplexity_of_any_loss() -> None:
    values = [perplexity_of(loss) for loss in (0.0, 708.0, 709.0, math.inf, math.nan)]
    assert [f"{value:.3g}" for value in values] == ["1", "3.02e+307", "inf", "inf", "nan"]


def test_nonfinite_figures_are_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = {"nll": math.nan, "perplexity": math.inf, "tokens": 3}
    monkeypatch.setattr("scripts.evaluation_modes._perplexity", lambda *_: figures)
    (tmp_path / "x.txt").write_text(TEXTS[0])
    arguments = ("--text", tmp_path / "x.txt", "--tokenizer", "bytes", "--length", "16")
    run_evaluate(monkeypatch, *arguments, "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    (record,) = content["models"]
    assert (record["nll"], record["perplexity"], record["tokens"]) == (None, None, 3)
    assert record["nonfinite"] == {"nll": "nan", "perplexity": "inf"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --text --prepared .* is required"),
        (["--text", "nowhere"], "nowhere: no such file or folder"),
        (["--text", "x", "--split", "train"], "--split has no effect with --text"),
        (["--prepared", "x", "--max-bytes", "3"], "--max-bytes has no effect with --prepared"),
        (["--prepared", "nowhere"], "nowhere: no such folder"),
        (["--text", "x", "--rows", "0"], "--rows 0"),
        (
            ["--text", __file__, "--tokenizer", "bytes", "--length", "129"],
            "--length 129 exceeds the model's 128 positions",
        ),
        (
            ["--text", "x", "--json", "nowhere/x.json"],
            "nowhere/x.json: cannot be written: No such file",
        ),
        (["--text", "x", "--json", "."], "cannot be written: Is a directory"),
        (["nowhere", "--text", __file__, "--tokenizer", "bytes"], "nowhere: no such path"),
        (["--text", __file__, "--tokenizer", "bytes", "--stride", "0"], "stride 0"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(
        "scripts.evaluation_modes._perplexity", None
    )  # checked before the evaluation
    with pytest.raises(UserError, match=message):
        run_evaluate(monkeypatch, *arguments)


def test_speed_excludes_the_first_batch() -> None:
    meter = Meter(37)
    assert meter.speed() is None
    meter.batches += [(100.0, 7), (101.0, 10), (102.0, 20)]
    assert meter.speed() == 15
    assert script._cell(None) == "-"


def test_result_rows_distinguish_models_without_paths() -> None:
    first, second = (
        evaluation_row("text", f"/{home}/runs/x", ["/data/t.txt"], {}, {"loss": 1.0}, None)
        for home in ("a", "b")
    )
    assert first["model"] != second["model"] and first["model"].startswith("x#")
    assert first["data"] == ["t.txt"]
