"""Multiple choice by likelihood: the choice that the model finds likeliest behind the question."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.likelihood import Pair, encode_pairs, likelihoods
from sat_jax.evaluate.prompts import Prompting
from sat_jax.evaluate.questions import Choices
from sat_jax.nn.decoder import Decoder


class Mean(NamedTuple):
    """A mean over questions and its standard error, s / √n with s from n - 1 degrees of freedom."""

    value: float
    error: float | None  # None of a single question


def mean(values: Sequence[float]) -> Mean:
    """The mean of `values`, at least one."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return Mean(float(array.mean()), error)


class Grade(NamedTuple):
    """How well choices were made: shares of what could be had, 0 to 1.

    `accuracy` takes the choice with the largest log p, `per_byte` that with the largest
    log p / bytes of the choice in UTF-8: lm-evaluation-harness calls these acc and acc_bytes, and
    its acc_norm divides by characters, which is the same for ASCII. `chance` is what a choice by
    lot gets.
    """

    accuracy: Mean
    per_byte: Mean
    chance: float


def grade(questions: Sequence[Choices], log_p: Sequence[Sequence[float]]) -> Grade:
    """The grade for `log_p` of every choice of every question.

    A choice earns its score (BIG-bench's multiple_choice_grade, where several may be right or one
    half right); choices that are exactly equally likely earn the mean of theirs. Raises `UserError`
    where a likelihood is no number.
    """
    plain, per_byte, chance = [], [], []
    for question, of_choices in zip(questions, log_p, strict=True):
        if any(map(math.isnan, of_choices)):
            raise UserError(
                f"question {question.question[:60]!r}: the log-likelihood of a choice is NaN; the"
                " model's weights are damaged, or its numbers overflow"
            )
        sizes = [len(choice.encode()) for choice in question.choices]
        plain.append(_earned(of_choices, question.scores))
        normal = [p / size for p, size in zip(of_choices, sizes, strict=True)]
        per_byte.append(_earned(normal, question.scores))
        chance.append(sum(question.scores) / len(question.scores))
    return Grade(mean(plain), mean(per_byte), sum(chance) / len(chance))


def _earned(likely: Sequence[float], scores: Sequence[float]) -> float:
    best = [score for p, score in zip(likely, scores, strict=True) if p == max(likely)]
    return sum(best) / len(best)


def encode_choices(
    tokenizer: Tokenizer, prompting: Prompting, questions: Sequence[Choices]
) -> list[Pair]:
    """Every choice of every question behind its prompt, in order."""
    texts = []
    for question in questions:
        prompt = prompting.prompt(tokenizer, question.question)
        texts += [(prompt, prompting.joint + choice) for choice in question.choices]
    return encode_pairs(tokenizer, texts)


def choose(
    model: Decoder,
    questions: Sequence[Choices],
    pairs: Sequence[Pair],
    rows: int,
    done: Callable[[int], object] = lambda _: None,
) -> Grade:
    """The model's grade; `pairs` are those of `encode_choices`, `done` that of `likelihoods`."""
    found = iter(likelihoods(model, pairs, rows, done))
    return grade(questions, [[next(found).log_p for _ in one.choices] for one in questions])
