"""Prompts to texts, many at a time: what evaluations do with a model's generation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.evaluate.generate import GREEDY, Sampling, stream
from sat_jax.nn.decoder import Decoder

_EVERY = 32  # tokens between two looks at whether a stop text has come


class Completion(NamedTuple):
    """What a model wrote. `cut`: it ran into the limit of new tokens, with no end of its own."""

    text: str
    tokens: int
    cut: bool


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rows: int,
    *,
    stops: Sequence[Stop] = (),
    sampling: Sampling = GREEDY,
    done: Callable[[int], object] = lambda _: None,
) -> list[Completion]:
    """The completion of every prompt, `rows` at once, prompts of like length together.

    One ends before the model's end-of-text token, before the first of `stops` in it, ids or texts,
    or after `max_new_tokens`; `tokens` counts what was made, some of it behind a stop text. All
    batches have `rows` rows, the last one repeats a prompt: no batch size of its own is compiled.
    `done` hears of every batch how many tokens were made. Raises `UserError` for prompts that the
    model cannot take.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        batch = [prompts[number] for number in numbers]
        batch += batch[-1:] * (rows - len(batch))
        texts = _batch(model, tokenizer, batch, max_new_tokens, stops, sampling)
        found |= zip(numbers, texts, strict=False)
        done(sum(found[number].tokens for number in numbers))
    return [found[number] for number in range(len(prompts))]


def _batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[Stop],
    sampling: Sampling,
) -> list[Completion]:
    texts = [stop for stop in stops if isinstance(stop, str)]
    ends = {stop for stop in stops if isinstance(stop, int)}.union(model.config.eos_token_ids)
    ids: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for parts in stream(
        model, prompts, max_new_tokens, sampling=sampling, stop_ids=ends, every=_EVERY
    ):
        for row, part in enumerate(parts):
            if running[row]:
                ids[row] += part
                # Shorter than asked for where its end came, and at the last part.
                running[row] = len(part) == _EVERY and not _stopped(tokenizer, ids[row], texts)
        if not any(running):
            break
    return [_completion(tokenizer, row, max_new_tokens, texts) for row in ids]


def _stopped(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> bool:
    text = tokenizer.decode(ids) if stops else ""
    return any(stop in text for stop in stops)


def _completion(
    tokenizer: Tokenizer, ids: Sequence[int], max_new_tokens: int, stops: Sequence[str]
) -> Completion:
    text = tokenizer.decode(ids)
    ends = [text.index(stop) for stop in stops if stop in text]
    cut = not ends and len(ids) >= max_new_tokens
    return Completion(text[: min(ends)] if ends else text, len(ids), cut)
