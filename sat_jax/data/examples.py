"""Reading conversations from JSON lines in common formats.

A line that does not have the expected format raises a `UserError` that names the file and the line.
A conversation without a loss (it has no answer, or nothing precedes the answer) is skipped and
counted, as empty texts are. So is one with tool calls, tool or developer turns, or a turn whose
content is null.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from sat_jax.data.data_format import DataFormat
from sat_jax.data.record import Record
from sat_jax.data.sources import Document, Source, read_records
from sat_jax.errors import UserError

# Reasons for skipping an example. They are keys of `left_out` in the info.json of prepared data.
NO_ANSWER = "without an answer"
NO_PROMPT = "with nothing before the answer"
TOOL_TURN = "with turns of tools"
DEVELOPER_TURN = "with turns of a developer"
NULL_TURN = "with a turn that is null"

_ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool", "developer")},
    "function": "tool",
}
_NULL = "null"  # the role of a turn without content
_SKIPPED_ROLES = {"tool": TOOL_TURN, "developer": DEVELOPER_TURN, _NULL: NULL_TURN}
_ASSISTANTS = ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot")
_TOOLS = ("tool", "function_call", "function_response", "observation")
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(_ASSISTANTS, "assistant"),
    **dict.fromkeys(_TOOLS, "tool"),
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
    empty = True
    for record in read_records(source.path):
        turns = _turns(record, data_format)
        reason = _skip_reason(turns, data_format)
        empty = empty and bool(reason)
        text = "" if reason else json.dumps(turns, ensure_ascii=False)
        yield Document(text, record.origin, reason)
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


def _messages(record: Record) -> list[Turn]:
    return [_message(message) for message in record.objects("messages")]


def _message(message: Record) -> Turn:
    role = message.choice("role", _ROLES)
    if any(message.fields.get(name) for name in ("tool_calls", "function_call")):
        return Turn("tool", "")
    content = message.fields.get("content", "")
    if content is None:
        return Turn(role if role in _SKIPPED_ROLES else _NULL, "")
    if not isinstance(content, list):
        return Turn(role, message.text("content"))
    parts = message.objects("content")
    for part in parts:
        part.choice("type", {"text": "text"})
    return Turn(role, "".join(part.text("text") for part in parts))


def _sharegpt(record: Record) -> list[Turn]:
    turns = record.objects("conversations")
    return _system(record) + [
        Turn(turn.choice("from", _SHAREGPT_ROLES), turn.text("value")) for turn in turns
    ]


def _alpaca(record: Record) -> list[Turn]:
    parts = filter(None, (record.text("instruction"), record.optional_text("input")))
    turns = [Turn("user", "\n\n".join(parts)), Turn("assistant", record.text("output"))]
    return _system(record) + turns


def _system(record: Record) -> list[Turn]:
    """Return the system prompt in a field of its own, if there is one."""
    text = record.optional_text("system")
    return [Turn("system", text)] if text else []


_TURNS_OF = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}


def _turns(record: Record, data_format: DataFormat) -> list[Turn]:
    if data_format.format == "prompt_completion":
        prompt = record.text(data_format.prompt_field)
        completion = record.text(data_format.completion_field)
        return [Turn("user", prompt), Turn("assistant", completion)]
    return _TURNS_OF[data_format.format](record)
