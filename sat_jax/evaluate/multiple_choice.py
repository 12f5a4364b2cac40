"""Multiple choice: the model selects the choice with the highest likelihood after the question."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.likelihood import Pair, encode_pairs, likelihoods
from sat_jax.evaluate.prompts import PromptFormat
from sat_jax.evaluate.question_files import MultipleChoiceQuestion, name_of
from sat_jax.evaluate.usable import usable
from sat_jax.nn.decoder import Decoder


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and its standard error s / √n with n - 1 degrees of freedom in s.

    The error of a single value is None.
    """
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return float(array.mean()), error


def score_choices(
    questions: Sequence[MultipleChoiceQuestion], log_p: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return the figures for the log p of every choice of every question.

    `accuracy` selects the choice with the largest log p; `accuracy_per_byte` the one with the
    largest log p / (UTF-8 bytes of the choice). lm-evaluation-harness calls these acc and
    acc_bytes; its acc_norm divides by characters, which is the same for ASCII. `chance` is the
    expected accuracy of a random choice.

    A selected choice counts with its score (multiple_choice_grade of BIG-bench, where several
    choices may be correct, or partly correct); choices with equal likelihood count with the mean of
    their scores.
    """
    plain, per_byte, chance = [], [], []
    for question, choice_log_p in zip(questions, log_p, strict=True):
        plain.append(_score_of_best(choice_log_p, question.scores))
        sizes = [len(choice.encode()) for choice in question.choices]
        normalized = [p / size for p, size in zip(choice_log_p, sizes, strict=True)]
        per_byte.append(_score_of_best(normalized, question.scores))
        chance.append(sum(question.scores) / len(question.scores))
    accuracy, stderr = mean_and_error(plain)
    accuracy_per_byte, stderr_per_byte = mean_and_error(per_byte)
    return {
        "questions": len(questions),
        "accuracy": accuracy,
        "stderr": stderr,
        "accuracy_per_byte": accuracy_per_byte,
        "stderr_per_byte": stderr_per_byte,
        "chance": sum(chance) / len(chance),
    }


def _score_of_best(likelihood: Sequence[float], scores: Sequence[float]) -> float:
    best = [score for p, score in zip(likelihood, scores, strict=True) if p == max(likelihood)]
    return sum(best) / len(best)


def encode_choices(
    tokenizer: Tokenizer, prompt_format: PromptFormat, questions: Sequence[MultipleChoiceQuestion]
) -> list[Pair]:
    """Return the prompt and the choice as a pair, for every choice of every question, in order."""
    texts = []
    for question in questions:
        prompt = prompt_format.prompt(tokenizer, question.question)
        texts += [(prompt, prompt_format.separator + choice) for choice in question.choices]
    return encode_pairs(tokenizer, texts, partial(prompt_format.encode, tokenizer))


def evaluate_choices(
    questions: Sequence[MultipleChoiceQuestion],
    pairs: Sequence[Pair],
    rows: int,
    model: Decoder,
    on_batch: Callable[[int], object] = lambda _: None,
    faults: list[str] | None = None,
) -> dict[str, Any]:
    """Return the figures; `pairs` as from `encode_choices`, `on_batch` as in `likelihoods`.

    A question with a likelihood that is NaN is a fault, see `usable`.
    """
    results = iter(likelihoods(model, pairs, rows, on_batch))
    log_p = [[next(results).log_p for _ in question.choices] for question in questions]
    pairs_of_lists = zip(questions, log_p, strict=True)
    scored = usable(_check_nan, pairs_of_lists, faults, lambda item: name_of(item[0]))
    return score_choices(*zip(*scored, strict=True))


def _check_nan(
    scored: tuple[MultipleChoiceQuestion, list[float]],
) -> tuple[MultipleChoiceQuestion, list[float]]:
    if any(map(math.isnan, scored[1])):
        raise UserError(
            "the log-likelihood of a choice is NaN; the model's weights are damaged, or its"
            " activations overflow"
        )
    return scored
