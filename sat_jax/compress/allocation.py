"""Allocation of a budget: one option for each item, so that the sum of losses is small."""

from collections.abc import Sequence
from typing import NamedTuple

from sat_jax.errors import UserError


class Option(NamedTuple):
    """What an option of an item costs, and by how much it increases the loss."""

    cost: float
    loss: float


def allocate(items: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """Return the number of the chosen option of each item, with a sum of costs of at most `budget`.

    Of each item only options on the lower convex hull of (cost, loss) are chosen. All items begin
    with the cheapest one; steps along the hulls are taken in the order of the decrease of the loss
    for the cost, unless a step exceeds the budget. No choice that costs at most as much has a
    smaller loss while all steps fit; after that, the loss exceeds the smallest one by less than the
    decrease by the first step that did not fit. Raises `UserError` if the cheapest options cost
    more than the budget.
    """
    hulls = [lower_hull(options) for options in items]
    chosen = [0] * len(items)
    spent = sum(options[hull[0]].cost for options, hull in zip(items, hulls, strict=True))
    if spent > budget:
        raise UserError(f"budget {budget:g}; accepted: {spent:g} or more")
    steps = []
    for item, (options, hull) in enumerate(zip(items, hulls, strict=True)):
        for number in range(1, len(hull)):
            before, after = options[hull[number - 1]], options[hull[number]]
            cost = after.cost - before.cost
            steps.append(((before.loss - after.loss) / cost, item, number, cost))
    for _, item, number, cost in sorted(steps, key=lambda step: -step[0]):
        if chosen[item] == number - 1 and spent + cost <= budget:
            chosen[item], spent = number, spent + cost
    return [hull[number] for hull, number in zip(hulls, chosen, strict=True)]


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Return the numbers of the options on the lower convex hull, from the cheapest to the one with
    the smallest loss; the slopes between them get flatter."""
    hull: list[int] = []
    for number in sorted(range(len(options)), key=options.__getitem__):
        point = options[number]
        if hull and point.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and not _is_below(options[hull[-2]], options[hull[-1]], point):
            hull.pop()
        hull.append(number)
    return hull


def _is_below(first: Option, middle: Option, last: Option) -> bool:
    """Return whether the middle point is below the line through the two others."""
    slope = (last.loss - first.loss) * (middle.cost - first.cost)
    return (middle.loss - first.loss) * (last.cost - first.cost) < slope
