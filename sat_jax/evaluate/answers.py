"""Exact match: a model writes an answer, a rule takes the result out of it, and it is compared."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.choices import Mean, mean
from sat_jax.evaluate.complete import Completion, complete
from sat_jax.evaluate.prompts import Prompting, Shot
from sat_jax.nn.decoder import Decoder

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
RULES = {
    "number": rf"({_NUMBER})",
    "hashes": rf"####\s*({_NUMBER})",
    "text": r"(?s)\A(.*)\Z",
}


class Rule:
    """Takes the result out of an answer: the last match of a pattern, or of the group in it.

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
        found = list(self._pattern.finditer(text))
        return normalised(found[-1][self._pattern.groups] or "") if found else None


def normalised(result: str) -> str:
    """Without `,` and `$`, without white space and one full stop at its ends, in lower case."""
    return result.replace(",", "").replace("$", "").strip().removesuffix(".").strip().lower()


def same(one: str | None, other: str | None) -> bool:
    """Whether two normalised results are equal: as texts, or as numbers (18 and 18.0). None is not
    equal to anything."""
    if one is None or other is None or one == other:
        return one is not None and one == other
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


class Asked(NamedTuple):
    """A question as it is put to a model, as text and as ids, and the result it should have."""

    question: str
    prompt: str
    ids: Sequence[int]
    expected: str


def ask(
    tokenizer: Tokenizer, problems: Sequence[Shot], prompting: Prompting, rule: Rule
) -> list[Asked]:
    """Every problem as it is put. Raises `UserError` where the rule finds no result to expect."""
    prompts = [prompting.prompt(tokenizer, problem.question) for problem in problems]
    asked = []
    for problem, prompt, ids in zip(
        problems, prompts, tokenizer.encode_batch(prompts), strict=True
    ):
        expected = rule(problem.answer)
        if expected is None:
            raise UserError(
                f"nothing to extract from the answer {problem.answer[-60:]!r}; accepted rules:"
                f" {', '.join(RULES)}, or a regular expression that matches"
            )
        asked.append(Asked(problem.question, prompt, ids, expected))
    return asked


class Answered(NamedTuple):
    """What a model wrote, and the result that was found in it."""

    asked: Asked
    completion: Completion
    found: str | None

    @property
    def right(self) -> bool:
        return same(self.found, self.asked.expected)


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    rule: Rule,
    max_new_tokens: int,
    rows: int,
    *,
    stops: Sequence[Stop] = (),
    done: Callable[[int], object] = lambda _: None,
) -> list[Answered]:
    """The model's answers, greedy; `stops` and `done` are those of `complete`."""
    prompts = [one.ids for one in asked]
    made = complete(model, tokenizer, prompts, max_new_tokens, rows, stops=stops, done=done)
    return [Answered(one, text, rule(text.text)) for one, text in zip(asked, made, strict=True)]


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
