"""Controllers: which rungs a run has, what they say of themselves, and when neurons are chosen."""

from typing import Any

from sat_jax.config import SparsityConfig
from sat_jax.sparsity.controller import Controller, make_controller
from sat_jax.sparsity.plan import Neurons

NEURONS = Neurons(layers=2, kv_groups=3, query_heads=2, channels=8)


def controller(rates: tuple[float, float], steps: int = 16, **changes: Any) -> Controller:
    return make_controller(SparsityConfig(**changes), NEURONS, steps, rates, balance=1)


def told(made: Controller) -> list[tuple[int, int, float, int, int]]:
    """(start, stop, rate, KV groups kept, channels kept) of every rung."""
    counts = [
        (rung.plan.segments[0].kv_groups, rung.plan.segments[0].channels) for rung in made.rungs
    ]
    return [(r.start, r.stop, r.rate, *c) for r, c in zip(made.rungs, counts, strict=True)]


def test_a_rung_for_every_stair_with_counts_of_its_own() -> None:
    assert told(controller((0.0, 0.5), rungs=2)) == [
        (0, 8, 0.5, 3, 4),
        (8, 12, 0.25, 3, 6),
        (12, 16, 0.0, 3, 8),
    ]


def test_stairs_with_equal_counts_are_one_rung_at_the_first_rate() -> None:
    # 2.1 channels are omitted at the first stair, 1.6 at the second.
    assert told(controller((0.0, 0.26), rungs=4))[0] == (0, 10, 0.26, 3, 6)


def test_what_omits_nothing_has_rate_zero() -> None:
    # Rates 0.4, 0.3, 0.2, 0.1, 0: of three groups a tenth is nothing.
    made = controller((0.4, 0.0), rungs=4)
    assert told(made) == [(0, 12, 0.4, 2, 8), (12, 16, 0.0, 3, 8)]
    assert (made.rungs[-1].rate_attention, made.rungs[-1].rate_mlp) == (0.0, 0.0)
    assert made.sparse
    nothing = controller((0.1, 0.05), schedule="constant")
    assert told(nothing) == [(0, 16, 0.0, 3, 8)]
    assert not nothing.sparse


def test_neurons_are_chosen_as_a_sparse_rung_starts_and_every_few_steps_in_it() -> None:
    made = controller((0.5, 0.5), rungs=2, refresh_every=3)
    chosen = [step for step in range(16) if made.refreshes(step)]
    assert [rung.start for rung in made.rungs] == [0, 8, 12]
    assert chosen == [0, 3, 6, 8, 11]
