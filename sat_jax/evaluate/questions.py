"""Files of questions: with choices (BIG-bench's JSON, or JSON lines), or with answers (JSON lines).

Questions are taken in the order of the file, the first ones where a limit is given.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from sat_jax.data.sources import read_records, read_text_file, resolve_sources, string_field
from sat_jax.errors import UserError
from sat_jax.evaluate.prompts import Shot

# By the first of these that a record has, where no field is named.
QUESTION_FIELDS = ("question", "input", "prompt", "problem", "query")
ANSWER_FIELDS = ("answer", "answerKey", "label", "target", "gold", "output")
CHOICE_FIELDS = ("choices", "options", "endings")


class Choices(NamedTuple):
    """A question of multiple choice. `scores`: what each choice is worth, 1 for the right one."""

    question: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def shot(self) -> Shot:
        """The question with the choice that is worth the most."""
        return Shot(self.question, self.choices[self.scores.index(max(self.scores))])


def read_choices(
    file: str, question_field: str | None, answer_field: str | None, limit: int | None = None
) -> list[Choices]:
    """The questions of multiple choice in `file`, the first `limit` of them.

    Either JSON with `examples`, as BIG-bench writes it, each with `input` and `target_scores`; or
    JSON lines with a question, its choices (a list; ARC's `{"text": [...], "label": [...]}`; or
    `target_scores`) and the answer: a number from 0 on, a letter, a label of ARC's form, or the
    text of a choice. Where a string could be several of them, it is the label, then the text, then
    the letter. Raises `UserError` for anything else.
    """
    return [
        _choices(record, question_field, answer_field, place)
        for record, place in _records(file, limit)
    ]


def read_answers(
    file: str, question_field: str | None, answer_field: str | None, limit: int | None = None
) -> list[Shot]:
    """The questions of `file`, JSON lines, with their whole answers; the first `limit` of them."""
    found = []
    for record, place in _records(file, limit):
        name = _field(record, answer_field, ANSWER_FIELDS, place)
        value = record[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            answer = str(value)
        else:
            answer = string_field(record, name, place)
        found.append(Shot(_question(record, question_field, place), answer))
    return found


def _records(file: str, limit: int | None) -> list[tuple[dict[str, Any], str]]:
    """The first `limit` records of the files that `file` names, and the place of each."""
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}; accepted: 1 or more questions")
    found = list(islice(_all_records(file), limit))
    if not found:
        raise UserError(f"{file}: holds no question")
    return found


def _all_records(file: str) -> Iterator[tuple[dict[str, Any], str]]:
    for source in resolve_sources([file]):
        if source.kind != "json_lines":
            raise UserError(f"{source}: accepted are .jsonl, .ndjson and .json, also .gz or .zst")
        examples = _examples(source.path)
        if examples is None:
            yield from read_records(source.path)
        else:
            yield from examples


def _examples(path: Path) -> list[tuple[dict[str, Any], str]] | None:
    """Those of BIG-bench's JSON; None where the file is something else, lines of JSON then."""
    if ".json" not in path.suffixes:
        return None
    try:
        content = json.loads(read_text_file(path))
    except ValueError:
        return None
    if not isinstance(content, dict) or "examples" not in content:
        return None
    examples = content["examples"]
    if not isinstance(examples, list) or not all(isinstance(one, dict) for one in examples):
        raise UserError(f"{path}: `examples` is no list of objects")
    return [(one, f"{path}, example {number}") for number, one in enumerate(examples)]


def _field(record: dict[str, Any], named: str | None, usual: Sequence[str], place: str) -> str:
    name = named or next((name for name in usual if name in record), None)
    if name is None or name not in record:
        wanted = named or f"any of {', '.join(usual)}"
        raise UserError(f"{place}: no field {wanted} (it has {', '.join(list(record)[:10])})")
    return name


def _question(record: dict[str, Any], named: str | None, place: str) -> str:
    return string_field(record, _field(record, named, QUESTION_FIELDS, place), place)


def _choices(
    record: dict[str, Any], question_field: str | None, answer_field: str | None, place: str
) -> Choices:
    question = _question(record, question_field, place)
    if "target_scores" in record:
        scores = record["target_scores"]
        values = list(scores.values()) if isinstance(scores, dict) else []
        if not all(type(value) in (int, float) for value in values):
            raise UserError(f"{place}: target_scores has values that are no numbers")
        return Choices(question, _texts(list(scores), place), tuple(map(float, values)))
    given: Any = record[_field(record, None, CHOICE_FIELDS, place)]
    labels: list[object] = []
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label", [])
    texts = _texts(given, place)
    answer = record[_field(record, answer_field, ANSWER_FIELDS, place)]
    right = _index(answer, texts, labels)
    if right is None:
        raise UserError(
            f"{place}: the answer {answer!r} is none of its {len(texts)} choices; accepted: a"
            " number from 0 on, a letter from A on, a label, or the text of a choice"
        )
    return Choices(question, texts, tuple(float(i == right) for i in range(len(texts))))


def _texts(given: object, place: str) -> tuple[str, ...]:
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{place}: its choices are no list of two or more")
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise UserError(f"{place}: a choice is no text")
    return tuple(given)


def _index(answer: object, texts: Sequence[str], labels: Sequence[object]) -> int | None:
    """Which choice the answer means."""
    letters = ascii_uppercase[: len(texts)]
    if isinstance(answer, str):
        for names in (labels, texts, letters, [str(i) for i in range(len(texts))]):
            if answer in names:
                return list(names).index(answer)
        return None
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    return None
