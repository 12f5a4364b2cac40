"""Tables of a report: quality against the dense baseline, cost, and training loss over a run."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from sat_jax.config_values import find
from sat_jax.results.curves import part_means
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings
from sat_jax.results.means import mean_of
from sat_jax.results.speed import ABOVE_BOUND, ABOVE_BOUND_NOTE, speedup_text
from sat_jax.results.sweep import Comparison
from sat_jax.results.text import fixed_width, markdown, percent, quantity
from sat_jax.results.variants import (
    Group,
    Variant,
    make_groups,
    reference_of,
    settings_in_words,
    variant_name,
)

_PARTS = 8  # of a run, in which losses are compared
_ACROSS = "each beside the dense baseline of its own setting"
_MIXED, _FEWER = "†", "§"
_NOTES = {
    ABOVE_BOUND: ABOVE_BOUND_NOTE,
    _MIXED: f"{_MIXED} measured at several commits or on several devices",
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


def comparison_tables(group: Group, comparisons: Iterable[Comparison]) -> list[Table]:
    """Return a table for each comparison that the group has two or more variants for, and one of
    the variants that are in none of these."""
    tables, shown = [], set[str]()
    for comparison in comparisons:
        variants = compared(group, comparison)
        if len(variants) > 1 and not _outside(comparison):
            tables.append(quality_table(group, comparison))
            shown |= {variant.name for variant in variants}
    others = [variant for variant in group.sparse if variant.name not in shown]
    if others or not tables:
        dense = [group.dense] if group.dense else []
        lines = [(variant.name, variant) for variant in (*dense, *others)]
        title = "Other variants" if tables else "Variants"
        tables.append(_quality("other", title, _quality_caption(group), lines))
    return tables


def compared(group: Group, comparison: Comparison) -> list[Variant]:
    """Return the sparse variants that differ from the reference in `comparison.settings` alone."""
    settings = set(comparison.settings)
    return [variant for variant in group.sparse if group.differing(variant) <= settings]


def quality_table(group: Group, comparison: Comparison | None = None) -> Table:
    """Return a table of the dense baseline and the variants of a comparison (None: of all).

    Comparisons of the omission rate have the shorter dense runs too: they cost as much.
    """
    if comparison is None:
        lines = [(variant.name, variant) for variant in group.variants]
        return _quality("quality", "Variants", _quality_caption(group), lines)
    dense = group.dense_variants
    if "sparsity.rate" not in comparison.settings:
        dense = tuple(variant for variant in dense if variant.is_baseline)
    lines = [(variant.name, variant) for variant in (*dense, *compared(group, comparison))]
    return _quality(comparison.name, comparison.title, _quality_caption(group), lines)


def across_tables(groups: Sequence[Group], comparisons: Iterable[Comparison]) -> list[Table]:
    """Return a table for each set of groups that differ in settings of a comparison outside
    sparsity alone, with the variants that two or more of the groups have."""
    tables = []
    for comparison in comparisons:
        together: dict[str, list[Group]] = {}
        for group in groups if (outside := _outside(comparison)) else ():
            together.setdefault(group.runs[0].shared(outside), []).append(group)
        for several in together.values():
            lines = _lines_across(several)
            counts = Counter(name for _, name, _ in lines)
            common = [(label, variant) for label, name, variant in lines if counts[name] > 1]
            if len(several) > 1:
                group = dataclasses.replace(several[0], reference=_common_reference(several))
                caption = caption_of(group, _ACROSS)
                tables.append(_quality(comparison.name, comparison.title, caption, common))
    return tables


def small_groups_table(groups: Sequence[Group]) -> Table:
    """Return one table of all variants of several groups."""
    lines = [(label, variant) for label, _, variant in _lines_across(groups)]
    caption = "; ".join([_ACROSS, *_reference_words(_common_reference(groups))])
    return _quality("settings", "Other settings", caption, lines)


def _lines_across(groups: Sequence[Group]) -> list[tuple[str, str, Variant]]:
    """Return label, name and variant of all variants, named by one reference for all groups."""
    reference = _common_reference(groups)
    lines = []
    for group, setting in zip(groups, group_labels(groups), strict=True):
        for variant in group.variants:
            name = variant.name if variant.dense else variant_name(variant.sparsity, reference)
            lines.append((f"{setting}: {name}" if setting else name, name, variant))
    return lines


def _common_reference(groups: Sequence[Group]) -> Settings:
    return reference_of([variant.sparsity for group in groups for variant in group.sparse])


def _reference_words(reference: Settings) -> list[str]:
    changed = {path: v for path, v in reference.items() if v != DEFAULTS[path]}
    words = settings_in_words({p: v for p, v in changed.items() if p != "sparsity.rate"})
    return [f"unless named otherwise {', '.join(words)}"] if words else []


def _outside(comparison: Comparison) -> list[str]:
    return [path for path in comparison.settings if path not in DEFAULTS]


def _quality_caption(group: Group) -> str:
    before = mean_of([run.row["perplexity_before"] for run in group.runs])
    number = "infinite" if before is None else f"{before.value:.3f}"
    return caption_of(group, *_learning_rate(group), f"perplexity before training {number}")


def _quality(name: str, title: str, caption: str, lines: Sequence[tuple[str, Variant]]) -> Table:
    columns = {
        "variant": [label for label, _ in lines],
        "seeds": [str(len(variant.runs)) for _, variant in lines],
        "perplexity": [_mean(variant.over(_after), "{:.3f}") for _, variant in lines],
        "from dense": [_difference(variant.differences(), variant) for _, variant in lines],
        "at equal FLOPs": [
            _difference(variant.differences_at_equal_flops(), variant) for _, variant in lines
        ],
        "FLOPs": [_mean_only(variant.flops_shares(), "{:.0f} %") for _, variant in lines],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return Table(name, title, caption, tuple(known), tuple(zip(*known.values(), strict=True)))


def cost_table(group: Group) -> Table:
    """Return a table of time, memory and FLOPs, with the speed-up beside its bound."""
    lines = [(variant.name, variant) for variant in group.variants]
    return _cost(caption_of(group, *_learning_rate(group)), lines)


def _cost(caption: str, lines: Sequence[tuple[str, Variant]]) -> Table:
    header = ("variant", "seeds", "time", "memory", "FLOPs", "of dense", "speed-up", "bound")
    rows = []
    for label, variant in lines:
        shares = variant.flops_shares()
        rows.append(
            (
                label,
                str(len(variant.runs)),
                _mean(variant.over(lambda run: run.seconds), "{:,.1f} s"),
                _mean_only(variant.over(lambda run: run.row["peak_memory"]["bytes"]), "B"),
                _mean_only(variant.over(lambda run: run.row["spent_flops"]), "FLOP"),
                _mean_only(shares, "{:.0f} %"),
                *_speedup_and_bound(variant),
            )
        )
    return Table("cost", "Time, memory and FLOPs", caption, header, tuple(rows))


def loss_table(group: Group) -> Table | None:
    """Return the training loss minus that of the dense baseline, by parts of the run.

    Both are trained on the same batches. The loss is that of the model as it is trained, without
    omitted neurons. None if no two runs can be compared.
    """
    rows = []
    for variant in group.sparse:
        gaps = [
            [None if None in pair else pair[0] - pair[1] for pair in zip(*both, strict=True)]
            for run, dense in zip(variant.runs, variant.baselines, strict=True)
            if dense
            and all(both := [part_means(r.row.get("curve", {}), _PARTS) for r in (run, dense)])
        ]
        if gaps:
            parts = [_mean(part, "{:+.2f}") for part in zip(*gaps, strict=True)]
            rows.append((variant.name, str(len(gaps)), *parts))
    if not rows:
        return None
    steps = group.runs[0].steps
    ends = [round(steps * part / _PARTS) for part in range(_PARTS + 1)]
    parts = [f"{start + 1} to {end}" for start, end in itertools.pairwise(ends)]
    header = ("variant", "seeds", f"steps {parts[0]}", *parts[1:])
    caption = caption_of(group, *_learning_rate(group), "nats per token")
    return Table("losses", "Training loss minus the dense baseline's", caption, header, tuple(rows))


def sentence(variant: Variant) -> str:
    """Return one sentence with quality and cost of a variant relative to its dense baseline."""
    difference, shares = mean_of(variant.differences()), mean_of(variant.flops_shares())
    seeds = f"{len(variant.runs)} seed{'s' * (len(variant.runs) > 1)}"
    if difference is None or shares is None:
        after = mean_of(variant.over(_after))
        number = "infinite" if after is None else after.text("{:.3f}")
        return f"{variant.name}: perplexity {number} ({seeds}), without a dense baseline."
    text = (
        f"{variant.name}: perplexity {difference.text('{:+.1f} %')} from dense training on the same"
        f" tokens ({seeds}), with {shares.value:.0f} % of its FLOPs"
    )
    equal = mean_of(variant.differences_at_equal_flops())
    return text + (f"; {equal.text('{:+.1f} %')} at equal FLOPs." if equal else ".")


def terminal_table(runs: Sequence[FinishedRun]) -> str:
    """Return the quality and the cost of a sweep's runs, as two tables for a terminal."""
    lines = [(label, variant) for label, _, variant in _lines_across(make_groups(runs))]
    tables = [_quality("quality", "", "", lines), _cost("", lines)]
    return "\n\n".join(
        "\n".join([fixed_width(table.header, table.rows), *table.notes]) for table in tables
    )


def caption_of(group: Group, *more: str) -> str:
    """Return what the runs of a group share, with `more` after their model and length."""
    run = group.runs[0]
    tokens = sum(r.row["tokens"] for r in group.runs) / len(group.runs)
    parts = [model_of(run), f"{run.steps:,} steps, {tokens:,.0f} tokens"]
    if run.fine_tuned and "loss_tokens" in run.row:
        parts.append(f"{percent(run.row['loss_tokens'] / run.row['tokens'])} of them with loss")
    parts += more
    parts += _reference_words(group.reference)
    parts.append(f"data {run.row['data'][:8]}")
    parts.append(" and ".join(dict.fromkeys(run.device for run in group.runs)))
    return "; ".join(parts)


def _learning_rate(group: Group) -> list[str]:
    """Rows of old versions do not have it."""
    if "settings" not in group.runs[0].row:
        return []
    rate, schedule = (
        group.runs[0].settings.get(path, find(path).default)
        for path in ("optimizer.learning_rate", "optimizer.schedule")
    )
    return [f"learning rate {rate:g}, {schedule}"]


def model_of(run: FinishedRun) -> str:
    """Return the model that a run starts from; the experiment, for rows without settings."""
    if "settings" not in run.row:
        return str(run.row["experiment"])
    default = find("model.preset").default
    return str(run.settings.get("model.path") or run.settings.get("model.preset", default))


def group_labels(groups: Sequence[Group]) -> list[str]:
    """Return the settings outside sparsity in which each group differs from others."""
    runs = [group.runs[0] for group in groups]
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    labels: list[list[str]] = [[] for _ in runs]
    # The fingerprint of the data stands for their settings.
    for path in [path for path in paths if not path.startswith(("seed", "data.", "train.eval"))]:
        values = [run.settings.get(path, find(path).default) for run in runs]
        if len(set(map(str, values))) > 1:
            for label, value in zip(labels, values, strict=True):
                label += settings_in_words({path: value})
    if len({run.row["data"] for run in runs}) > 1:
        for label, run in zip(labels, runs, strict=True):
            label.append(f"data {run.row['data'][:6]}")
    return [", ".join(label) for label in labels]


def _mean(values: Sequence[float | None], form: str) -> str:
    mean = mean_of(values)
    return "-" if mean is None else mean.text(form)


def _mean_only(values: Sequence[float | None], form: str) -> str:
    """Without the error, for what hardly differs between seeds; `form` is a format, or a unit."""
    mean = mean_of(values)
    if mean is None:
        return "-"
    return form.format(mean.value) if "{" in form else quantity(mean.value, form)


def _difference(values: Sequence[float | None], variant: Variant) -> str:
    return _mean(values, "{:+.1f} %") + _FEWER * (0 < len(values) < len(variant.runs))


def _speedup_and_bound(variant: Variant) -> tuple[str, str]:
    """Return the speed-up that the runs measured of their steps, with its bound; if they did not,
    that of the time of all training, with the bound of all FLOPs."""
    if variant.is_baseline:
        return "-", "-"
    compared: list[FinishedRun | None] = [*variant.runs]
    if measured := variant.measured_speedups():
        mean = mean_of([run.speedup for run in measured])
        bound = mean_of([run.bound for run in measured])
        if mean is not None and mean.error is None:
            mean = mean._replace(error=measured[0].spread)
    else:
        mean = mean_of(variant.speedups())
        bound = mean_of([share and 100 / share for share in variant.flops_shares()])
        compared += variant.baselines
    bound_text = f"{bound.value:.2f}×" if bound else "-"
    if mean is None:
        return "-", bound_text
    mixed = len({(run.commit, run.device) for run in compared if run is not None}) > 1
    text = speedup_text(mean.value, bound and bound.value, mean.error)
    return text + _MIXED * mixed, bound_text


def _after(run: FinishedRun) -> float | None:
    after: float | None = run.row["perplexity_after"]
    return after
