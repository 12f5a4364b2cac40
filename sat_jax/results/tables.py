"""Tables of a report: quality against the dense baseline, cost, and training loss over a run."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.config_values import find
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings
from sat_jax.results.rows import Row, device_name
from sat_jax.results.speed import ABOVE_BOUND, ABOVE_BOUND_NOTE, speedup_text
from sat_jax.results.sweep import Comparison
from sat_jax.results.text import fixed_width, markdown, percent, quantity
from sat_jax.results.variants import (
    Group,
    Values,
    Variant,
    make_groups,
    mean_of,
    reference_of,
    settings_in_words,
    variant_name,
)

_Columns: TypeAlias = Mapping[str, Callable[[Variant], str]]

_PARTS = 8  # of a run, in which losses are compared
_ACROSS = "each beside the dense baseline of its own setting"
_FEWER = "§"
_NOTES = {
    ABOVE_BOUND: ABOVE_BOUND_NOTE,
    _FEWER: f"{_FEWER} of fewer seeds: some have no dense baseline, or none around their FLOPs",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """`name` is the kind of table in documents."""

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def notes(self) -> list[str]:
        """Explanations of the marks in the cells."""
        shown = "".join(cell for row in self.rows for cell in row)
        return [text for mark, text in _NOTES.items() if mark in shown]

    def markdown(self) -> str:
        """Return the table in Markdown, with its caption and notes below."""
        sentences = [f"{text}." for text in (self.caption, *self.notes)]
        return f"{markdown(self.header, self.rows)}\n\n{' '.join(sentences)}"


def group_tables(group: Group, comparisons: Iterable[Comparison]) -> list[Table]:
    """Return a table for each comparison that the group has two or more variants for, one of the
    variants that are in none of these, cost, and training losses.

    Comparisons of the omission rate have the shorter dense runs too: they cost as much.
    """
    tables, shown = [], set[str]()
    caption = _quality_caption(group)
    baseline = [variant for variant in group.dense if variant.is_baseline]
    for comparison in comparisons:
        settings = set(comparison.settings)
        variants = [variant for variant in group.sparse if group.differing(variant) <= settings]
        if len(variants) > 1 and not _outside(comparison):
            lines = [*(group.dense if "sparsity.rate" in settings else baseline), *variants]
            tables.append(_table(comparison.name, comparison.title, caption, lines, _QUALITY))
            shown |= {variant.name for variant in variants}
    others = [variant for variant in group.sparse if variant.name not in shown]
    if others or not tables:
        title = "Other variants" if tables else "Variants"
        tables.append(_table("other", title, caption, [*baseline, *others], _QUALITY))
    return [*tables, *cost_and_losses(group)]


def cost_and_losses(group: Group) -> list[Table]:
    """Return a table of time, memory and FLOPs, with the speed-up beside its bound, and one of the
    training loss minus that of the dense baseline, by parts of the run.

    Both runs are trained on the same batches. The loss is that of the model as it is trained,
    without omitted neurons. There is no second table if no two runs can be compared.
    """
    caption = _caption(group, _learning_rate(group))
    cost = _table("cost", "Time, memory and FLOPs", caption, group.variants, _COST)
    paired = [variant for variant in group.sparse if variant.loss_differences(_PARTS)]
    if not paired:
        return [cost]
    ends = [round(group.runs[0].steps * part / _PARTS) for part in range(_PARTS + 1)]
    parts = [f"{start + 1} to {end}" for start, end in itertools.pairwise(ends)]
    columns: _Columns = {"seeds": lambda v: str(len(v.loss_differences(_PARTS)))} | {
        name: lambda v, part=part: _mean([d[part] for d in v.loss_differences(_PARTS)], "{:+.2f}")
        for part, name in enumerate([f"steps {parts[0]}", *parts[1:]])
    }
    title = "Training loss minus the dense baseline's"
    caption = _caption(group, _learning_rate(group), "nats per token")
    return [cost, _table("losses", title, caption, paired, columns)]


def quality_table(groups: Sequence[Group], title: str = "Variants") -> Table:
    """Return a table of all variants, of several groups each beside its own dense baseline."""
    words = _reference_words(_common_reference(groups))
    caption = _quality_caption(groups[0]) if len(groups) == 1 else "; ".join([_ACROSS, *words])
    variants = [variant for _, variant in _variants_across(groups)]
    return _table("quality", title, caption, variants, _QUALITY)


def across_tables(groups: Sequence[Group], comparisons: Iterable[Comparison]) -> list[Table]:
    """Return a table for each set of groups that differ in settings of a comparison outside
    sparsity alone, with the variants that two or more of the groups have."""
    tables = []
    for comparison in comparisons:
        together: dict[str, list[Group]] = {}
        for group in groups if (outside := _outside(comparison)) else ():
            together.setdefault(group.runs[0].shared(outside), []).append(group)
        for several in together.values():
            if len(several) > 1:
                lines = list(_variants_across(several))
                counts = Counter(name for name, _ in lines)
                common = [variant for name, variant in lines if counts[name] > 1]
                group = dataclasses.replace(several[0], reference=_common_reference(several))
                caption = _caption(group, _ACROSS)
                tables.append(_table(comparison.name, comparison.title, caption, common, _QUALITY))
    return tables


def _variants_across(groups: Sequence[Group]) -> Iterator[tuple[str, Variant]]:
    """Yield all variants, named by one reference for all groups, without and with the settings of
    their group in the name."""
    reference = _common_reference(groups)
    for group, setting in zip(groups, group_labels(groups), strict=True):
        for variant in group.variants:
            name = variant.name
            if not variant.dense:
                name = variant_name(variant.runs[0].sparsity, reference)
            label = f"{setting}: {name}" if setting else name
            yield name, dataclasses.replace(variant, name=label)


def _common_reference(groups: Sequence[Group]) -> Settings:
    return reference_of([variant.runs[0].sparsity for group in groups for variant in group.sparse])


def _outside(comparison: Comparison) -> list[str]:
    return [path for path in comparison.settings if path not in DEFAULTS]


def sentence(variant: Variant) -> str:
    """Return one sentence with quality and cost of a variant relative to its dense baseline."""
    difference, shares = mean_of(variant.differences()), mean_of(variant.flops_shares())
    seeds = f"{len(variant.runs)} seed{'s' * (len(variant.runs) > 1)}"
    if difference is None or shares is None:
        after = _mean(variant.over(lambda run: run.row["perplexity_after"]), "{:.3f}")
        return f"{variant.name}: perplexity {after} ({seeds}), without a dense baseline."
    text = (
        f"{variant.name}: perplexity {difference.text('{:+.1f} %')} from dense training on the same"
        f" tokens ({seeds}), with {shares.value:.0f} % of its FLOPs"
    )
    equal = mean_of(variant.differences_at_equal_flops())
    return text + (f"; {equal.text('{:+.1f} %')} at equal FLOPs." if equal else ".")


def terminal_table(rows: Sequence[Row]) -> str:
    """Return the quality and the cost of a sweep's runs, as two tables for a terminal."""
    variants = [variant for _, variant in _variants_across(make_groups(rows))]
    tables = [
        _table(name, "", "", variants, columns)
        for name, columns in (("quality", _QUALITY), ("cost", _COST))
    ]
    return "\n\n".join(
        "\n".join([fixed_width(table.header, table.rows), *table.notes]) for table in tables
    )


def _caption(group: Group, *more: str) -> str:
    """Return what the runs of a group share, with `more` after their model and length."""
    run = group.runs[0]
    tokens = sum(r.row["tokens"] for r in group.runs) / len(group.runs)
    parts = [model_of(run), f"{run.steps:,} steps, {tokens:,.0f} tokens"]
    if _setting(run, "data.format") != "text":
        parts.append(f"{percent(run.row['loss_tokens'] / run.row['tokens'])} of them with loss")
    parts += [*more, *_reference_words(group.reference), f"data {run.row['data'][:8]}"]
    return "; ".join(
        [*parts, " and ".join(dict.fromkeys(device_name(run.row["device"]) for run in group.runs))]
    )


def _reference_words(reference: Settings) -> list[str]:
    changed = {path: v for path, v in reference.items() if v != DEFAULTS[path]}
    words = settings_in_words({p: v for p, v in changed.items() if p != "sparsity.rate"})
    return [f"unless named otherwise {', '.join(words)}"] if words else []


def _quality_caption(group: Group) -> str:
    before = mean_of([run.row["perplexity_before"] for run in group.runs])
    number = "infinite" if before is None else f"{before.value:.3f}"
    return _caption(group, _learning_rate(group), f"perplexity before training {number}")


def _learning_rate(group: Group) -> str:
    rate, schedule = (
        _setting(group.runs[0], path) for path in ("optimizer.learning_rate", "optimizer.schedule")
    )
    return f"learning rate {rate:g}, {schedule}"


def _setting(run: FinishedRun, path: str) -> Any:
    return run.settings.get(path, find(path).default)


def model_of(run: FinishedRun) -> str:
    """Return the model that a run starts from."""
    return str(run.settings.get("model.path") or _setting(run, "model.preset"))


def group_labels(groups: Sequence[Group]) -> list[str]:
    """Return the settings outside sparsity in which each group differs from others."""
    runs = [group.runs[0] for group in groups]
    labels: list[list[str]] = [[] for _ in runs]
    # The fingerprint of the data stands for their settings.
    apart = ("seed", "data.", "train.eval")
    for path in dict.fromkeys(p for r in runs for p in r.settings if not p.startswith(apart)):
        words = [settings_in_words({path: _setting(run, path)})[0] for run in runs]
        for label, word in zip(labels, words, strict=True):
            label += [word] * (len(set(words)) > 1)
    if len({run.row["data"] for run in runs}) > 1:
        for label, run in zip(labels, runs, strict=True):
            label.append(f"data {run.row['data'][:6]}")
    return [", ".join(label) for label in labels]


def _table(
    name: str,
    title: str,
    caption: str,
    variants: Sequence[Variant],
    columns: _Columns,
) -> Table:
    """Return a row for each variant; columns without any value are left out."""
    cells = {head: list(map(cell, variants)) for head, cell in columns.items()}
    known = {head: values for head, values in cells.items() if set(values) != {"-"}}
    rows = zip([variant.name for variant in variants], *known.values(), strict=True)
    return Table(name, title, caption, ("variant", *known), tuple(rows))


def _mean(values: Values, form: str) -> str:
    mean = mean_of(values)
    return "-" if mean is None else mean.text(form)


def _mean_only(values: Values, form: Callable[[float], str]) -> str:
    """Without the error, for what hardly differs between seeds."""
    mean = mean_of(values)
    return "-" if mean is None else form(mean.value)


def _difference(values: Values, variant: Variant) -> str:
    return _mean(values, "{:+.1f} %") + _FEWER * (0 < len(values) < len(variant.runs))


def _speedup(variant: Variant) -> str:
    speedup, bound = variant.speedup_and_bound()
    if variant.is_baseline or speedup is None:
        return "-"
    return speedup_text(speedup.value, bound and bound.value, speedup.error)


def _bound(variant: Variant) -> str:
    _, bound = variant.speedup_and_bound()
    return "-" if variant.is_baseline or bound is None else f"{bound.value:.2f}×"


_QUALITY: _Columns = {
    "seeds": lambda variant: str(len(variant.runs)),
    "perplexity": lambda variant: _mean(
        variant.over(lambda run: run.row["perplexity_after"]), "{:.3f}"
    ),
    "from dense": lambda variant: _difference(variant.differences(), variant),
    "at equal FLOPs": lambda v: _difference(v.differences_at_equal_flops(), v),
    "FLOPs": lambda variant: _mean_only(variant.flops_shares(), "{:.0f} %".format),
}
_COST: _Columns = {
    "seeds": lambda variant: str(len(variant.runs)),
    "time": lambda variant: _mean(variant.over(lambda run: run.seconds), "{:,.1f} s"),
    "memory": lambda v: _mean_only(
        v.over(lambda r: r.row["peak_memory"]["bytes"]), lambda n: quantity(n, "B")
    ),
    "FLOPs": lambda v: _mean_only(
        v.over(lambda r: r.row["spent_flops"]), lambda n: quantity(n, "FLOP")
    ),
    "of dense": lambda variant: _mean_only(variant.flops_shares(), "{:.0f} %".format),
    "speed-up": _speedup,
    "bound": _bound,
}
