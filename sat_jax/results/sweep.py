"""Sweeps: the runs to launch, and the comparisons for which their results are tabulated."""

import dataclasses
import itertools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sat_jax.config_values import experiment_sweep, find, parse, parse_overrides
from sat_jax.errors import UserError
from sat_jax.results.text import setting_text

Settings: TypeAlias = Mapping[str, Any]
Axes: TypeAlias = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table of results: the runs that differ in `settings` and in nothing else.

    `name` is used in documents and file names; `title` says what differs; `settings` are dotted
    paths. Every run is compared with its dense baseline: the run of the same settings, seed and
    data with `sparsity.rate=0`. Settings outside sparsity, such as the learning rate, have a dense
    baseline for each of their values.
    """

    name: str
    title: str
    settings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep()` of an experiment file returns.

    `runs` are the settings of each run, by dotted path; `cross` makes combinations.
    """

    runs: Sequence[Settings]
    comparisons: tuple[Comparison, ...] = ()


def sweep_of(spec: str) -> Sweep | None:
    """Return the sweep of an experiment `FILE.py` or `FILE.py:VARIANT`, or None without one."""
    sweep = experiment_sweep(spec)
    if sweep is None:
        return None
    if not isinstance(sweep, Sweep) or not all(isinstance(run, Mapping) for run in sweep.runs):
        raise UserError(
            f"get_sweep() of {spec} returns {sweep!r}; accepted: a Sweep of runs, each a mapping"
        )
    for path in {path for run in sweep.runs for path in run}:
        find(path, f"get_sweep() of {spec}: ")
    return sweep


def declared_comparisons(folder: Path) -> list[Comparison]:
    """Return the comparisons of all experiment files in `folder`, each once."""
    comparisons: dict[str, Comparison] = {}
    for file in sorted(folder.glob("*.py")):
        sweep = sweep_of(str(file))
        for comparison in sweep.comparisons if sweep else ():
            if comparisons.setdefault(comparison.name, comparison) != comparison:
                raise UserError(f"{file}: comparison {comparison.name} differs from another file's")
    return list(comparisons.values())


def comparison_of(runs: Sequence[Settings]) -> Comparison:
    """Return the comparison of runs for which none is declared: everything but the seed."""
    settings = tuple(dict.fromkeys(path for run in runs for path in run if path != "seed"))
    return Comparison("sweep", f"Runs that differ in {', '.join(settings)}", settings)


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values by path of axes `a.b=v1,v2`.

    Semicolons instead of commas separate values that contain commas, and are required where a
    setting is a list: `a.b=0,1;0`. Raises `UserError` for an unknown setting, a value that it does
    not accept, and a setting given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        path, separator, values = text.partition("=")
        key = find(path, "--axis ")
        if not separator or not values:
            raise UserError(f"--axis {path} has no values; write --axis {path}=VALUE,VALUE")
        if path in axes:
            raise UserError(f"--axis {path} is given twice; accepted: one, with all its values")
        if ";" not in values and typing.get_origin(key.type) is tuple:
            raise UserError(
                f"--axis {text}: the values of {path} are lists with commas; accepted: values"
                f" separated by semicolons, as in '{path}=0,1;0', or one by --config.{path}"
            )
        parts = values.split(";" if ";" in values else ",")
        axes[path] = [parse(path, part) for part in parts]
    return axes


def cross(runs: Sequence[Settings], axes: Axes) -> list[dict[str, Any]]:
    """Return each run with each combination of the axes' values; the last axis varies fastest."""
    products = list(itertools.product(*axes.values()))
    return [{**run, **dict(zip(axes, point, strict=True))} for run in runs for point in products]


def combine(
    overrides: Sequence[str], axes: Axes, runs: Sequence[Settings] | None, seeds: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings of all runs, and those of each run: `runs` × `axes` × seeds from 0.

    Raises `UserError` if a setting has two sources, or nothing varies.
    """
    fixed = parse_overrides(overrides)
    if not axes and not runs and seeds is None:
        raise UserError(
            "nothing to sweep over; accepted: --axis, --seeds, or an experiment with get_sweep()"
        )
    sources = {
        "--config": fixed,
        "--axis": axes,
        "--seeds": () if seeds is None else ("seed",),
        "get_sweep()": {path for run in runs or () for path in run},
    }
    for (one, paths), (other, more) in itertools.combinations(sources.items(), 2):
        if both := sorted({*paths} & {*more}):
            raise UserError(f"{both[0]} is given by {one} and by {other}; accepted: one of them")
    if seeds is not None:
        axes = {**axes, "seed": range(seeds)}
    return fixed, cross(runs or [{}], axes)


def settings_text(settings: Settings) -> str:
    """Format as `sparsity.rate=0.4 seed=1`."""
    return " ".join(f"{path}={setting_text(value)}" for path, value in settings.items())
