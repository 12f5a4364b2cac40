"""Batched generation: completions of many prompts, for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.evaluate.generate import GREEDY, Sampling, stream
from sat_jax.nn.decoder import Decoder

_PART = 32  # tokens generated between two searches for a stop text


class Completion(NamedTuple):
    """Generated text. `truncated`: the limit of new tokens was reached before an end."""

    text: str
    tokens: int
    truncated: bool


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rows: int,
    *,
    stops: Sequence[Stop] = (),
    sampling: Sampling = GREEDY,
    on_batch: Callable[[int], object] = lambda _: None,
) -> list[Completion]:
    """Return the completion of every prompt (see `complete_batches`).

    `on_batch` is called with the number of tokens of each batch.
    """
    completions: dict[int, Completion] = {}
    for batch in complete_batches(
        model, tokenizer, prompts, max_new_tokens, rows, stops=stops, sampling=sampling
    ):
        completions |= batch
        on_batch(sum(completion.tokens for completion in batch.values()))
    return [completions[index] for index in range(len(prompts))]


def complete_batches(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rows: int,
    *,
    stops: Sequence[Stop] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    start: int = 0,
) -> Iterator[dict[int, Completion]]:
    """Yield the completions of `rows` prompts of similar lengths at a time, by index of the prompt;
    the first `start` batches are left out.

    A completion ends before the model's end-of-text token, before the first of `stops` (token ids
    or texts), or after `max_new_tokens`. `tokens` counts all generated tokens, also those after a
    stop text. Random numbers depend on `seed` and the index of the prompt. The last batch is padded
    with copies of a prompt, so that one batch size is compiled. Raises `UserError` for prompts that
    the model does not accept.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for first in range(start * rows, len(order), rows):
        indices = order[first : first + rows]
        padded = indices + indices[-1:] * (rows - len(indices))
        batch = [prompts[index] for index in padded]
        limits = (max_new_tokens, stops, sampling, seed)
        results = _complete_batch(model, tokenizer, batch, padded, *limits)
        yield dict(zip(indices, results, strict=False))


def _complete_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    max_new_tokens: int,
    stops: Sequence[Stop],
    sampling: Sampling,
    seed: int,
) -> list[Completion]:
    stop_texts = [stop for stop in stops if isinstance(stop, str)]
    stop_ids = {stop for stop in stops if isinstance(stop, int)}.union(model.config.eos_token_ids)
    ids: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    parts = stream(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        every=_PART,
        numbers=numbers,
    )
    while any(running) and (part := next(parts, None)) is not None:
        for row, new in enumerate(part):
            if running[row]:
                ids[row] += new
                # A part is shorter if the row has ended, and at the limit of new tokens.
                ended = len(new) < _PART or _before_stop(tokenizer, ids[row], stop_texts)[1]
                running[row] = not ended
    completions = []
    for row_ids in ids:
        text, stopped = _before_stop(tokenizer, row_ids, stop_texts)
        truncated = not stopped and len(row_ids) >= max_new_tokens
        completions.append(Completion(text, len(row_ids), truncated))
    return completions


def _before_stop(
    tokenizer: Tokenizer, ids: Sequence[int], stop_texts: Sequence[str]
) -> tuple[str, bool]:
    """Return the text of `ids` before the first stop text, and whether there is one."""
    text = tokenizer.decode(ids)
    ends = [text.index(stop) for stop in stop_texts if stop in text]
    return text[: min(ends, default=len(text))], bool(ends)
