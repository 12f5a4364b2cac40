"""Speed-ups from steps in turns: load cancels, the time limit holds, noise is marked."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_jax.config_values import load
from sat_jax.results.run_table import end_of_run
from sat_jax.results.speed import ABOVE_BOUND_NOTE, whole_run_speedup
from sat_jax.results.tables import group_tables
from sat_jax.results.variants import make_groups
from sat_jax.train import speed
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.speed import MAXIMUM_ROUNDS, Turn, measure_speed, speedup_of, take_turns
from tests.conftest import ROOT
from tests.result_runs import config_of, runs, summary_of
from tests.test_tables import rung
from tests.tolerances import assert_close


class Machine:
    """A clock that work moves: `load(now)` is by how much other work slows it."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0
        self.load: Callable[[float], float] = lambda _: 1.0

    def work(self, seconds: float) -> None:
        self.wall += seconds * self.load(self.wall)
        self.cpu += seconds

    def turn(self, seconds: float, conversion: float = 0.0) -> Callable[[], Turn]:
        """A turn of `seconds` without load, after a `conversion` that is no part of them."""

        def take() -> Turn:
            self.work(conversion)
            wall, cpu = self.wall, self.cpu
            self.work(seconds)
            return Turn(self.wall - wall, self.cpu - cpu)

        return take


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    clock = types.SimpleNamespace(perf_counter=lambda: made.wall, process_time=lambda: made.cpu)
    monkeypatch.setattr(speed, "time", clock)
    return made


class FakeState:
    """Stands for `RunState`: programs are names of plans, with the seconds that a step takes."""

    def __init__(self, machine: Machine, seconds: dict[str, float]):
        self.machine, self.seconds, self.steps = machine, seconds, list[str]()
        self.plan: str | None = None

    def expand(self) -> None:
        self.plan = None

    def change_blocks(self, plan: str) -> None:
        assert self.plan is None and plan in self.seconds

    def choose(self, program: str) -> None:
        assert self.plan is None and program in self.seconds

    def compact(self, program: str) -> None:
        self.plan = program
        self.machine.work(0.5)

    def step(self, batch: str) -> None:
        assert self.plan is not None and batch == "batch"
        self.steps.append(self.plan)
        self.machine.work(self.seconds[self.plan])

    def wait(self) -> None:
        pass


def measured(machine: Machine, seconds: dict[str, float], limit: float) -> tuple[FakeState, Any]:
    state = FakeState(machine, seconds)
    programs = {plan: plan for plan in seconds}
    known: Any = measure_speed(
        state,  # type: ignore[arg-type]
        programs,  # type: ignore[arg-type]
        "dense",  # type: ignore[arg-type]
        ("batch",),
        seconds,  # type: ignore[arg-type]
        limit,
        state.change_blocks,  # type: ignore[arg-type]
    )
    return state, known


def test_load_that_doubles_halfway_cancels(machine: Machine) -> None:
    # 2, 3 and 4 seconds with half a second to convert: a round of 10.5 seconds, nine of 94.5.
    machine.load = lambda now: 1.0 if now < 42 else 2.0
    state, speedups = measured(machine, {"a": 2.0, "b": 3.0, "dense": 4.0}, limit=200.0)
    assert state.steps == ["dense", "a", "b"] * 9 == ["dense", "a", "b"] * MAXIMUM_ROUNDS
    assert speedups == {
        "dense": (1.0, 0.0, 1.0),
        "a": (2.0, 0.0, 2.0),
        "b": (4 / 3, 0.0, 4 / 3),
    }


def test_load_within_a_round_is_in_the_spread() -> None:
    calm, slowed = (Turn(4.0, 4.0), Turn(2.0, 2.0)), (Turn(8.0, 4.0), Turn(2.0, 2.0))
    assert speedup_of([calm, calm, slowed], True) == (2.0, 0.5, 2.0)
    assert speedup_of([calm, slowed], False) == (3.0, 0.5, None)


def test_short_steps_are_repeated_within_a_turn(machine: Machine) -> None:
    state, speedups = measured(machine, {"a": 0.02, "dense": 0.04}, limit=200.0)
    assert state.steps == (["dense"] * 3 + ["a"] * 3) * MAXIMUM_ROUNDS
    assert_close(speedups["a"].speedup, 2.0, "float64", "forward")


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (200.0, [3] * 9),
        (29.0, [3, 3, 3]),
        (25.0, [3, 3, 2]),
        (19.0, [3, 3]),
        (17.0, [2, 2]),
        (12.0, [2, 2]),
        (11.0, []),
    ],
)
def test_the_limit_chooses_rounds(machine: Machine, limit: float, counts: list[int]) -> None:
    """A round of all takes 9 seconds, one of the dense and the first rung 6."""
    turns = [machine.turn(seconds) for seconds in (4.0, 2.0, 3.0)]
    assert [len(turns) for turns in take_turns(turns, [4.0, 2.0, 3.0], limit)] == counts
    assert machine.wall <= limit


def test_what_turns_took_replaces_the_estimates(machine: Machine) -> None:
    """With their conversions two rounds of all take 24 seconds, in place of 18."""
    turns = [machine.turn(seconds, conversion=1.0) for seconds in (4.0, 2.0, 3.0)]
    rounds = take_turns(turns, [4.0, 2.0, 3.0], 21.0)
    assert [len(turns) for turns in rounds] == [3, 2] and machine.wall == 20.0


def test_fewer_than_two_rounds_are_no_measurement(machine: Machine) -> None:
    _, speedups = measured(machine, {"a": 2.0, "b": 3.0, "dense": 4.0}, limit=18.5)
    assert speedups.keys() == {"dense", "a"}
    assert measured(machine, {"a": 2.0, "dense": 4.0}, limit=11.0)[1] == {}


# --- what is shown ---


def with_speed(rate: float, speedup: float | None, spread: float | None, **more: Any) -> Any:
    """A rung of 100 tokens, with a bound of 4/3 at the rate 0.5."""
    speeds = {"speedup": speedup, "speedup_spread": spread, "cpu_speedup": speedup}
    return rung(rate, 100.0, tokens=100, **speeds, **more)


DENSE = with_speed(0.0, 1.0, 0.0)


def summary(*rungs: Any) -> dict[str, Any]:
    return summary_of(11.0, 18.0, list(rungs), figures=[], export=None)


def test_what_exceeds_its_bound_by_more_than_its_spread_is_marked() -> None:
    text = end_of_run(summary(with_speed(0.5, 2.0, 0.1), DENSE))
    assert "  2.00× ± 0.10×‡     2.00×  1.33×\n" in text
    assert f"  All steps of the run: 1.33× ± 0.02×‡, bound 1.14×.\n  {ABOVE_BOUND_NOTE}\n" in text

    text = end_of_run(summary(with_speed(0.5, 1.4, 0.1), DENSE))
    assert "  1.40× ± 0.10×     1.40×  1.33×\n" in text
    assert "  All steps of the run: 1.17× ± 0.03×, bound 1.14×.\n\n" in text


def test_what_was_not_measured_is_not_shown() -> None:
    text = end_of_run(summary(with_speed(0.5, None, None), DENSE))
    assert "         -         -  1.33×\n" in text and "All steps" not in text
    text = end_of_run(summary(rung(0.5, 300.0), rung(0.0, 100.0)))  # of an older version
    assert "3.00×" not in text and "All steps" not in text


def test_speedup_of_all_steps_weighs_rungs_by_their_tokens() -> None:
    """By hand: 300 tokens at 1.5 and 100 at 1 take 300, where dense ones take 400."""
    rungs = [with_speed(0.5, 1.5, 0.1) | {"tokens": 300}, DENSE]
    run = whole_run_speedup(rungs)
    assert run is not None
    # The bound: 300 at 4/3 and 100 take 325. The spread: that of a small change of the ratio.
    assert_close([run.speedup, run.bound], [4 / 3, 400 / 325], "float64", "forward")
    more = whole_run_speedup([rungs[0] | {"speedup": 1.5 + 1e-7}, DENSE])
    assert more is not None
    assert_close(run.spread, 0.1 * (more.speedup - run.speedup) / 1e-7, "float32", "forward")
    assert whole_run_speedup([with_speed(0.5, None, None), DENSE]) is None
    assert whole_run_speedup([rung(0.5, 150.0), rung(0.0, 100.0)]) is None


def test_tables_have_the_measured_ratios(tmp_path: Path) -> None:
    """By hand: 100 tokens at 1.25 and 100 at 1 take 180, where dense ones take 200."""
    records = runs(
        tmp_path,
        (config_of(0), summary(with_speed(0.0, None, None)) | {"spent_flops": 1e10}),
        (config_of(0, rate=0.2), summary(with_speed(0.5, 1.25, 0.1), DENSE)),
        (config_of(0, rate=0.3), summary(with_speed(0.5, 2.0, 0.1), DENSE)),
        (config_of(0, rate=0.4), summary(with_speed(0.5, 1.2, 0.1), DENSE)),
        (config_of(1, rate=0.4), summary(with_speed(0.5, 1.3, 0.1), DENSE)),
        (config_of(0, rate=0.5), summary(with_speed(0.5, None, None), DENSE)),
    )
    (group,) = make_groups(records)
    _, cost, _ = group_tables(group, [])
    assert [row[-2:] for row in cost.rows] == [
        ("-", "-"),
        ("1.11× ± 0.04×", "1.14×"),
        ("1.33× ± 0.02×‡", "1.14×"),
        ("1.11× ± 0.02×", "1.14×"),
        ("1.00×", "1.25×"),  # of the time of both runs, which is the same
    ]


# --- real runs ---


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(5):
        (folder / f"{number}.txt").write_text(bytes(rng.integers(97, 123, 600)).decode())
    return folder


def run(text: Path, path: Path, measure: bool) -> tuple[dict[str, Any], list[str]]:
    changes = {
        "data.sources": text, "data.row_length": 32, "train.steps": 4, "train.rows_per_step": 2,
        "train.eval_rows": 4, "checkpoint.every": 0, "sparsity.rungs": 1,
        "sparsity.refresh_every": 2, "train.measure_speed": measure,
    }  # fmt: skip
    said: list[str] = []
    config = load(str(ROOT / "experiments/tiny.py"), [f"{k}={v}" for k, v in changes.items()])
    return train(config, path, said.append), said


@pytest.mark.slow
def test_measuring_changes_nothing_of_a_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_jax.train.loop.SHARE", 10.0)  # a tiny run has no time to spare
    on, _ = run(text, tmp_path / "on", True)
    off, said = run(text, tmp_path / "off", False)

    for one in on["rungs"]:
        assert one["speedup"] > 0 and one["speedup_spread"] >= 0 and one["cpu_speedup"] > 0
    assert on["rungs"][-1]["speedup"] == 1.0
    assert on["seconds"]["speed"] > 0
    assert all("speedup" not in one for one in off["rungs"])
    assert off["seconds"]["speed"] < 1e-3
    assert not any("speed-up" in line for line in said)

    for key in ("loss", "eval_loss", "tokens", "spent_flops", "selections", "probes"):
        assert on[key] == off[key], key
    weights = [Path(one["export"], "model.safetensors").read_bytes() for one in (on, off)]
    assert weights[0] == weights[1]
    stored = [find(tmp_path / name / "checkpoints") for name in ("on", "off")]
    assert stored[0].step == stored[1].step == 4
    states = [one.read(one.leaves) for one in stored]
    assert states[0].keys() == states[1].keys() and "step" in states[0]
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], strict=True)


@pytest.mark.slow
def test_what_the_limit_does_not_allow_is_told(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_jax.train.loop.SHARE", 0.0)
    made, said = run(text, tmp_path / "run", True)
    assert [one["speedup"] for one in made["rungs"]] == [None, None]
    assert any("speed-up of 2 of 2 rungs not measured" in line for line in said)
