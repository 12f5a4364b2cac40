"""Multiple choice: log-likelihoods, scores, prompts and question files."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.likelihood import Likelihood, Pair, encode_pairs, likelihoods
from sat_jax.evaluate.multiple_choice import (
    encode_choices,
    evaluate_choices,
    mean_and_error,
    score_choices,
)
from sat_jax.evaluate.prompts import PLAIN, PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import MultipleChoiceQuestion, read_choices
from tests.golden_model import golden, logits_of, run_evaluate
from tests.tolerances import assert_close


def by_hand(pair: Pair) -> tuple[float, bool]:
    """Return log p of the continuation and whether it is greedy, from logits of the pair alone."""
    ids = [*pair.context, *pair.continuation]
    logits = logits_of(ids, 129).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    positions = range(len(pair.context) - 1, len(ids) - 1)
    greedy = all(logits[i].argmax() == ids[i + 1] for i in positions)
    return sum(log_p[i, ids[i + 1]] for i in positions), greedy


def test_likelihoods_do_not_depend_on_the_batch() -> None:
    # The last pair has 128 inputs: all positions.
    sizes = [(1, 1), (3, 2), (40, 1), (2, 60), (7, 7), (64, 65)]
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(0, 256, size).tolist() for size in pair)) for pair in sizes]
    expected = [by_hand(pair) for pair in pairs]
    # A pair whose continuation is the greedy one.
    best = int(logits_of(pairs[1].context, 129)[-1].argmax())
    pairs.append(Pair(pairs[1].context, [best]))
    expected.append(by_hand(pairs[-1]))
    for rows in (1, 3):
        results = likelihoods(golden(), pairs, rows)
        for result, (log_p, greedy) in zip(results, expected, strict=True):
            assert_close(result.log_p, log_p, "float32", "forward")
            assert result.greedy == greedy
    assert [result.greedy for result in results] == [False] * len(sizes) + [True]
    assert likelihoods(golden(), pairs, 3) == results
    batches: list[int] = []
    likelihoods(golden(), pairs[:2], 3, batches.append)
    assert batches == [1 + 4]
    with pytest.raises(UserError, match="the length 129 exceeds the model's 128 positions"):
        likelihoods(golden(), [Pair([1], [2] * 129)], 1)


def test_white_space_belongs_to_the_continuation() -> None:
    tokenizer = load_tokenizer("bytes")
    pairs = encode_pairs(tokenizer, [("a b ", "c"), ("a", " bé"), ("", "xy"), (" ", "z")])
    assert [bytes(pair.context) for pair in pairs[:2]] == [b"a b", b"a"]
    assert [bytes(pair.continuation) for pair in pairs[:2]] == [b" c", " bé".encode()]
    # An empty context is the eos token, because this tokenizer has no bos.
    assert pairs[2] == ([256], list(b"xy"))
    assert pairs[3] == ([256], list(b" z"))
    assert encode_pairs(tokenizer, [("", "<|endoftext|>a")]) == [([256], list(b"a"))]
    with pytest.raises(UserError, match="'': adds no token to its context"):
        encode_pairs(tokenizer, [("a", "")])
    with pytest.raises(UserError, match="no bos or eos token for an empty context"):
        encode_pairs(load_tokenizer("bytes", None, 256), [("", "a")])


def test_score_of_choices() -> None:
    single = MultipleChoiceQuestion("?", ("long choice", "né"), (0.0, 1.0))
    tie = MultipleChoiceQuestion("?", ("a", "b", "c"), (1.0, 0.5, 0.0))
    result = score_choices([single, tie], [[-2.3, -2.4], [-1.0, -1.0, -2.0]])
    assert result["accuracy"] == (0 + 0.75) / 2
    # The choices have 11 and 3 bytes (é has two): -2.2 / 11 is between -0.5 / 3 and -0.61 / 3.
    assert score_choices([single], [[-2.2, -0.5]])["accuracy_per_byte"] == 1
    assert score_choices([single], [[-2.2, -0.61]])["accuracy_per_byte"] == 0
    assert result["chance"] == (0.5 + 0.5) / 2
    assert result["stderr"] == pytest.approx(0.375)
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == (0.5, pytest.approx(math.sqrt(1 / 3 / 4)))
    assert mean_and_error([1.0]) == (1.0, None)
    assert score_choices([single], [[-math.inf, -1.0]])["accuracy"] == 1


def test_a_likelihood_that_is_nan_leaves_out_its_question(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [MultipleChoiceQuestion(text, ("a", "b"), (1.0, 0.0)) for text in "xy"]
    values = iter([-1.0, math.nan, -1.0, -2.0] * 2 + [math.nan] * 4)
    monkeypatch.setattr(
        "sat_jax.evaluate.multiple_choice.likelihoods",
        lambda *_: [Likelihood(next(values), True) for _ in range(4)],
    )
    evaluate = functools.partial(evaluate_choices, questions, [], 1, golden())
    faults: list[str] = []
    assert evaluate(faults=faults)["questions"] == 1
    assert [fault[:44] for fault in faults] == ["question 'x': the log-likelihood of a choice"]
    for collected in (None, []):  # strict; none is left
        with pytest.raises(UserError, match=r"question 'x': the log-likelihood of a choice is NaN"):
            evaluate(faults=collected)


def test_prompts() -> None:
    tokenizer = load_tokenizer("bytes")
    plain = PromptFormat(shots=[QuestionAnswer("1+1?", "2")])
    assert plain.prompt(tokenizer, "{x}") == ("Question: 1+1?\nAnswer: 2\n\nQuestion: {x}\nAnswer:")
    assert plain.stops(tokenizer) == ["\nQuestion:"]
    assert PromptFormat("{question} =").stops(tokenizer) == []
    (pair, _) = encode_choices(tokenizer, plain, [MultipleChoiceQuestion("q", ("a", "b"), (1, 0))])
    assert bytes(pair.continuation) == b" a"
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{{ '<assistant>\\n' if add_generation_prompt }}"
    )
    chatty = load_tokenizer("bytes")
    object.__setattr__(chatty, "chat_template", template)
    chat = PromptFormat(chat=True, shots=plain.shots)
    prompt = "<user>1+1?<assistant>2<user>q<assistant>\n"
    assert chat.prompt(chatty, "q") == prompt
    assert chat.stops(chatty) == []
    (pair, _) = encode_choices(chatty, chat, [MultipleChoiceQuestion("q", ("a", "b"), (1, 0))])
    assert bytes(pair.context + pair.continuation) == prompt.encode() + b"a"
    with pytest.raises(UserError, match="no chat template"):
        chat.prompt(tokenizer, "q")
    with pytest.raises(UserError, match="does not contain"):
        PromptFormat("Question:")
    assert PromptFormat().question_template == PLAIN


RED = {"choices": ["red", "A", "blue"]}
RIGHT = ("q", ("red", "A", "blue"), (0.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", **RED, "answer": 2}, RIGHT),
        ({"input": "q", **RED, "answer": "C"}, RIGHT),
        ({"prompt": "q", "options": RED["choices"], "target": "blue"}, RIGHT),
        ({"question": "q", **RED, "label": "2"}, RIGHT),
        # A text precedes a letter, a label precedes both.
        ({"question": "q", **RED, "answer": "A"}, ("q", RIGHT[1], (0.0, 1.0, 0.0))),
        (
            {
                "question": "q",
                "choices": {"text": RED["choices"], "label": ["1", "2", "A"]},
                "answerKey": "A",
            },
            RIGHT,
        ),
        ({"input": "q", "target_scores": {"x": 1, "y": 0.5}}, ("q", ("x", "y"), (1.0, 0.5))),
    ],
)
def test_formats_of_choices(record: dict, expected: tuple, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(record) + "\n")
    assert read_choices(str(file), None, None) == [expected]


def test_big_bench_and_limits(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    examples = [{"input": f"q{n}", "target_scores": {"x": 1, "y": 0}} for n in range(3)]
    file.write_text(json.dumps({"canary": "...", "examples": examples}, indent=1))
    assert [question.question for question in read_choices(str(file), None, None)] == [
        "q0",
        "q1",
        "q2",
    ]
    assert [question.question for question in read_choices(str(file), None, None, 2)] == [
        "q0",
        "q1",
    ]
    # A .json file may also contain JSON lines.
    file.write_text("\n".join(map(json.dumps, examples)))
    assert len(read_choices(str(file), None, None)) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "line 1: no field any of choices, options, endings"),
        ({**RED, "answer": 0}, "no field any of question"),
        ({"question": "q", **RED, "answer": 3}, "the answer 3 is none of the 3 choices"),
        ({"question": "q", **RED, "answer": True}, "the answer True is none"),
        ({"question": "q", **RED, "answer": "D"}, "the answer 'D' is none"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "not a list of two or more"),
        ({"question": "q", "choices": ["x", ""], "answer": 0}, "a choice is not a text"),
        ({"question": 3, **RED, "answer": 0}, "field 'question' is a number"),
        ({"question": "q", "target_scores": {"x": "1", "y": 0}}, "values that are not numbers"),
    ],
)
def test_invalid_choices(record: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        read_choices(str(file), None, None)


# --- The script ------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    run_evaluate(monkeypatch, "--tokenizer", "bytes", *arguments)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "q.jsonl"
    records = [
        {"question": "one?", "choices": ["1", "two"], "answer": 0},
        {"question": "two?", "choices": ["1", "two", "3"], "answer": 1},
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_script_scores(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    questions: Path,
) -> None:
    command(monkeypatch, "--choices", questions, "--prompt", r"{question}\n>")
    columns = capsys.readouterr().out.splitlines()[0].split()
    assert columns == ["model", "questions", *COLUMNS]
    command(
        monkeypatch,
        *("--choices", questions, "--prompt", r"{question}\n>", "--json", tmp_path / "out.json"),
    )
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["settings"]["prompt"] == "{question}\n>"
    (record,) = content["models"]
    assert record["questions"] == 2
    assert record["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    scores = []
    for question in read_choices(str(questions), None, None):
        texts = [(f"{question.question}\n>", f" {choice}") for choice in question.choices]
        pairs = encode_pairs(load_tokenizer("bytes"), texts)
        log_p = [by_hand(pair)[0] for pair in pairs]
        scores.append(question.scores[int(np.argmax(log_p))])
    assert record["accuracy"] == sum(scores) / 2


def test_script_leaves_out_single_questions(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    questions: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--choices", questions, "--json", "alone.json")
    capsys.readouterr()
    bad = [
        *("{", "[]", '{"question": "no choices"}', '{"question": "q", "choices": ["x", "y"]}'),
        json.dumps({"question": "none of these", "choices": ["x", "y"], "answer": "z"}),
        json.dumps({"question": "l" + "o" * 200 + "ng", "choices": ["x", "y"], "answer": 0}),
    ]
    first, second = questions.read_text().split("\n")
    questions.write_text("\n".join([*bad[:3], first, "", *bad[3:], second]))
    command(monkeypatch, "--choices", questions, "--json", "beside.json")
    alone, beside = (json.loads(Path(f"{n}.json").read_text()) for n in ("alone", "beside"))
    for content, skipped in ((alone, 0), (beside, len(bad))):
        (record,) = content["models"]
        assert (record["questions"], record["skipped"]) == (2, skipped)
    assert alone["models"][0]["accuracy"] == beside["models"][0]["accuracy"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    for line, name in zip(lines, ["line 1", "line 2", "line 3", "line 6", "line 7"], strict=False):
        assert f"{questions}, {name}: " in line
    assert "question 'looo" in lines[5] and "exceeds the model's 128 positions" in lines[5]


COLUMNS = [
    *("accuracy", "stderr", "accuracy_per_byte", "stderr_per_byte", "chance"),
    *("skipped", "tokens_per_second"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "3"], "--stride has no effect with --choices"),
        (["--extract", "number"], "--extract has no effect with --choices"),
        (["--chat"], "no chat template"),
        (["--limit", "0"], "limit 0; accepted: 1 or more"),
        (["--shots", "1"], "--shots and --shots-from must be given together"),
        (["--shots", "1", "--shots-from", "q.jsonl"], "contains the questions to be answered"),
        (["--prompt", "{question}" + "x" * 130], "exceeds the model's 128 positions"),
        (["--prompt", "x"], "does not contain {question}"),
        (["--answers", "q.jsonl"], "not allowed with argument"),
        (["--question-field", "text"], "no field text"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, questions: Path
) -> None:
    monkeypatch.chdir(questions.parent)
    monkeypatch.setattr("scripts.evaluation_modes.evaluate_choices", None)  # checked before
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--choices", questions, *arguments)


def test_limit_of_tasks_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--limit -1; accepted: 1 or more"):
        command(monkeypatch, "--lm-eval", "any", "--limit", "-1")


def test_script_refuses_other_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in [("x.txt", "accepted: .jsonl"), ("empty.jsonl", "contains no question")]:
        with pytest.raises(UserError, match=message):
            command(monkeypatch, "--choices", tmp_path / name)
