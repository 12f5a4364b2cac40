"""A finished run that a sweep refuses."""

from pathlib import Path

import pytest

from sat_jax.config_values import experiment
from sat_jax.errors import UserError
from sat_jax.results.planned import plan_runs, prepare_all
from sat_jax.results.runner import SweepDir
from sat_jax.train.files import write_json
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
    (run,) = plan_runs(experiment(TINY), {"data.sources": (str(text), str(other))}, [{}])
    data = prepare_all([run], print)[run.name]
    done = SweepDir(folder).find(run)
    done.workdir.path.mkdir(parents=True)
    write_json(done.workdir.summary, {"data": data})
    done.check_finished(data)
    (folder / "lock").touch()
    text.write_text("Another text. " * 2000)
    with pytest.raises(UserError) as caught:
        script.main()
    assert str(caught.value).startswith(f"run {run.name} in {folder} has finished on data that")
    assert not (folder / "sweep.json").exists()
