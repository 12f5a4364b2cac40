"""Exact match: the model writes an answer, a rule takes the result out of it, and it is compared."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.choices import Mean, mean
from sat_jax.evaluate.complete import Completion, complete
from sat_jax.evaluate.prompts import Prompting, Shot
from sat_jax.models.llama import Llama

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
RULES = {
    "number": rf"({_NUMBER})",
    "hashes": rf"####\s*({_NUMBER})",
    "text": r"(?s)\A(.*)\Z",
}


class Rule:
    """Takes the result out of an answer: the last match of a pattern, of its group where it has one.

    By name: `number` is the last number, `hashes` the number behind the last `####` (GSM8K's form),
    `text` the whole text; anything else is a regular expression.
    """

    def __init__(self, name: str):
        try:
            self._pattern = re.compile(RULES.get(name, name))
        except re.error as error:
            raise UserError(
                f"extraction {name!r}: {error}; accepted: {', '.join(RULES)}, or a regular"
                " expression with one group or none"
            ) from error
        if self._pattern.groups > 1:
            raise UserError(
                f"extraction {name!r}: has {self._pattern.groups} groups; accepted: one"
            )

    def __call__(self, text: str) -> str | None:
        """The result, normalised; None where there is none."""
        found = None
        for found in self._pattern.finditer(text):
            pass
        return None if found is None else normalised(found[self._pattern.groups] or "")


def normalised(result: str) -> str:
    """Without `,` and `$`, without white space and one full stop at its ends, in lower case."""
    return result.replace(",", "").replace("$", "").strip().removesuffix(".").strip().lower()


def same(one: str | None, other: str | None) -> bool:
    """Whether two normalised results are equal: as texts, or as numbers (18 and 18.0). None is not
    equal to anything."""
    if one is None or other is None:
        return False
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return one == other


class Answered(NamedTuple):
    """A question, what the model wrote, and what was taken out of both answers."""

    question: str
    prompt: str
    completion: Completion
    expected: str
    found: str | None

    @property
    def right(self) -> bool:
        return same(self.found, self.expected)


def expected_results(problems: Sequence[Shot], rule: Rule) -> list[str]:
    """What the rule takes out of the given answers. Raises `UserError` where it finds nothing."""
    results = []
    for number, problem in enumerate(problems):
        result = rule(problem.answer)
        if result is None:
            raise UserError(
                f"question {number}: nothing to extract in its answer {problem.answer[-60:]!r};"
                f" accepted rules: {', '.join(RULES)}, or a regular expression"
            )
        results.append(result)
    return results


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    problems: Sequence[Shot],
    prompting: Prompting,
    rule: Rule,
    max_new_tokens: int,
    rows: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[Answered]:
    """The model's answers, greedy. A plain prompt's ends where the model goes on to a next question.

    Raises `UserError` for a question that leaves no room for `max_new_tokens`.
    """
    expected = expected_results(problems, rule)
    prompts = [prompting.prompt(tokenizer, problem.question) for problem in problems]
    stops = [] if prompting.end is None else [f"\n{prompting.end}"]
    ids = tokenizer.encode_batch(prompts)
    completions = complete(model, tokenizer, ids, max_new_tokens, rows, stops=stops, done=done)
    return [
        Answered(problem.question, prompt, completion, result, rule(completion.text))
        for problem, prompt, completion, result in zip(
            problems, prompts, completions, expected, strict=True
        )
    ]


class Marks(NamedTuple):
    """Shares of the questions: answered rightly, without a result, and cut off by the limit."""

    accuracy: Mean
    without_result: float
    cut: float


def marks(answers: Sequence[Answered]) -> Marks:
    """The marks of one or more answers."""
    count = len(answers)
    return Marks(
        mean([float(one.right) for one in answers]),
        sum(one.found is None for one in answers) / count,
        sum(one.completion.cut for one in answers) / count,
    )
