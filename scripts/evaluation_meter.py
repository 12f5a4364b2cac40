"""Speed and progress of an evaluation."""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from sat_jax.nn.decoder import Decoder

Args = argparse.Namespace
Figures = dict[str, Any]
Evaluation = Callable[[Decoder], Iterable[Figures]]  # from a model to its lines of output


class Meter:
    """Progress bar on stderr that measures the speed; called with the tokens of each batch."""

    def __init__(self, total: int):
        self.batches: list[tuple[float, int]] = []  # end time and tokens
        self._bar = tqdm(
            desc="evaluating", unit=" tokens", unit_scale=True, total=total, leave=False
        )

    def __call__(self, tokens: int) -> None:
        self.batches.append((time.perf_counter(), tokens))
        self._bar.update(tokens)

    def speed(self) -> float | None:
        """Close the bar and return tokens/s, without the first batch because of its compilation."""
        self._bar.close()
        tokens = sum(count for _, count in self.batches[1:])
        return tokens / (self.batches[-1][0] - self.batches[0][0]) if tokens else None


def measured(total: int, evaluate: Callable[[Decoder, Meter], Figures]) -> Evaluation:
    """Return `evaluate` with a meter of `total` tokens; the speed is added to its figures."""

    def run(model: Decoder) -> list[Figures]:
        meter = Meter(total)
        return [{**evaluate(model, meter), "tokens_per_second": meter.speed()}]

    return run
