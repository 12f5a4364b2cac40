"""Which comparison a run belongs to, told by the settings in which runs differ, never by names."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sat_jax.config_values import name_of
from sat_jax.report.groups import Group, Variant
from sat_jax.report.records import SPARSE, Settings
from sat_jax.sparsity.importance import METRICS


@dataclasses.dataclass(frozen=True)
class Axis:
    """A table: runs that differ in nothing but `keys` (and their seed) stand in it together."""

    name: str
    title: str
    keys: tuple[str, ...]


RATES = Axis("rates", "Quality against rate", ("rate",))
SCHEDULES = Axis(
    "schedules",
    "Schedule of the omission rate",
    ("schedule", "rungs", "split", "dense_start", "patience", "min_gain"),
)
_NAMED = (
    RATES,
    Axis("metrics", "Metric and selection", ("metric", "selection", "temperature")),
    SCHEDULES,
    Axis(
        "refresh",
        "Refreshes and their probes",
        ("refresh_every", "probe_tokens", "probe_sampling", "stats_decay"),
    ),
    Axis(
        "modules",
        "Heads, channels, or both",
        ("rate_attention", "rate_mlp", "attention_unit"),
    ),
    Axis(
        "moments",
        "Moments of omitted neurons",
        ("moments", "bias_correction", "execution", "kernels"),
    ),
)
_LEFT = tuple(key for key in SPARSE if not any(key in axis.keys for axis in _NAMED))
AXES = (*_NAMED, Axis("others", "Other settings of sparsity", _LEFT))


def _probes(settings: Settings) -> bool:
    return settings["refresh_every"] > 0 and METRICS[settings["metric"]].probes


# Settings that say something only beside certain others.
_BESIDE: Mapping[str, Callable[[Settings], bool]] = {
    "temperature": lambda settings: settings["selection"] == "sample",
    "rungs": lambda settings: settings["schedule"] not in ("constant", "s2d"),
    "split": lambda settings: settings["schedule"] in ("ladder", "auto", "s2d"),
    "patience": lambda settings: settings["schedule"] == "auto",
    "min_gain": lambda settings: settings["schedule"] == "auto",
    "probe_tokens": _probes,
    "probe_sampling": _probes,
}

_FEW = 3  # settings that a name has room for


@dataclasses.dataclass(frozen=True)
class Slice:
    """Variants of one table: `varied` are the settings in which any of them differ, those of the
    axis first."""

    axis: Axis
    variants: tuple[Variant, ...]
    varied: tuple[str, ...]


def slices(group: Group) -> list[Slice]:
    """The tables that `group` has runs for, in the order of `AXES`.

    A table has every two variants that differ in its own settings alone. What is compared with
    nothing but the dense run stands in the first table.
    """
    found = {axis: _families(axis, group.sparse) for axis in AXES}
    compared = {id(one) for families in found.values() for family in families for one in family}
    alone = [[one] for one in group.sparse if id(one) not in compared]
    found[RATES] = [*found[RATES], *alone]
    made = []
    for axis, families in found.items():
        variants = tuple(one for family in families for one in family)
        if variants:
            made.append(Slice(axis, variants, varied(variants, axis.keys)))
    return made


def varied(variants: Sequence[Variant], first: Iterable[str] = ()) -> tuple[str, ...]:
    """The settings in which some differ, in the order of the settings but `first` before others."""
    order = [*first, *(key for key in SPARSE if key not in first)]
    return tuple(key for key in order if len({one.settings[key] for one in variants}) > 1)


def told(group: Group) -> dict[int, dict[str, Any]]:
    """By the identity of each sparse variant of a group: its rate where the rates vary, and the
    settings in which it is not as most of them are."""
    if not group.sparse:
        return {}
    keys = _telling(group)
    usual = {key: _usual(key, group.sparse) for key in keys}
    return {
        id(one): {
            key: one.settings[key]
            for key in keys
            if key in RATES.keys or one.settings[key] != usual[key]
        }
        for one in group.sparse
    }


def says_something(settings: Settings, key: str) -> bool:
    """Whether a setting has any effect beside the others."""
    return key not in _BESIDE or _BESIDE[key](settings)


def axis_of(told_of_it: Iterable[str]) -> Axis | None:
    """The axis of the settings that tell a variant from most, by what `told` has for it: that of
    the rates where nothing else does, None where those of several do."""
    axes = [
        axis for axis in AXES if axis is not RATES and not set(axis.keys).isdisjoint(told_of_it)
    ]
    return axes[0] if len(axes) == 1 else None if axes else RATES


def foremost(group: Group) -> list[Variant]:
    """The sparse variants, those first that are worth showing where there is no room for all: that
    differ from most in the fewest settings but the rate."""
    settings = told(group)
    return sorted(group.sparse, key=lambda one: len(settings[id(one)].keys() - set(RATES.keys)))


def keys_told(group: Group, variant: Variant) -> tuple[str, ...]:
    """The settings that name a sparse variant in its group: all that vary where they are few; else
    those that `told` has, and all for the one that is as most are."""
    varying = _telling(group)
    if len(varying) <= _FEW:
        return varying
    return tuple(told(group)[id(variant)]) or varying


def _telling(group: Group) -> tuple[str, ...]:
    """The settings in which variants differ; where there is one alone its rate."""
    return varied(group.sparse, RATES.keys) or RATES.keys


def _usual(key: str, variants: Sequence[Variant]) -> Any:
    """The most frequent value; of several the default, or the first."""
    counts = collections.Counter(one.settings[key] for one in variants)
    return max(counts, key=lambda value: (counts[value], value == SPARSE[key]))


def _families(axis: Axis, variants: Iterable[Variant]) -> list[list[Variant]]:
    """Two or more variants that are the same but for the axis' keys, ordered by these."""
    families: dict[str, list[Variant]] = {}
    for one in variants:
        rest = {key: value for key, value in one.settings.items() if key not in axis.keys}
        families.setdefault(name_of(rest), []).append(one)
    return [_ordered(axis, family) for family in families.values() if len(family) > 1]


def _ordered(axis: Axis, family: Sequence[Variant]) -> list[Variant]:
    """By numbers where a setting is one; names stay in the order of the runs."""

    def place(one: Variant) -> tuple[float, ...]:
        values: list[Any] = [one.settings[key] for key in axis.keys]
        return tuple(float(v) if isinstance(v, int | float) else 0.0 for v in values)

    return sorted(family, key=place)
