"""Passkey retrieval: a number hidden in a long irrelevant text is asked for at its end.

Source: Mohtashami and Jaggi (arXiv:2305.16300), whose texts and rule of comparison these are, as in
the evaluation published with YaRN (arXiv:2309.00071).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.multiple_choice import mean_and_error

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there.\n"
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_FACT = "\nThe pass key{of} is {key}. Remember it. {key} is the pass key{of}.\n"
_QUESTION = "\nWhat is the pass key{of}? The pass key{of} is"
_KEYS = range(10_000, 100_000)
# A space and five digits are at most six tokens; one more shows that the number ends.
ANSWER_TOKENS = 7


@dataclasses.dataclass(frozen=True)
class PasskeyTask:
    """`trials` prompts at each of `depths` equally spaced depths.

    A prompt and the `ANSWER_TOKENS` of its answer have `length` tokens together. `keys` numbers are
    hidden in a prompt. The one that is asked for has the depth of the prompt, and the others have
    random depths. Raises `UserError` for a number that is out of range.
    """

    length: int
    depths: int = 5
    trials: int = 4
    keys: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depths", "trials", "keys"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}; accepted: 1 or more")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}; accepted: 0 or more")


class PasskeyPrompt(NamedTuple):
    """Token ids of a prompt, the number that answers it, and its depth in the irrelevant text:
    from 0, the begin, to 1, the end."""

    ids: list[int]
    key: str
    depth: float


def passkey_prompts(task: PasskeyTask, tokenizer: Tokenizer) -> list[PasskeyPrompt]:
    """Return the prompts of all depths, in order; equal tasks give equal prompts.

    The irrelevant text is repeated, and cut at a token. Raises `UserError` if the instructions,
    the keys and the question are longer than the length.
    """
    rng = np.random.default_rng((task.seed, task.length))
    depths = np.linspace(0, 1, task.depths).repeat(task.trials).tolist()
    return [_prompt(task, tokenizer, depth, rng) for depth in depths]


def _prompt(
    task: PasskeyTask, tokenizer: Tokenizer, depth: float, rng: np.random.Generator
) -> PasskeyPrompt:
    keys = [str(key) for key in rng.choice(_KEYS, task.keys, replace=False)]
    of = [f" of box {number}" if task.keys > 1 else "" for number in range(1, task.keys + 1)]
    asked, places = int(rng.integers(task.keys)), rng.random(task.keys)
    places[asked] = depth
    texts = [_FACT.format(key=key, of=name) for key, name in zip(keys, of, strict=True)]
    texts = [_TASK, _FILLER, _QUESTION.format(of=of[asked]), *texts]
    start, filler, question, *facts = tokenizer.encode_rendered(texts)
    ids = [*tokenizer.prefix, *start]
    fixed = len(ids) + len(question) + sum(map(len, facts)) + ANSWER_TOKENS
    if fixed > task.length:
        raise UserError(f"passkey length {task.length}; accepted: {fixed} tokens or more")
    filler = list(islice(cycle(filler), task.length - fixed))
    previous = 0
    for cut, fact in sorted(zip((places * len(filler)).round().astype(int), facts, strict=True)):
        ids += [*filler[previous:cut], *fact]
        previous = cut
    return PasskeyPrompt([*ids, *filler[previous:], *question], keys[asked], depth)


def passkey_figures(
    task: PasskeyTask,
    prompts: Sequence[PasskeyPrompt],
    answer: Callable[[list[list[int]]], Sequence[str]],
) -> dict[str, Any]:
    """Return the share of prompts whose key `answer` gives, with its standard error.

    `answer` returns the text after each prompt. Its first number must be the key.
    `depth_accuracy` has the share at each depth.
    """
    texts = answer([prompt.ids for prompt in prompts])
    correct = [
        (number := re.search(r"\d+", text)) is not None and number[0] == prompt.key
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    accuracy, stderr = mean_and_error(correct)
    by_depth = np.reshape(correct, (task.depths, task.trials)).mean(axis=1)
    return {
        "context": task.length,
        "prompts": len(prompts),
        "accuracy": accuracy,
        "stderr": stderr,
        "depth_accuracy": by_depth.tolist(),
    }
