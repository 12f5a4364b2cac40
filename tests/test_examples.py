"""Lines of JSON in four forms, to turns; what is left out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from sat_jax.data.examples import (
    DEVELOPER,
    NO_ANSWER,
    NO_PROMPT,
    NO_TEXT,
    TOOLS,
    learnt,
    read_examples,
    turns_of,
)
from sat_jax.data.form import Form, Format
from sat_jax.data.sources import resolve_sources
from sat_jax.errors import UserError

ASKED = [("user", "q"), ("assistant", "a")]
SYSTEM = ("system", "s")


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "x.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def read(folder: Path, form: Form, *lines: Any) -> list[Any]:
    """The turns of each line, or why it is left out."""
    (source,) = resolve_sources([str(written(folder, *lines))])
    return [d.why or [tuple(t) for t in turns_of(d.text)] for d in read_examples(source, form)]


def error(folder: Path, form: Form, line: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, form, line)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder / 'x.jsonl'}, line 1 (byte 0)")


@pytest.mark.parametrize(
    ("name", "line", "turns"),
    [
        (
            "messages",
            {
                "id": 7,
                "messages": [
                    {"role": "system", "content": "s", "name": None},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ],
            },
            [SYSTEM, *ASKED],
        ),
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "é"}],
                    },
                    {"role": "assistant", "content": "a", "tool_calls": []},
                ]
            },
            [("user", "qé"), ("assistant", "a")],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "user", "value": "q"},
                    {"from": "chatgpt", "value": "a"},
                    {"from": "assistant", "value": "a"},
                ]
            },
            [SYSTEM, *ASKED, *ASKED, ASKED[1]],
        ),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            [SYSTEM, *ASKED],
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ASKED),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [SYSTEM, ("user", "q\n\ni"), ASKED[1]],
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, ASKED),
    ],
)
def test_every_form_becomes_turns(tmp_path: Path, name: Format, line: Any, turns: Any) -> None:
    assert read(tmp_path, Form(name), line) == [turns]


def test_fields_can_be_named(tmp_path: Path) -> None:
    form = Form("prompt_completion", prompt_field="question", completion_field="answer")
    assert read(tmp_path, form, {"question": "q", "answer": "a"}) == [ASKED]


def test_what_teaches_nothing_is_left_out(tmp_path: Path) -> None:
    def line(*turns: tuple[str, str]) -> Any:
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    lines = [
        *(line(), line(SYSTEM), line(ASKED[0]), line(ASKED[0], ("assistant", " \n"))),
        *(line(ASKED[1]), line(SYSTEM, ASKED[1], *ASKED), line(*ASKED, *ASKED)),
        line(*ASKED, ASKED[0], ("assistant", "")),
    ]
    none, start = [NO_ANSWER] * 4, [NO_PROMPT] * 2
    *left_out, whole, half = read(tmp_path, Form("messages"), *lines)
    assert left_out == none + start
    assert (len(whole), len(half)) == (4, 4)
    assert read(tmp_path, Form("messages", loss_on="last"), *lines)[-1] == NO_ANSWER


def test_speakers_of_sharegpt(tmp_path: Path) -> None:
    def line(*speakers: str) -> Any:
        return {"conversations": [{"from": one, "value": "x"} for one in speakers]}

    lines = [line("human", one) for one in ("gpt", "bing", "bard")]
    lines += [line("human", one, "gpt") for one in ("tool", "function_call", "observation")]
    *whole, first, second, third = read(tmp_path, Form("sharegpt"), *lines)
    assert whole == [[("user", "x"), ("assistant", "x")]] * 3
    assert first == second == third == TOOLS


def test_messages_that_are_not_all_said(tmp_path: Path) -> None:
    q, a = ({"role": role, "content": text} for role, text in ASKED)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    without = {"role": "assistant", "function_call": {"name": "f"}}
    others = [
        *((call, TOOLS), (without, TOOLS), ({**a, "tool_calls": call["tool_calls"]}, TOOLS)),
        *(({"role": role, "content": "x"}, TOOLS) for role in ("tool", "function")),
        *(({"role": "tool", "content": None}, TOOLS), ({**a, "content": None}, NO_TEXT)),
        ({"role": "developer", "content": "x"}, DEVELOPER),
    ]
    lines = [{"messages": [q, other, a]} for other, _ in others]
    *left_out, whole = read(tmp_path, Form("messages"), *lines, {"messages": [q, a]})
    assert left_out == [reason for _, reason in others]
    assert whole == ASKED


def test_which_answers_are_learnt(tmp_path: Path) -> None:
    line = [*ASKED, ("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "b"), ASKED[0]]
    messages = {"messages": [{"role": role, "content": content} for role, content in line]}
    written(tmp_path, messages)
    (source,) = resolve_sources([str(tmp_path / "x.jsonl")])
    for loss_on, expected in (("all", [1, 5]), ("last", [5])):
        form = Form("messages", loss_on=loss_on)  # type: ignore[arg-type]
        (document,) = read_examples(source, form)
        assert learnt(turns_of(document.text), form) == expected


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("messages", {"text": "x"}, ": no field 'messages' (it has text)"),
        ("messages", {"messages": "x"}, ": field 'messages' is a string, not an array"),
        ("messages", {"messages": ["x"]}, ": item 1 of 'messages' is a string, not an object"),
        (
            "messages",
            {"messages": [{"role": "User", "content": "q"}]},
            ", item 1 of 'messages': role 'User'; accepted: system, user, assistant, tool,"
            " developer, function",
        ),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            ", item 1 of 'messages': no field 'content' (it has role)",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": 1}, {"role": "tool", "content": "x"}]},
            ", item 1 of 'messages': field 'content' is a number, not a string",
        ),
        (
            "messages",
            {"messages": [{"role": "tool", "content": 1}]},
            ", item 1 of 'messages': field 'content' is a number, not a string",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            ", item 1 of 'messages', item 1 of 'content': type 'image'; accepted: text",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "eliza", "value": ""}]},
            ", item 1 of 'conversations': from 'eliza'; accepted: system, human, user, gpt,"
            " assistant, chatgpt, bing, bard, ",
        ),
        ("alpaca", {"instruction": "q"}, ": no field 'output' (it has instruction)"),
        (
            "alpaca",
            {"instruction": "q", "input": 1, "output": "a"},
            ": field 'input' is a number, not a string",
        ),
        (
            "prompt_completion",
            {"question": "q", "answer": "a"},
            ": no field 'prompt' (it has question, answer)",
        ),
        (
            "prompt_completion",
            {"prompt": "\ud800", "completion": ""},
            ": half a surrogate pair at character 0 of field 'prompt'",
        ),
        ("alpaca", ["x"], ": an array, not an object; accepted: one JSON object a line,"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: Format, line: Any, problem: str) -> None:
    assert error(tmp_path, Form(name), line).startswith(problem)


def test_files_of_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    message = error(tmp_path, Form("messages"), {"messages": []})
    assert message.endswith("x.jsonl: holds no example with an answer")
    (tmp_path / "x.txt").write_text("x")
    (source,) = resolve_sources([str(tmp_path / "x.txt")])
    with pytest.raises(UserError, match=r"not JSON lines; data\.format 'alpaca' reads nothing"):
        next(read_examples(source, Form("alpaca")))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt_field": "q"}, "data.prompt_field 'q' says nothing to data.format 'text'"),
        ({"format": "alpaca", "text_field": "t"}, "it is for text"),
        ({"format": "messages", "completion_field": "a"}, "it is for prompt_completion"),
        ({"loss_on": "last"}, "it is for messages, sharegpt, alpaca, prompt_completion"),
        ({"chat_template": "chatml"}, "says nothing to data.format 'text'"),
        ({"system": "s"}, "says nothing"),
        ({"too_long": "cut_end"}, "says nothing"),
        ({"format": "chatml"}, "data.format 'chatml'; accepted: text, messages, sharegpt"),
        ({"format": "alpaca", "too_long": "cut"}, "accepted: drop, cut_end, refuse"),
        ({"format": "alpaca", "loss_on": "first"}, "accepted: all, last"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: Any, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        Form(**settings)
    assert problem in str(caught.value)
