"""Exact match: what is taken out of an answer, when two are equal, and where answers end."""

import json
from pathlib import Path

import pytest

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.answers import Answered, Asked, Rule, marks, same
from sat_jax.evaluate.complete import Completion, complete
from sat_jax.evaluate.generate import generate
from sat_jax.evaluate.prompts import Shot
from sat_jax.evaluate.questions import read_answers
from tests.golden_model import golden, run_evaluate, tokenizer_with

BYTES = load_tokenizer("bytes", None, 256)


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("number", "3 and 4 make 7.", "7"),
        ("number", "It costs $1,234.50, that is", "1234.50"),
        ("number", "-3 degrees", "-3"),
        ("number", "so 12 - 18 = -6\n#### 18", "18"),
        ("number", "none", None),
        ("hashes", "5\n#### 18\nQuestion: 7", "18"),
        ("hashes", "the answer is 18", None),
        ("text", " Paris.\n", "paris"),
        ("text", "two\nlines", "two\nlines"),
        (r"answer is (\w+)", "answer is Red, answer is Blue", "blue"),
        (r"[A-D]\b", "A, or B", "b"),
        (r"(x)?y", "y", ""),
    ],
)
def test_what_a_rule_takes(rule: str, text: str, expected: str | None) -> None:
    assert Rule(rule)(text) == expected


@pytest.mark.parametrize(
    ("rule", "message"), [("(", "accepted: number, hashes, text"), ("(a)(b)", "has 2 groups")]
)
def test_bad_rules(rule: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rule(rule)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        *(("18", "18.0", True), ("18", "18.1", False), ("paris", "paris", True)),
        *((None, None, False), ("18", None, False), ("a", "18", False), ("nan", "nan", True)),
    ],
)
def test_equal_results(one: str | None, other: str | None, expected: bool) -> None:
    assert same(one, other) is expected


def test_marks() -> None:
    def answered(found: str | None, cut: bool) -> Answered:
        return Answered(Asked("q", "p", [1], "2"), Completion("", 1, cut), found)

    result = marks([answered("2", False), answered(None, True), answered("3", True)])
    assert result.accuracy.value == pytest.approx(1 / 3)
    assert result.accuracy.error == pytest.approx(1 / 3)
    assert (result.without_result, result.cut) == pytest.approx((1 / 3, 2 / 3))


def test_completions_are_those_of_each_prompt_alone() -> None:
    prompts = [list(text) for text in (b"a", b"Once upon", b"it is a truth univ", b"x")]
    alone = [generate(golden(), [prompt], 40)[0] for prompt in prompts]
    seen: list[int] = []
    made = complete(golden(), BYTES, prompts, 40, 3, done=seen.append)
    assert [one.text for one in made] == [BYTES.decode(ids) for ids in alone]
    assert [one.tokens for one in made] == [len(ids) for ids in alone]
    assert [one.cut for one in made] == [len(ids) == 40 for ids in alone]
    assert (len(seen), sum(seen)) == (2, sum(map(len, alone)))


def test_a_completion_ends_before_a_stop_text() -> None:
    prompt = list(b"Once upon")
    whole = complete(golden(), BYTES, [prompt], 100, 1)[0]
    assert whole.cut
    stop = whole.text[4:6]
    short = complete(golden(), BYTES, [prompt], 100, 1, stops=["never", stop, whole.text[60:63]])[0]
    assert short.text == whole.text[: whole.text.index(stop)]
    assert not short.cut
    assert short.tokens == 32  # nothing is made once all rows have stopped
    assert not complete(golden(), BYTES, [prompt], 32, 1, stops=[stop])[0].cut


def test_a_completion_ends_before_a_stop_token() -> None:
    prompt = list(b"Once upon")
    ids = generate(golden(), [prompt], 100)[0]
    end = ids[40]
    expected = BYTES.decode(ids[: ids.index(end)])
    made = complete(golden(), BYTES, [prompt], 100, 1, stops=[end, "never"])[0]
    assert made == (expected, ids.index(end), False)


def test_fields_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [{"question": "a", "answer": "b"}, {"prompt": "c", "target": 3}, {"x": "d", "y": "e"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_answers(str(file), None, None, 2) == [Shot("a", "b"), Shot("c", "3")]
    with pytest.raises(UserError, match=r"line 3 .*no field any of answer, .* \(it has x, y\)"):
        read_answers(str(file), None, None)
    with pytest.raises(UserError, match=r"line 1 .*no field y"):
        read_answers(str(file), None, "y")


# --- The script ------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    run_evaluate(monkeypatch, "--tokenizer", "bytes", *arguments)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three questions; the model's own answer to the first and the third is the expected one."""
    file = tmp_path / "q.jsonl"
    asked = ["Once", "upon", "a time"]
    answers = [BYTES.decode(generate(golden(), [list(text.encode())], 8)[0]) for text in asked]
    answers[1] = "another"
    records = [{"question": q, "answer": a} for q, a in zip(asked, answers, strict=True)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_script_counts_right_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, questions: Path
) -> None:
    command(
        monkeypatch,
        *("--answers", questions, "--prompt", "{question}", "--extract", "text", "--rows", "2"),
        *("--max-new-tokens", "8", "--generations", tmp_path / "out.jsonl"),
        *("--json", tmp_path / "out.json"),
    )
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["settings"]["extract"] == "text"
    (record,) = content["models"]
    assert (record["questions"], record["accuracy"]) == (3, pytest.approx(2 / 3))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["question"] for line in written] == ["Once", "upon", "a time"]
    assert [line["right"] for line in written] == [True, False, True]
    assert record["cut"] == sum(line["cut"] for line in written) / 3
    assert written[1]["expected"] == "another"


@pytest.mark.parametrize("end", ['"', "<end>"])
def test_script_ends_an_answer_where_its_turn_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    ids = generate(golden(), [list(b"upon")], 60)[0]
    template = (
        "{% for m in messages %}{{ m.content }}{{ END if m.role == 'assistant' }}{% endfor %}"
    )
    chatty = tokenizer_with(tmp_path / "chatty", template.replace("END", repr(end)), '"')
    (tmp_path / "q.jsonl").write_text('{"question": "upon", "answer": "x"}')
    given = ("--answers", tmp_path / "q.jsonl", "--extract", "text", "--max-new-tokens", "60")
    written = tmp_path / "out.jsonl"
    run_evaluate(monkeypatch, "--tokenizer", chatty, *given, "--chat", "--generations", written)
    line = json.loads(written.read_text())
    size = ids.index(ord(end)) if end in '"' else 60
    assert (line["text"], line["tokens"]) == (BYTES.decode(ids[:size]), size)
    assert line["cut"] == (size == 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include-path", "."], "--include-path says nothing to --answers"),
        (["--extract", "number"], "nothing to extract from the answer 'another'"),
        (["--extract", "text", "--max-new-tokens", "127"], "tokens and 127 new ones are more than"),
        (["--generations", "nowhere/x"], "there is no folder nowhere"),
        (["--generations", "."], "is a folder"),
        (["--shots", "2", "--shots-from", "one.jsonl"], "has 1 questions; --shots 2"),
        (["--shots", "0", "--shots-from", "one.jsonl"], "--shots 0; of questions accepted: 1 or"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, questions: Path
) -> None:
    monkeypatch.chdir(questions.parent)
    Path("one.jsonl").write_text('{"question": "a", "answer": "b"}')
    monkeypatch.setattr("scripts.evaluate_ways.answer", None)  # all this is known before the work
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--answers", questions, *arguments)
