"""A recipe: steps of compression and training, each on the model of the step before."""

import argparse
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sat_jax.compress.low_rank import Factorization
from sat_jax.compress.methods import Method
from sat_jax.compress.prune import Pruning
from sat_jax.compress.quantize import Quantization
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.errors import UserError
from scripts.compress import parser
from scripts.evaluation_meter import Args
from scripts.method_options import METHOD_OPTIONS, chosen_method, option

_KINDS = ("compress", "train")
# Options of the command line that hold for all compress steps.
COMMON = (
    "calibration", "text_field", "calibration_rows", "context", "held_out", "tokenizer", "rows",
    "dtype",
)  # fmt: skip
_SOURCE = "model.path"  # the setting of a training that is the model of the step before


class Step(NamedTuple):
    """A step: its directory, its settings as the recipe has them, and what they mean: a method with
    its options, or the configuration of a training."""

    directory: Path
    settings: dict[str, Any]
    method: Method | None = None
    args: Args | None = None
    config: Config | None = None


def read_recipe(args: Args, out: Path) -> list[Step]:
    """Return the steps of a recipe, whose directories are in `out`.

    Raises `UserError` for a file or a setting that is not accepted, before anything is computed.
    """
    path = Path(args.recipe).expanduser()
    for name in METHOD_OPTIONS:
        if getattr(args, name) is not None:
            raise UserError(f"{option(name)} has no effect with --recipe; accepted: in a step")
    if args.record is not None:
        raise UserError("--record with --recipe; accepted: one of them")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error
    tables = raw.get("step")
    if raw.keys() != {"step"} or not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: accepted: tables [[step]], and nothing else")
    steps: list[Step] = []
    source = args.model
    for number, table in enumerate(tables, 1):
        try:
            steps.append(_step(args, table, number, source, out))
            _check_order(steps)
        except UserError as error:
            raise UserError(f"{path}: step {number}: {error}") from error
        source = str(steps[-1].directory)
    return steps


def _step(args: Args, table: Any, number: int, source: str, out: Path) -> Step:
    kinds = [kind for kind in _KINDS if kind in table] if isinstance(table, dict) else []
    if len(kinds) != 1 or table.keys() != {"name", *kinds} or not isinstance(table[kinds[0]], dict):
        raise UserError("accepted: a name, and one table compress or train")
    name, settings = table["name"], table[kinds[0]]
    if not isinstance(name, str) or not name.replace("-", "").isalnum():
        raise UserError(f"name = {name!r}; accepted: letters, digits and hyphens")
    directory = out / f"{number}-{name}"
    if kinds == ["train"]:
        return Step(directory, table, config=_train_config(settings, source))
    own = _compress_options(args, settings, source, directory)
    return Step(directory, table, chosen_method(own), own)


def _compress_options(args: Args, settings: Mapping[str, Any], source: str, out: Path) -> Args:
    """Return the options of a compression: those of the step, and those of the command line that
    hold for all steps."""
    accepted = [option(name).removeprefix("--") for name in METHOD_OPTIONS]
    arguments = []
    for name, value in settings.items():
        if name not in accepted:
            raise UserError(f"compress has no option {name}; accepted: {', '.join(accepted)}")
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    own = parser().parse_args(["--model", source, "--out", str(out), *arguments])
    return argparse.Namespace(**vars(own) | {name: getattr(args, name) for name in COMMON})


def _train_config(settings: Mapping[str, Any], source: str) -> Config:
    """Return the configuration of a training, which begins with the model `source`."""
    values = dict(flat(settings))
    file = values.pop("config", None)
    if not isinstance(file, str):
        raise UserError("train needs config, an experiment file")
    if _SOURCE in values:
        raise UserError(f"train: {_SOURCE} is the model of the step before; accepted: none")
    overrides = [f"{key}={_text(value)}" for key, value in values.items()]
    return load(file, [*overrides, f"{_SOURCE}={source}"])


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested tables by dotted name."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_order(steps: list[Step]) -> None:
    """Raise `UserError` if the last step would undo, or cannot begin with, one before it."""
    *before, last = steps
    for step in before:
        if isinstance(step.method, Quantization):
            raise UserError(
                f"the model is quantized by {step.directory.name}; accepted: nothing after it"
            )
        if last.config is not None and isinstance(step.method, Pruning | Factorization):
            kept = "zeros" if isinstance(step.method, Pruning) else "ranks"
            raise UserError(
                f"training does not keep the {kept} of {step.directory.name}; accepted: training"
                " before it, or after method structured"
            )
