"""Conversion of ConfigDicts, experiment files and command-line overrides to `Config`."""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict

from sat_jax.config import Config
from sat_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting: dotted path, type, and metadata of its dataclass field."""

    path: str
    type: Any
    default: Any
    help: str
    low: float | None
    above: float | None
    high: float | None
    choices: tuple[str, ...]
    free: bool

    @property
    def accepts(self) -> str:
        """The accepted values as text: `int >= 1`, `one of a, b, or None`."""
        options = [t for t in _options(self.type) if t is not type(None)]
        text = " or ".join(_type_text(t) for t in options)
        if self.choices:
            text = f"one of {', '.join(self.choices)}"
        if self.low is not None:
            text += f" >= {self.low:.10g}"
        if self.above is not None:
            text += f" > {self.above:.10g}"
        if self.high is not None:
            text += f"{'' if self.low is self.above is None else ','} <= {self.high:.10g}"
        return text + (", or None" if len(options) < len(_options(self.type)) else "")


def keys(cls: type = Config, prefix: str = "") -> Iterator[Key]:
    """Yield every setting, in the order of the dataclasses."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{path}.")
        else:
            yield Key(path, hints[field.name], field.default, **field.metadata)


def default_config() -> ConfigDict:
    """Return all settings at their defaults, for an experiment file to change."""
    return ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain values, with lists instead of tuples, as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def changed(config: Config) -> dict[str, Any]:
    """Return the settings that are not at their defaults by dotted path, with JSON values."""
    values = {}
    for known in _known().values():
        value = functools.reduce(getattr, known.path.split("."), config)
        if value != known.default:
            values[known.path] = list(value) if isinstance(value, tuple) else value
    return values


def name_of(values: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits of a hash of some settings."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(config: Config) -> str:
    """Return a hash of the settings that are not at their defaults. Settings that are added later
    do not change it."""
    return name_of(changed(config))


def from_config_dict(values: Mapping[str, Any] | ConfigDict) -> Config:
    """Return the frozen settings; a missing key has its default."""
    return _build(Config, values.to_dict() if isinstance(values, ConfigDict) else values, "", {})


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of `FILE.py` or `FILE.py:VARIANT` with overrides `a.b=value` applied."""
    return build(experiment(spec), parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return values by path from texts `a.b=value`; the last text of a path counts."""
    changes = {}
    for text in overrides:
        path, separator, value = text.partition("=")
        known = find(path, "--config.")
        if not separator:
            raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
        changes[path] = _parse(value, known)
    return changes


def parse(path: str, text: str) -> Any:
    """Return the accepted value of the setting `path` that `text` represents."""
    key = find(path)
    return _check(_parse(text, key), key)


def build(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return the frozen settings of nested `values`, replaced by `changes`, which are by path."""
    for path in changes:
        find(path)
    return _build(Config, values, "", changes)


def free_paths(config: Config) -> set[str]:
    """Return the keys on which no result of `config` depends. Results of the schedule `auto` depend
    on `train.eval_every`."""
    needed = {"train.eval_every"} if config.sparsity.schedule == "auto" else set()
    return {key.path for key in _known().values() if key.free} - needed


def without_free(config: Config) -> Config:
    """Return `config` with the keys of `free_paths` at their defaults."""
    for path in free_paths(config):
        group, _, name = path.partition(".")
        if name:
            part = dataclasses.replace(getattr(config, group), **{name: find(path).default})
            config = dataclasses.replace(config, **{group: part})
    return config


def experiment(spec: str) -> dict[str, Any]:
    """Return the settings of `get_config()` or `get_config(VARIANT)` of an experiment file."""
    config = _call(spec, "get_config")
    name = spec.partition(":")[0]
    if config is _NO:
        raise UserError(f"--config: {name} has no get_config()")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {name} returns {config!r}, not a ConfigDict")
    return dict(config.to_dict())


def experiment_sweep(spec: str) -> Any:
    """Return `get_sweep()` or `get_sweep(VARIANT)` of an experiment file; None without one."""
    sweep = _call(spec, "get_sweep")
    return None if sweep is _NO else sweep


def _call(spec: str, function: str) -> Any:
    """Return the result of `function` of an experiment file for the variant of `spec`, or `_NO` if
    the file has no such function."""
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--config: no file {name}; experiments/README.md lists the experiments")
    module_spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config: {name} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        called = getattr(module, function, None)
        if called is None:
            return _NO
        has_variants = bool(inspect.signature(called).parameters)
        if variant and not has_variants and function == "get_config":
            raise UserError(f"--config: {name} has no variants; {variant} is not accepted")
        return called(variant) if variant and has_variants else called()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (variant,):
            raise UserError(
                f"--config: {name} has no variant {variant!r}. {inspect.getdoc(called) or ''}"
            ) from error
        raise UserError(f"--config: {spec}{_line_of(error, path)}: {_one_line(error)}") from error


def _line_of(error: Exception, path: Path) -> str:
    """Return ", line N" for the last line of the file in the traceback, or nothing."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.absolute()
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _one_line(error: BaseException) -> str:
    """Return type and message of an error, without the errors that ml_collections wraps around."""
    kind = type(error).__name__
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if error.args else ""
    return f"{kind}: {' '.join(text.split())}"


@functools.cache
def _known() -> Mapping[str, Key]:
    return {key.path: key for key in keys()}


def find(path: str, prefix: str = "") -> Key:
    """Return the setting `path`. Raises `UserError` with near names if it does not exist."""
    if path in _known():
        return _known()[path]
    raise _not_a_setting(path, prefix)


def _not_a_setting(path: str, prefix: str = "") -> UserError:
    """Return an error with the settings most similar to `path` and to its last part."""
    last = path.rsplit(".", 1)[-1]
    tails = {name.rsplit(".", 1)[-1]: name for name in _known()}
    # A key in the wrong group first.
    close = [tails[last]] if last in tails else []
    close += difflib.get_close_matches(path, _known(), n=3, cutoff=0.6)
    close += [tails[tail] for tail in difflib.get_close_matches(last, tails, n=3, cutoff=0.7)]
    unique = list(dict.fromkeys(close))[:3]
    near = f"near: {', '.join(unique)}" if unique else "--help lists all settings"
    return UserError(f"{prefix}{path} is not a setting; {near}")


def _build(cls: type[T], values: Any, prefix: str, changes: Mapping[str, Any]) -> T:
    """Return a `cls` of nested `values`, replaced by `changes`, which are by path."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')} is {values!r}; accepted: a group of settings")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise _not_a_setting(f"{prefix}{name}")
    built = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            group = values.get(field.name, {})
            built[field.name] = _build(hints[field.name], group, f"{path}.", changes)
        elif path in changes:
            built[field.name] = _check(changes[path], _known()[path])
        elif field.name in values:
            built[field.name] = _check(values[field.name], _known()[path])
    return cls(**built)


def _check(value: Any, key: Key) -> Any:
    """Return `value` in the key's type. Raises `UserError` if the key does not accept it."""
    for option in _options(key.type):
        converted = _convert(value, option)
        if converted is not _NO and _accepted(converted, key):
            return converted
    near = difflib.get_close_matches(str(value).lower(), key.choices, n=3)
    hint = f"near: {', '.join(near)}; " if near else ""
    raise UserError(f"{key.path} is {value!r}; {hint}accepted: {key.accepts}")


_NO = object()


def _convert(value: Any, option: Any) -> Any:
    """Return `value` as type `option`, or `_NO`."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return value if value in typing.get_args(option) else _NO
    if origin is tuple:
        item = typing.get_args(option)[0]
        parts = [value] if isinstance(value, (str, int)) else value
        if not isinstance(parts, (list, tuple)):
            return _NO
        converted = tuple(_convert(part, item) for part in parts)
        return _NO if _NO in converted else converted
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is not (option is bool):
        return _NO
    return value if isinstance(value, option) else _NO


def _accepted(value: Any, key: Key) -> bool:
    """Return whether a value, or each item of a tuple, is a known name or within the bounds."""
    if isinstance(value, str) and key.choices:
        return value in key.choices
    if isinstance(value, tuple):
        return all(_accepted(part, key) for part in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return (
        math.isfinite(value)
        and (key.low is None or value >= key.low)
        and (key.above is None or value > key.above)
        and (key.high is None or value <= key.high)
    )


def _parse(text: str, key: Key) -> Any:
    """Return a command-line value in the key's type; items of tuples are separated by commas."""
    options = _options(key.type)
    if type(None) in options and text in ("None", "none", ""):
        return None
    for option in options:
        if option is type(None):
            continue
        parsed = _parse_as(text, option)
        if parsed is not _NO:
            return parsed
    raise UserError(f"--config.{key.path} is {text!r}; accepted: {key.accepts}")


def _parse_as(text: str, option: Any) -> Any:
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        parts = tuple(_parse_as(part, item) for part in text.split(",") if part)
        return _NO if _NO in parts else parts
    if typing.get_origin(option) is Literal:
        return next((item for item in typing.get_args(option) if str(item) == text), text)
    if option is bool:
        return {"true": True, "false": False}.get(text.lower(), _NO)
    if option in (int, float):
        try:
            return option(text)
        except ValueError:
            return _NO
    return text


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(o for arg in typing.get_args(annotation) for o in _options(arg))
    return (annotation,)


def _type_text(option: Any) -> str:
    origin = typing.get_origin(option)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if origin is tuple:
        return f"{_type_text(typing.get_args(option)[0])}s separated by commas"
    return {bool: "true or false", str: "text"}.get(option, str(option.__name__))
