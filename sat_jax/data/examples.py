"""Reading conversations from JSON lines in common formats.

A line that does not have the expected format raises a `UserError` that names the file and the line.
A conversation without a loss (it has no answer, or nothing precedes the answer) is skipped and
counted, as empty texts are. So is one with tool calls, tool or developer turns, or a turn whose
content is null.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sat_jax.data.data_format import DataFormat
from sat_jax.data.sources import (
    Document,
    Source,
    get_field,
    json_type,
    read_records,
    string_field,
)
from sat_jax.errors import UserError

# Reasons for skipping an example. They are keys of `left_out` in the info.json of prepared data.
NO_ANSWER = "without an answer"
NO_PROMPT = "with nothing before the answer"
TOOL_TURN = "with turns of tools"
DEVELOPER_TURN = "with turns of a developer"
NULL_TURN = "with a turn that is null"

_ROLES = {name: name for name in ("system", "user", "assistant", "tool", "developer")}
_ROLES |= {"function": "tool"}
_NULL = "null"  # the role of a turn without content
_SKIPPED_ROLES = {"tool": TOOL_TURN, "developer": DEVELOPER_TURN, _NULL: NULL_TURN}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function_call": "tool",
    "function_response": "tool",
    "observation": "tool",
}


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str  # system, user or assistant; other roles only in examples that are skipped
    content: str


def read_examples(source: Source, data_format: DataFormat) -> Iterator[Document]:
    """Yield the examples of a JSON-lines file; `decode_turns` reads the text of such a document.

    Raises `UserError` for bad input, and if a file that was named contains no usable example.
    """
    if source.kind != "json_lines":
        raise UserError(f"{source}: data.format {data_format.format!r} accepts only JSON lines")
    read_turns, empty = _READERS[data_format.format], True
    for fields, origin in read_records(source.path):
        turns = read_turns(_Record(fields, origin), data_format)
        reason = _skip_reason(turns, data_format)
        empty = empty and bool(reason)
        yield Document("" if reason else json.dumps(turns, ensure_ascii=False), origin, reason)
    if empty and source.named:
        raise UserError(f"{source}: contains no example with an answer")


def decode_turns(text: str) -> list[Turn]:
    """Return the turns of a document of `read_examples`."""
    return [Turn(*turn) for turn in json.loads(text)]


def turns_with_loss(turns: list[Turn], data_format: DataFormat) -> list[int]:
    """Return the indices of the nonempty assistant turns with a loss: all of them, or the last."""
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    answers = answers[-1:] if data_format.loss_on == "last" else answers
    return [index for index in answers if turns[index].content.strip()]


def _skip_reason(turns: list[Turn], data_format: DataFormat) -> str:
    for turn in turns:
        if turn.role in _SKIPPED_ROLES:
            return _SKIPPED_ROLES[turn.role]
    if not turns_with_loss(turns, data_format):
        return NO_ANSWER
    first = next(turn for turn in turns if turn.role != "system")
    return NO_PROMPT if first.role == "assistant" else ""


class _Record(NamedTuple):
    """A JSON object and its location."""

    fields: dict[str, Any]
    origin: str

    def text(self, name: str) -> str:
        """Return the text of a required field."""
        return string_field(self.fields, name, self.origin)

    def optional_text(self, name: str) -> str:
        """Return the text of a field, or "" if the field is missing or null."""
        return "" if self.fields.get(name) is None else self.text(name)

    def objects(self, name: str) -> "list[_Record]":
        """Return the objects in a field that is a list of objects."""
        value = get_field(self.fields, name, self.origin)
        if not isinstance(value, list):
            raise UserError(f"{self.origin}: field {name!r} is {json_type(value)}, not an array")
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise UserError(
                    f"{self.origin}: item {number} of {name!r} is {json_type(item)}, not an object"
                )
        return [
            _Record(item, f"{self.origin}, item {number} of {name!r}")
            for number, item in enumerate(value, 1)
        ]

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """Return the entry of `choices` for the text of a field."""
        text = self.text(name)
        if text not in choices:
            raise UserError(f"{self.origin}: {name} {text!r}; accepted: {', '.join(choices)}")
        return choices[text]


def _messages(record: _Record, data_format: DataFormat) -> list[Turn]:
    del data_format
    return [_message(message) for message in record.objects("messages")]


def _message(message: _Record) -> Turn:
    role = message.choice("role", _ROLES)
    if any(message.fields.get(name) for name in ("tool_calls", "function_call")):
        return Turn("tool", "")
    if "content" in message.fields and message.fields["content"] is None:
        return Turn(role if role in _SKIPPED_ROLES else _NULL, "")
    return Turn(role, _content(message))


def _content(message: _Record) -> str:
    """Return the content of a message: a text, or a list of parts of type text."""
    if not isinstance(message.fields.get("content"), list):
        return message.text("content")
    parts = message.objects("content")
    for part in parts:
        part.choice("type", {"text": "text"})
    return "".join(part.text("text") for part in parts)


def _sharegpt(record: _Record, data_format: DataFormat) -> list[Turn]:
    del data_format
    turns = record.objects("conversations")
    return _system(record) + [
        Turn(turn.choice("from", _SHAREGPT_ROLES), turn.text("value")) for turn in turns
    ]


def _alpaca(record: _Record, data_format: DataFormat) -> list[Turn]:
    del data_format
    parts = [part for part in (record.text("instruction"), record.optional_text("input")) if part]
    turns = [Turn("user", "\n\n".join(parts)), Turn("assistant", record.text("output"))]
    return _system(record) + turns


def _prompt_completion(record: _Record, data_format: DataFormat) -> list[Turn]:
    prompt = record.text(data_format.prompt_field)
    completion = record.text(data_format.completion_field)
    return [Turn("user", prompt), Turn("assistant", completion)]


def _system(record: _Record) -> list[Turn]:
    """Return the system prompt in a field of its own, if there is one."""
    text = record.optional_text("system")
    return [Turn("system", text)] if text else []


_READERS: dict[str, Callable[[_Record, DataFormat], list[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
