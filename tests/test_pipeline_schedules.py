"""Pipeline schedules: hand-computed tables, published formulas, memory, and bad input."""

import dataclasses
import sys

import pytest

from sat_jax.nn.pipeline import number_of_ticks
from sat_jax.parallel.schedules import (
    CHUNKED,
    EXECUTED,
    SCHEDULES,
    Costs,
    Simulated,
    Task,
    make_schedule,
    simulate,
    stage_costs,
    timeline,
)
from scripts.pipeline import main
from tests.user_errors import user_error

SIZES = [(2, 2), (2, 6), (4, 4), (4, 8), (3, 9), (4, 32)]  # devices, microbatches


def simulated(
    name: str,
    devices: int,
    microbatches: int,
    *,
    chunks: int | None = None,
    costs: tuple[float, float, float] = (2.0, 3.0, 1.0),
) -> Simulated:
    schedule = make_schedule(name, devices, microbatches, chunks)
    return simulate(schedule, stage_costs(schedule, *((cost,) for cost in costs), (10.0,)))


TABLES = {
    ("gpipe", 2, 2): ["F0 F1 .  .  .  B1 B1 B0 B0", ".  F0 F1 B1 B1 B0 B0 .  ."],
    ("1f1b", 2, 2): ["F0 F1 .  .  B0 B0 .  B1 B1", ".  F0 B0 B0 F1 B1 B1 .  ."],
    ("zb-h1", 2, 3): ["F0 F1 .  I0 W0 F2 I1 W1 I2 W2", ".  F0 I0 F1 I1 W0 F2 I2 W1 W2"],
    ("circular", 2, 2): [
        "F0.0 F1.0 F0.1 F1.1 .    .    .    B1.1 B1.1 B0.1 B0.1 B1.0 B1.0 B0.0 B0.0",
        ".    F0.0 F1.0 F0.1 F1.1 B1.1 B1.1 B0.1 B0.1 B1.0 B1.0 B0.0 B0.0 .    .",
    ],
    ("interleaved", 2, 2): [
        "F0.0 F1.0 F0.1 F1.1 .    .    B0.1 B0.1 .    B1.1 B1.1 B0.0 B0.0 B1.0 B1.0",
        ".    F0.0 F1.0 F0.1 B0.1 B0.1 F1.1 B1.1 B1.1 B0.0 B0.0 B1.0 B1.0 .    .",
    ],
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: tuple[str, int, int]) -> None:
    assert timeline(make_schedule(*case)) == TABLES[case]


@pytest.mark.parametrize(("devices", "microbatches"), SIZES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_works_once_on_every_microbatch(
    name: str, devices: int, microbatches: int
) -> None:
    schedule = make_schedule(name, devices, microbatches)
    tasks = [task for order in schedule.orders for task in order]
    kinds = ("forward", "input", "weight") if name == "zb-h1" else ("forward", "backward")
    expected = {
        Task(kind, stage, microbatch)
        for kind in kinds
        for stage in range(schedule.stages)
        for microbatch in range(microbatches)
    }
    assert len(tasks) == len(expected) and set(tasks) == expected
    for device, order in enumerate(schedule.orders):
        assert {task.stage % devices for task in order} == {device}


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_published_formulas(s: int, m: int) -> None:
    """Equal costs of all stages; the idle share of GPipe, 1F1B and their versions with chunks is
    that of s - 1 slots, whatever the cost of a backward pass."""
    for name in ("gpipe", "1f1b"):
        result = simulated(name, s, m)
        assert result.bubble == pytest.approx((s - 1) / (m + s - 1))
        assert result.step_time == pytest.approx(6 * (m + s - 1))
    for chunks in (2, 3):
        for name in CHUNKED:
            result = simulated(name, s, m, chunks=chunks)
            assert result.step_time - 6 * m == pytest.approx(6 * (s - 1) / chunks), name
    # Table 2 of arXiv:2401.10241: (p - 1) (T_F + T_B - T_W) idle against (p - 1) (T_F + T_B + T_W).
    zero = simulated("zb-h1", s, m, costs=(1.0, 1.0, 1.0))
    assert zero.step_time - 3 * m == pytest.approx(s - 1)


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_peak_activations(s: int, m: int) -> None:
    assert simulated("gpipe", s, m).activations == (m,) * s
    assert simulated("1f1b", s, m).activations == tuple(s - device for device in range(s))
    assert simulated("zb-h1", s, m).activations == (s,) * s
    circular = simulated("circular", s, m, chunks=2)
    assert circular.activations == (2 * m,) * s  # of half a device's layers each
    assert circular.activation_bytes == (10 * m,) * s
    first = simulated("interleaved", s, m, chunks=2).activations[0]
    assert first == min(2 * (s - 1) + s + 1, 2 * m)


@pytest.mark.parametrize(("devices", "rounds", "microbatches"), [(2, 1, 4), (4, 1, 8), (2, 3, 6)])
def test_executed_schedules_take_the_ticks_of_the_simulated_ones(
    devices: int, rounds: int, microbatches: int
) -> None:
    """In tick t device d computes its forward task t - d: none waits for another device."""
    assert {"gpipe", "circular"} == EXECUTED
    name, chunks = ("gpipe", None) if rounds == 1 else ("circular", rounds)
    schedule = make_schedule(name, devices, microbatches, chunks)
    equal = (1.0,) * schedule.stages
    start = simulate(schedule, Costs(equal, equal, equal, equal)).start
    tasks = rounds * microbatches
    for device, order in enumerate(schedule.orders):
        ticks = [start[task] for task in order[:tasks]]
        assert ticks == [device + number for number in range(tasks)]
    assert (
        number_of_ticks(devices, rounds, microbatches) == start[schedule.orders[-1][tasks - 1]] + 1
    )


def test_the_slowest_stage_sets_the_pace() -> None:
    """Two devices, three microbatches; the second device takes twice as long. GPipe: its forward
    passes are at 1-3, 3-5, 5-7, its backward passes at 7-11, 11-15, 15-19, the last of the first
    device at 19-21. Both devices compute 3 · 3 and 3 · 6 of 2 · 21."""
    schedule = make_schedule("gpipe", 2, 3)
    costs = stage_costs(schedule, (1, 2), (1, 2), (1, 2), (5, 7))
    result = simulate(schedule, costs)
    assert result.start[Task("backward", 1, 2)] == 7
    assert (result.step_time, result.bubble) == (21, pytest.approx(1 - 27 / 42))
    assert result.activation_bytes == (15, 21)


def test_an_order_that_cannot_be_computed_raises() -> None:
    schedule = make_schedule("1f1b", 1, 2)
    (order,) = schedule.orders
    wrong = dataclasses.replace(schedule, orders=(order[::-1],))
    with pytest.raises(ValueError, match="deadlock"):
        simulate(wrong, stage_costs(wrong, (1,), (1,), (1,), (1,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "schedule '2f2b'; accepted: gpipe, circular, 1f1b, interleaved, zb-h1"),
        (("gpipe", 0, 2), "stages 0; accepted: 1 or more"),
        (("gpipe", 2, 0), "microbatches 0; accepted: 1 or more"),
        (("1f1b", 2, 2, 2), "schedule 1f1b does not use chunks; accepted: circular, interleaved"),
        (("circular", 2, 2, 1), "schedule circular with chunks 1; accepted: 2 or more"),
        (
            ("circular", 4, 6),
            "schedule circular with microbatches 6; accepted: multiples of the stages 4",
        ),
        (
            ("interleaved", 4, 6),
            "schedule interleaved with microbatches 6; accepted: multiples of the stages 4",
        ),
    ],
)
def test_bad_schedules(arguments: tuple, message: str) -> None:
    assert user_error(lambda: make_schedule(*arguments)) == message


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ((1, 2, 3), "forward has 3 numbers; accepted: one, or 2, one for each device"),
        ((-1.0,), "forward is [-1.0]; accepted: finite numbers of 0 or more"),
        ((float("nan"),), "forward is [nan]; accepted: finite numbers of 0 or more"),
        ((0,), "all costs are 0; accepted: a positive cost of forward, input or weight"),
    ],
)
def test_bad_costs(forward: tuple[float, ...], message: str) -> None:
    schedule = make_schedule("gpipe", 2, 2)
    assert user_error(lambda: stage_costs(schedule, forward, (0,), (0,), (1,))) == message


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    main()


def test_the_script_compares_all_schedules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--stages", "4", "--microbatches", "8", "--activation-bytes", "2e9")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines[1 : 1 + len(SCHEDULES)]}
    assert list(rows) == list(SCHEDULES)
    assert rows["1f1b"][:5] == ["1", "33", "27.3%", "4", "8e+09"]
    assert rows["interleaved"][:5] == ["2", "28.5", "15.8%", "11", "1.1e+10"]
    assert {name for name, cells in rows.items() if cells[5] == "yes"} == EXECUTED


def test_the_script_prints_a_timeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--stages", "2", "--microbatches", "2", "--schedule", "1f1b", "--timeline")
    run(monkeypatch, *options)
    assert "\n".join(TABLES["1f1b", 2, 2]) in capsys.readouterr().out


def test_the_script_says_what_is_not_possible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--stages", "4", "--microbatches", "6")
    assert "interleaved  not possible: schedule interleaved with" in capsys.readouterr().out
    for wrong in (["--schedule", "interleaved"], ["--forward", "1,x"], ["--stages", "0"]):
        options = ["--stages", "4", "--microbatches", "6", *wrong]
        user_error(lambda options=options: run(monkeypatch, *options))
