"""Tables and a figure of extended contexts: perplexity and passkey retrieval under scalings of
rotary positions, without training and after training at the new length.

Rows of `scripts.evaluate --record` have both; rows of runs have the tokens that training needs.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sat_jax.config_values import find
from sat_jax.results.evaluations import extension_of
from sat_jax.results.figures import look
from sat_jax.results.finished import FinishedRun, finished_runs
from sat_jax.results.rows import Row, device_names
from sat_jax.results.run_plots import new_figure, tidy
from sat_jax.results.tables import Table
from sat_jax.results.variants import mean_of, percent_from


class Method(NamedTuple):
    """A scaling of rotary positions. `tokens`: those of training with it, 0 for the scaling alone;
    `skips`: positions skip some in training (PoSE); `rate`: of the units that SAT omits."""

    factor: float
    scaling: str
    tokens: int = 0
    learning_rate: float = 0.0
    skips: bool = False
    rate: float = 0.0

    @property
    def training(self) -> str:
        """The training in words."""
        if not self.tokens:
            return "none"
        names = ", PoSE" * self.skips + f", SAT from {self.rate:g}" * (self.rate > 0)
        return f"{self.tokens:,} tokens at {self.learning_rate:g}{names}"


_Measured = dict[Method, dict[tuple[int, int], Row]]
"""Rows by method, then by seed and context."""


def extension_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each factor of extension: a line for each scaling and training. A scaling
    with the factor 1, which grows with the length by itself, is in all of them.

    `from the base` compares the perplexity at the longest context with that of the base model at
    the length of its training, seed by seed. `tokens to the base's loss` are those of the first
    evaluation during training whose held-out loss, in rows of the new length, is not above that of
    the base model in rows of its own.
    """
    perplexities, passkeys = _measured(rows, "context"), _measured(rows, "passkey")
    runs, base, length = finished_runs(rows), *_base(perplexities)
    tables = []
    for factor in _factors(perplexities):
        methods = [method for method in perplexities if method.factor in (factor, 1)]
        methods.sort(key=lambda method: (method.tokens > 0, method.skips, method.rate))
        contexts = sorted({c for m in methods if m.factor == factor for _, c in perplexities[m]})
        tasks = sorted({c for m in methods for _, c in passkeys.get(m, {})})
        body = []
        for method in methods:
            some, accuracies = perplexities[method], passkeys.get(method, {})
            seeds = sorted({seed for seed, _ in some})
            body.append(
                (
                    method.scaling,
                    method.training,
                    str(len(seeds)),
                    *(_mean(seeds, some, c, "perplexity", "{:.2f}") for c in contexts),
                    _from_base(some, max(contexts), base),
                    *(_mean(seeds, accuracies, c, "accuracy", "{:.0%}") for c in tasks),
                    _tokens_to_base(runs, method),
                )
            )
        header = (
            *("scaling", "training", "seeds"),
            *(f"{context:,} tokens" for context in contexts),
            "from the base",
            *(f"passkey, {context:,}" for context in tasks),
            "tokens to the base's loss",
        )
        measured = [row for method in methods for row in perplexities[method].values()]
        row = measured[0]
        caption = (
            f"Perplexity by context of {', '.join(row['data'])} ({row['tokens']:,} tokens), passkey"
            f" accuracy, and held-out loss; a model trained in rows of {length:,} tokens; mean and"
            f" standard error over seeds; {device_names(measured)}"
        )
        tables.append(Table("extension", f"Context × {factor:g}", caption, header, tuple(body)))
    return tables


def extension_figure(rows: Sequence[Row]) -> Figure | None:
    """Return a figure of perplexity against context at the largest factor, means over seeds: left
    without training, right after it; None without rows."""
    measured = _measured(rows, "context")
    if not measured:
        return None
    largest = _factors(measured)[-1]
    methods = [method for method in measured if method.factor in (largest, 1)]
    scalings = [*dict.fromkeys(method.scaling for method in methods)]
    figure = new_figure(width=12.5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, trained in zip(panels, (False, True), strict=True):
        for method in (m for m in methods if (m.tokens > 0) == trained):
            _draw(axes, method, measured[method], look(scalings.index(method.scaling)))
        title = "trained at the new length" if trained else "without training"
        tidy(axes, title=title, x="context [tokens]", y="perplexity per token" * (not trained))
        contexts = sorted({context for m in methods for _, context in measured[m]})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
    lines = {str(line.get_label()): line for axes in panels for line in axes.lines}
    figure.legend([*lines.values()], [*lines], loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _factors(measured: _Measured) -> list[float]:
    """Return the factors of extension, without 1 if there is another."""
    factors = sorted({method.factor for method in measured})
    return [factor for factor in factors if factor > 1] or factors


def _draw(axes: Axes, method: Method, some: Mapping[tuple[int, int], Row], style: Any) -> None:
    seeds = sorted({seed for seed, _ in some})
    points = []
    for context in sorted({context for _, context in some}):
        values = [some[s, context]["perplexity"] for s in seeds if (s, context) in some]
        if mean := mean_of(values):
            points.append((context, mean.value))
    axes.plot(
        *zip(*points, strict=True), markersize=4, linewidth=1.5, **style,
        linestyle="--" if method.skips else ":" if method.rate else "-",
        label=f"{method.scaling}{', PoSE' * method.skips}{', SAT' * (method.rate > 0)}",
    )  # fmt: skip


def _measured(rows: Sequence[Row], measure: str) -> _Measured:
    """Return the rows of a measure by method; of equal ones the last counts."""
    result: _Measured = collections.defaultdict(dict)
    for row in rows:
        extension = extension_of(row) if row.get("measure") == measure and row["run"] else None
        if extension is not None:
            scaling, factor = extension
            settings = row["run"]["settings"]
            method = _trained(settings, _value(settings, "sparsity.rate"))
            if method is None or row["options"].get("rope_type") is not None:
                method = Method(factor, scaling)
            result[method][row["run"]["seed"], row["context"]] = row
    return dict(result)


def _trained(settings: Mapping[str, Any], rate: float) -> Method | None:
    """Return the scaling and training of a run with these settings; None for one without."""
    if "model.rope_type" not in settings:
        return None
    sizes = ("train.steps", "train.rows_per_step", "data.row_length")
    return Method(
        _value(settings, "model.rope_factor"),
        settings["model.rope_type"],
        math.prod(_value(settings, path) for path in sizes),
        _value(settings, "optimizer.learning_rate"),
        _value(settings, "data.pose_length") is not None,
        rate,
    )


def _method_of(run: FinishedRun) -> Method | None:
    return _trained(run.settings, run.sparsity["sparsity.rate"])


def _value(settings: Mapping[str, Any], path: str) -> Any:
    return settings.get(path, find(path).default)


def _base(perplexities: _Measured) -> tuple[dict[int, float], int]:
    """Return the perplexity of the base model by seed at the length of its training, and this
    length: that of the rows without a scaling and without training."""
    base, length = {}, 0
    for method, some in perplexities.items():
        for (seed, context), row in some.items():
            if method.tokens == 0:
                length = _value(row["run"]["settings"], "data.row_length")
                if method.scaling == "default" and context == length:
                    base[seed] = row["perplexity"]
    return base, length


def _mean(
    seeds: Sequence[int], some: Mapping[tuple[int, int], Row], context: int, field: str, form: str
) -> str:
    values = [some[seed, context][field] if (seed, context) in some else None for seed in seeds]
    return _text(values, lambda value: form.format(value).replace("%", " %"))


def _text(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    mean = mean_of(values)
    return mean.text(form) if mean else "-"


def _from_base(some: Mapping[tuple[int, int], Row], longest: int, base: Mapping[int, float]) -> str:
    differences = [
        percent_from(row["perplexity"], base[seed])
        for (seed, context), row in some.items()
        if context == longest and seed in base and row["perplexity"] is not None
    ]
    return _text(differences, "{:+.1f} %".format)


def _tokens_to_base(runs: Sequence[FinishedRun], method: Method) -> str:
    """Return the mean of the tokens after which the held-out loss is that of the base model."""
    if method.skips:  # whose held-out rows have the old length
        return "-"
    bases = {run.seed: math.log(run.perplexity) for run in runs if _method_of(run) is None}
    needed = []
    for run in runs:
        curve = run.row.get("curve", {})
        if _method_of(run) == method and run.seed in bases and "eval_loss" in curve:
            points = zip(curve["eval_tokens"], curve["eval_loss"], strict=True)
            needed.append(next((count for count, x in points if x <= bases[run.seed]), None))
    if needed and all(count is None for count in needed):
        return "not reached"
    return _text(needed, "{:,.0f}".format)
