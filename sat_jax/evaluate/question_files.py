"""Reading of question files: with choices (JSON of BIG-bench, or JSON lines) or with answers."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from sat_jax.data.sources import read_records, read_text_file, resolve_sources, string_field
from sat_jax.errors import UserError
from sat_jax.evaluate.prompts import QuestionAnswer

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


def read_choices(
    file: str, question_field: str | None, answer_field: str | None, limit: int | None = None
) -> list[MultipleChoiceQuestion]:
    """Return the multiple-choice questions in `file`, at most the first `limit`.

    The file is either JSON with `examples`, each with `input` and `target_scores`, as in BIG-bench;
    or JSON lines with a question, its choices (a list, `{"text": [...], "label": [...]}` as in ARC,
    or `target_scores`) and the answer: an index from 0, a letter, a label, or the text of a choice.
    An ambiguous string is a label, else a text, else a letter. Raises `UserError` for anything
    else.
    """
    return [
        _multiple_choice(record, question_field, answer_field, origin)
        for record, origin in _records(file, limit)
    ]


def read_answers(
    file: str, question_field: str | None, answer_field: str | None, limit: int | None = None
) -> list[QuestionAnswer]:
    """Return the questions in `file` (JSON lines) with their answers, at most the first `limit`."""
    questions = []
    for record, origin in _records(file, limit):
        name = _field_name(record, answer_field, ANSWER_FIELDS, origin)
        value = record[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            answer = str(value)
        else:
            answer = string_field(record, name, origin)
        questions.append(QuestionAnswer(_question(record, question_field, origin), answer))
    return questions


def _records(file: str, limit: int | None) -> list[tuple[dict[str, Any], str]]:
    """Return the first `limit` records of the files that `file` names, and their locations."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}; accepted: 1 or more questions")
    records = list(islice(_all_records(file), limit))
    if not records:
        raise UserError(f"{file}: contains no question")
    return records


def _all_records(file: str) -> Iterator[tuple[dict[str, Any], str]]:
    for source in resolve_sources([file]):
        if source.kind != "json_lines":
            raise UserError(f"{source}: accepted: .jsonl, .ndjson and .json, also with .gz or .zst")
        examples = _big_bench_examples(source.path)
        yield from read_records(source.path) if examples is None else examples


def _big_bench_examples(path: Path) -> list[tuple[dict[str, Any], str]] | None:
    """Return the examples of a BIG-bench file, or None for another file (JSON lines)."""
    if ".json" not in path.suffixes:
        return None
    try:
        content = json.loads(read_text_file(path))
    except ValueError:
        return None
    if not isinstance(content, dict) or "examples" not in content:
        return None
    examples = content["examples"]
    if not isinstance(examples, list) or not all(isinstance(item, dict) for item in examples):
        raise UserError(f"{path}: `examples` is not a list of objects")
    return [(item, f"{path}, example {number}") for number, item in enumerate(examples)]


def _field_name(
    record: dict[str, Any], name: str | None, defaults: Sequence[str], origin: str
) -> str:
    """Return `name`, or the first of `defaults` in the record if `name` is None."""
    field = name or next((default for default in defaults if default in record), None)
    if field is None or field not in record:
        accepted = name or f"any of {', '.join(defaults)}"
        raise UserError(f"{origin}: no field {accepted} (it has {', '.join(list(record)[:10])})")
    return field


def _question(record: dict[str, Any], name: str | None, origin: str) -> str:
    return string_field(record, _field_name(record, name, QUESTION_FIELDS, origin), origin)


def _multiple_choice(
    record: dict[str, Any], question_field: str | None, answer_field: str | None, origin: str
) -> MultipleChoiceQuestion:
    question = _question(record, question_field, origin)
    if "target_scores" in record:
        scores = record["target_scores"]
        values = list(scores.values()) if isinstance(scores, dict) else []
        if not all(type(value) in (int, float) for value in values):
            raise UserError(f"{origin}: target_scores has values that are not numbers")
        texts = _choice_texts(list(scores), origin)
        return MultipleChoiceQuestion(question, texts, tuple(map(float, values)))
    choices: Any = record[_field_name(record, None, CHOICE_FIELDS, origin)]
    labels: list[object] = []
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label", [])
    texts = _choice_texts(choices, origin)
    answer = record[_field_name(record, answer_field, ANSWER_FIELDS, origin)]
    correct = _answer_index(answer, texts, labels)
    if correct is None:
        raise UserError(
            f"{origin}: the answer {answer!r} is none of the {len(texts)} choices; accepted: an"
            " index from 0, a letter from A, a label, or the text of a choice"
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
    letters = ascii_uppercase[: len(texts)]
    if isinstance(answer, str):
        for names in (labels, texts, letters, [str(i) for i in range(len(texts))]):
            if answer in names:
                return list(names).index(answer)
        return None
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    return None
