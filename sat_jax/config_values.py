"""Between `Config` and what people write: ConfigDicts, experiment files, command-line overrides."""

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
    """One setting: dotted path, type, and the metadata of its dataclass field."""

    path: str
    type: Any
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    free: bool

    @property
    def accepts(self) -> str:
        """The accepted values in words: `int >= 1`, `one of a, b, or None`."""
        options = [t for t in _options(self.type) if t is not type(None)]
        words = " or ".join(_type_words(t) for t in options)
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        if self.low is not None:
            words += f" >= {self.low:.10g}"
        if self.high is not None:
            words += f"{',' if self.low is not None else ''} <= {self.high:.10g}"
        return words + (", or None" if len(options) < len(_options(self.type)) else "")


def keys(cls: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every setting, in the order of the dataclasses."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{path}.")
        else:
            meta = {k: field.metadata[k] for k in ("help", "low", "high", "choices", "free")}
            yield Key(path, hints[field.name], field.default, **meta)


def default_config() -> ConfigDict:
    """All settings at their defaults, for an experiment file to change."""
    return ConfigDict(to_dict(Config()), type_safe=False)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values; tuples become lists, so that JSON gives the same back."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def changed(config: Config) -> dict[str, Any]:
    """Dotted key → value of every setting that is not at its default, as JSON gives it back."""
    values = {}
    for known in keys():
        value = functools.reduce(getattr, known.path.split("."), config)
        if value != known.default:
            values[known.path] = list(value) if isinstance(value, tuple) else value
    return values


def name_of(values: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that name some settings."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(config: Config) -> str:
    """A name for these settings. It stays what it is where settings are added later, since what is
    at its default has no part in it."""
    return name_of(changed(config))


def from_config_dict(values: Mapping[str, Any] | ConfigDict) -> Config:
    """The frozen settings; a key that is missing takes its default."""
    return _build(Config, values.to_dict() if isinstance(values, ConfigDict) else values, "", {})


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Settings from `FILE.py` or `FILE.py:VARIANT`, then overrides `a.b=value` in order."""
    return build(experiment(spec), parse_overrides(overrides))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Values by path, of texts `a.b=value`; the last one of a path counts."""
    changes = {}
    for text in overrides:
        path, separator, value = text.partition("=")
        known = find(path, "--config.")
        if not separator:
            raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
        changes[path] = _parse(value, known)
    return changes


def parse(path: str, text: str) -> Any:
    """The value that `text` gives the setting `path`: of its type, and one that it accepts."""
    key = find(path)
    return _check(_parse(text, key), key)


def build(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """The frozen settings: nested `values`, with `changes` by path in the place of theirs."""
    for path in changes:
        find(path)
    return _build(Config, values, "", changes)


def free_paths(config: Config) -> set[str]:
    """The keys on which no result of `config` depends. The schedule `auto` follows the evaluations:
    there one depends on when they are."""
    follows = {"train.eval_every"} if config.sparsity.schedule == "auto" else set()
    return {known.path for known in keys() if known.free} - follows


def without_free(config: Config) -> Config:
    """`config` with the keys on which no result depends at their defaults."""
    for path in free_paths(config):
        group, _, name = path.partition(".")
        if name:
            part = dataclasses.replace(getattr(config, group), **{name: find(path).default})
            config = dataclasses.replace(config, **{group: part})
    return config


def experiment(spec: str) -> dict[str, Any]:
    """What `get_config()` or `get_config(VARIANT)` of an experiment file gives."""
    config = _call(spec, "get_config")
    name = spec.partition(":")[0]
    if config is _NO:
        raise UserError(f"--config: {name} has no get_config()")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {name} gives {config!r}, not a ConfigDict")
    return dict(config.to_dict())


def experiment_sweep(spec: str) -> Any:
    """What `get_sweep()` or `get_sweep(VARIANT)` of an experiment file gives; None without one."""
    found = _call(spec, "get_sweep")
    return None if found is _NO else found


def _call(spec: str, function: str) -> Any:
    """What `function` of an experiment file gives for the variant, or `_NO` where it has none."""
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
        varied = bool(inspect.signature(called).parameters)
        if variant and not varied and function == "get_config":
            raise UserError(f"--config: {name} has no variants, so none is called {variant}")
        return called(variant) if variant and varied else called()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (variant,):
            raise UserError(
                f"--config: {name} has no variant {variant!r}. {inspect.getdoc(called) or ''}"
            ) from error
        raise UserError(f"--config: {spec}{_place(error, path)}: {_told(error)}") from error


def _place(error: Exception, path: Path) -> str:
    """The line of the file where the error arose, if one did."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.absolute()
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _told(error: BaseException) -> str:
    """The error in one line. ml_collections wraps errors in errors, which quotes their text."""
    kind = type(error).__name__
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if error.args else ""
    return f"{kind}: {' '.join(text.split())}"


@functools.cache
def _known() -> Mapping[str, Key]:
    return {key.path: key for key in keys()}


def find(path: str, prefix: str = "") -> Key:
    """The setting `path`. Raises `UserError`, with `prefix` and near names, where there is none."""
    if path in _known():
        return _known()[path]
    raise UserError(f"{prefix}{path} is no setting; {_near(path)}")


def _near(path: str) -> str:
    """The settings most like `path`, by the whole path and by its last part."""
    last = path.rsplit(".", 1)[-1]
    tails = {name.rsplit(".", 1)[-1]: name for name in _known()}
    # A key in the wrong group first.
    close = [tails[last]] if last in tails else []
    close += difflib.get_close_matches(path, _known(), n=3, cutoff=0.6)
    close += [tails[tail] for tail in difflib.get_close_matches(last, tails, n=3, cutoff=0.7)]
    unique = list(dict.fromkeys(close))[:3]
    return f"near: {', '.join(unique)}" if unique else "--help lists all settings"


def _build(cls: type[T], values: Any, prefix: str, changes: Mapping[str, Any]) -> T:
    """`cls` from nested `values`, with `changes` by path in the place of theirs."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')} is {values!r}; accepted: a group of settings")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"{prefix}{name} is no setting; {_near(f'{prefix}{name}')}")
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
    """`value` as the key's type and one that it accepts, or a `UserError` naming the key."""
    for option in _options(key.type):
        converted = _convert(value, option)
        if converted is not _NO and _accepted(converted, key):
            return converted
    near = difflib.get_close_matches(str(value).lower(), key.choices, n=3)
    hint = f"near: {', '.join(near)}; " if near else ""
    raise UserError(f"{key.path} is {value!r}; {hint}accepted: {key.accepts}")


_NO = object()


def _convert(value: Any, option: Any) -> Any:
    """`value` as type `option`, or `_NO`."""
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
    """Whether a value of the right type, or each of its parts, is one of the names, or within the
    bounds."""
    if isinstance(value, str) and key.choices:
        return value in key.choices
    if isinstance(value, tuple):
        return all(_accepted(part, key) for part in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    low, high = key.low, key.high
    return (
        math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)
    )


def _parse(text: str, key: Key) -> Any:
    """A command-line value as the key's type; `None` and comma-separated tuples understood."""
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
    if option is bool:
        return {"true": True, "false": False}.get(text.lower(), _NO)
    if option in (int, float):
        try:
            return option(text)
        except ValueError:
            return _NO
    return text


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(o for arg in typing.get_args(annotation) for o in _options(arg))
    return (annotation,)


def _type_words(option: Any) -> str:
    origin = typing.get_origin(option)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if origin is tuple:
        return f"{_type_words(typing.get_args(option)[0])}s separated by commas"
    return {bool: "true or false", str: "text"}.get(option, str(option.__name__))
