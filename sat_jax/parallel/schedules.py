"""Pipeline schedules as data, and a simulator of their step time, idle time and memory.

The layers of a model are split into stages, `chunks` of them on each device: stage s is on device
s mod devices. A schedule is the order of the tasks of each device. Start times follow from the
dependencies between tasks and from the costs of the stages.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from sat_jax.errors import UserError

Kind = Literal["forward", "backward", "input", "weight"]
"""`backward` computes the gradients of a stage's inputs and weights in one task; `input` and
`weight` are its two parts as separate tasks."""

EXECUTED = frozenset({"gpipe", "circular"})
"""Names of the schedules that training runs (`nn.pipeline`). All others are simulated only."""


class Task(NamedTuple):
    """The work of one stage on one microbatch."""

    kind: Kind
    stage: int
    microbatch: int


Order = tuple[Task, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`orders`: the tasks of each device in the order in which it computes them."""

    devices: int
    microbatches: int
    chunks: int
    orders: tuple[Order, ...]

    @property
    def stages(self) -> int:
        """Number of stages on all devices."""
        return self.devices * self.chunks


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of each stage for one microbatch: times in any one unit, and the bytes of activations
    that the stage holds from its forward pass to its weight gradients."""

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    activation_bytes: tuple[float, ...]

    def duration(self, task: Task) -> float:
        """Return the duration of a task."""
        s = task.stage
        if task.kind == "backward":
            return self.input[s] + self.weight[s]
        times = {"forward": self.forward, "input": self.input, "weight": self.weight}
        return times[task.kind][s]


class Simulated(NamedTuple):
    """Start of each task, duration of the step, the share of the devices' time in which they are
    idle, and for each device the peak number and bytes of activations that it holds.

    An activation is that of one stage for one microbatch.
    """

    start: dict[Task, float]
    step_time: float
    bubble: float
    activations: tuple[int, ...]
    activation_bytes: tuple[float, ...]


def stage_costs(
    schedule: Schedule,
    forward: Sequence[float],
    input: Sequence[float],
    weight: Sequence[float],
    activation_bytes: Sequence[float],
) -> Costs:
    """Return the costs of stages from those of the layers of each device (one entry, or one for
    each device), which its `chunks` stages share equally."""

    def split(name: str, values: Sequence[float]) -> tuple[float, ...]:
        if len(values) not in (1, schedule.devices):
            raise UserError(
                f"{name} has {len(values)} numbers; accepted: one, or {schedule.devices}, one for"
                " each device"
            )
        if not all(0 <= value < float("inf") for value in values):
            raise UserError(f"{name} is {list(values)}; accepted: finite numbers of 0 or more")
        return tuple(values[s % len(values)] / schedule.chunks for s in range(schedule.stages))

    costs = Costs(
        split("forward", forward),
        split("input", input),
        split("weight", weight),
        split("activation_bytes", activation_bytes),
    )
    if not any((*costs.forward, *costs.input, *costs.weight)):
        raise UserError("all costs are 0; accepted: a positive cost of forward, input or weight")
    return costs


def simulate(schedule: Schedule, costs: Costs) -> Simulated:
    """Start each task as soon as its device is free and its dependencies are finished.

    Raises `ValueError` for orders in which a task waits for one that never starts.
    """
    start: dict[Task, float] = {}
    end: dict[Task, float] = {}
    free = [0.0] * schedule.devices
    waiting = [list(reversed(order)) for order in schedule.orders]
    while any(waiting):
        started = len(start)
        for device, tasks in enumerate(waiting):
            while tasks and all(d in end for d in _needs(tasks[-1], schedule.stages)):
                task = tasks.pop()
                ready = [end[needed] for needed in _needs(task, schedule.stages)]
                start[task] = max(free[device], *ready, 0.0)
                free[device] = end[task] = start[task] + costs.duration(task)
        if len(start) == started:
            raise ValueError(f"deadlock: {[tasks[-1] for tasks in waiting if tasks]}")
    step_time = max(free)
    busy = sum(costs.duration(task) for task in start)
    peaks = [_peak(order, costs) for order in schedule.orders]
    return Simulated(
        start,
        step_time,
        1 - busy / (schedule.devices * step_time),
        tuple(number for number, _ in peaks),
        tuple(size for _, size in peaks),
    )


def timeline(schedule: Schedule) -> list[str]:
    """Return one line for each device with its task in each slot: F, B, I or W (forward, backward,
    input, weight) and the microbatch, and the chunk if there are several. Each of a stage's forward
    pass, input gradients and weight gradients takes one slot; `.` is idle."""
    equal = (1.0,) * schedule.stages
    costs = Costs(equal, equal, equal, equal)
    simulated = simulate(schedule, costs)
    rows = [["."] * round(simulated.step_time) for _ in schedule.orders]
    for (kind, stage, microbatch), first in simulated.start.items():
        chunk = f".{stage // schedule.devices}" if schedule.chunks > 1 else ""
        task = Task(kind, stage, microbatch)
        for slot in range(round(first), round(first + costs.duration(task))):
            rows[stage % schedule.devices][slot] = f"{kind[0].upper()}{microbatch}{chunk}"
    width = max(len(cell) for row in rows for cell in row)
    return [" ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]


def make_schedule(
    name: str, devices: int, microbatches: int, chunks: int | None = None
) -> Schedule:
    """Return the schedule with this name. `chunks`: stages on each device, for the schedules in
    `CHUNKED` only, 2 by default. Raises `UserError` for what the schedule cannot have."""
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r}; accepted: {', '.join(SCHEDULES)}")
    for what, number in (("stages", devices), ("microbatches", microbatches)):
        if number < 1:
            raise UserError(f"{what} {number}; accepted: 1 or more")
    if name not in CHUNKED and chunks is not None:
        raise UserError(f"schedule {name} does not use chunks; accepted: {', '.join(CHUNKED)}")
    if name in CHUNKED and chunks is not None and chunks < 2:
        raise UserError(f"schedule {name} with chunks {chunks}; accepted: 2 or more")
    if name in CHUNKED and microbatches % devices:
        raise UserError(
            f"schedule {name} with microbatches {microbatches}; accepted: multiples of the stages"
            f" {devices}"
        )
    number = (chunks or 2) if name in CHUNKED else 1
    orders = tuple(
        SCHEDULES[name](device, devices, microbatches, number) for device in range(devices)
    )
    return Schedule(devices, microbatches, number, orders)


def _needs(task: Task, stages: int) -> list[Task]:
    """Return the tasks whose results a task needs from other tasks."""
    kind, stage, microbatch = task
    if kind == "forward":
        return [Task(kind, stage - 1, microbatch)] if stage else []
    if kind == "weight":
        return [Task("input", stage, microbatch)]
    following = [Task(kind, stage + 1, microbatch)] if stage + 1 < stages else []
    return [Task("forward", stage, microbatch), *following]


def _peak(order: Order, costs: Costs) -> tuple[int, float]:
    """Return the peak number and bytes of the activations that one device holds."""
    number = most = 0
    size = largest = 0.0
    for kind, stage, _ in order:
        sign = {"forward": 1, "backward": -1, "input": 0, "weight": -1}[kind]
        number, size = number + sign, size + sign * costs.activation_bytes[stage]
        most, largest = max(most, number), max(largest, size)
    return most, largest


def _forward_then_backward(device: int, devices: int, microbatches: int, chunks: int) -> Order:
    """GPipe (Huang et al., arXiv:1811.06965): all forward passes, then all backward passes in
    reverse. With several chunks the circular schedule, whose groups of as many microbatches as
    devices pass through one chunk after the other."""
    if chunks == 1:
        forward = [Task("forward", device, microbatch) for microbatch in range(microbatches)]
    else:
        forward = _in_groups("forward", device, devices, microbatches, range(chunks))
    return (*forward, *(task._replace(kind="backward") for task in reversed(forward)))


def _one_forward_one_backward(device: int, devices: int, microbatches: int, chunks: int) -> Order:
    """1F1B (Narayanan et al., arXiv:2104.04473, section 2.2): as many forward passes as stages
    follow, then a forward and a backward pass in turn."""
    del chunks
    forward = [Task("forward", device, microbatch) for microbatch in range(microbatches)]
    backward = [task._replace(kind="backward") for task in forward]
    return _alternate(forward, backward, devices - device - 1)


def _interleaved(device: int, devices: int, microbatches: int, chunks: int) -> Order:
    """Interleaved 1F1B (arXiv:2104.04473, section 2.2): groups of as many microbatches as devices
    pass through one chunk after the other."""
    forward = _in_groups("forward", device, devices, microbatches, range(chunks))
    backward = _in_groups("backward", device, devices, microbatches, range(chunks)[::-1])
    return _alternate(forward, backward, 2 * (devices - device - 1) + (chunks - 1) * devices)


def _in_groups(
    kind: Kind, device: int, devices: int, microbatches: int, chunks: Sequence[int]
) -> list[Task]:
    """Return one device's tasks of one kind: groups of as many microbatches as devices pass through
    the chunks in this order."""
    return [
        Task(kind, chunk * devices + device, microbatch)
        for first in range(0, microbatches, devices)
        for chunk in chunks
        for microbatch in range(first, first + devices)
    ]


def _zero_bubble_h1(device: int, devices: int, microbatches: int, chunks: int) -> Order:
    """ZB-H1 (Qi et al., arXiv:2401.10241, section 2.1): 1F1B in which device i computes weight
    gradients i microbatches late, which fills the idle time after the last input gradients. No
    device holds more activations than the first one of 1F1B."""
    order: list[Task] = []
    late = 0
    for task in _one_forward_one_backward(device, devices, microbatches, chunks):
        if task.kind == "forward":
            order.append(task)
            continue
        order.append(task._replace(kind="input"))
        if task.microbatch >= device:
            order.append(Task("weight", device, late))
            late += 1
    return (*order, *(Task("weight", device, number) for number in range(late, microbatches)))


def _alternate(forward: list[Task], backward: list[Task], first: int) -> Order:
    """Return `first` forward passes, then a forward and a backward pass in turn, then the
    remaining backward passes."""
    order = forward[:first]
    for number, task in enumerate(forward[first:]):
        order += [task, backward[number]]
    return (*order, *backward[max(len(forward) - first, 0) :])


SCHEDULES: dict[str, Callable[[int, int, int, int], Order]] = {
    "gpipe": _forward_then_backward,
    "circular": _forward_then_backward,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb-h1": _zero_bubble_h1,
}
CHUNKED = ("circular", "interleaved")
"""Schedules with several stages on each device."""
