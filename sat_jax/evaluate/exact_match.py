"""Exact match: the model generates an answer, a rule extracts its result, and it is compared."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import Completion
from sat_jax.evaluate.multiple_choice import mean_and_error
from sat_jax.evaluate.numbers import last_number, number_after, value_of
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import SourceQuestion

RULES: dict[str, Callable[[str], str | None]] = {
    "number": last_number,
    "hashes": partial(number_after, "####"),
    "text": lambda text: text,
}
_ACCEPTED = f"accepted: {', '.join(RULES)}, or a regular expression with at most one group"


class ExtractionRule:
    """Extracts the result of an answer: a number, or the last match of a regular expression.

    Names: `number` is the last number, `hashes` the number after the last `####` (as in GSM8K),
    both as in `numbers`; `text` is the whole text. Anything else is a regular expression; the
    result is its match, or that of its group.
    """

    def __init__(self, name: str):
        self._extract = RULES.get(name, self._last_match)
        try:
            self._pattern = re.compile("" if name in RULES else name)
        except re.error as error:
            raise UserError(f"extraction {name!r}: {error}; {_ACCEPTED}") from error
        if self._pattern.groups > 1:
            raise UserError(f"extraction {name!r}: has {self._pattern.groups} groups; {_ACCEPTED}")

    def __call__(self, text: str) -> str | None:
        """Return the normalized result, or None if the text has none."""
        result = self._extract(text)
        return None if result is None else normalize(result)

    def _last_match(self, text: str) -> str | None:
        matches = list(self._pattern.finditer(text))
        return matches[-1][self._pattern.groups] or "" if matches else None


def normalize(result: str) -> str:
    """Return `result` in lower case, without outer white space and a final full stop."""
    return result.strip().removesuffix(".").strip().lower()


def equal_results(result: str | None, expected: str | None) -> bool:
    """Return whether two normalized results are equal, as texts or as numbers (18 and $18.00).

    None is not equal to anything.
    """
    if result is None or expected is None:
        return False
    value = value_of(result)
    return result == expected or (value is not None and value == value_of(expected))


class PromptedQuestion(NamedTuple):
    """A question with its prompt, as text and as ids, and the expected result; None without a
    rule."""

    question: str
    prompt: str
    ids: Sequence[int]
    expected: str | None


def prompt_question(
    tokenizer: Tokenizer,
    problem: QuestionAnswer | SourceQuestion,
    prompt_format: PromptFormat,
    rule: ExtractionRule | None,
) -> PromptedQuestion:
    """Return the prompt of `problem`. Raises `UserError` if its answer has no result."""
    expected = None
    if rule is not None and (expected := rule(problem.answer)) is None:
        raise UserError(
            f"no result in the answer {problem.answer[-60:]!r}; choose another extraction rule"
        )
    prompt = prompt_format.prompt(tokenizer, problem.question)
    (ids,) = prompt_format.encode(tokenizer, [prompt])
    return PromptedQuestion(problem.question, prompt, ids, expected)


def compare_answers(
    questions: Sequence[PromptedQuestion], completions: Sequence[Completion], rule: ExtractionRule
) -> list[dict[str, Any]]:
    """Return the answers with their questions and results; `cut`: truncated at the token limit."""
    answers = []
    for question, completion in zip(questions, completions, strict=True):
        result = rule(completion.text)
        answers.append(
            {
                "question": question.question,
                "prompt": question.prompt,
                "expected": question.expected,
                "text": completion.text,
                "tokens": completion.tokens,
                "cut": completion.truncated,
                "found": result,
                "right": equal_results(result, question.expected),
            }
        )
    return answers


def exact_match_score(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the shares of answers that are correct, have no result, and are truncated."""
    count = len(answers)
    accuracy, stderr = mean_and_error([float(answer["right"]) for answer in answers])
    return {
        "questions": count,
        "accuracy": accuracy,
        "stderr": stderr,
        "no_result": sum(answer["found"] is None for answer in answers) / count,
        "cut": sum(answer["cut"] for answer in answers) / count,
        "new_tokens": sum(answer["tokens"] for answer in answers),
    }
