"""Reading of conversations in four formats; skipped examples and errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from sat_jax.data.data_format import DataFormat, Format
from sat_jax.data.examples import (
    BAD_WEIGHT,
    DEVELOPER_TURN,
    LEARNT_PROMPT,
    NO_ANSWER,
    NO_PROMPT,
    NOT_TEXT,
    NULL_TURN,
    REJECTED,
    TOOL_TURN,
    TWO_SYSTEMS,
    UNKNOWN_ROLE,
    ZERO_WEIGHT,
    decode_turns,
    read_examples,
    turns_with_loss,
)
from sat_jax.data.sources import resolve_sources
from sat_jax.errors import UserError
from tests.user_errors import user_error

ASKED = [("user", "q"), ("assistant", "a")]
SYSTEM = ("system", "s")


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "x.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def read(folder: Path, data_format: DataFormat, *lines: Any) -> list[Any]:
    """Return the turns of each line, or why it is skipped."""
    (source,) = resolve_sources([str(written(folder, *lines))])
    return [
        d.skip_reason or [t[:2] if t.has_loss else tuple(t) for t in decode_turns(d.text)]
        for d in read_examples(source, data_format)
    ]


def error(folder: Path, data_format: DataFormat, line: Any) -> str:
    message = user_error(lambda: read(folder, data_format, line))
    return message.removeprefix(f"{folder / 'x.jsonl'}, line 1 (byte 0)")


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
        (
            "alpaca",
            {"instruction": "q", "output": "a", "history": [["q", "a"], ["q", ""]]},
            [*ASKED, ASKED[0], ("assistant", ""), *ASKED],
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, ASKED),
        ("prompt_completion", {"prompt": "q", "completion": "a", "system": "s"}, [SYSTEM, *ASKED]),
    ],
)
def test_turns_of_every_format(tmp_path: Path, name: Format, line: Any, turns: Any) -> None:
    assert read(tmp_path, DataFormat(name), line) == [turns]


def test_field_names_can_be_set(tmp_path: Path) -> None:
    data_format = DataFormat(
        "prompt_completion", prompt_field="question", completion_field="answer"
    )
    assert read(tmp_path, data_format, {"question": "q", "answer": "a"}) == [ASKED]


def test_examples_without_a_loss_are_skipped(tmp_path: Path) -> None:
    def line(*turns: tuple[str, str]) -> Any:
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    lines = [
        *(line(), line(SYSTEM), line(ASKED[0]), line(ASKED[0], ("assistant", " \n"))),
        *(line(ASKED[1]), line(SYSTEM, ASKED[1], *ASKED), line(*ASKED, *ASKED)),
        line(*ASKED, ASKED[0], ("assistant", "")),
    ]
    *skipped, first, last = read(tmp_path, DataFormat("messages"), *lines)
    assert skipped == [NO_ANSWER] * 4 + [NO_PROMPT] * 2
    assert (len(first), len(last)) == (4, 4)
    assert read(tmp_path, DataFormat("messages", loss_on="last"), *lines)[-1] == NO_ANSWER


def test_roles_of_sharegpt(tmp_path: Path) -> None:
    def line(*roles: str) -> Any:
        return {"conversations": [{"from": role, "value": "x"} for role in roles]}

    lines = [line("human", role) for role in ("gpt", "bing", "bard")]
    lines += [line("human", role, "gpt") for role in ("tool", "function_call", "observation")]
    *read_turns, first, second, third = read(tmp_path, DataFormat("sharegpt"), *lines)
    assert read_turns == [[("user", "x"), ("assistant", "x")]] * 3
    assert first == second == third == TOOL_TURN


def test_messages_with_tool_developer_or_null_turns_are_skipped(tmp_path: Path) -> None:
    q, a = ({"role": role, "content": text} for role, text in ASKED)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    without = {"role": "assistant", "function_call": {"name": "f"}}
    turns = [
        *(
            (call, TOOL_TURN),
            (without, TOOL_TURN),
            ({**a, "tool_calls": call["tool_calls"]}, TOOL_TURN),
        ),
        *(({"role": role, "content": "x"}, TOOL_TURN) for role in ("tool", "function")),
        *(({"role": "tool", "content": None}, TOOL_TURN), ({**a, "content": None}, NULL_TURN)),
        ({"role": "developer", "content": "x"}, DEVELOPER_TURN),
    ]
    lines = [{"messages": [q, turn, a]} for turn, _ in turns]
    *skipped, complete = read(tmp_path, DataFormat("messages"), *lines, {"messages": [q, a]})
    assert skipped == [reason for _, reason in turns]
    assert complete == ASKED


FORMATS: list[Format] = ["messages", "sharegpt", "alpaca", "prompt_completion"]


def example(name: Format, *turns: Any, **fields: Any) -> Any:
    """Return turns (role, content, fields) in a format; the last two are question and answer."""
    turns = tuple((role, content, *(more or [{}])) for role, content, *more in turns)
    (_, question, _), (_, answer, more) = turns[-2:]
    match name:
        case "messages":
            fields["messages"] = [{"role": r, "content": c, **more} for r, c, more in turns]
        case "sharegpt":
            fields["conversations"] = [{"from": r, "value": c, **more} for r, c, more in turns]
        case "alpaca":
            fields |= {"instruction": question, "output": answer, **more}
        case _:
            fields |= {"prompt": question, "completion": answer, **more}
    return fields


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [{"type": "function"}]}, "with the field 'tools'"),
        ({"tools": '[{"type": "function"}]'}, "with the field 'tools'"),
        ({"reasoning_content": "so"}, "with the field 'reasoning_content'"),
        ({"images": ["x.png"]}, "with the field 'images'"),
        ({"chat_template_kwargs": {"x": 1}}, "with the field 'chat_template_kwargs'"),
        ({"train_detail": [{"train": False}]}, "with the field 'train_detail'"),
        ({"weight": 0}, ZERO_WEIGHT),
        ({"train": False}, ZERO_WEIGHT),
        ({"weight": 0.5}, BAD_WEIGHT),
        ({"weight": [0]}, BAD_WEIGHT),
        ({"train": "False"}, ZERO_WEIGHT),
        ({"label": False}, REJECTED),
        ({"kto_tag": False}, REJECTED),
        ({"weight": 1, "train": True, "label": True, "tools": [], "images": None}, None),
        ({"system": None, "reasoning_content": "", "label": "maths", "tools": "[]"}, None),
    ],
)
def test_fields_that_decide_what_is_shown_or_learnt(
    tmp_path: Path, name: Format, fields: dict[str, Any], reason: str | None
) -> None:
    lines = [example(name, *ASKED, **fields), example(name, *ASKED)]
    in_turn = example(name, ASKED[0], (*ASKED[1], fields))
    first, second, bare = read(tmp_path, DataFormat(name), *lines[:1], in_turn, lines[1])
    assert (first, bare) == (reason or ASKED, ASKED)
    # A turn of weight 0 is shown; a conversation without another answer has no loss.
    in_turns = name in ("messages", "sharegpt") and reason == ZERO_WEIGHT
    assert second == (NO_ANSWER if in_turns else reason or ASKED)


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
@pytest.mark.parametrize("field", ["weight", "train", "training"])
def test_the_weight_of_a_turn(tmp_path: Path, name: Format, field: str) -> None:
    wrong = (*ASKED[1], {field: 0})
    lines = [
        example(name, ASKED[0], wrong, *ASKED),
        example(name, (*ASKED[0], {field: 0}), *ASKED[1:]),
        example(name, (*ASKED[0], {field: True}), *ASKED[1:]),
        example(name, *ASKED, ASKED[0], wrong),
    ]
    shown = [ASKED[0], (*ASKED[1], False), *ASKED]
    for loss_on, last in (("all", [*ASKED, *shown[:2]]), ("last", NO_ANSWER)):
        data_format = DataFormat(name, loss_on=loss_on)  # type: ignore[arg-type]
        assert read(tmp_path, data_format, *lines) == [shown, ASKED, LEARNT_PROMPT, last]


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_skip_the_same_turns(tmp_path: Path, name: Format) -> None:
    question, answer = ASKED
    lines = [
        *(example(name, question, ("assistant", text)) for text in (None, "", " ", "a")),
        example(name, ("user", None), answer),
        example(name, ("user", ""), answer),
    ]
    assert read(tmp_path, DataFormat(name), *lines) == [
        *(NULL_TURN, NO_ANSWER, NO_ANSWER, ASKED, NULL_TURN),
        [("user", ""), answer],
    ]
    if name in ("alpaca", "prompt_completion"):
        return
    other = [*("User", "eliza"), *("tool", "function", "observation"), "developer"]
    image = [{"type": "text", "text": "q"}, {"type": "image"}]
    lines = [example(name, (role, "x"), *ASKED) for role in other]
    lines += [example(name, ("user", image), answer), example(name, ("human", "q"), ("gpt", "a"))]
    assert read(tmp_path, DataFormat(name), *lines) == [
        *[UNKNOWN_ROLE] * 2, *[TOOL_TURN] * 3, DEVELOPER_TURN, NOT_TEXT, ASKED
    ]  # fmt: skip
    two = [example(name, SYSTEM, *ASKED, system=text) for text in ("s", "t")]
    assert read(tmp_path, DataFormat(name), *two) == [[SYSTEM, *ASKED], TWO_SYSTEMS]


@pytest.mark.parametrize("name", FORMATS)
def test_other_fields_are_named(tmp_path: Path, name: Format) -> None:
    (source,) = resolve_sources(
        [str(written(tmp_path, example(name, ASKED[0], (*ASKED[1], {"mood": "x"}), id=0, url="")))]
    )
    (document,) = read_examples(source, DataFormat(name))
    assert set(document.unused_fields) == {"id", "mood"}


def test_examples_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("instruction,input,output,id\nq,,a,1\nq,i,a,\n")
    (source,) = resolve_sources([str(tmp_path / "x.csv")])
    documents = list(read_examples(source, DataFormat("alpaca")))
    assert [[t[:2] for t in decode_turns(d.text)] for d in documents] == [
        ASKED, [("user", "q\n\ni"), ASKED[1]]
    ]  # fmt: skip
    assert [d.unused_fields for d in documents] == [("id",), ()]


def test_which_answers_have_a_loss(tmp_path: Path) -> None:
    line = [*ASKED, ("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "b"), ASKED[0]]
    messages = {"messages": [{"role": role, "content": content} for role, content in line]}
    written(tmp_path, messages)
    (source,) = resolve_sources([str(tmp_path / "x.jsonl")])
    for loss_on, expected in (("all", [1, 5]), ("last", [5])):
        data_format = DataFormat("messages", loss_on=loss_on)  # type: ignore[arg-type]
        (document,) = read_examples(source, data_format)
        assert turns_with_loss(decode_turns(document.text), data_format) == expected


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("messages", {"text": "x"}, ": no field 'messages' (it has text)"),
        ("messages", {"messages": "x"}, ": field 'messages' is a string, not an array"),
        ("messages", {"messages": ["x"]}, ": item 1 of 'messages' is a string, not an object"),
        (
            "messages",
            {"messages": [{"role": 1, "content": "q"}]},
            ", item 1 of 'messages': field 'role' is a number, not a string",
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
            {"messages": [{"role": "user", "content": [{"text": "q"}]}]},
            ", item 1 of 'messages', item 1 of 'content': no field 'type' (it has text)",
        ),
        (
            "sharegpt",
            {"conversations": [{"role": "user", "content": ""}]},
            ", item 1 of 'conversations': no field 'from' (it has role, content)",
        ),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "history": [["q"]]},
            ", item 1 of 'history': not a pair of a question and an answer",
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
            ": lone surrogate at character 0 of field 'prompt'",
        ),
        ("alpaca", ["x"], ": an array, not an object; accepted: one JSON object per line,"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, name: Format, line: Any, problem: str) -> None:
    assert error(tmp_path, DataFormat(name), line).startswith(problem)


def test_files_without_a_usable_example_are_refused(tmp_path: Path) -> None:
    message = error(tmp_path, DataFormat("messages"), {"messages": []})
    assert message.endswith("x.jsonl: contains no example that can be used: 1 without an answer")
    (tmp_path / "x.txt").write_text("x")
    (source,) = resolve_sources([str(tmp_path / "x.txt")])
    with pytest.raises(UserError, match=r"data\.format 'alpaca' accepts only JSON lines and"):
        next(read_examples(source, DataFormat("alpaca")))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt_field": "q"}, "data.prompt_field 'q' has no effect with data.format 'text'"),
        ({"format": "alpaca", "text_field": "t"}, "it is used by text"),
        ({"format": "messages", "completion_field": "a"}, "it is used by prompt_completion"),
        ({"loss_on": "last"}, "it is used by messages, sharegpt, alpaca, prompt_completion"),
        ({"chat_template": "chatml"}, "has no effect with data.format 'text'"),
        ({"system": "s"}, "has no effect"),
        ({"too_long": "cut_end"}, "has no effect"),
        ({"format": "chatml"}, "data.format 'chatml'; accepted: text, messages, sharegpt"),
        ({"format": "alpaca", "too_long": "cut"}, "accepted: drop, cut_end, refuse"),
        ({"format": "alpaca", "loss_on": "first"}, "accepted: all, last"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: Any, problem: str) -> None:
    assert problem in user_error(lambda: DataFormat(**settings))
