"""Exact match: the model generates an answer, a rule extracts its result, and it is compared."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import Completion
from sat_jax.evaluate.multiple_choice import mean_and_error
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
RULES = {
    "number": rf"({_NUMBER})",
    "hashes": rf"####\s*({_NUMBER})",
    "text": r"(?s)\A(.*)\Z",
}
_ACCEPTED = f"accepted: {', '.join(RULES)}, or a regular expression with at most one group"


class ExtractionRule:
    """Extracts the result of an answer: the last match of a pattern, or of the group in it.

    Names: `number` is the last number, `hashes` the number after the last `####` (as in GSM8K),
    `text` the whole text. Anything else is a regular expression.
    """

    def __init__(self, name: str):
        try:
            self._pattern = re.compile(RULES.get(name, name))
        except re.error as error:
            raise UserError(f"extraction {name!r}: {error}; {_ACCEPTED}") from error
        if self._pattern.groups > 1:
            raise UserError(f"extraction {name!r}: has {self._pattern.groups} groups; {_ACCEPTED}")

    def __call__(self, text: str) -> str | None:
        """Return the normalized result, or None if the text has none."""
        matches = list(self._pattern.finditer(text))
        return normalize(matches[-1][self._pattern.groups] or "") if matches else None


def normalize(result: str) -> str:
    """Return `result` in lower case, without `,`, `$`, outer white space and a final full stop."""
    return result.replace(",", "").replace("$", "").strip().removesuffix(".").strip().lower()


def equal_results(result: str | None, expected: str | None) -> bool:
    """Return whether two normalized results are equal, as texts or as numbers (18 and 18.0).

    None is not equal to anything.
    """
    if result is None or expected is None:
        return False
    try:
        return result == expected or Decimal(result) == Decimal(expected)
    except InvalidOperation:
        return False


class PromptedQuestion(NamedTuple):
    """A question with its prompt, as text and as ids, and the expected result."""

    question: str
    prompt: str
    ids: Sequence[int]
    expected: str


def prompt_questions(
    tokenizer: Tokenizer,
    problems: Sequence[QuestionAnswer],
    prompt_format: PromptFormat,
    rule: ExtractionRule,
) -> list[PromptedQuestion]:
    """Return the prompts of `problems`. Raises `UserError` if an answer has no expected result."""
    prompts = [prompt_format.prompt(tokenizer, problem.question) for problem in problems]
    questions = []
    for problem, prompt, ids in zip(
        problems, prompts, prompt_format.encode(tokenizer, prompts), strict=True
    ):
        expected = rule(problem.answer)
        if expected is None:
            raise UserError(
                f"no result in the answer {problem.answer[-60:]!r}; choose another extraction rule"
            )
        questions.append(PromptedQuestion(problem.question, prompt, ids, expected))
    return questions


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
