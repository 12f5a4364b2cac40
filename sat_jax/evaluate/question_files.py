"""Reading of question files: with choices (JSON of BIG-bench, or JSON lines) or with answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from string import ascii_uppercase
from typing import Any, NamedTuple

from sat_jax.data.record import Record, json_type
from sat_jax.data.sources import Source, read_text_file, resolve_sources
from sat_jax.errors import UserError
from sat_jax.evaluate.prompts import QuestionAnswer
from sat_jax.evaluate.usable import usable

# Default field names; the first one that a record has is used.
QUESTION_FIELDS = ("question", "input", "prompt", "problem", "query")
ANSWER_FIELDS = ("answer", "answerKey", "label", "target", "gold", "output")
CHOICE_FIELDS = ("choices", "options", "endings")


class MultipleChoiceQuestion(NamedTuple):
    """A question with choices. `scores`: the score of each choice, 1 for the correct one."""

    question: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def with_answer(self) -> QuestionAnswer:
        """The question with the choice that has the highest score, as a few-shot example."""
        return QuestionAnswer(self.question, self.choices[self.scores.index(max(self.scores))])


def name_of(question: "MultipleChoiceQuestion | QuestionAnswer | SourceQuestion") -> str:
    """Return the beginning of a question, for messages."""
    return f"question {question.question[:60]!r}"


def read_choices(
    file: str,
    question_field: str | None,
    answer_field: str | None,
    limit: int | None = None,
    faults: list[str] | None = None,
) -> list[MultipleChoiceQuestion]:
    """Return the multiple-choice questions in `file`, at most the first `limit`.

    The file is either JSON with `examples`, each with `input` and `target_scores`, as in BIG-bench;
    or JSON lines with a question, its choices (a list, `{"text": [...], "label": [...]}` as in ARC,
    or `target_scores`) and the answer: an index from 0, a letter, a label, or the text of a choice.
    An ambiguous string is a label, else a text, else a letter. Anything else is a fault, see
    `usable`.
    """

    def read(item: tuple[Any, str]) -> MultipleChoiceQuestion:
        return _multiple_choice(_record(*item), question_field, answer_field)

    return usable(read, _items(file, limit), faults)


def read_answers(
    file: str,
    question_field: str | None,
    answer_field: str | None,
    limit: int | None = None,
    faults: list[str] | None = None,
) -> list[QuestionAnswer]:
    """Return the questions in `file` (JSON lines) with their answers, at most the first `limit`.

    Faults as in `usable`.
    """

    def read(item: tuple[Any, str]) -> QuestionAnswer:
        record = _record(*item)
        answer = _answer(record, answer_field)
        return QuestionAnswer(_question(record, question_field), answer)

    return usable(read, _items(file, limit), faults)


class SourceQuestion(NamedTuple):
    """A question with all fields of its record, and its answer ("" if that was not read)."""

    question: str
    answer: str
    fields: Mapping[str, Any]


def read_sources(
    file: str,
    question_field: str | None,
    answer_field: str | None,
    limit: int | None = None,
    faults: list[str] | None = None,
    *,
    with_answers: bool,
) -> list[SourceQuestion]:
    """Return the questions in `file` (JSON lines) with their records, at most the first `limit`.

    Faults as in `usable`; a record without an answer is one if `with_answers`.
    """

    def read(item: tuple[Any, str]) -> SourceQuestion:
        record = _record(*item)
        answer = _answer(record, answer_field) if with_answers else ""
        return SourceQuestion(_question(record, question_field), answer, record.fields)

    return usable(read, _items(file, limit), faults)


def _items(file: str, limit: int | None) -> list[tuple[Any, str]]:
    """Return the first `limit` questions of the files that `file` names, with their locations.

    A question is a line of JSON, or a value of JSON.
    """
    files = map(_items_of, resolve_sources([file]))
    items = list(islice(chain.from_iterable(files), limit))
    if not items:
        raise UserError(f"{file}: contains no question")
    return items


def _items_of(source: Source) -> Iterator[tuple[Any, str]]:
    """Yield the examples of a BIG-bench file, or the nonblank lines of a JSON-lines file."""
    if source.kind != "json_lines":
        raise UserError(f"{source}: accepted: .jsonl, .ndjson and .json, also with .gz or .zst")
    text = read_text_file(source.path)
    if ".json" in source.path.suffixes:
        try:
            content = json.loads(text)
        except ValueError:
            content = None  # JSON lines
        if isinstance(content, dict) and "examples" in content:
            examples = content["examples"]
            if not isinstance(examples, list):
                raise UserError(f"{source}: 'examples' is {json_type(examples)}, not an array")
            for number, example in enumerate(examples, 1):
                yield example, f"{source}, example {number}"
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line, f"{source}, line {number}"


def _record(content: Any, origin: str) -> Record:
    """Return the object that a line of JSON or a value of JSON is."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{origin}: {json_type(content)}, not an object")
    return Record(content, origin)


def _field_name(record: Record, name: str | None, defaults: Sequence[str]) -> str:
    """Return `name`, or the first of `defaults` in the record if `name` is None."""
    field = name or next((default for default in defaults if default in record.fields), None)
    if field is None or field not in record.fields:
        accepted = name or f"any of {', '.join(defaults)}"
        names = ", ".join(list(record.fields)[:10])
        raise UserError(f"{record.origin}: no field {accepted} (it has {names})")
    return field


def _question(record: Record, name: str | None) -> str:
    return record.text(_field_name(record, name, QUESTION_FIELDS))


def _answer(record: Record, name: str | None) -> str:
    field = _field_name(record, name, ANSWER_FIELDS)
    is_number = type(record.fields[field]) in (int, float)
    return str(record.fields[field]) if is_number else record.text(field)


def _multiple_choice(
    record: Record, question_field: str | None, answer_field: str | None
) -> MultipleChoiceQuestion:
    question = _question(record, question_field)
    if "target_scores" in record.fields:
        scores = record.fields["target_scores"]
        values = list(scores.values()) if isinstance(scores, dict) else []
        if not all(type(value) in (int, float) for value in values):
            raise UserError(f"{record.origin}: target_scores has values that are not numbers")
        texts = _choice_texts(list(scores), record.origin)
        return MultipleChoiceQuestion(question, texts, tuple(map(float, values)))
    choices: Any = record.fields[_field_name(record, None, CHOICE_FIELDS)]
    labels: list[object] = []
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label", [])
    texts = _choice_texts(choices, record.origin)
    answer = record.fields[_field_name(record, answer_field, ANSWER_FIELDS)]
    correct = _answer_index(answer, texts, labels)
    if correct is None:
        raise UserError(
            f"{record.origin}: the answer {answer!r} is none of the {len(texts)} choices; accepted:"
            " an index from 0, a letter from A, a label, or the text of a choice"
        )
    scores = tuple(float(index == correct) for index in range(len(texts)))
    return MultipleChoiceQuestion(question, texts, scores)


def _choice_texts(choices: object, origin: str) -> tuple[str, ...]:
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{origin}: the choices are not a list of two or more")
    if not all(isinstance(text, str) and text.strip() for text in choices):
        raise UserError(f"{origin}: a choice is not a text")
    return tuple(choices)


def _answer_index(answer: object, texts: Sequence[str], labels: Sequence[object]) -> int | None:
    """Return the index of the choice that the answer names, or None."""
    if type(answer) is int:
        return answer if 0 <= answer < len(texts) else None
    letters, numbers = ascii_uppercase[: len(texts)], map(str, range(len(texts)))
    for names in map(list, (labels, texts, letters, numbers)):
        if isinstance(answer, str) and answer in names:
            return names.index(answer)
    return None
