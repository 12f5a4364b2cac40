"""Exact match: extraction of results, their comparison, and the ends of completions."""

import json
from pathlib import Path

import pytest

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.exact_match import ExtractionRule, equal_results, exact_match_score
from sat_jax.evaluate.generate import generate
from sat_jax.evaluate.prompts import QuestionAnswer
from sat_jax.evaluate.question_files import read_answers
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
        # Forms of numbers
        *(("number", text, text) for text in ("7", "-3", ".75", "1.5e-3", "3/4", "2 1/2")),
        *(("number", f"{sign}5 apples", "-5") for sign in "-\u2212\u2013\uff0d"),
        *(
            ("number", text, "5")
            for text in ("+5", "5%", "5 %", "\u20ac5", "5\u20ac", "US$5", "5km/h")
        ),
        *(
            ("number", text, "5")
            for text in ("**5**.", "(5)", "=5", "5-year", "- 5 pears", "\u2014 5")
        ),
        *(("number", text, "-.5") for text in ("-$.5", "$-.5", "It is -.5.", r"\boxed{-.5}")),
        *(("number", f"1{gap}234.5", "1234.5") for gap in (",", "'", "\u202f", "{,}", r"\,")),
        *(("number", text, "3/4") for text in ("\u00be", r"$\frac{3}{4}$", "3/4 cup")),
        *(("number", text, "2 1/2") for text in ("2\u00bd", r"2\frac{1}{2}", "2 1/2 cups")),
        ("number", "9*2=<<9*2=18>>18 eggs", "18"),
        ("number", "10, 200, 300", "300"),
        # Expressions without a value: no part of them is a result
        *(
            ("number", text, None)
            for text in ("3-5", "3\u20135", "3 - 5", "3 to 5", "between 3 and 5")
        ),
        *(("number", text, None) for text in ("5*3", "5 + 3", "5 + x", "x - 5", "10^6", "10^{6}")),
        *(
            ("number", text, None)
            for text in ("3,4", "1,23,456", "1.234,5", "1 234", "0,123", "1.2.3")
        ),
        *(("number", text, None) for text in ("12:30", "2024-05-01", "1/2/2024", "3/0", "\u00b15")),
        *(
            ("number", text, None)
            for text in ("CO2", "COVID-19", "x_1", "No.5", "5\u00b2", r"\sqrt{5}")
        ),
        *(
            ("number", text, None)
            for text in ("5k", "5 million", r"2\pi", "-$ 5", "--5", "7" * 5000)
        ),
        ("hashes", "#### .5", ".5"),
        ("hashes", "#### 2 1/2 cups of 3", "2 1/2"),
        ("hashes", "#### 4\n#### 3 to 5", None),
    ],
)
def test_extracted_results(rule: str, text: str, expected: str | None) -> None:
    assert ExtractionRule(rule)(text) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [("(", "accepted: number, hashes, text"), ("(a)(b)", "has 2 groups; accepted: number")],
)
def test_invalid_rules(rule: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExtractionRule(rule)


@pytest.mark.parametrize(
    ("result", "other", "expected"),
    [
        *(("18", "18.0", True), ("18", "18.1", False), ("paris", "paris", True)),
        *((None, None, False), ("18", None, False), ("a", "18", False), ("nan", "nan", True)),
        *(
            (".75", "0.75", True),
            (".75", "75", False),
            ("3/4", "0.75", True),
            ("2 1/2", "2.5", True),
        ),
        *(
            ("$1,000", "1000", True),
            ("50%", "50", True),
            ("3,4", "34", False),
            ("5 kg", "5", False),
        ),
    ],
)
def test_equal_results(result: str | None, other: str | None, expected: bool) -> None:
    assert equal_results(result, other) is expected


def test_exact_match_score() -> None:
    answers = [
        {"right": right, "found": found, "cut": cut, "tokens": 5}
        for right, found, cut in ((True, "2", False), (False, None, True), (False, "3", True))
    ]
    score = exact_match_score(answers)
    assert (score["questions"], score["new_tokens"]) == (3, 15)
    assert (score["accuracy"], score["stderr"]) == pytest.approx((1 / 3, 1 / 3))
    assert (score["no_result"], score["cut"]) == pytest.approx((1 / 3, 2 / 3))


@pytest.mark.slow
def test_completions_do_not_depend_on_the_batch() -> None:
    prompts = [list(text) for text in (b"a", b"Once upon", b"it is a truth univ", b"x")]
    expected = [generate(golden(), [prompt], 40)[0] for prompt in prompts]
    batches: list[int] = []
    completions = complete(golden(), BYTES, prompts, 40, 3, on_batch=batches.append)
    assert [c.text for c in completions] == [BYTES.decode(ids) for ids in expected]
    assert [c.tokens for c in completions] == [len(ids) for ids in expected]
    assert [c.truncated for c in completions] == [len(ids) == 40 for ids in expected]
    assert (len(batches), sum(batches)) == (2, sum(map(len, expected)))


def test_a_completion_ends_before_a_stop_text() -> None:
    prompt = list(b"Once upon")
    full = complete(golden(), BYTES, [prompt], 100, 1)[0]
    assert full.truncated
    stop = full.text[4:6]
    short = complete(golden(), BYTES, [prompt], 100, 1, stops=["never", stop, full.text[60:63]])[0]
    assert short.text == full.text[: full.text.index(stop)]
    assert not short.truncated
    assert short.tokens == 32  # generation ends once all rows have stopped
    assert not complete(golden(), BYTES, [prompt], 32, 1, stops=[stop])[0].truncated


@pytest.mark.slow
def test_a_completion_ends_before_a_stop_token() -> None:
    prompt = list(b"Once upon")
    ids = generate(golden(), [prompt], 100)[0]
    end = ids[40]
    expected = BYTES.decode(ids[: ids.index(end)])
    completion = complete(golden(), BYTES, [prompt], 100, 1, stops=[end, "never"])[0]
    assert completion == (expected, ids.index(end), False)


def test_fields_of_question_files(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [{"question": "a", "answer": "b"}, {"prompt": "c", "target": 3}, {"x": "d", "y": "e"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_answers(str(file), None, None, 2) == [
        QuestionAnswer("a", "b"),
        QuestionAnswer("c", "3"),
    ]
    with pytest.raises(UserError, match=r"line 3: no field any of answer, .* \(it has x, y\)"):
        read_answers(str(file), None, None)
    with pytest.raises(UserError, match=r"line 1: no field y"):
        read_answers(str(file), None, "y")


# --- The script ------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    run_evaluate(monkeypatch, "--tokenizer", "bytes", *arguments)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three questions; the model answers the first and the third one as expected."""
    file = tmp_path / "q.jsonl"
    texts = ["Once", "upon", "a time"]
    answers = [BYTES.decode(generate(golden(), [list(text.encode())], 8)[0]) for text in texts]
    answers[1] = "another"
    records = [{"question": q, "answer": a} for q, a in zip(texts, answers, strict=True)]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_script_counts_correct_answers(
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


def test_script_leaves_out_questions_without_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answers = {"Once": "#### 5", "upon": "#### 3-5", "a": None, "time": 7}
    lines = [json.dumps({"question": q, "answer": a}) for q, a in answers.items()]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    command(
        monkeypatch,
        *("--answers", tmp_path / "q.jsonl", "--max-new-tokens", "8"),
        *("--json", tmp_path / "out.json"),
    )
    (record,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert (record["questions"], record["skipped"]) == (2, 2)
    error = capsys.readouterr().err
    assert "q.jsonl, line 3: field 'answer' is null, not a string" in error
    assert "question 'upon': no result in the answer '#### 3-5'" in error


@pytest.mark.parametrize("end", ['"', "<end>"])
def test_script_ends_an_answer_at_the_end_of_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    ids = generate(golden(), [list(b"upon")], 60)[0]
    template = (
        "{% for m in messages %}{{ m.content }}{{ END if m.role == 'assistant' }}{% endfor %}"
    )
    chatty = tokenizer_with(tmp_path / "chatty", template.replace("END", repr(end)), '"')
    (tmp_path / "q.jsonl").write_text('{"question": "upon", "answer": "x"}')
    arguments = ("--answers", tmp_path / "q.jsonl", "--extract", "text", "--max-new-tokens", "60")
    written = tmp_path / "out.jsonl"
    run_evaluate(monkeypatch, "--tokenizer", chatty, *arguments, "--chat", "--generations", written)
    line = json.loads(written.read_text())
    size = ids.index(ord(end)) if end in '"' else 60
    assert (line["text"], line["tokens"]) == (BYTES.decode(ids[:size]), size)
    assert line["cut"] == (size == 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include-path", "."], "--include-path has no effect with --answers"),
        (["--extract", r"(\d{9})"], "none of 3 can be used: question 'Once': no result in the"),
        (["--extract", "text", "--max-new-tokens", "127"], "tokens and 127 new tokens: the length"),
        (["--generations", "nowhere/x"], "nowhere/x: cannot be written: No such file"),
        (["--generations", "."], "cannot be written: Is a directory"),
        (["--shots", "2", "--shots-from", "one.jsonl"], "has 1 questions; --shots 2"),
        (["--shots", "0", "--shots-from", "one.jsonl"], "--shots 0; accepted for questions: 1 or"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, questions: Path
) -> None:
    monkeypatch.chdir(questions.parent)
    Path("one.jsonl").write_text('{"question": "a", "answer": "b"}')
    monkeypatch.setattr("scripts.evaluation_modes.complete", None)  # checked before
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--answers", questions, *arguments)
