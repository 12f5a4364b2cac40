"""Reading of conversations from JSON lines or CSV in common formats.

A line that does not have the expected structure raises a `UserError` that names the file and the
line. All formats skip and count the same examples: without a loss (no answer, or nothing precedes
it), with a turn that is null or has an unknown role, and with a field that would change what is
shown or learnt and is not supported, such as tools. All other fields that are not read are counted.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from sat_jax.data.data_format import DataFormat
from sat_jax.data.record import Record
from sat_jax.data.sources import Document, Source, counted, read_records
from sat_jax.errors import UserError

READER_VERSION = 2  # part of the fingerprint of prepared data: changes with what an example means

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}

# Reasons for skipping an example. They are keys of `left_out` in the info.json of prepared data.
NO_ANSWER = "without an answer"
NO_ANSWER_TOKEN = "with answers that give no token"
NO_PROMPT = "with nothing before the answer"
TOOL_TURN = "with turns of tools"
DEVELOPER_TURN = "with turns of a developer"
NULL_TURN = "with a turn that is null"
UNKNOWN_ROLE = f"with a role other than {', '.join(_ROLES)}"
NOT_TEXT = "with content that is not text"
TWO_SYSTEMS = "with different system prompts in a field and in a turn"
ZERO_WEIGHT = "with a weight of 0"
BAD_WEIGHT = "with a weight other than 0 and 1"
LEARNT_PROMPT = "with a weight of 1 on a turn that is not an answer"
REJECTED = "with an answer that is labelled false"

_SKIPPED_ROLES = {
    "developer": DEVELOPER_TURN,
    **dict.fromkeys(
        ("tool", "function", "function_call", "function_response", "observation"), TOOL_TURN
    ),
}
# Fields of an example or of a turn, as trl, axolotl, LLaMA-Factory and OpenAI name them.
_WEIGHTS = ("weight", "train", "training")  # 0 or false: no loss
_WEIGHT_VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # text in CSV
_LABELS = ("label", "kto_tag")  # false: an answer that is not to be learnt
_UNSUPPORTED = {
    **dict.fromkeys(("tool_calls", "function_call"), TOOL_TURN),
    **{
        name: f"with the field {name!r}"
        for name in (
            *("tools", "functions", "documents", "chat_template", "chat_template_kwargs"),
            *("reasoning_content", "reasoning", "thinking", "refusal", "prefix"),
            *("image", "images", "video", "videos", "audio", "audios"),
            *("train_detail", "training_detail"),
        )
    },
}


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str  # system, user or assistant
    content: str
    has_loss: bool = True  # False: an answer that is shown and not learnt


class _Skipped(Exception):  # not an error
    """The example is skipped; the argument is the reason."""


def read_examples(source: Source, data_format: DataFormat) -> Iterator[Document]:
    """Yield the examples of a file; `decode_turns` reads the text of such a document.

    Raises `UserError` for bad input, and if a file that was named contains no usable example.
    """
    if source.kind not in ("json_lines", "csv"):
        raise UserError(
            f"{source}: data.format {data_format.format!r} accepts only JSON lines and CSV"
        )
    reasons: Counter[str] = Counter()
    for record in read_records(source.path):
        document = _example(record, data_format)
        reasons[document.skip_reason] += 1
        yield document
    if source.named and not reasons[""]:
        raise UserError(f"{source}: contains no example that can be used: {counted(reasons)}")


def decode_turns(text: str) -> list[Turn]:
    """Return the turns of a document of `read_examples`."""
    return [Turn(*turn) for turn in json.loads(text)]


def turns_with_loss(turns: list[Turn], data_format: DataFormat) -> list[int]:
    """Return the indices of the assistant turns with a loss: all, or only the last one.

    Empty turns and those of weight 0 have none.
    """
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    answers = answers[-1:] if data_format.loss_on == "last" else answers
    return [index for index in answers if turns[index].has_loss and turns[index].content.strip()]


def _example(record: Record, data_format: DataFormat) -> Document:
    try:
        turns = _with_system(record, _turns(record, data_format))
        if not turns_with_loss(turns, data_format):
            raise _Skipped(NO_ANSWER)
        if next(turn for turn in turns if turn.role != "system").role == "assistant":
            raise _Skipped(NO_PROMPT)
    except _Skipped as skipped:
        return Document("", record.origin, str(skipped))
    # The split follows from a hash of this text: `has_loss` is written only if it is False.
    parts = [turn[:2] if turn.has_loss else turn for turn in turns]
    unused = _unused_fields(record, data_format)
    return Document(json.dumps(parts, ensure_ascii=False), record.origin, unused_fields=unused)


# The field with the turns, and the fields of a turn.
_TURN_FIELDS = {"messages": ("messages", "role", "content"),
                "sharegpt": ("conversations", "from", "value")}  # fmt: skip


def _turns(record: Record, data_format: DataFormat) -> list[Turn]:
    if _weight(record, _fields_read(data_format)) == 0:
        raise _Skipped(ZERO_WEIGHT)
    if data_format.format in _TURN_FIELDS:
        field, *names = _TURN_FIELDS[data_format.format]
        return [_turn(turn, *names) for turn in record.objects(field)]
    if data_format.format == "alpaca":
        parts = filter(None, (_text(record, "instruction"), record.optional_text("input")))
        history, prompt, answer = _history(record), "\n\n".join(parts), _text(record, "output")
    else:
        history, prompt = [], _text(record, data_format.prompt_field)
        answer = _text(record, data_format.completion_field)
    return [*history, Turn("user", prompt), Turn("assistant", answer)]


def _turn(record: Record, role_field: str, content_field: str) -> Turn:
    weight, name = _weight(record, (role_field, content_field)), record.text(role_field)
    role = _ROLES.get(name)
    if role is None:
        raise _Skipped(_SKIPPED_ROLES.get(name, UNKNOWN_ROLE))
    if role != "assistant":
        if weight == 1:
            raise _Skipped(LEARNT_PROMPT)
        weight = None
    if isinstance(record.value(content_field), list):
        parts = record.objects(content_field)
        if any(part.text("type") != "text" for part in parts):
            raise _Skipped(NOT_TEXT)
        content = "".join(_text(part, "text") for part in parts)
    else:
        content = _text(record, content_field)
    return Turn(role, content, weight != 0)


def _text(record: Record, name: str) -> str:
    if record.value(name) is None:
        raise _Skipped(NULL_TURN)
    return record.text(name)


def _weight(record: Record, read: Collection[str]) -> int | None:
    """Return the weight of the loss, 0 or 1; None if no field has it.

    Raises `_Skipped` for a field that is not supported.
    """
    weights = set()
    for name in record.fields_besides(read):
        value = record.fields[name]
        if name in _UNSUPPORTED:
            raise _Skipped(_UNSUPPORTED[name])
        if name in _LABELS and value is False:
            raise _Skipped(REJECTED)
        if name in _WEIGHTS:
            if (weight := _WEIGHT_VALUES.get(str(value).lower())) is None:
                raise _Skipped(BAD_WEIGHT)
            weights.add(weight)
    return min(weights, default=None)


def _history(record: Record) -> list[Turn]:
    """Return the earlier turns of an Alpaca example: a list of pairs of question and answer."""
    if not record.has_value("history"):
        return []
    turns = []
    for number, pair in enumerate(record.array("history"), 1):
        origin = f"{record.origin}, item {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{origin}: not a pair of a question and an answer")
        texts = Record(dict(zip(("question", "answer"), pair, strict=True)), origin)
        turns += [Turn("user", _text(texts, "question")), Turn("assistant", _text(texts, "answer"))]
    return turns


def _with_system(record: Record, turns: list[Turn]) -> list[Turn]:
    """Add the system prompt of a field of its own to the turns."""
    text = record.optional_text("system")
    if not text:
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content != text:
            raise _Skipped(TWO_SYSTEMS)
        return turns
    return [Turn("system", text), *turns]


def _fields_read(data_format: DataFormat) -> set[str]:
    match data_format.format:
        case "alpaca":
            return {"system", "instruction", "input", "output", "history"}
        case "prompt_completion":
            return {"system", data_format.prompt_field, data_format.completion_field}
        case name:
            return {"system", _TURN_FIELDS[name][0]}


def _unused_fields(record: Record, data_format: DataFormat) -> tuple[str, ...]:
    names = record.fields_besides({*_fields_read(data_format), *_WEIGHTS})
    if data_format.format in _TURN_FIELDS:
        field, *read = _TURN_FIELDS[data_format.format]
        for turn in record.objects(field):
            names += turn.fields_besides({*read, *_WEIGHTS})
    return tuple(dict.fromkeys(names))
