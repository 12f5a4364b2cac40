"""The runs of a sweep before they start: settings, names, costs, and which are invalid."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sat_jax.config import Config
from sat_jax.config_values import build, fingerprint, free_paths, without_free
from sat_jax.errors import UserError
from sat_jax.results.record import SPARSE_ONLY, dense_version
from sat_jax.results.sweep import Settings, settings_text, short_names
from sat_jax.results.text import duration, fixed_width, quantity
from sat_jax.results.training import Plan, make_plan, prepare_data


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run. `settings` are those in which the runs of the sweep differ, by dotted path."""

    settings: Settings
    plan: Plan

    @property
    def config(self) -> Config:
        return self.plan.config

    @cached_property
    def name(self) -> str:
        """The name of its work directory: a fingerprint of all that its results depend on."""
        return fingerprint(without_free(self.config))

    @property
    def dense(self) -> bool:
        return max(self.config.rates) == 0

    @property
    def variant(self) -> str:
        """A fingerprint shared by the runs that differ in their seed alone."""
        return fingerprint(dataclasses.replace(without_free(self.config), seed=0))


class InvalidRun(NamedTuple):
    """Settings that make no valid run, and the reason."""

    settings: Settings
    reason: str


def plan_runs(
    values: Mapping[str, Any], fixed: Settings, settings_of_runs: Sequence[Settings]
) -> tuple[list[PlannedRun], list[InvalidRun]]:
    """Return the runs of the experiment `values` with the settings `fixed`, and the invalid ones.

    Equal runs are planned once. Dense runs that differ in sparsity alone are equal, so a sweep over
    rates from 0 and metrics has one dense run per seed.
    """
    runs: dict[str, PlannedRun] = {}
    invalid = []
    models: dict[Any, Any] = {}
    for settings in settings_of_runs:
        try:
            config = build(values, {**fixed, **settings})
            for path in sorted(free_paths(config) & settings.keys()):
                raise UserError(
                    f"{path} changes no result, so runs that differ in it are equal; give it as"
                    f" --config.{path}"
                )
            if max(config.rates) == 0:
                config = dense_version(config)
                settings = _dense_settings(settings)
            run = PlannedRun(settings, make_plan(config, models))
        except UserError as error:
            invalid.append(InvalidRun(settings, str(error)))
        else:
            runs.setdefault(run.name, run)
    return list(runs.values()), invalid


def _dense_settings(settings: Settings) -> Settings:
    """Replace the settings of sparsity by a rate of 0."""
    outside = {
        path: value
        for path, value in settings.items()
        if not (path.startswith("sparsity.") or path in SPARSE_ONLY)
    }
    return {"sparsity.rate": 0.0, **outside} if len(outside) < len(settings) else outside


def prepare_all(
    runs: Iterable[PlannedRun], log: Callable[[str], None]
) -> tuple[dict[str, str], list[InvalidRun]]:
    """Prepare the data of all runs, each once, before any run starts.

    Returns the fingerprints of the data by the name of the run, and the runs whose data are
    invalid.
    """
    prepared: dict[Any, str] = {}
    errors: dict[Any, str] = {}
    valid, invalid = {}, []
    for run in runs:
        config = run.config
        source = (config.data, config.model.path, config.model.preset)
        if source not in prepared and source not in errors:
            try:
                prepared[source] = prepare_data(run.plan, log)
            except UserError as error:
                errors[source] = str(error)
        if source in prepared:
            valid[run.name] = prepared[source]
        else:
            invalid.append(InvalidRun(run.settings, errors[source]))
    return valid, invalid


def dry_run(
    runs: Sequence[PlannedRun],
    finished: Mapping[str, Mapping[str, Any]],
    flops_per_second: float | None,
) -> str:
    """Return a table of the runs with their cost, and the total of those that are not finished.

    `finished` has the summaries of finished runs by name, whose median speed is used where
    `flops_per_second` is None.
    """
    source = "--flops-per-second"
    if flops_per_second is None and finished:
        speeds = [run["spent_flops"] / run["seconds"]["total"] for run in finished.values()]
        flops_per_second = statistics.median(speeds)
        source = f"{len(speeds)} finished runs of this sweep"

    def time(flops: float) -> str:
        return "-" if flops_per_second is None else duration(flops / flops_per_second)

    names = short_names(path for run in runs for path in run.settings)
    rows, remaining = [], 0.0
    for run in runs:
        dense, spent = run.plan.dense_flops(), run.plan.spent_flops()
        flops = [quantity(dense, "FLOP"), quantity(spent, "FLOP"), f"{dense / spent:.2f}×"]
        left = "finished" if run.name in finished else time(spent)
        remaining += 0.0 if run.name in finished else spent
        rows.append([run.name, settings_text(run.settings, names), *flops, left])
    header = ("run", "settings", "dense", "spent", "bound", "time")
    speed = "unknown; give --flops-per-second"
    if flops_per_second is not None:
        speed = f"at {quantity(flops_per_second, 'FLOP/s')}, from {source}"
    return (
        f"{fixed_width(header, rows, left=2)}\n\n{len(runs)} runs, {len(runs) - len(finished)} to"
        f" do: at most {quantity(remaining, 'FLOP')}, {time(remaining)} one after another\n"
        f"Time: {speed}"
    )
