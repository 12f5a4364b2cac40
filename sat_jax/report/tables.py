"""The tables of a report as data: cells with the number, its error and its text."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sat_jax.analysis.means import estimate, mean_and_error
from sat_jax.analysis.tables import Align, percent, quantity, sides
from sat_jax.analysis.twins import ESTIMATED, PAIRS
from sat_jax.analysis.twins import NOTES as TWIN_NOTES
from sat_jax.config import ModelConfig, OptimizerConfig
from sat_jax.data.form import DONE
from sat_jax.report.axes import AXES, RATES, Slice, says_something, slices, told, varied
from sat_jax.report.groups import (
    Group,
    Variant,
    first_bound,
    first_rungs,
    first_speed,
    whole_bounds,
)
from sat_jax.report.records import SPARSE, Record, Settings

COMMITS, DEVICES = "†", "‡"
NOTES = {
    COMMITS: f"{COMMITS} The runs that this is made of are of several commits.",
    DEVICES: f"{DEVICES} The runs that this is made of are of several devices.",
    **TWIN_NOTES,
}


class Cell(NamedTuple):
    """What is shown; `value` and `error` are the number behind it, if it is one."""

    text: str
    value: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """`name` is of its kind: several groups of runs may have one each."""

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    align: tuple[Align, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def texts(self) -> list[list[str]]:
        return [[cell.text for cell in row] for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """What the marks in the cells mean."""
        shown = "".join(cell.text for row in self.rows for cell in row)
        return [text for mark, text in NOTES.items() if mark in shown]


def tables_of(groups: Iterable[Group]) -> list[Table]:
    """Every table that the groups have runs for: a kind after the other, a table a group."""
    groups = list(groups)
    made = [table for group in groups for table in _of_group(group)]
    names = ["sft", *(axis.name for axis in AXES), "efficiency"]
    return sorted(made, key=lambda table: names.index(table.name))


def _of_group(group: Group) -> list[Table]:
    compared = slices(group)
    if not compared:  # dense runs alone
        compared = [Slice(RATES, (), ())]
    made = [
        _quality(group, one, () if number else group.shorter) for number, one in enumerate(compared)
    ]
    return [*made, _efficiency(group)]


def _quality(group: Group, one: Slice, shorter: Sequence[Variant]) -> Table:
    """Perplexity before and after, distance from dense at the same tokens and, where dense runs of
    several lengths tell it, at the same FLOPs; FLOPs and whole-run speed-up with its bound."""
    tuned = group.runs[0].fine_tuned
    what = "perplexity of answers" if tuned else "held-out perplexity"
    keys = one.varied or ("rate",)
    variants = (*([group.dense] if group.dense else []), *shorter, *one.variants)
    equal = [_gap(variant.gaps_at_equal_flops(), variant) for variant in variants]
    known = any(cell.value is not None for cell in equal)
    rows = [
        (
            *_settings(variant, keys),
            _count(variant),
            _before(variant),
            _mean(variant.over(lambda run: run.row["perplexity_after"]), "{:.3f}"),
            _gap(variant.gaps(), variant),
            *([Cell("-") if variant.dense else at_equal] if known else []),
            _spent_share(variant),
            _whole(variant),
            _whole_bound(variant),
        )
        for variant, at_equal in zip(variants, equal, strict=True)
    ]
    names = [key.replace("_", " ") for key in keys]
    header = (
        *names,
        "seeds",
        f"{what} before",
        "after",
        "from dense",
        *(["at equal FLOPs"] if known else []),
        "FLOPs",
        "whole run",
        "bound",
    )
    name, title = one.axis.name, one.axis.title
    if tuned and one.axis is RATES:
        name, title = "sft", "Supervised fine-tuning"
    caption = caption_of(group, one.variants, keys)
    return Table(
        name, title, caption, header, sides(len(names), len(header) - len(names)), tuple(rows)
    )


def _efficiency(group: Group) -> Table:
    """Speed, time, memory and FLOPs; both speed-ups, each beside its bound."""
    keys = varied(group.sparse)
    settings = told(group)
    others = any(one.keys() - set(RATES.keys) for one in settings.values())
    rows = []
    for variant in group.variants:
        dense = variant.dense
        rest = {
            key: value_of(variant.settings, key)
            for key in settings.get(id(variant), {})
            if key not in RATES.keys
        }
        rows.append(
            (
                *_settings(variant, RATES.keys),
                *([Cell(named(rest))] if others else []),
                _count(variant),
                _marked(_mean(variant.over(first_speed), "{:,.0f}"), variant.runs),
                _marked(_mean(variant.over(lambda run: run.seconds), "{:,.1f} s"), variant.runs),
                _plain(variant.over(_memory), "B"),
                _plain(variant.over(lambda run: run.row["spent_flops"]), "FLOP"),
                _spent_share(variant),
                Cell("-") if dense else _first(variant),
                Cell("-") if dense else _plain(variant.over(first_bound), "{:.2f}×"),
                _whole(variant),
                _whole_bound(variant),
            )
        )
    names = [*RATES.keys, *(["settings"] if others else [])]
    header = (
        *names, "seeds", "tokens/s", "time", "memory", "FLOPs", "of dense",
        "first rung", "bound", "whole run", "bound",
    )  # fmt: skip
    caption = caption_of(group, group.sparse, (*RATES.keys, *keys))
    return Table("efficiency", "Efficiency", caption, header, sides(len(names), 10), tuple(rows))


def caption_of(group: Group, variants: Sequence[Variant], varied: Sequence[str]) -> str:
    """What all runs of a table have in common, so far as it is no default."""
    run = group.runs[0]
    settings = run.settings
    preset = settings.get("model.preset", ModelConfig().preset)
    known = "settings" in run.row
    parts = [str(settings.get("model.path") or preset) if known else run.row["experiment"]]
    tokens = sum(one.row["tokens"] for one in group.runs) / len(group.runs)
    parts.append(f"{run.row['steps']:,} steps, {tokens:,.0f} tokens")
    if run.fine_tuned and "loss_tokens" in run.row:
        parts.append(f"{percent(run.row['loss_tokens'] / run.row['tokens'])} of them learnt")
    parts += _examples(run) if run.fine_tuned and "prepared" in run.row else []
    if known:
        rate, schedule = (
            settings.get(f"optimizer.{key}", getattr(OptimizerConfig, key))
            for key in ("learning_rate", "schedule")
        )
        parts.append(f"learning rate {rate:g}, {schedule}")
    shared = variants[0].settings if variants else {}
    common = {k: v for k, v in shared.items() if k not in varied and v != SPARSE[k]}
    parts += [named(common)] if common else []
    parts.append(f"data {run.row['data'][:8]}")
    parts.append(" and ".join(dict.fromkeys(one.device for one in group.runs)))
    return "; ".join(parts)


def _examples(run: Record) -> list[str]:
    """How full the training rows are, and what of the examples is not in them."""
    prepared = run.row["prepared"]
    done = DONE[prepared["too_long"]]
    counts = {**prepared["left_out"], f"longer than a row ({done})": prepared["long_documents"]}
    changed = ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
    examples = f"{prepared['documents']:,} examples"
    return [
        f"{percent(prepared['useful_share'])} of the slots useful",
        f"{examples}, not as they were: {changed}" if changed else f"{examples}, none left out",
    ]


def rate_of(settings: Settings) -> str:
    """The omission rate asked for: of heads and of channels where they differ, the least and the
    most where layers do."""
    heads, channels = (_asked(settings, module) for module in ("attention", "mlp"))
    return heads if heads == channels else f"{heads} of heads, {channels} of channels"


def _asked(settings: Settings, module: str) -> str:
    own, layers = settings[f"rate_{module}"], settings[f"layer_rates_{module}"]
    if layers and min(layers) != max(layers):
        return f"{shown(min(layers))} to {shown(max(layers))}"
    return shown(layers[0] if layers else settings["rate"] if own is None else own)


def value_of(settings: Settings, key: str) -> Any:
    """A setting as a table has it: a rate as it is asked for, what follows the rate as that."""
    if key == "rate" and (asked := rate_of(settings)) != shown(settings["rate"]):
        return asked
    if key in ("rate_attention", "rate_mlp") and settings[key] is None:
        return settings["rate"]
    return settings[key]


def dense_name(variant: Variant) -> str:
    """Of the dense runs that the others are held against, or of fewer steps."""
    return "dense" if variant.reference else f"dense, {variant.runs[0].row['steps']:,} steps"


def named(settings: Settings) -> str:
    """Settings for people: `rate 0.4, dense layers 0,1`."""
    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in settings.items())


def shown(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(variant: Variant, keys: Sequence[str]) -> list[Cell]:
    if variant.dense:
        name = Cell(dense_name(variant), 0.0 if keys[0] == "rate" else None)
        return [name, *[Cell("")] * (len(keys) - 1)]
    cells = []
    for key in keys:
        if not says_something(variant.settings, key):
            cells.append(Cell(""))
            continue
        value = value_of(variant.settings, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        cells.append(Cell(shown(value), value if number else None))
    return cells


def _count(variant: Variant) -> Cell:
    return Cell(str(len(variant.runs)), len(variant.runs))


def _mean(values: Sequence[float | None], text: str) -> Cell:
    found = estimate(values)
    if found is None:
        return Cell("-")
    return Cell(mean_and_error(values, text), found.mean, found.error)


def _before(variant: Variant) -> Cell:
    """Without an error where all seeds start from the same model."""
    values = variant.over(lambda run: run.row["perplexity_before"])
    return (_plain if len(set(values)) == 1 else _mean)(values, "{:.3f}")


def _plain(values: Sequence[float | None], text: str) -> Cell:
    """The mean without its error, for what hardly differs between seeds; `text` is a format, or a
    unit to be shown with an SI prefix."""
    found = estimate(values)
    if found is None:
        return Cell("-")
    told = text.format(found.mean) if "{" in text else quantity(found.mean, text)
    return Cell(told, found.mean)


def _memory(run: Record) -> float:
    return float(run.row["peak_memory"]["bytes"])


def _spent_share(variant: Variant) -> Cell:
    if variant.reference:
        return Cell("100 %", 100.0)
    bounds = whole_bounds(variant)
    return _plain([None if one is None else 100 / one for one in bounds], "{:.0f} %")


def _first(variant: Variant) -> Cell:
    cell = _mean(first_rungs(variant), "{:.2f}×")
    return _marked(cell, variant.runs)


def _whole(variant: Variant) -> Cell:
    if variant.reference:
        return Cell("-")
    speed = variant.speedups()
    cell = _mean(speed.values, "{:.2f}×")
    twins = () if speed.estimated else variant.twins
    cell = _marked(cell, [*variant.runs, *(twin for twin in twins if twin is not None)])
    if speed.estimated and cell.value is not None:
        cell = cell._replace(text=f"{ESTIMATED} {cell.text}")
    return cell


def _whole_bound(variant: Variant) -> Cell:
    return Cell("-") if variant.reference else _plain(whole_bounds(variant), "{:.2f}×")


def _gap(gaps: Sequence[float | None], variant: Variant) -> Cell:
    """With a mark where some seeds have no dense run beside them."""
    cell = _mean(gaps, "{:+.1f} %")
    return cell._replace(text=cell.text + PAIRS) if 0 < len(gaps) < len(variant.runs) else cell


def _marked(cell: Cell, runs: Sequence[Record]) -> Cell:
    """With a mark where the runs behind a speed are not of one commit or of one device."""
    marks = COMMITS if len({run.commit for run in runs}) > 1 else ""
    marks += DEVICES if len({run.device for run in runs}) > 1 else ""
    return cell._replace(text=cell.text + marks) if cell.value is not None else cell
