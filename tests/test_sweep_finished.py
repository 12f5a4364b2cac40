"""Runs that a sweep refuses as finished: those of other data or other kept neurons."""

from pathlib import Path

import pytest

from sat_jax.config_values import experiment, load
from sat_jax.errors import UserError
from sat_jax.results.planned import PlannedRun, plan_runs, prepare_all
from sat_jax.results.runner import SweepDir
from sat_jax.sparsity.budget import Sensitivity, save
from sat_jax.train.files import write_json
from sat_jax.train.setup import shape_of
from sat_jax.train.trained import starting_point
from scripts import sweep as script
from tests.conftest import ROOT

TINY = str(ROOT / "experiments/tiny.py")


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_run_that_finished_on_other_data_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, other, folder = tmp_path / "x.md", tmp_path / "y.md", tmp_path / "sweep"
    text.write_text("One text. " * 2000)
    other.write_text("A second text. " * 2000)
    sources = f"--config.data.sources={text},{other}"
    line = ["sweep", f"--config={TINY}", f"--workdir={folder}", sources, "--seeds=1"]
    monkeypatch.setattr("sys.argv", line)
    (run,) = plan_runs(experiment(TINY), {"data.sources": (str(text), str(other))}, [{}])[0]
    data = prepare_all([run], print)[0][run.name]
    done = SweepDir(folder).watch(run)
    done.workdir.path.mkdir(parents=True)
    write_json(done.workdir.summary, {"data": data})
    done.check_finished(data)
    (folder / "lock").touch()
    text.write_text("Another text. " * 2000)
    with pytest.raises(UserError) as caught:
        script.main()
    assert str(caught.value).startswith(f"run {run.name} in {folder} has finished on data that")
    assert not (folder / "sweep.json").exists()


def test_a_run_that_finished_with_another_budget_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "budget.json", tmp_path / "sweep"
    fixed = {"sparsity.budget": str(file)}

    def run_now(*rises: float) -> PlannedRun:
        shape = shape_of(starting_point(load(TINY))[0])
        save(Sensitivity((0, 1, 2), 0.5, 0.5, rises, rises, shape, "output"), file)
        return plan_runs(experiment(TINY), fixed, [{}])[0][0]

    run = run_now(0.1, 0.3)
    done = SweepDir(folder).watch(run)
    done.workdir.path.mkdir(parents=True)
    data = prepare_all([run], print)[0][run.name]
    write_json(done.workdir.summary, {"data": data, "kept": run.plan.kept})
    done.check_finished(data)
    assert run_now(0.3, 0.1).name == run.name  # and other rates
    (folder / "lock").touch()
    line = ["sweep", f"--config={TINY}", f"--workdir={folder}", "--seeds=1"]
    settings = [f"--config.{key}={value}" for key, value in fixed.items()]
    monkeypatch.setattr("sys.argv", [*line, *settings])
    with pytest.raises(UserError) as caught:
        script.main()
    assert str(caught.value).startswith(
        f"run {run.name} in {folder} has finished with other counts"
    )
    assert not (folder / "sweep.json").exists()
    write_json(done.workdir.summary, {"data": data})  # of an older version
    SweepDir(folder).watch(run_now(0.3, 0.1)).check_finished(data)
