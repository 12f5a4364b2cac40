"""Sweeps: axes, lists, names, invalid runs, launchers, and the order of runs."""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sat_jax.config_values import experiment, load
from sat_jax.errors import UserError
from sat_jax.results.launch import Job, Local, Slurm, failure, slurm_options
from sat_jax.results.planned import PlannedRun, plan_runs, prepare_all
from sat_jax.results.record import dense_baseline
from sat_jax.results.runner import SweepDir, run_sweep
from sat_jax.results.sweep import (
    Comparison,
    Sweep,
    combine,
    comparison_of,
    cross,
    declared_comparisons,
    parse_axes,
    settings_text,
    sweep_of,
)
from sat_jax.train.files import write_json
from tests.conftest import ROOT, RunPython

TINY = str(ROOT / "experiments/tiny.py")


def runs_of(*axes: str, fixed: dict[str, Any] | None = None) -> list[PlannedRun]:
    return plan_runs(experiment(TINY), fixed or {}, cross([{}], parse_axes(axes)))


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_axes_are_typed_and_semicolons_separate_lists() -> None:
    axes = parse_axes(
        ["sparsity.rate=0,0.5", "sparsity.dense_layers=;0,1;0", "sparsity.rate_mlp=None,0.5"]
    )
    assert axes == {
        "sparsity.rate": [0.0, 0.5],
        "sparsity.dense_layers": [(), (0, 1), (0,)],
        "sparsity.rate_mlp": [None, 0.5],
    }
    assert all(type(rate) is float for rate in axes["sparsity.rate"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["sparsity.dense_layers=0,1"], r"are lists with commas; .*'sparsity.dense_layers="),
        (["sparsity.rat=0.1"], r"--axis sparsity\.rat is not a setting; near: sparsity\.rate"),
        (["sparsity.rate=0.1,1.5"], r"sparsity\.rate is 1\.5; accepted: float >= 0, <= 1"),
        (["sparsity.rate"], r"has no values"),
        (["seed=1", "seed=2"], r"--axis seed is given twice"),
    ],
)
def test_a_wrong_axis_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_axes(texts)


def test_runs_axes_and_seeds_are_crossed() -> None:
    listed = [{"sparsity.rate": 0.2}, {"sparsity.rate": 0.4}]
    fixed, points = combine(["train.steps=5"], {"sparsity.metric": ["uniform"]}, listed, 2)
    assert fixed == {"train.steps": 5}
    assert [tuple(point.values()) for point in points] == [
        (0.2, "uniform", 0), (0.2, "uniform", 1), (0.4, "uniform", 0), (0.4, "uniform", 1),
    ]  # fmt: skip
    comparison = comparison_of(points)
    assert comparison.settings == ("sparsity.rate", "sparsity.metric")
    assert comparison.title == "Runs that differ in sparsity.rate, sparsity.metric"


@pytest.mark.parametrize(
    ("overrides", "axes", "listing", "seeds", "message"),
    [
        ([], {}, None, None, "nothing to sweep over"),
        ([], {"seed": [1]}, None, 2, "seed is given by --axis and by --seeds"),
        (["seed=3"], {"seed": [1]}, None, None, "seed is given by --config and by --axis"),
        ([], {"seed": [1]}, [{"seed": 2}], None, "seed is given by --axis and by get_sweep"),
    ],
)
def test_a_setting_has_one_source(
    overrides: list[str], axes: Any, listing: Any, seeds: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        combine(overrides, axes, listing, seeds)


def test_an_experiment_declares_its_runs_and_comparisons(tmp_path: Path) -> None:
    assert sweep_of(TINY) is None
    rates = Comparison("rates", "Rate", ("sparsity.rate",))
    text = (
        "from sat_jax.results.sweep import Comparison, Sweep\n"
        "def get_sweep(scale='small'):\n"
        "    runs = [{'seed': {'small': 1, 'full': 2}[scale]}]\n"
        "    return Sweep(runs, (Comparison('rates', 'Rate', ('sparsity.rate',)),))\n"
    )
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(text)
    file = tmp_path / "a.py"
    assert sweep_of(str(file)) == Sweep([{"seed": 1}], (rates,))
    assert sweep_of(f"{file}:full") == Sweep([{"seed": 2}], (rates,))
    assert declared_comparisons(tmp_path) == [rates]
    with pytest.raises(UserError, match="has no variant 'huge'"):
        sweep_of(f"{file}:huge")
    (tmp_path / "c.py").write_text(text.replace("'Rate'", "'Another title'"))
    with pytest.raises(UserError, match=r"c\.py: comparison rates differs from another file's"):
        declared_comparisons(tmp_path)
    for returned, message in (
        ("[{'seed': 1}]", r"returns \[{'seed': 1}\]; accepted: a Sweep"),
        ("Sweep([4])", "accepted: a Sweep of runs, each a mapping"),
        ("Sweep([{'sead': 1}])", "sead is not a setting; near: seed"),
    ):
        start = "from sat_jax.results.sweep import Sweep\n"
        file.write_text(f"{start}def get_sweep():\n    return {returned}\n")
        with pytest.raises(UserError, match=message):
            sweep_of(str(file))


def test_a_name_is_what_results_depend_on() -> None:
    one, other = runs_of("sparsity.rate=0.25,0.5")
    (same,) = runs_of("sparsity.rate=0.5", fixed={"train.log_every": 3, "checkpoint.keep": 5})
    assert other.name == same.name != one.name
    first, second = runs_of("seed=0,1")
    assert first.name != second.name


def test_dense_runs_that_differ_in_sparsity_are_one() -> None:
    runs = runs_of("sparsity.rate=0,0.5", "sparsity.metric=uniform,wanda", "seed=0,1")
    dense = [settings_text(run.settings) for run in runs if max(run.config.rates) == 0]
    assert dense == ["sparsity.rate=0 seed=0", "sparsity.rate=0 seed=1"]
    assert len(runs) == 6
    assert {dense_baseline(run.config) for run in runs if run.settings["seed"] == 0} == {
        dense_baseline(runs[0].config)
    }


def test_dense_baselines_are_without_settings_that_need_sparsity() -> None:
    """`decay` needs mask execution and `kernels` kernel execution: a dense run has neither."""
    fixed = {"sparsity.execution": "mask"}
    decay, freeze = runs_of("optimizer.moments=decay,freeze", fixed=fixed)
    (dense,) = runs_of("sparsity.rate=0")
    assert len({dense_baseline(run.config) for run in (decay, freeze, dense)}) == 1
    of_kernels = {"sparsity.execution": "kernel", "sparsity.block": 64}
    kernels = runs_of("model.kernels=xla;None", fixed=of_kernels)
    assert {dense_baseline(run.config) for run in kernels} == {dense_baseline(dense.config)}
    (alone,) = runs_of("sparsity.rate=0", "model.kernels=xla;None", fixed=of_kernels)
    assert alone.name == dense.name and alone.settings == {"sparsity.rate": 0.0}


def test_an_axis_that_changes_no_result_is_invalid_unless_it_does() -> None:
    with pytest.raises(UserError, match=r"=1: train\.eval_every changes no result, so runs"):
        runs_of("train.eval_every=1,2")
    # The ladder that follows the held-out loss steps down when it is looked at.
    assert len(runs_of("train.eval_every=1,2", fixed={"sparsity.schedule": "auto"})) == 2


def test_an_invalid_run_is_named() -> None:
    with pytest.raises(UserError, match=r"^optimizer\.moments=decay: .* 'mask', not 'gather'"):
        runs_of("optimizer.moments=freeze,decay")
    with pytest.raises(UserError, match=r"^sparsity\.dense_layers=7: "):
        runs_of("sparsity.dense_layers=0;7")
    runs = runs_of("data.sources=README.md,CHANGELOG.md;none.md")
    with pytest.raises(UserError, match=r"^data\.sources=none\.md: .*none\.md"):
        prepare_all(runs, print)


def test_the_folder_remembers_what_was_asked(tmp_path: Path) -> None:
    folder = SweepDir(tmp_path / "sweep")
    first, second = runs_of("sparsity.rate=0.25,0.5")
    comparison = Comparison("x", "X", ("sparsity.rate",))
    with ExitStack() as stack:
        folder.lock(stack)
        for runs in ([first], [second], [first]):
            folder.add(runs, [comparison])
        with pytest.raises(UserError, match="is in use by process"):
            SweepDir(tmp_path / "sweep").lock(stack)
    contents = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert contents["comparisons"] == [
        {"name": "x", "title": "X", "settings": ["sparsity.rate"]},
    ]
    assert contents["runs"] == {
        first.name: {"sparsity.rate": 0.25},
        second.name: {"sparsity.rate": 0.5},
    }
    done = folder.find(first).workdir
    done.path.mkdir()
    write_json(done.summary, {})
    assert folder.find(first).finished and folder.find(second).waiting
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match="holds a run; a sweep needs"), ExitStack() as stack:
        SweepDir(tmp_path).lock(stack)


class _AtOnce:
    """A launcher of two jobs at a time that are finished when they are handed over."""

    outlives, seconds = False, 0.0

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def free_slots(self) -> int:
        return 2

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        self.jobs += jobs
        for job in jobs:
            job.directory.mkdir(parents=True)
            write_json(job.directory / "summary.json", {})
        return ["job" for _ in jobs]

    def done(self, job: str) -> bool:
        return job == "job"

    def stop(self) -> None:
        raise AssertionError("nothing asked to stop")


def test_seeds_of_a_variant_do_not_start_together(tmp_path: Path) -> None:
    folder = SweepDir(tmp_path / "sweep")
    runs = runs_of("sparsity.rate=0,0.25,0.5", "seed=0,1")
    (extra,) = runs_of("sparsity.rate=0.5", fixed={"seed": 2})
    launcher = _AtOnce()
    lines: list[str] = []
    found = [folder.find(run) for run in [*runs, extra]]
    run_sweep(folder, found, launcher, lambda *_: None, lines.append)  # type: ignore[arg-type]
    assert lines[0] == f"7 runs, 0 finished before; their output: {folder.logs}"
    assert f"{extra.name}  sparsity.rate=0.5  finished" in lines
    assert [(job.config.seed, job.config.sparsity.rate) for job in launcher.jobs] == [
        (0, 0.0), (0, 0.25), (0, 0.5), (1, 0.0), (1, 0.25), (1, 0.5), (2, 0.5),
    ]  # fmt: skip


def test_options_of_a_launcher_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = slurm_options(["time=60,partition=a,nodelist=x,y", "setup=module load cuda, gcc"])
    assert options == {
        "time": 60, "partition": "a", "nodelist": "x,y", "setup": ["module load cuda, gcc"],
    }  # fmt: skip
    for wrong in (["time"], ["partition=a"], ["time=1:00"], ["time=5,time=6"]):
        with pytest.raises(UserError, match="--slurm "):
            slurm_options(wrong)
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"slurm: Unavailable parameter\(s\): \['tyme'\]"):
        Slurm(tmp_path, {"time": 5, "tyme": 5})
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match='slurm: Could not detect "srun"'):
        Slurm(tmp_path, {"time": 5})
    with pytest.raises(UserError, match="--gpus 0,1,2 are not shared evenly by --workers 2"):
        Local(2, ["0", "1", "2"])


def test_each_worker_has_its_own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "start", lambda job: SimpleNamespace(job=job, is_alive=lambda: True))
    (run,) = runs_of("sparsity.rate=0.5")
    job = Job(run.config, tmp_path / "run", tmp_path / "log")
    shared: Any = Local(2, ["4", "5", "6", "7"])
    assert shared.free_slots() == 2
    assert [process.job.devices for process in shared.submit([job, job])] == ["4,6", "5,7"]
    assert shared.free_slots() == 0
    alone: Any = Local()
    assert alone.submit([job])[0].job == job  # its devices are those of this process


class _Waiting(Job):
    def _train(self) -> None:
        self.log.touch()
        time.sleep(600)


@pytest.mark.slow
def test_signals_for_a_launcher_do_not_end_a_run(tmp_path: Path) -> None:
    """Ctrl-C, and the signal of Slurm before a time limit, reach every process."""
    log = tmp_path / "log"
    process = _Waiting(load(TINY), tmp_path / "run", log).start()
    while not log.exists():
        assert process.is_alive()
        time.sleep(0.1)
    assert process.pid is not None
    for number in (signal.SIGINT, signal.SIGUSR2):
        os.kill(process.pid, number)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def test_the_reason_of_a_failure_is_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert failure(log) == "no output"
    log.write_text("step 1/2\nerror: step 2 has loss nan\n")
    assert failure(log) == "step 2 has loss nan"


@pytest.mark.slow
def test_invalid_runs_start_nothing(tmp_path: Path, run_python: RunPython) -> None:
    done = run_python(
        "-m", "scripts.sweep", "--config=experiments/tiny.py", f"--workdir={tmp_path / 'sweep'}",
        "--axis", "optimizer.moments=freeze,decay",
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "sweep").exists()
    assert done.stderr.startswith("error: optimizer.moments=decay: ")


def test_settings_of_a_file_win_over_nothing_else() -> None:
    """A run of a sweep is what scripts.train makes of the same settings."""
    (run,) = runs_of("sparsity.rate=0.25", fixed={"train.steps": 5})
    assert run.config == load(TINY, ["sparsity.rate=0.25", "train.steps=5"])
