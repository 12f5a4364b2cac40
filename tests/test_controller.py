"""Controllers: the rungs of a run, their rates, and when neurons are chosen."""

import json
from typing import Any

import pytest

from sat_jax.config_sparsity import SparsityConfig, WeightSparsityConfig
from sat_jax.errors import UserError
from sat_jax.nn.layout import Unit
from sat_jax.sparsity.controller import Controller, make_controller
from sat_jax.sparsity.plan import Neurons

NEURONS = Neurons(
    2,
    (
        Unit("kv_group", 3, "attention", ()),
        Unit("query_head", 2, "attention", ("kv_group",)),
        Unit("channel", 8, "mlp", ()),
    ),
)


def controller(rates: tuple[float, float], steps: int = 16, **changes: Any) -> Controller:
    return make_controller(SparsityConfig(**changes), NEURONS, steps, rates, balance=1)


def described(made: Controller) -> list[tuple[int, int, float, int, int]]:
    """(start, stop, rate, KV groups kept, channels kept) of every rung."""
    counts = [
        tuple(rung.plan.segments[0].kept(unit) for unit in ("kv_group", "channel"))
        for rung in made.rungs
    ]
    return [(r.start, r.stop, r.rate, *c) for r, c in zip(made.rungs, counts, strict=True)]


def test_a_rung_for_every_stair_with_counts_of_its_own() -> None:
    assert described(controller((0.0, 0.5), rungs=2)) == [
        (0, 8, 0.5, 3, 4),
        (8, 12, 0.25, 3, 6),
        (12, 16, 0.0, 3, 8),
    ]


def test_stairs_with_equal_counts_are_one_rung_at_the_first_rate() -> None:
    # 2.1 channels are omitted at the first stair, 1.6 at the second.
    assert described(controller((0.0, 0.26), rungs=4))[0] == (0, 10, 0.26, 3, 6)


def test_what_omits_nothing_has_rate_zero() -> None:
    # Rates 0.4, 0.3, 0.2, 0.1, 0: of three groups a tenth is nothing.
    made = controller((0.4, 0.0), rungs=4)
    assert described(made) == [(0, 12, 0.4, 2, 8), (12, 16, 0.0, 3, 8)]
    assert (made.rungs[-1].rate_attention, made.rungs[-1].rate_mlp) == (0.0, 0.0)
    assert made.sparse
    nothing = controller((0.1, 0.05), schedule="constant")
    assert described(nothing) == [(0, 16, 0.0, 3, 8)]
    assert not nothing.sparse


def test_neurons_are_chosen_as_a_sparse_rung_starts_and_every_few_steps_in_it() -> None:
    made = controller((0.5, 0.5), rungs=2, refresh_every=3)
    chosen = [step for step in range(16) if made.refreshes(step)]
    assert [rung.start for rung in made.rungs] == [0, 8, 12]
    assert chosen == [0, 3, 6, 8, 11]


def test_the_rate_of_a_rung_is_the_mean_of_its_layers() -> None:
    made = make_controller(SparsityConfig(rungs=1), NEURONS, 4, (0.0, (0.25, 0.75)), balance=1)
    assert [(rung.start, rung.stop, rung.rate) for rung in made.rungs] == [(0, 2, 0.5), (2, 4, 0)]
    assert [segment.kept("channel") for segment in made.rungs[0].plan.segments] == [6, 2]


def auto(**changes: Any) -> Controller:
    return controller((0.0, 0.5), rungs=2, schedule="auto", min_gain=0.1, **changes)


def evaluated(made: Controller, losses: dict[int, float]) -> list[int]:
    """The steps after which the next rung began early."""
    return [step for step, loss in losses.items() if made.evaluated(step, loss)]


def borders(made: Controller) -> list[tuple[int, int]]:
    return [(rung.start, rung.stop) for rung in made.rungs]


def test_auto_steps_down_when_the_held_out_loss_stalls() -> None:
    made = auto()
    assert borders(made) == [(0, 8), (8, 12), (12, 16)]
    # A tenth lower is progress, less is not; the best loss is reset with each rung.
    assert evaluated(made, {0: 9.0, 2: 5.0, 4: 4.4, 6: 4.0}) == [6]
    assert borders(made) == [(0, 6), (6, 12), (12, 16)]
    assert evaluated(made, {8: 4.0, 10: 3.9, 14: 3.9, 16: 3.9}) == [10]
    assert borders(made) == [(0, 6), (6, 10), (10, 16)]


def test_auto_begins_no_rung_later_than_a_ladder() -> None:
    made = auto()
    assert evaluated(made, {2: 5.0, 8: 5.0, 12: 4.9}) == []
    assert borders(made) == [(0, 8), (8, 12), (12, 16)]


def test_densities_of_block_sparse_matrices_follow_the_schedule() -> None:
    def made(**weights: Any) -> Controller:
        changes = {"weights": WeightSparsityConfig(density=0.25, block=8, **weights)}
        config = SparsityConfig(rungs=2, **changes)
        return make_controller(config, NEURONS, 16, (0.0, 0.0), 1, grids={"up": (8, 16)})

    def described(made: Controller) -> list[Any]:
        counts = [dict(rung.plan.stored).get("up") for rung in made.rungs]
        return [
            (r.start, r.rate, c and (c.per_row, c.longest))
            for r, c in zip(made.rungs, counts, strict=True)
        ]

    # The first pattern has equal block columns, what grows later has not.
    assert described(made()) == [(0, 0.75, (4, 2)), (8, 0.375, (10, 8)), (12, 0.0, None)]
    assert [made().block_gradients(number) for number in range(3)] == [1, 0, 0]
    assert described(made(pattern="magnitude"))[0] == (0, 0.75, (4, 3))
    assert not made().sparse and not any(made().refreshes(step) for step in range(16))
    assert made().neurons.is_dense(made().rungs[-1].plan)
    assert not made().neurons.is_dense(made().rungs[0].plan)
    exchanged = made(update="rigl", update_every=3)
    assert [step for step in range(16) if exchanged.exchanges(step)] == [3, 6, 11]
    assert [exchanged.block_gradients(number) for number in range(3)] == [3, 1, 0]


def test_matrices_that_store_all_blocks_are_dense() -> None:
    config = SparsityConfig(rungs=4, weights=WeightSparsityConfig(density=0.25, block=8))
    made = make_controller(config, NEURONS, 16, (0.0, 0.0), 1, grids={"up": (8, 2)})
    # 0.5 of two blocks, then 0.875, 1.25, 1.625 and 2 of two: one, and from a half more two.
    assert [(r.start, bool(r.plan.stored)) for r in made.rungs] == [(0, True), (12, False)]


def test_a_ladder_ignores_evaluations() -> None:
    assert evaluated(controller((0.0, 0.5), rungs=2), {1: 5.0, 2: 5.0}) == []


def test_auto_goes_on_where_it_was() -> None:
    losses = {1: 5.0, 2: 4.0, 3: 4.0, 4: 3.9, 5: 3.0, 6: 3.0}
    whole, first = auto(), auto()
    evaluated(whole, losses)
    for cut in range(7):
        first = auto()
        evaluated(first, {step: loss for step, loss in losses.items() if step <= cut})
        second = auto()
        second.restore(json.loads(json.dumps(first.to_json())))
        evaluated(second, {step: loss for step, loss in losses.items() if step > cut})
        assert second.rungs == whole.rungs
        assert second.to_json() == whole.to_json()


def test_other_plans_are_another_run() -> None:
    known = controller((0.0, 0.5), rungs=2).to_json()
    with pytest.raises(UserError, match=r"^the plans of the rungs differ .* an older version"):
        controller((0.0, (0.25, 0.75)), rungs=2).restore(known)
