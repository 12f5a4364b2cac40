"""What a sweep runs over: axes, crossed, and lists of runs; each run as settings by dotted path."""

import itertools
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.config_values import find, parse, parse_overrides
from sat_jax.errors import UserError

Settings = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values by path of axes written `a.b=v1,v2`.

    Semicolons in place of the commas separate values that have commas themselves, and have to
    where a setting is a list: `a.b=0,1;0`. Raises `UserError` for what is no setting, not accepted
    or given twice.
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
                f"--axis {text}: a value of {path} is a list with commas itself; accepted: values"
                f" separated by semicolons, as in '{path}=0,1;0', or one by --config.{path}"
            )
        parts = values.split(";" if ";" in values else ",")
        axes[path] = [parse(path, part) for part in parts]
        if len(set(axes[path])) < len(parts):
            raise UserError(f"--axis {text} has a value twice")
    return axes


def read_runs(file: Path) -> Any:
    """What a .json or .jsonl file holds: for `listed`. Raises `UserError` if that is no JSON."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"--runs {file} cannot be read: {error}") from error


def listed(asked: Any, origin: str) -> list[dict[str, Any]]:
    """The runs that `asked` describes: a list of runs, each its settings by path, or a mapping of
    paths to lists of values, which are crossed. `origin` names it in errors."""
    if isinstance(asked, Mapping):
        for path, values in asked.items():
            find(path, f"{origin}: ")
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise UserError(f"{origin}: {path} is {values!r}; accepted: a list of values")
        return cross([{}], asked)
    if not isinstance(asked, Sequence) or isinstance(asked, str) or not asked:
        raise UserError(
            f"{origin} gives {asked!r}; accepted: a list of runs, each a mapping of settings to"
            " values, or a mapping of settings to lists of values"
        )
    for number, run in enumerate(asked, 1):
        if not isinstance(run, Mapping):
            raise UserError(f"{origin}, run {number}: {run!r}; accepted: settings by dotted name")
        for path in run:
            find(path, f"{origin}, run {number}: ")
    return [dict(run) for run in asked]


def cross(runs: Sequence[Settings], axes: Axes) -> list[dict[str, Any]]:
    """Each of `runs` with each combination of the axes' values; the last axis varies fastest."""
    products = list(itertools.product(*axes.values()))
    return [{**run, **dict(zip(axes, point, strict=True))} for run in runs for point in products]


def combine(
    overrides: Sequence[str],
    axes: Axes,
    runs: Sequence[Settings] | None,
    seeds: int | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings of all runs, settings of each run): `runs` × `axes` × seeds from 0.

    Raises `UserError` where a setting comes from two places, or where there is nothing to vary.
    """
    fixed = parse_overrides(overrides)
    if not axes and runs is None and seeds is None:
        raise UserError(
            "nothing to sweep over; accepted: --axis, --runs, --seeds, or an experiment with"
            " get_sweep()"
        )
    if seeds is not None:
        if "seed" in axes:
            raise UserError("seed is given by --seeds and by --axis; accepted: one of them")
        axes = {**axes, "seed": range(seeds)}
    in_runs = {path for run in runs or () for path in run}
    for path in in_runs & axes.keys():
        raise UserError(f"{path} is in the list of runs and an axis; accepted: one of them")
    for path in (in_runs | axes.keys()) & fixed.keys():
        raise UserError(f"{path} varies over the sweep, and --config.{path} fixes it")
    return fixed, cross(runs if runs is not None else [{}], axes)


def told(settings: Settings, short: Mapping[str, str] | None = None) -> str:
    """`sparsity.rate=0.4 seed=1`; `short` has other names for paths."""
    return " ".join(
        f"{(short or {}).get(path, path)}={shown(value)}" for path, value in settings.items()
    )


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "()"
    return str(value)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path's last part, where no other path ends the same."""
    paths = list(dict.fromkeys(paths))
    ends = [path.rpartition(".")[2] for path in paths]
    return {
        path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)
    }
