"""Perplexity against context length and position, and passkey retrieval."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.long_context import score_context
from sat_jax.evaluate.passkey import (
    ANSWER_TOKENS,
    PasskeyPrompt,
    PasskeyTask,
    passkey_figures,
    passkey_prompts,
)
from sat_jax.evaluate.perplexity import perplexity, windows
from sat_jax.interop import load_model
from sat_jax.models.presets import extended
from sat_jax.results.evaluations import newest_rows
from tests.golden_model import GOLDEN, golden, run_evaluate
from tests.test_perplexity import log_probabilities
from tests.tolerances import assert_close

TEXTS = ["It is a truth universally acknowledged,", "a single man in possession of a good"]
DOCUMENTS = [list(text.encode()) for text in TEXTS]
BYTES = load_tokenizer("bytes", None, 256)


# --- Perplexity ------------------------------------------------------------------------------


def test_sliding_windows_by_hand() -> None:
    # Windows of 16 inputs begin at these tokens of two documents with 39 and 28 tokens, each given
    # twice. After the first window of a document, each predicts the targets after its first 6. The
    # last windows of the documents have 8 and 7 inputs and share rows.
    documents = [DOCUMENTS[0], DOCUMENTS[1][:28]]
    spans = [(0, 0), (0, 10), (0, 20), (0, 30), (1, 0), (1, 10), (1, 20)]
    nll, means, positions = [], [], []
    for number, start in spans:
        window = -log_probabilities(tuple(documents[number][start : start + 17]))
        predicted = window[6 if start else 0 :]
        nll += predicted.tolist()
        means.append(predicted.mean())
        if len(window) == 16:
            positions.append(window)
    assert (len(nll), len(means), len(positions)) == (38 + 27, 7, 5)
    score = score_context(golden(), documents * 2, 16, 10, 4)
    assert (score.tokens, score.windows, score.full_windows) == (2 * 65, 14, 10)
    assert_close(score.nll / 130, np.mean(nll), "float32", "forward")
    assert_close(score.window_nll, np.mean(means), "float32", "forward")
    assert_close(score.position_nll, np.mean(positions, axis=0), "float32", "forward")
    assert abs(score.window_nll - score.nll / 130) > 1e-3  # the two averages are not the same


@pytest.mark.parametrize("rows", [1, 3])
def test_a_stride_of_the_context_gives_plain_perplexity(rows: int) -> None:
    plain = perplexity(golden(), windows(DOCUMENTS, 8, 8, 2))
    counted: list[int] = []
    score = score_context(golden(), DOCUMENTS, 8, 8, rows, counted.append)
    assert score.tokens == plain.tokens == sum(counted)
    assert_close(score.nll / score.tokens, plain.nll / plain.tokens, "float32", "forward")
    assert score.full_windows == 38 // 8 + 35 // 8


def test_script_has_a_line_for_each_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, text in enumerate((*TEXTS, "too short")):
        (tmp_path / f"{name}.txt").write_text(text)
    run_evaluate(
        monkeypatch,
        *("--text", tmp_path, "--tokenizer", "bytes", "--context", "32,8", "--stride", "8"),
        *("--json", tmp_path / "out.json", "--record", tmp_path / "rows.jsonl"),
    )
    long, short = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [(line["context"], line["documents"], line["tokens"]) for line in (long, short)] == [
        (32, 2, 73),
        (8, 2, 73),
    ]
    score = score_context(golden(), DOCUMENTS, 32, 8, 4)
    assert_close(math.log(long["perplexity"]), score.nll / 73, "float32", "forward")
    assert_close(math.log(long["window_perplexity"]), score.window_nll, "float32", "forward")
    position_nll = score.position_nll.reshape(16, 2).mean(axis=1)
    assert_close(np.log(long["position_perplexity"]), position_nll, "float32", "forward")
    assert len(long["position_perplexity"]) == 16 and len(short["position_perplexity"]) == 8
    printed = capsys.readouterr()
    assert "left out: 1 of 3 documents, of 32 tokens or less" in printed.err
    header, *lines = printed.out.splitlines()
    assert len(lines) == 2 and "position" not in header
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["measure"], row["context"], row["data"]) for row in rows] == [
        ("context", length, [tmp_path.name]) for length in (32, 8)
    ]


def test_script_has_another_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[0])
    file = tmp_path / "rows.jsonl"
    arguments = ("--text", tmp_path / "x.txt", "--tokenizer", "bytes", "--context", "32")
    for scaling in ((), ("--rope-type", "linear", "--rope-factor", "4")):
        run_evaluate(monkeypatch, *arguments, "--stride", "8", *scaling, "--record", file)
    own, interpolated = [json.loads(line) for line in file.read_text().splitlines()]
    model = load_model(GOLDEN / "llama_gqa")  # not the shared one
    model.config = extended(model.config, "linear", 4.0)
    score = score_context(model, DOCUMENTS[:1], 32, 8, 4)
    assert_close(math.log(interpolated["perplexity"]), score.nll / 38, "float32", "forward")
    assert abs(own["nll"] - interpolated["nll"]) > 1
    names = [
        name for _, lines in newest_rows([own, interpolated], ["context"]) for name, _ in lines
    ]
    assert names[1] == f"{names[0]}, linear × 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--context", "8", "--rope-factor", "2"],
            "--rope-factor has no effect without --rope-typ",
        ),
        (["--context", "8", "--rope-type", "x"], "rope type 'x'; accepted: default, linear"),
        (["--context", "129"], "--context 129 exceeds the model's 128 positions"),
        (["--context", "16,8", "--stride", "9"], "--context 8 and --stride 9; accepted: 1 to 8"),
        (["--context", "8", "--stride", "0"], "--context 8 and --stride 0; accepted: 1 to 8"),
        (["--context", "40", "--stride", "1"], "context 40: the longest document has 39 tokens"),
        (["--context", "8,x"], "lengths '8,x'; accepted: numbers of tokens"),
        (["--context", "0"], "lengths '0'; accepted: numbers of tokens, 1 or more"),
        (["--context", "8", "--length", "8"], "--length has no effect with --context"),
        (["--depths", "3"], "--depths has no effect with --text"),
    ],
)
def test_script_refuses_contexts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "x.txt").write_text(TEXTS[0])
    monkeypatch.setattr("scripts.long_context_modes.score_context", None)  # checked before
    with pytest.raises(UserError, match=message):
        run_evaluate(monkeypatch, "--text", tmp_path / "x.txt", "--tokenizer", "bytes", *arguments)


# --- Passkey retrieval -----------------------------------------------------------------------

LENGTH = 600


def prompts_of(length: int = LENGTH, **settings: int) -> list[PasskeyPrompt]:
    return passkey_prompts(PasskeyTask(length, **settings), BYTES)


def test_prompts_have_their_length_depth_and_key() -> None:
    prompts = prompts_of(depths=3, trials=2)
    assert [prompt.depth for prompt in prompts] == [0, 0, 0.5, 0.5, 1, 1]
    assert {len(prompt.ids) for prompt in prompts} == {LENGTH - ANSWER_TOKENS}
    assert len({prompt.key for prompt in prompts}) == 6
    for prompt in prompts:
        text = BYTES.decode(prompt.ids)
        fact = f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n"
        before, after = text.split(fact)
        before = before.split("information there.\n")[1]
        after, question, _ = after.partition("\nWhat is the pass key? The pass key is")
        assert question and text.endswith(question)
        assert len(before) == round(prompt.depth * len(before + after))
        assert (before + after).startswith("The grass is green. The sky is blue.")


def test_prompts_are_a_function_of_the_task() -> None:
    assert prompts_of(seed=1) == prompts_of(seed=1)
    assert prompts_of(seed=1) != prompts_of(seed=2)
    keys = {prompt.key for prompt in prompts_of(601, seed=1)}
    assert keys.isdisjoint(prompt.key for prompt in prompts_of(seed=1))


def test_one_of_several_keys_is_asked_for() -> None:
    asked = set()
    for prompt in prompts_of(keys=3, trials=3):
        text = BYTES.decode(prompt.ids)
        (box,) = [n for n in "123" if text.endswith(f"The pass key of box {n} is")]
        assert f"The pass key of box {box} is {prompt.key}. Remember it." in text
        assert sum(text.count(f"\nThe pass key of box {n} is ") for n in "123") == 3
        assert len(prompt.ids) == LENGTH - ANSWER_TOKENS
        boxes = re.findall(r"of box (\d) is \d{5}\. Remember", text)
        if prompt.depth in (0, 1):
            assert boxes[-int(prompt.depth)] == box
        asked.add(box)
    assert asked == {"1", "2", "3"}


def test_exact_match_of_a_fake_model() -> None:
    task = PasskeyTask(LENGTH, depths=2, trials=3)
    prompts = passkey_prompts(task, BYTES)
    right = [prompt.key for prompt in prompts]
    # Depth 0: right, right with text, one digit more. Depth 1: another number first, none, right.
    answers = [f" {right[0]}", f"\n{right[1]}. 7", f" {right[2]}6", f" 7 {right[3]}", "", right[5]]

    def answer(ids: list[list[int]]) -> Sequence[str]:
        assert ids == [prompt.ids for prompt in prompts]
        return answers

    figures = passkey_figures(task, prompts, answer)
    # s = sqrt(6 · 1/4 / 5), divided by sqrt(6)
    assert figures == {
        "context": LENGTH,
        "prompts": 6,
        "accuracy": 0.5,
        "stderr": pytest.approx(math.sqrt(0.05)),
        "depth_accuracy": pytest.approx([2 / 3, 1 / 3]),
    }
    assert passkey_figures(task, prompts, lambda _: right)["accuracy"] == 1
    assert passkey_figures(task, prompts, lambda _: right[::-1])["accuracy"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": 0}, "depths 0; accepted: 1 or more"),
        ({"trials": 0}, "trials 0"),
        ({"keys": 0}, "keys 0"),
        ({"seed": -1}, "seed -1; accepted: 0 or more"),
        ({"length": 253}, "passkey length 253; accepted: 254 tokens or more"),
    ],
)
def test_invalid_tasks(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts_of(**settings)
    assert len(prompts_of(254)) == 20


def test_script_refuses_lengths_beyond_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--passkey 129 exceeds the model's 128 positions"):
        run_evaluate(monkeypatch, "--passkey", "129", "--tokenizer", "bytes")


def test_script_has_a_line_for_each_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sat_jax.models.decoder_config.DecoderConfig.check_length", lambda *_: None)
    arguments = ("--tokenizer", "bytes", "--depths", "2", "--trials", "1", "--rows", "2")
    file = tmp_path / "rows.jsonl"
    run_evaluate(monkeypatch, "--passkey", "254,300", *arguments, "--record", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["context"], row["prompts"], row["accuracy"]) for row in rows] == [
        (254, 2, 0),
        (300, 2, 0),
    ]
    assert {row["data"] for row in rows} == {"passkey retrieval"}
    assert rows[0]["options"]["keys"] == 1 and rows[0]["depth_accuracy"] == [0, 0]
