"""The runs of a sweep: what each is, what it is called, and which of them cannot be."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sat_jax.analysis.results import OF_SPARSITY, dense_twin, dense_version
from sat_jax.config import Config
from sat_jax.config_values import build, fingerprint, free_paths, without_free
from sat_jax.errors import UserError
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.sparsity.controller import Controller
from sat_jax.sweep.axes import Settings
from sat_jax.train.setup import controller_of, prepared_data
from sat_jax.train.trained import starting_point


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. `settings` are those in which the runs of the sweep differ, by dotted path."""

    settings: Settings
    config: Config
    model: DecoderConfig
    controller: Controller

    @property
    def name(self) -> str:
        """The name of its work directory: everything that a result depends on, and no more."""
        return fingerprint(without_free(self.config))

    @property
    def dense(self) -> bool:
        """Whether no sparsity was asked for."""
        return max(self.config.rates) == 0

    @property
    def twin(self) -> str:
        """Shared with the dense run of the same seed."""
        return dense_twin(self.config)

    @property
    def group(self) -> str:
        """Shared by the runs that differ in their seed alone."""
        return fingerprint(dataclasses.replace(without_free(self.config), seed=0))


@dataclasses.dataclass(frozen=True)
class Refused:
    """A run that cannot be, and why."""

    settings: Settings
    reason: str


def make_runs(
    values: Mapping[str, Any], fixed: Settings, asked: Sequence[Settings]
) -> tuple[list[Run], list[Refused]]:
    """The runs of the experiment `values` with the settings `fixed`, one for each of `asked`.

    Runs that come out the same are one. So are dense runs that differ in sparsity alone: they take
    its defaults, and a sweep over rates from 0 and metrics has one dense run a seed.
    """
    runs: dict[str, Run] = {}
    refused = []
    models: dict[tuple[str | None, str | None], DecoderConfig] = {}
    for settings in asked:
        try:
            config = build(values, {**fixed, **settings})
            _check_told_apart(config, settings)
            if max(config.rates) == 0:
                config = dense_version(config)
                settings = _of_dense(settings)
            source = (config.model.path, config.model.preset)
            if source not in models:
                models[source] = starting_point(config)[0]
            model = models[source]
            model.check_length("data.row_length", config.data.row_length)
            run = Run(settings, config, model, controller_of(config, model))
        except UserError as error:
            refused.append(Refused(settings, str(error)))
        else:
            runs.setdefault(run.name, run)
    return list(runs.values()), refused


def _check_told_apart(config: Config, settings: Settings) -> None:
    for path in sorted(free_paths(config) & settings.keys()):
        raise UserError(
            f"{path} changes no result, so runs that differ in it are the same; give it as"
            f" --config.{path}"
        )


def _of_dense(settings: Settings) -> Settings:
    """What is left to tell of a dense run: a rate of 0, and what is not sparsity."""
    others = {
        path: v
        for path, v in settings.items()
        if not (path.startswith("sparsity.") or path in OF_SPARSITY)
    }
    sparse = others.keys() < settings.keys()
    return {"sparsity.rate": 0.0, **others} if sparse else others


def prepare_all(
    runs: Iterable[Run], log: Callable[[str], None]
) -> tuple[dict[str, str], list[Refused]]:
    """Prepares the data of all runs, each once, before one starts: what is wrong with a text is
    known at once, and no two runs do the same work. Returns the fingerprints of the data of the
    runs that can be, by name."""
    prepared: dict[Any, str] = {}
    failed: dict[Any, str] = {}
    good, refused = {}, []
    for run in runs:
        config = run.config
        wanted = (config.data, config.model.path, config.model.preset)
        if wanted not in prepared and wanted not in failed:
            try:
                prepared[wanted] = prepared_data(config, run.model, log)[1].info.fingerprint
            except UserError as error:
                failed[wanted] = str(error)
        if wanted in prepared:
            good[run.name] = prepared[wanted]
        else:
            refused.append(Refused(run.settings, failed[wanted]))
    return good, refused
