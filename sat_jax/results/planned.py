"""The runs of a sweep before they start: settings, names, and costs."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from sat_jax.config import Config
from sat_jax.config_values import build, fingerprint, free_paths, without_free
from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.results.record import SPARSE_ONLY, dense_version
from sat_jax.results.sweep import Settings, settings_text
from sat_jax.results.text import fixed_width, quantity
from sat_jax.sparsity.controller import Controller, Rung
from sat_jax.sparsity.importance import METRICS
from sat_jax.train.counters import RunCounters
from sat_jax.train.finish import flops_of_run
from sat_jax.train.run_weights import starting_point
from sat_jax.train.setup import Task, controller_of, prepared_data
from sat_jax.train.teacher import open_teacher


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run. `settings` are those in which the runs of the sweep differ, by dotted path.

    FLOPs are those of full rows, at most what a run with padding spends.
    """

    settings: Settings
    config: Config
    model: DecoderConfig
    controller: Controller
    teacher_model: DecoderConfig | None = None

    @cached_property
    def name(self) -> str:
        """The name of its work directory: a fingerprint of all that its results depend on."""
        return fingerprint(without_free(self.config))

    def flops(self) -> tuple[float, float]:
        """FLOPs of the run with probes and selections, and of dense training on its tokens."""
        counters, rungs = RunCounters(self.controller), self.controller.rungs
        tokens = self.config.train.rows_per_step * self.config.data.row_length
        counters.probes = self.probes()
        counters.rung_selections = [self.selections(rung) for rung in rungs]
        counters.rung_tokens = [(rung.stop - rung.start) * tokens for rung in rungs]
        return flops_of_run(cast(Task, self), counters)  # of a task: these fields alone

    def probes(self) -> int:
        """Number of refreshes with a probe: all of them, or the first for metrics of inputs."""
        metric = METRICS[self.config.sparsity.metric]
        selections = sum(map(self.selections, self.controller.rungs)) if metric.needs else 0
        return selections if metric.probes else min(selections, 1)

    def selections(self, rung: Rung) -> int:
        """Number of selections between the steps of a rung."""
        return sum(map(self.controller.refreshes, range(rung.start, rung.stop)))


def plan_runs(
    values: Mapping[str, Any], fixed: Settings, settings_of_runs: Iterable[Settings]
) -> list[PlannedRun]:
    """Return the runs of the experiment `values` with the settings `fixed`, equal runs once.

    Dense runs that differ in sparsity alone are equal, so a sweep over rates from 0 and metrics
    has one dense run per seed. Raises `UserError`, naming the settings, for an invalid run.
    """
    runs: dict[str, PlannedRun] = {}
    models: dict[Any, DecoderConfig] = {}
    for settings in settings_of_runs:
        try:
            run = _plan_run(values, fixed, settings, models)
        except UserError as error:
            raise UserError(f"{settings_text(settings)}: {error}") from error
        runs.setdefault(run.name, run)
    return list(runs.values())


def _plan_run(
    values: Mapping[str, Any], fixed: Settings, settings: Settings, models: dict[Any, DecoderConfig]
) -> PlannedRun:
    """`models` caches the models that were read."""
    config = build(values, {**fixed, **settings})
    for path in sorted(free_paths(config) & settings.keys()):
        raise UserError(
            f"{path} changes no result, so runs that differ in it are equal; give it as"
            f" --config.{path}"
        )
    if config.omitted_share == 0:
        config = dense_version(config)
        sparse = {path for path in settings if path.startswith("sparsity.") or path in SPARSE_ONLY}
        outside = {path: value for path, value in settings.items() if path not in sparse}
        settings = {"sparsity.rate": 0.0, **outside} if sparse else outside
    shape = config.model
    source = (shape.path, shape.preset, shape.rope_type, shape.rope_factor, *shape.sizes.items())
    if source not in models:
        models[source] = starting_point(config)[0]
    models[source].check_length("data.row_length", config.data.row_length)
    run = PlannedRun(settings, config, models[source], controller_of(config, models[source]))
    if not config.distills:
        return run
    teacher = config.distill.teacher
    if teacher not in models:
        models[teacher] = open_teacher(config).config
    return dataclasses.replace(run, teacher_model=models[teacher])


def prepare_all(runs: Iterable[PlannedRun], log: Callable[[str], None]) -> dict[str, str]:
    """Prepare the data of all runs, each once; return their fingerprints by the name of the run.

    Raises `UserError`, naming the settings, for invalid data.
    """
    prepared: dict[Any, str] = {}
    by_name = {}
    for run in runs:
        source = (run.config.data, run.config.model.path, run.model.vocab_size)
        if source not in prepared:
            try:
                data = prepared_data(run.config, run.model, log)[1]
            except UserError as error:
                raise UserError(f"{settings_text(run.settings)}: {error}") from error
            prepared[source] = data.info.fingerprint
        by_name[run.name] = prepared[source]
    return by_name


def dry_run(runs: Sequence[PlannedRun], finished: Collection[str]) -> str:
    """Return a table of the runs with their FLOPs, and the total of those that are not `finished`
    (names)."""
    rows, remaining = [], 0.0
    for run in runs:
        spent, dense = run.flops()
        flops = [quantity(dense, "FLOP"), quantity(spent, "FLOP"), f"{dense / spent:.2f}×"]
        remaining += 0.0 if run.name in finished else spent
        state = "finished" if run.name in finished else "-"
        rows.append([run.name, settings_text(run.settings), *flops, state])
    table = fixed_width(("run", "settings", "dense", "spent", "bound", "state"), rows, left=2)
    left = len(runs) - len(finished)
    return f"{table}\n\n{len(runs)} runs, {left} to do: at most {quantity(remaining, 'FLOP')}"
