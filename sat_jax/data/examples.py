"""Lines of JSON in the forms that people have, to conversations.

A line that is not of its form is a `UserError` naming file and line. One from which nothing could
be learnt, with no answer or with nothing before it, is left out and counted, as empty texts are,
and so is one in which tools are called or speak, developers speak, or a turn's content is null.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sat_jax.data.form import Form
from sat_jax.data.sources import Document, Source, check_text, json_kind, read_records
from sat_jax.errors import UserError

NO_ANSWER = "without an answer"
NO_PROMPT = "with nothing before the answer"
TOOLS = "with turns of tools"
DEVELOPER = "with turns of a developer"
NO_TEXT = "with a turn that is null"

_ROLES = {name: name for name in ("system", "user", "assistant", "tool", "developer")}
_ROLES |= {"function": "tool"}
_NULL = "null"  # the role of a turn without text
_LEFT_OUT = {"tool": TOOLS, "developer": DEVELOPER, _NULL: NO_TEXT}
_SPEAKERS = {
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
    """What one side says."""

    role: str  # system, user or assistant; in examples that are left out also others
    content: str


def read_examples(source: Source, form: Form) -> Iterator[Document]:
    """The examples of a file of JSON lines, each one's turns as text: see `turns_of`.

    Raises `UserError` for bad input, and where a file that was named holds no example.
    """
    if source.kind != "json_lines":
        raise UserError(f"{source}: not JSON lines; data.format {form.format!r} reads nothing else")
    turns_in, empty = _READERS[form.format], True
    for record, origin in read_records(source.path):
        turns = turns_in(_Record(record, origin), form)
        reason = _nothing_to_learn(turns, form)
        empty = empty and bool(reason)
        yield Document("" if reason else json.dumps(turns, ensure_ascii=False), origin, reason)
    if empty and source.named:
        raise UserError(f"{source}: holds no example with an answer")


def turns_of(example: str) -> list[Turn]:
    """The turns of a document that `read_examples` gave."""
    return [Turn(*turn) for turn in json.loads(example)]


def learnt(turns: list[Turn], form: Form) -> list[int]:
    """Which turns bear loss: the assistant's, or its last one, where they say something."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    answers = answers[-1:] if form.loss_on == "last" else answers
    return [number for number in answers if turns[number].content.strip()]


def _nothing_to_learn(turns: list[Turn], form: Form) -> str:
    for turn in turns:
        if turn.role in _LEFT_OUT:
            return _LEFT_OUT[turn.role]
    if not learnt(turns, form):
        return NO_ANSWER
    first = next(turn for turn in turns if turn.role != "system")
    return NO_PROMPT if first.role == "assistant" else ""


class _Record(NamedTuple):
    """An object of JSON and where it stands."""

    fields: Mapping[str, Any]
    origin: str

    def text(self, name: str) -> str:
        """A field that has to be text."""
        value = self._get(name)
        if not isinstance(value, str):
            raise UserError(f"{self.origin}: field {name!r} is {json_kind(value)}, not a string")
        return check_text(value, name, self.origin)

    def optional(self, name: str) -> str:
        """A field that may be missing or null, and is "" then."""
        return "" if self.fields.get(name) is None else self.text(name)

    def objects(self, name: str) -> "list[_Record]":
        """A field that has to be a list of objects."""
        value = self._get(name)
        if not isinstance(value, list):
            raise UserError(f"{self.origin}: field {name!r} is {json_kind(value)}, not an array")
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise UserError(
                    f"{self.origin}: item {number} of {name!r} is {json_kind(item)}, not an object"
                )
        return [
            _Record(item, f"{self.origin}, item {number} of {name!r}")
            for number, item in enumerate(value, 1)
        ]

    def role(self, name: str, roles: Mapping[str, str]) -> str:
        """A field that has to be one of `roles`."""
        said = self.text(name)
        if said not in roles:
            raise UserError(f"{self.origin}: {name} {said!r}; accepted: {', '.join(roles)}")
        return roles[said]

    def _get(self, name: str) -> Any:
        if name not in self.fields:
            has = ", ".join(list(self.fields)[:10]) or "no fields"
            raise UserError(f"{self.origin}: no field {name!r} (it has {has})")
        return self.fields[name]


def _messages(record: _Record, form: Form) -> list[Turn]:
    del form
    return [_message(message) for message in record.objects("messages")]


def _message(message: _Record) -> Turn:
    role = message.role("role", _ROLES)
    if any(message.fields.get(name) for name in ("tool_calls", "function_call")):
        return Turn("tool", "")
    if "content" in message.fields and message.fields["content"] is None:
        return Turn(role if role in _LEFT_OUT else _NULL, "")
    return Turn(role, _content(message))


def _content(message: _Record) -> str:
    """Text, or a list of parts that are all text."""
    if not isinstance(message.fields.get("content"), list):
        return message.text("content")
    parts = message.objects("content")
    for part in parts:
        part.role("type", {"text": "text"})
    return "".join(part.text("text") for part in parts)


def _sharegpt(record: _Record, form: Form) -> list[Turn]:
    del form
    said = record.objects("conversations")
    turns = [Turn(turn.role("from", _SPEAKERS), turn.text("value")) for turn in said]
    return _system(record) + turns


def _alpaca(record: _Record, form: Form) -> list[Turn]:
    del form
    asked = [text for text in (record.text("instruction"), record.optional("input")) if text]
    turns = [Turn("user", "\n\n".join(asked)), Turn("assistant", record.text("output"))]
    return _system(record) + turns


def _prompt_completion(record: _Record, form: Form) -> list[Turn]:
    prompt, completion = record.text(form.prompt_field), record.text(form.completion_field)
    return [Turn("user", prompt), Turn("assistant", completion)]


def _system(record: _Record) -> list[Turn]:
    """The system prompt that a line may have beside its turns."""
    text = record.optional("system")
    return [Turn("system", text)] if text else []


_READERS: dict[str, Callable[[_Record, Form], list[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
