"""Answers of a model as examples: which are kept, continuation, and training on the file."""

import fcntl
import json
import sys
from pathlib import Path

import pytest

from sat_jax.data.data_format import DataFormat
from sat_jax.data.examples import Turn, decode_turns, read_examples
from sat_jax.data.sources import Source
from sat_jax.evaluate import completions as module
from sat_jax.evaluate.completions import Completion
from sat_jax.evaluate.exact_match import ExtractionRule, PromptedQuestion
from sat_jax.evaluate.question_files import SourceQuestion
from sat_jax.evaluate.written_answers import (
    EMPTY,
    NO_RESULT,
    OTHER_RESULT,
    REPEATED,
    TRUNCATED,
    training_rows,
)
from scripts import write_answers as script
from tests.golden_model import GOLDEN
from tests.user_errors import user_error

# Fields that a reader of examples would otherwise take for settings or refuse.
FIELDS = {"question": "1 + 1?", "answer": "#### 2", "reasoning": "x", "weight": 0, "id": 7}


def completed(*texts: str, truncated: bool = False) -> dict[int, Completion]:
    return {number: Completion(text, 5, truncated) for number, text in enumerate(texts)}


def rows_of(answers: dict[int, Completion], rule: str | None, expected: str = "2"):
    question = SourceQuestion("1 + 1?", "#### 2", FIELDS)
    prompted = PromptedQuestion("1 + 1?", "", [1], expected if rule else None)
    extraction = None if rule is None else ExtractionRule(rule)
    return training_rows([(question, prompted)] * 2, answers, 3, extraction)


def test_answers_with_the_right_result_are_kept_whole() -> None:
    texts = (" 1 and 1, so 2.00\n", "it is 3", "none", "it is 2", "it is 2", " ")
    rows, left_out = rows_of(completed(*texts), "number")
    answers = [row["messages"][1]["content"] for row in rows]
    assert answers == ["1 and 1, so 2.00", "it is 2"]
    assert dict(left_out) == {OTHER_RESULT: 1, NO_RESULT: 1, REPEATED: 1, EMPTY: 1}
    assert {row["source"]["id"] for row in rows} == {7}


def test_without_a_rule_results_are_not_compared() -> None:
    rows, left_out = rows_of(completed("a", "b", "a", "a"), None)
    assert [row["messages"][1]["content"] for row in rows] == ["a", "b", "a"]
    assert dict(left_out) == {REPEATED: 1}
    assert rows_of(completed("a", truncated=True), None) == ([], {TRUNCATED: 1})


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    values = ("--model", GOLDEN / "llama_gqa", "--questions", out.parent / "q.jsonl", "--out", out)
    base = ("--max-new-tokens", "8", "--temperature", "1", "--tokenizer", "bytes", "--samples", "2")
    arguments = ["write_answers", *map(str, values), *base, "--rows", "3", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of different lengths, so that batches are in another order than questions."""
    lines = [{**FIELDS, "question": text, "id": i} for i, text in enumerate(("a", "it is", "so"))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Every answer would reach the limit of tokens: the golden model has no end of text.
    complete = module._complete_batch
    monkeypatch.setattr(
        module,
        "_complete_batch",
        lambda *a: [answer._replace(truncated=False) for answer in complete(*a)],
    )
    return tmp_path


def test_an_interrupted_command_writes_the_same_file(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After every batch, and within the line of one."""
    whole = questions / "whole.jsonl"
    command(monkeypatch, whole)
    assert "6 of 6 answers, to 3 of 3 questions; left out: none" in capsys.readouterr().out
    rows = list(map(json.loads, whole.read_text().splitlines()))
    assert [row["source"]["id"] for row in rows] == [0, 0, 1, 1, 2, 2]
    lines = whole.with_name("whole.jsonl.progress").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    for number, before in enumerate((lines[0], "".join(lines[:2]), "".join(lines)[:-9])):
        out = questions / f"{number}.jsonl"
        progress = out.with_name(f"{out.name}.progress")
        progress.write_text(before)
        command(monkeypatch, out)
        assert out.read_text() == whole.read_text()
        assert progress.read_text() == "".join(lines)
    # Batches of another size have the same answers: random numbers are those of an answer.
    command(monkeypatch, questions / "rows.jsonl", "--rows", "2")
    assert (questions / "rows.jsonl").read_text() == whole.read_text()
    command(monkeypatch, questions / "seed.jsonl", "--seed", "1")
    assert (questions / "seed.jsonl").read_text() != whole.read_text()


def test_training_reads_every_row(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fields the questions have."""
    out = questions / "answers.jsonl"
    command(monkeypatch, out)
    examples = read_examples(Source(out, "json_lines", True), DataFormat(format="messages"))
    documents = list(examples)
    assert [document.skip_reason for document in documents] == [""] * 6
    turns = decode_turns(documents[2].text)
    answer = json.loads(out.read_text().splitlines()[2])["messages"][1]["content"]
    assert turns == [Turn("user", "it is"), Turn("assistant", answer)]


def test_what_is_refused(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = questions / "answers.jsonl"
    progress = out.with_name("answers.jsonl.progress")

    def refused(*options: str) -> str:
        return user_error(lambda: command(monkeypatch, out, *options))

    assert refused("--temperature", "0").startswith("--samples 2: answers at --temperature 0 are")
    assert refused("--answer-field", "x").startswith("--answer-field has no effect without")
    assert "no result in the answer" in refused("--extract", "none of it")
    assert refused("--extract", "hashes").startswith(f"{out}: no answer can be kept: 6 without a")
    assert not out.exists()
    assert refused("--seed", "1") == (
        f"{progress}: answers with other settings: seed 0, now 1; accepted: the same settings, or"
        " another --out"
    )
    with progress.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused() == f"{progress}: in use by another process"
    progress.write_text("[]\n")
    assert refused().startswith(f"{progress}: not the progress of answers")
    out.write_text("")
    assert refused() == f"--out {out}: exists; accepted: a new file"
