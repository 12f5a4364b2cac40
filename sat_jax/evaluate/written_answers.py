"""Answers of a model to questions, as examples for the training of another one.

All answers: sequence-level distillation (Kim and Rush, arXiv:1606.07947). Only those whose result
equals that of a reference answer: distillation of rationales (Ho et al., arXiv:2212.10071, section
3; for the model itself STaR, Zelikman et al., arXiv:2203.14465, section 3.1).
"""

import fcntl
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sat_jax.errors import UserError
from sat_jax.evaluate.completions import Completion
from sat_jax.evaluate.exact_match import ExtractionRule, PromptedQuestion, equal_results
from sat_jax.evaluate.question_files import SourceQuestion

TRUNCATED = "that reached the maximum of new tokens"
EMPTY = "without text"
NO_RESULT = "without a result"
OTHER_RESULT = "with another result than the reference answer"
REPEATED = "equal to another one of the same question"


class Progress:
    """A file with all batches of answers so far: a line with the settings, then one for each batch.

    A batch is one line, so that none is stored in part. `batches` are completions by number.
    """

    def __init__(self, file: TextIO, batches: list[dict[int, Completion]]):
        self._file, self.batches = file, batches

    def append(self, batch: Mapping[int, Completion]) -> None:
        """Store a batch."""
        _write_line(self._file, list(batch.items()))
        self.batches.append(dict(batch))

    @property
    def completions(self) -> dict[int, Completion]:
        """The completions of all batches by number, in order."""
        return dict(sorted(item for batch in self.batches for item in batch.items()))


@contextmanager
def open_progress(path: Path, settings: Mapping[str, Any]) -> Iterator[Progress]:
    """Open the progress of answers with these settings, and lock it; the file is new or continued.

    A last line that is not complete is removed. Raises `UserError` for a file of other settings or
    of another kind, and for one that another process has locked.
    """
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path}: in use by another process") from error
        file.seek(0)
        content = file.read()
        complete = content[: content.rfind("\n") + 1]
        try:
            lines: list[Any] = [json.loads(line) for line in complete.splitlines()]
            differing = _differences(lines[0], settings) if lines else []
            batches = [{n: Completion(*values) for n, values in line} for line in lines[1:]]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the progress of answers: {error}") from error
        if differing:
            raise UserError(
                f"{path}: answers with other settings: {'; '.join(differing)}; accepted: the same"
                " settings, or another --out"
            )
        file.truncate(len(complete.encode()))
        if not complete:
            _write_line(file, settings)
        yield Progress(file, batches)


def _differences(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {stored.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted(stored.keys() | settings.keys())
        if stored.get(name) != settings.get(name)
    ]


def _write_line(file: TextIO, value: Any) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()


def training_rows(
    questions: Sequence[tuple[SourceQuestion, PromptedQuestion]],
    completions: Mapping[int, Completion],
    samples: int,
    rule: ExtractionRule | None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the examples of the answers that are kept, and the number of the others by reason.

    Completion n is an answer to question n // `samples`. An example has `messages`, the question
    and the answer, which `data.format=messages` reads, and in `source` all fields of the question.
    """
    rows, left_out, kept = [], Counter[str](), set()
    for number, completion in completions.items():
        source, prompted = questions[number // samples]
        text = completion.text.strip()
        reason = _reason(text, completion, prompted.expected, rule)
        if not reason and (number // samples, text) in kept:
            reason = REPEATED
        if reason:
            left_out[reason] += 1
            continue
        kept.add((number // samples, text))
        turns = (("user", source.question), ("assistant", text))
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"messages": messages, "source": source.fields})
    return rows, left_out


def _reason(
    text: str, completion: Completion, expected: str | None, rule: ExtractionRule | None
) -> str:
    """Return why an answer is left out, or ""."""
    if completion.truncated:
        return TRUNCATED
    if not text:
        return EMPTY
    if rule is None:
        return ""
    result = rule(text)
    if result is None:
        return NO_RESULT
    return "" if equal_results(result, expected) else OTHER_RESULT


def rows_as_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
