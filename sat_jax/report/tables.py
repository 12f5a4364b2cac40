"""The tables of a report: quality, what it cost, and where in the run it was lost."""

import itertools
from collections.abc import Iterable, Sequence

from sat_jax.analysis.curves import part_means
from sat_jax.analysis.tables import sides
from sat_jax.analysis.twins import ESTIMATED, PAIRS
from sat_jax.report.axes import AXES, RATES, Slice, says_something, slices, told, varied
from sat_jax.report.cells import Cell, Table, marked, mean_cell, plain_cell
from sat_jax.report.groups import (
    Group,
    Variant,
    first_bound,
    first_rungs,
    first_speed,
    whole_bounds,
)
from sat_jax.report.records import Record
from sat_jax.report.wording import caption_of, dense_name, named, shown, value_of

PARTS = 8  # of a run, in which losses are compared


def tables_of(groups: Iterable[Group]) -> list[Table]:
    """Every table that the groups have runs for: a kind after the other, a table a group."""
    groups = list(groups)
    made = [table for group in groups for table in _of_group(group)]
    names = ["sft", *(axis.name for axis in AXES), "losses", "efficiency"]
    return sorted(made, key=lambda table: names.index(table.name))


def _of_group(group: Group) -> list[Table]:
    compared = slices(group)
    if not compared:  # dense runs alone
        compared = [Slice(RATES, (), ())]
    made = [
        _quality(group, one, () if number else group.shorter) for number, one in enumerate(compared)
    ]
    losses = _losses(group)
    return [*made, *([losses] if losses else []), _efficiency(group)]


def _quality(group: Group, one: Slice, shorter: Sequence[Variant]) -> Table:
    """Perplexity before and after, distance from dense at the same tokens and, where dense runs of
    several lengths tell it, at the same FLOPs; FLOPs and whole-run speed-up with its bound."""
    tuned = group.runs[0].fine_tuned
    what = "perplexity of answers" if tuned else "held-out perplexity"
    keys = one.varied or ("rate",)
    variants = (*([group.dense] if group.dense else []), *shorter, *one.variants)
    equal = [_gap(variant.gaps_at_equal_flops(), variant) for variant in variants]
    known = any(
        cell.value is not None and not one.dense for one, cell in zip(variants, equal, strict=True)
    )
    rows = [
        (
            *_settings(variant, keys),
            _count(variant),
            _before(variant),
            mean_cell(variant.over(lambda run: run.row["perplexity_after"]), "{:.3f}"),
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


def _losses(group: Group) -> Table | None:
    """Training loss less that of the dense run of the same seed, which has the same batches, part
    by part of the run: where what is lost arises, and what of it is made up. A loss is that of the
    model as it is trained, so without what is omitted. None where no two runs can be compared."""
    names, labels = _labels(group, group.sparse)
    rows = [
        (
            *label,
            Cell(str(len(gaps)), len(gaps)),
            *(mean_cell(part, "{:+.2f}") for part in zip(*gaps, strict=True)),
        )
        for variant, label in zip(group.sparse, labels, strict=True)
        if (gaps := _loss_gaps(variant))
    ]
    if not rows:
        return None
    steps = group.runs[0].row["steps"]
    ends = [round(steps * part / PARTS) for part in range(PARTS + 1)]
    parts = [f"{start + 1} to {end}" for start, end in itertools.pairwise(ends)]
    header = (*names, "seeds", f"steps {parts[0]}", *parts[1:])
    caption = f"Nats a token; {_caption_of_all(group)}"
    align = sides(len(names), 1 + PARTS)
    return Table(
        "losses", "Training loss above the dense run's", caption, header, align, tuple(rows)
    )


def _loss_gaps(variant: Variant) -> list[list[float | None]]:
    """Part by part, of each run that can be compared."""
    gaps = []
    for run, twin in zip(variant.runs, variant.twins, strict=True):
        both = [part_means(one.row.get("curve", {}), PARTS) for one in (run, twin) if one]
        if len(both) == 2 and all(both):
            pairs = zip(*both, strict=True)
            gaps.append([None if None in pair else pair[0] - pair[1] for pair in pairs])
    return gaps


def _efficiency(group: Group) -> Table:
    """Speed, time, memory and FLOPs; both speed-ups, each beside its bound."""
    variants = sorted((*group.variants, *group.shorter), key=lambda one: not one.dense)
    names, labels = _labels(group, variants)
    rows = []
    for variant, label in zip(variants, labels, strict=True):
        dense = variant.dense
        rows.append(
            (
                *label,
                _count(variant),
                marked(mean_cell(variant.over(first_speed), "{:,.0f}"), variant.runs),
                marked(mean_cell(variant.over(lambda run: run.seconds), "{:,.1f} s"), variant.runs),
                plain_cell(variant.over(_memory), "B"),
                plain_cell(variant.over(lambda run: run.row["spent_flops"]), "FLOP"),
                _spent_share(variant),
                Cell("-") if dense else _first(variant),
                Cell("-") if dense else plain_cell(variant.over(first_bound), "{:.2f}×"),
                _whole(variant),
                _whole_bound(variant),
            )
        )
    header = (
        *names, "seeds", "tokens/s", "time", "memory", "FLOPs", "of dense",
        "first rung", "bound", "whole run", "bound",
    )  # fmt: skip
    caption = _caption_of_all(group)
    return Table("efficiency", "Efficiency", caption, header, sides(len(names), 10), tuple(rows))


def _labels(group: Group, variants: Sequence[Variant]) -> tuple[list[str], list[list[Cell]]]:
    """The first headings of a table of all variants, and the cells that name each: the rate, and
    in one cell in what else it is not as most are, where any is."""
    settings = told(group)
    others = any(one.keys() - set(RATES.keys) for one in settings.values())
    labels = []
    for variant in variants:
        rest = {
            key: value_of(variant.settings, key)
            for key in settings.get(id(variant), {})
            if key not in RATES.keys
        }
        labels.append([*_settings(variant, RATES.keys), *([Cell(named(rest))] if others else [])])
    return [*RATES.keys, *(["settings"] if others else [])], labels


def _caption_of_all(group: Group) -> str:
    """For a table with all variants."""
    return caption_of(group, group.sparse, (*RATES.keys, *varied(group.sparse)))


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


def _before(variant: Variant) -> Cell:
    """Without an error where all seeds start from the same model."""
    values = variant.over(lambda run: run.row["perplexity_before"])
    return (plain_cell if len(set(values)) == 1 else mean_cell)(values, "{:.3f}")


def _memory(run: Record) -> float:
    return float(run.row["peak_memory"]["bytes"])


def _spent_share(variant: Variant) -> Cell:
    if variant.reference:
        return Cell("100 %", 100.0)
    bounds = whole_bounds(variant)
    return plain_cell([None if one is None else 100 / one for one in bounds], "{:.0f} %")


def _first(variant: Variant) -> Cell:
    cell = mean_cell(first_rungs(variant), "{:.2f}×")
    return marked(cell, variant.runs)


def _whole(variant: Variant) -> Cell:
    if variant.reference:
        return Cell("-")
    speed = variant.speedups()
    cell = mean_cell(speed.values, "{:.2f}×")
    twins = () if speed.estimated else variant.twins
    cell = marked(cell, [*variant.runs, *(twin for twin in twins if twin is not None)])
    if speed.estimated and cell.value is not None:
        cell = cell._replace(text=f"{ESTIMATED} {cell.text}")
    return cell


def _whole_bound(variant: Variant) -> Cell:
    return Cell("-") if variant.reference else plain_cell(whole_bounds(variant), "{:.2f}×")


def _gap(gaps: Sequence[float | None], variant: Variant) -> Cell:
    """With a mark where some seeds have no dense run beside them."""
    cell = mean_cell(gaps, "{:+.1f} %")
    return cell._replace(text=cell.text + PAIRS) if 0 < len(gaps) < len(variant.runs) else cell
