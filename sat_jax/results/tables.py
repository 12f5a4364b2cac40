"""Tables of a report: quality against the dense baseline, cost, and training loss over a run."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sat_jax.config_values import find
from sat_jax.results.finished import DEFAULTS, FinishedRun, Settings
from sat_jax.results.rows import Row, device_names
from sat_jax.results.speed import ABOVE_BOUND, ABOVE_BOUND_NOTE, speedup_text
from sat_jax.results.sweep import Comparison
from sat_jax.results.text import fixed_width, markdown, percent, quantity
from sat_jax.results.variants import (
    FEWER,
    Group,
    PairedRun,
    Variant,
    make_groups,
    mean_of,
    reference_of,
    settings_in_words,
    variant_name,
)

_Cell: TypeAlias = Callable[[Variant], str]

_COSTS = {"sparsity.rate", "sparsity.weights.density"}  # what a method costs
_PARTS = 8  # of a run, in which losses are compared
_ACROSS = "each beside the dense baseline of its own setting"
_BEST = "best dense: lowest mean perplexity over the seeds that all have"
_PAIRED = "minus the variant of the same rate without the named settings, seed by seed"
_NOTES = {
    ABOVE_BOUND: ABOVE_BOUND_NOTE,
    FEWER: f"{FEWER} of fewer seeds: some have no dense baseline, or none around their FLOPs",
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
    variants that are in none of these, cost, training losses, and held-out losses.

    Comparisons of the omission rate have the shorter dense runs too: they cost as much. A table
    `NAME_paired` follows where variants differ from another one in more than the rate.
    """
    tables, shown = [], set[str]()
    caption = _quality_caption(group)
    baseline = [variant for variant in group.dense if variant.is_baseline]
    for comparison in comparisons:
        settings = set(comparison.settings)
        variants = [variant for variant in group.sparse if group.differing(variant) <= settings]
        if len(variants) > 1 and not _outside(comparison):
            lines = [*(group.dense if settings & _COSTS else baseline), *variants]
            tables.append(_table(comparison.name, comparison.title, caption, lines, _QUALITY))
            tables += _paired(group, comparison, variants)
            shown |= {variant.name for variant in variants}
    others = [variant for variant in group.sparse if variant.name not in shown]
    if others or not tables:
        title = "Other variants" if tables else "Variants"
        tables.append(_table("other", title, caption, [*baseline, *others], _QUALITY))
    caption = _caption(group, _learning_rate(group))
    tables.append(_table("cost", "Time, memory and FLOPs", caption, group.variants, _COST))
    return [*tables, *_losses(group), *_held_out(group)]


def _paired(group: Group, comparison: Comparison, variants: Sequence[Variant]) -> list[Table]:
    """Return a table of variants minus the plain variant of the same rate, in percentage points, if
    there are any: means over common seeds."""

    def key(run: PairedRun) -> tuple[Any, ...]:
        return *(run.sparsity[path] for path in sorted(_COSTS)), run.seed

    plain = {
        key(run): run
        for variant in group.sparse
        if group.differing(variant) <= _COSTS
        for run in variant.runs
    }

    def minus_plain(measure: Callable[[PairedRun], float | None]) -> _Cell:
        def change(run: PairedRun) -> float | None:
            other = plain.get(key(run))
            value, reference = (measure(some) if some else None for some in (run, other))
            return None if value is None or reference is None else value - reference

        return _mean(change, "{:+.1f}".format)

    columns = {head: minus_plain(measure) for head, measure in _DIFFERENCES.items()}
    changed = [variant for variant in variants if not group.differing(variant) <= _COSTS]
    paired = [variant for variant in changed if any(c(variant) != "-" for c in columns.values())]
    caption = _caption(group, _learning_rate(group), f"percentage points {_PAIRED}")
    title = f"{comparison.title}: paired differences"
    name = f"{comparison.name}_paired"
    return [_table(name, title, caption, paired, columns)] if paired else []


def _losses(group: Group) -> list[Table]:
    """Return a table of the training loss minus that of the dense baseline, by parts of the run, if
    any two runs can be compared.

    Both are trained on the same batches. The loss is that of the model as it is trained, without
    omitted neurons.
    """
    ends = [round(group.runs[0].steps * part / _PARTS) for part in range(_PARTS + 1)]
    parts = [f"{start + 1} to {end}" for start, end in itertools.pairwise(ends)]

    def column(part: int) -> _Cell:
        return _mean(lambda run: run.loss_difference(part, _PARTS), "{:+.2f}".format)

    columns = {name: column(part) for part, name in enumerate([f"steps {parts[0]}", *parts[1:]])}
    variants = [
        variant
        for variant in group.sparse
        if any(run.loss_difference(0, _PARTS) is not None for run in variant.runs)
    ]
    title = "Training loss minus the dense baseline's"
    caption = _caption(group, _learning_rate(group), "nats per token")
    return [_table("losses", title, caption, variants, columns)] if variants else []


def _held_out(group: Group) -> list[Table]:
    """Return a table of the held-out loss of the dense baseline and the sparse variants, by the
    share of the tokens, if any run was evaluated between start and end."""
    variants = [variant for variant in group.variants if variant.is_baseline or not variant.dense]
    curve = variants[0].runs[0].row.get("curve", {}) if variants else {}
    tokens: Sequence[float] = curve.get("eval_tokens", ())

    def column(number: int) -> _Cell:
        def loss(run: PairedRun) -> float | None:
            losses = run.row.get("curve", {}).get("eval_loss", ())
            return losses[number] if len(losses) == len(tokens) else None

        return _mean(loss, "{:.3f}".format)

    columns = {percent(count / tokens[-1]): column(n) for n, count in enumerate(tokens)}
    caption = _caption(group, _learning_rate(group), "nats per token, by share of the tokens")
    table = _table("held_out", "Held-out loss", caption, variants, columns)
    return [table] if len(tokens) > 2 else []


def quality_table(groups: Sequence[Group], title: str = "Variants") -> Table:
    """Return a table of all variants, of several groups each beside its own dense baseline."""
    words = _reference_words(_common_reference(groups))
    caption = _quality_caption(groups[0]) if len(groups) == 1 else "; ".join([_ACROSS, *words])
    variants = [variant for _, variant in _variants_across(groups)]
    return _table("quality", title, caption, variants, _QUALITY)


def across_tables(groups: Sequence[Group], comparisons: Iterable[Comparison]) -> list[Table]:
    """Return a table for each set of groups that differ in settings of a comparison outside
    sparsity alone, with the dense runs and the variants that two or more of the groups have.

    Further columns compare each with the best dense baseline, the one with the lowest mean
    perplexity.
    """
    tables = []
    for comparison in comparisons:
        together: dict[str, list[Group]] = {}
        for group in groups if (outside := _outside(comparison)) else ():
            together.setdefault(group.runs[0].shared(outside), []).append(group)
        for several in (groups for groups in together.values() if len(groups) > 1):
            lines = list(_variants_across(several))
            counts = Counter(name for name, _ in lines)
            common = [variant for name, variant in lines if variant.dense or counts[name] > 1]
            group = dataclasses.replace(several[0], reference=_common_reference(several))
            caption = _caption(group, _ACROSS, _BEST)
            columns = _QUALITY | _beside_best(several)
            tables.append(_table(comparison.name, comparison.title, caption, common, columns))
    return tables


def _beside_best(groups: Sequence[Group]) -> dict[str, _Cell]:
    """Return columns relative to the dense runs of the group whose baseline has the lowest mean
    perplexity over the seeds that all baselines have; none without such seeds."""
    baselines = [variant for group in groups for variant in group.dense if variant.is_baseline]
    runs = [{run.seed: run for run in variant.runs} for variant in baselines]
    common = set.intersection(*map(set, runs)) if runs else set()
    means = [
        mean_of([run.perplexity for seed, run in some.items() if seed in common]) for some in runs
    ]
    finite = [(mean.value, number) for number, mean in enumerate(means) if mean]
    best = runs[min(finite)[1]] if finite else {}

    def beside(measure: Callable[[PairedRun], float | None]) -> _Cell:
        def measured(run: PairedRun) -> float | None:
            if (dense := best.get(run.seed)) is None:
                return None
            lengths = dense.lengths
            return measure(dataclasses.replace(run, baseline=dense.baseline, lengths=lengths))

        return _mean(measured, "{:+.1f} %".format)

    heads = "from best dense", "from best dense at equal FLOPs"
    return dict(zip(heads, map(beside, _DIFFERENCES.values()), strict=True))


def terminal_table(rows: Sequence[Row]) -> str:
    """Return the quality and the cost of a sweep's runs, as two tables for a terminal."""
    variants = [variant for _, variant in _variants_across(make_groups(rows))]
    tables = [_table("", "", "", variants, columns) for columns in (_QUALITY, _COST)]
    texts = ([fixed_width(table.header, table.rows), *table.notes] for table in tables)
    return "\n\n".join(map("\n".join, texts))


def sentence(variant: Variant) -> str:
    """Return one sentence with quality and cost of a variant relative to its dense baseline."""
    seeds = f"{len(variant.runs)} seed{'s' * (len(variant.runs) > 1)}"
    perplexity, difference, equal, share = (cell(variant) for cell in _QUALITY.values())
    if "-" in (difference, share):
        return f"{variant.name}: perplexity {perplexity} ({seeds}), without a dense baseline."
    text = (
        f"{variant.name}: perplexity {difference} from dense training on the same tokens ({seeds}),"
        f" with {share} of its FLOPs"
    )
    return f"{text}." if equal == "-" else f"{text}; {equal} at equal FLOPs."


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


def _caption(group: Group, *more: str) -> str:
    """Return what the runs of a group share, with `more` after their model and length."""
    run = group.runs[0]
    tokens = sum(r.row["tokens"] for r in group.runs) / len(group.runs)
    parts = [model_of(run), f"{run.steps:,} steps, {tokens:,.0f} tokens"]
    if _setting(run, "data.format") != "text":
        parts.append(f"{percent(run.row['loss_tokens'] / run.row['tokens'])} of them with loss")
    parts += [*more, *_reference_words(group.reference), f"data {run.row['data'][:8]}"]
    return "; ".join([*parts, device_names(run.row for run in group.runs)])


def _reference_words(reference: Settings) -> list[str]:
    changed = {path: v for path, v in reference.items() if v != DEFAULTS[path]}
    changed.pop("sparsity.rate", None)
    return [f"unless named otherwise {', '.join(settings_in_words(changed))}"] if changed else []


def _quality_caption(group: Group) -> str:
    before = mean_of([run.row["perplexity_before"] for run in group.runs])
    number = "infinite" if before is None else f"{before.value:.3f}"
    return _caption(group, _learning_rate(group), f"perplexity before training {number}")


def _learning_rate(group: Group) -> str:
    paths = ("optimizer.learning_rate", "optimizer.schedule")
    rate, schedule = (_setting(group.runs[0], path) for path in paths)
    return f"learning rate {rate:g}, {schedule}"


def _setting(run: FinishedRun, path: str) -> Any:
    return run.settings[path] if path in run.settings else find(path).default


def model_of(run: FinishedRun) -> str:
    """Return the model that a run starts from."""
    return str(run.settings.get("model.path") or _setting(run, "model.preset"))


def group_labels(groups: Sequence[Group]) -> list[str]:
    """Return the settings outside sparsity in which each group differs from others."""
    runs = [group.runs[0] for group in groups]
    # The fingerprint of the data stands for their settings.
    apart = ("seed", "data.", "train.eval")
    paths = dict.fromkeys(p for r in runs for p in r.settings if not p.startswith(apart))
    settings = [[settings_in_words({p: _setting(run, p)})[0] for run in runs] for p in paths]
    settings.append([f"data {run.row['data'][:6]}" for run in runs])
    differing = [words for words in settings if len(set(words)) > 1]
    return [", ".join(words[number] for words in differing) for number in range(len(runs))]


def _table(
    name: str,
    title: str,
    caption: str,
    variants: Sequence[Variant],
    columns: Mapping[str, _Cell],
) -> Table:
    """Return a row for each variant; columns without any value are left out."""
    cells = {head: list(map(cell, variants)) for head, cell in columns.items()}
    known = {head: values for head, values in cells.items() if set(values) != {"-"}}
    seeds = [str(len(variant.runs)) for variant in variants]
    rows = zip([variant.name for variant in variants], seeds, *known.values(), strict=True)
    return Table(name, title, caption, ("variant", "seeds", *known), tuple(rows))


def _mean(
    measure: Callable[[PairedRun], float | None], form: Callable[[float], str], error: bool = True
) -> _Cell:
    """`error`: whether to show the standard error; not for what hardly differs between seeds."""

    def cell(variant: Variant) -> str:
        mean = mean_of([measure(run) for run in variant.runs])
        if mean is None:
            return "-"
        return mean.text(form) if error else form(mean.value)

    return cell


def _speedup(variant: Variant) -> str:
    runs = [run.speedup() for run in variant.runs]
    mean = mean_of([run and run.speedup for run in runs])
    bound = mean_of([run and run.bound for run in runs])
    if mean is None or bound is None:
        return "-"
    error = mean.error if len(runs) > 1 or not runs[0] else runs[0].spread
    return speedup_text(mean.value, bound.value, error) + FEWER * mean.fewer


_DIFFERENCES = {
    "from dense": PairedRun.difference,
    "at equal FLOPs": PairedRun.difference_at_equal_flops,
}
_FLOPS_SHARE = _mean(PairedRun.flops_share, "{:.0f} %".format, error=False)
_QUALITY = {
    "perplexity": _mean(lambda run: run.perplexity, "{:.3f}".format),
    **{head: _mean(measure, "{:+.1f} %".format) for head, measure in _DIFFERENCES.items()},
    "FLOPs": _FLOPS_SHARE,
}
_COST = {
    "time": _mean(lambda run: run.seconds, "{:,.1f} s".format),
    "memory": _mean(lambda r: r.row["peak_memory"]["bytes"], lambda n: quantity(n, "B"), False),
    "FLOPs": _mean(lambda run: run.flops, lambda n: quantity(n, "FLOP"), error=False),
    "of dense": _FLOPS_SHARE,
    "speed-up": _speedup,
    "bound": _mean(lambda r: (speed := r.speedup()) and speed.bound, "{:.2f}×".format, False),
}
