"""Finished runs from where they lie: work directories, folders of sweeps, files of rows."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from sat_jax.analysis.results import row_of
from sat_jax.analysis.rows import ORIGIN, Row, read
from sat_jax.config_values import from_config_dict
from sat_jax.errors import UserError
from sat_jax.report.evaluations import MEASURES
from sat_jax.report.records import Record, record_of
from sat_jax.train.files import read_json
from sat_jax.train.metrics import read_metrics
from sat_jax.train.workdir import WorkDir


def collect(
    folders: Sequence[Path], files: Sequence[Path], log: Callable[[str], None]
) -> list[Record]:
    """The runs in `folders` (of a run or of a sweep) and in `files` of rows, in that order.

    `log` is told of runs that have not finished. Raises `UserError` for what is neither, and where
    there is neither a run nor an evaluation.
    """
    records = [record for folder in folders for record in _in_folder(folder, log)]
    for file in files:
        rows = [(number, row) for number, row in enumerate(read(file), 1) if "twin" in row]
        if not rows and not evaluations([file]):
            raise UserError(
                f"{file} holds no run and no evaluation; accepted: rows that --record wrote"
            )
        records += [record_of(row, None, f"{file}:{number}") for number, row in rows]
    if not records and not evaluations(files):
        raise UserError("no finished run to report on")
    return records


def evaluations(files: Sequence[Path]) -> list[Row]:
    """The rows of evaluations in `files` of rows."""
    return [row for file in files for row in read(file) if row.get("measure") in MEASURES]


def _in_folder(folder: Path, log: Callable[[str], None]) -> list[Record]:
    if (folder / "sweep.json").is_file():
        names = read_json(folder / "sweep.json").get("runs", {})
        runs = [folder / name for name in names]
    elif (folder / "config.json").is_file():
        runs = [folder]
    else:
        raise UserError(
            f"{folder} is neither a run's work directory (config.json) nor a sweep's (sweep.json)"
        )
    records = []
    for run in runs:
        workdir = WorkDir(run)
        summary = workdir.finished()
        if summary is None:
            log(f"{run} has not finished: left out")
            continue
        config = from_config_dict(read_json(workdir.config))
        ended = datetime.datetime.fromtimestamp(workdir.summary.stat().st_mtime, datetime.UTC)
        row = row_of(folder.name, config, summary, read_metrics(workdir.metrics))
        row |= {name: summary[name] for name in ORIGIN}
        row["date"] = ended.isoformat(timespec="seconds")
        records.append(record_of(row, run, str(run)))
    return records
