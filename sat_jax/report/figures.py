"""Pictures of a group of runs: losses, quality against FLOPs and speed-up, rate over time, what was
kept."""

import base64
import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

from sat_jax.analysis.means import Estimate, estimate
from sat_jax.analysis.plots import INK, new_figure, tidy
from sat_jax.analysis.twins import ESTIMATED
from sat_jax.report.axes import AXES, RATES, SCHEDULES, axis_of, foremost, keys_told, told, varied
from sat_jax.report.groups import Group, Variant, whole_bounds
from sat_jax.report.wording import caption_of, dense_name, named, shown, value_of

# Okabe and Ito's, which colour-blind readers can tell apart; the dense run is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_MARKERS = "osD^vP*X<>"
_FONT = 10
_LINE = 0.19  # inches of height that a line of names takes
_COLUMN = 40  # characters that a column of long names needs
_MANY = 9  # lines or names beyond which a picture is a tangle
_FAR = 10.0  # per cent from dense that a picture has room for
_MANY_POINTS = 18  # points with names, in a picture of the usual width

_SIZE = {"width": 5.2, "height": 3.9}  # inches; read at the width of a telephone too

_BARS = "Bars are standard errors over the seeds."
_HOLLOW = "Hollow: of fewer seeds than the dense run, so not to be held against the line."
LOSS = "Loss against tokens, FLOPs and time"
AGAINST = {
    "tokens": ("tokens trained on", ""),
    "flops": ("FLOPs spent, probes in", "FLOP"),
    "seconds": ("time of training, compiling and evaluating apart", "s"),
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as a data URI, under a heading; `words` say what it shows, for those who do not see
    it too. A wide one needs the room of two."""

    heading: str
    words: str
    uri: str
    wide: bool = False


def pictures_of(group: Group) -> list[Picture]:
    """Each only where runs for it exist."""
    made: list[tuple[str, str, Figure]] = []  # heading, words, figure
    about = caption_of(group, group.sparse, varied(group.sparse))
    few = _drawn(group)
    some = (
        "" if len(few) == len(group.variants) else f"{len(few)} of {len(group.variants)} settings."
    )
    variants = [one for one in few if any(run.row.get("curve") for run in one.runs)]
    for against in AGAINST if variants else ():
        made.append((LOSS, some, _losses(group, variants, against)))
    hollow = any(_fewer_seeds(group, one) for one in group.sparse)
    bars = f"{_BARS} {_HOLLOW}" if hollow else _BARS
    if (flops := flops_figure(group)) is not None:
        words = "Down and left is better. The line joins dense runs"
        words += ", of fewer steps too: below it is better than dense at equal FLOPs" * bool(
            group.shorter
        )
        made.append(("Quality against FLOPs", f"{words}. {bars}", flops))
    if (points := _points(group, 1.0, _speedups)) and any(not one.dense for one, *_ in points):
        words = f"Down and right is better. The line joins what no other run beats in both. {bars}"
        if any(estimated for *_, estimated in points):
            words += f" {ESTIMATED}: estimated from the run's own dense rung."
        joined = front([(speed.mean, gap.mean) for _, speed, gap, _ in points])
        figure = _scatter(group, points, joined, "speed-up of the whole run")
        made.append(("Quality against speed-up", words, figure))
    if group.sparse:
        made.append(("Omission rate over a run", "", _rates(group)))
    pictures = [Picture(t, f"{words} {about}".strip(), svg(figure)) for t, words, figure in made]
    return [*pictures, *_kept(group)]


def svg(figure: Figure) -> str:
    """The figure as a data URI; the same figure gives the same text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sat_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("svg+xml", file.getvalue())


def label(group: Group, variant: Variant) -> str:
    """What tells a variant from the others of its group."""
    if variant.dense:
        return dense_name(variant)
    keys = keys_told(group, variant)
    said = ("rate_attention", "rate_mlp") if "rate" in keys else ()  # with the rate
    return named({key: value_of(variant.settings, key) for key in keys if key not in said})


def _drawn(group: Group) -> list[Variant]:
    """All variants in their order; of many the dense one and the foremost."""
    dense = [group.dense] if group.dense else []
    chosen = {id(one) for one in [*dense, *foremost(group)][:_MANY]}
    return [one for one in group.variants if id(one) in chosen]


def _styles(group: Group) -> dict[int, dict[str, Any]]:
    """Colour and marker of each variant, by its identity; the foremost have the colours first."""
    styles: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(foremost(group)):
        marker = _MARKERS[number // len(COLOURS) % len(_MARKERS)]
        styles[id(one)] = {"color": COLOURS[number % len(COLOURS)], "marker": marker}
    if group.dense:
        styles[id(group.dense)] = {"color": "black", "marker": "o"}
    return styles | {id(one): {"color": "black", "marker": "x"} for one in group.shorter}


def _by_axis(group: Group) -> dict[int, dict[str, Any]]:
    """Where there are more variants than a legend has room for: the look of those that differ in
    more than the rate, and their name (`label`), by what they differ in."""
    settings = told(group)
    axes = {id(one): axis_of(settings[id(one)]) for one in group.sparse}
    own = sum(axis is RATES for axis in axes.values())  # these have the first colours
    looks = {
        axis: {
            "color": COLOURS[(own + number) % len(COLOURS)],
            "marker": _MARKERS[1 + number],
            "label": axis.title if axis else "Several of these",
        }
        for number, axis in enumerate((*AXES[1:], None))
    }
    return {one: looks[axis] for one, axis in axes.items() if axis is not RATES}


def _losses(group: Group, variants: Sequence[Variant], against: str) -> Figure:
    """Training losses thin, held-out ones thick; a line a run, a colour a variant."""
    figure = new_figure(**_SIZE)
    axes = figure.add_subplot()
    name, unit = AGAINST[against]
    tidy(axes, title="", x=name, y="loss [nats per token]")
    styles = _styles(group)
    for one in variants:
        style = styles[id(one)]
        first = True
        for curve in filter(None, (run.row.get("curve") for run in one.runs)):
            axes.plot(
                _floats(curve[against]), _floats(curve["loss"]), color=style["color"],
                linewidth=0.9, alpha=0.45,
            )  # fmt: skip
            axes.plot(
                _floats(curve[f"eval_{against}"]), _floats(curve["eval_loss"]), **style,
                linewidth=2, markersize=5, label=label(group, one) if first else None,
            )  # fmt: skip
            first = False
    axes.xaxis.set_major_formatter(EngFormatter(unit, sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend(figure, "held-out, dense model (thin: training, under masks)")
    return figure


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


_Point = tuple[Variant, Estimate, Estimate, bool]
_Places = tuple[list[float | None], bool]  # of each run, and whether any is estimated


def _points(group: Group, dense: float, across: Callable[[Variant], _Places]) -> list[_Point]:
    """(variant, its place across, per cent from dense, whether estimated), the shorter dense runs
    among them; the dense run at its own place, `dense`, by definition."""
    points = []
    for one in (*group.shorter, *group.sparse):
        values, estimated = across(one)
        place, gap = estimate(values), estimate(one.gaps())
        if place is not None and gap is not None:
            points.append((one, place, gap, estimated))
    if group.dense and points:
        points.append((group.dense, Estimate(dense, None), Estimate(0.0, None), False))
    return points


def _fewer_seeds(group: Group, variant: Variant) -> bool:
    """Whether a seed of the dense run has no run here: seeds differ by more than most variants."""
    seeds = {run.seed for run in group.dense.runs} if group.dense else set()
    return not seeds <= {run.seed for run in variant.runs}


def _speedups(variant: Variant) -> _Places:
    speeds = variant.speedups()
    return speeds.values, speeds.estimated


def _flops(variant: Variant) -> _Places:
    """Per cent of those of dense training on the same tokens."""
    return [None if bound is None else 100 / bound for bound in whole_bounds(variant)], False


def flops_figure(group: Group, width: float = _SIZE["width"]) -> Figure | None:
    """Distance from dense against FLOPs, dense runs joined, `width` inches wide; None: no sparse
    run has a dense one."""
    points = _points(group, 100.0, _flops)
    if all(one.dense for one, *_ in points):
        return None
    dense = [number for number, (one, *_) in enumerate(points) if one.dense]
    dense.sort(key=lambda number: points[number][1].mean)
    return _scatter(group, points, dense, "FLOPs, probes in [% of dense training]", width)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (speed-up, distance from dense) no other one beats in both, fastest last."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    best, kept = float("inf"), []
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept[::-1]


def _scatter(
    group: Group,
    points: Sequence[_Point],
    joined: Sequence[int],
    x: str,
    width: float = _SIZE["width"],
) -> Figure:
    """The points of the numbers `joined` with a line through them."""
    figure = new_figure(_SIZE["height"], width)
    axes = figure.add_subplot()
    tidy(axes, title="", x=x, y="perplexity from dense [%]")
    places = [(place.mean, gap.mean) for _, place, gap, _ in points]
    axes.plot(
        [places[i][0] for i in joined], [places[i][1] for i in joined], color=INK, linewidth=1,
        alpha=0.5, zorder=1,
    )  # fmt: skip
    many = len(points) > _MANY_POINTS * width / _SIZE["width"]
    styles, kinds = _styles(group), _by_axis(group) if many else {}
    names = set[str]()
    for number, (one, place, gap, estimated) in enumerate(points):
        look = styles if number in joined else styles | kinds
        style = dict(look[id(one)])
        name = style.pop("label", None) or f"{ESTIMATED} " * estimated + label(group, one)
        face = "white" if _fewer_seeds(group, one) else style["color"]
        axes.errorbar(
            place.mean, gap.mean, xerr=place.error, yerr=gap.error, fmt=style["marker"],
            color=style["color"], markerfacecolor=face, markersize=7, elinewidth=1, capsize=3,
            label="_" if name in names else name, zorder=3 if number in joined else 2,
        )  # fmt: skip
        names.add(name)
    axes.margins(0.1)
    _bend(axes, [gap.mean for _, _, gap, _ in points])
    _legend(figure)
    return figure


def _bend(axes: Axes, gaps: Sequence[float]) -> None:
    """Where a distance is past twice `_FAR` the axis is logarithmic beyond `_FAR`, so that those
    which are close remain apart."""
    if max(gaps) <= 2 * _FAR:
        return
    axes.set_yscale("symlog", linthresh=_FAR, linscale=2)
    axes.set_ylabel(f"{axes.get_ylabel()},\nabove {_FAR:g} logarithmic")
    ticks = (*np.arange(-_FAR, _FAR, 2), *(_FAR * np.array([1, 2, 5, 10, 20, 50, 100])))
    axes.set_yticks([tick for tick in ticks if min(gaps) <= tick <= max(gaps)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _rates(group: Group) -> Figure:
    """The omission rate asked for, over the share of the steps."""
    figure = new_figure(**_SIZE)
    axes = figure.add_subplot()
    tidy(axes, title="", x="steps", y="omission rate")
    together = _shapes(group)
    differ = varied(group.sparse)
    keys = [key for key in SCHEDULES.keys if key != "schedule" and key in differ]
    names = [_shared(variants, keys) for variants in together.values()]
    for number, (shape, variants) in enumerate([*together.items()][:_MANY]):
        ends = np.cumsum([0, *(steps for steps, _ in shape)])
        rates = [rate for _, rate in shape]
        name = names[number]
        axes.plot(
            ends, [*rates, rates[-1]], drawstyle="steps-post", linewidth=2, alpha=0.8,
            color=COLOURS[number % len(COLOURS)],
            label=name if names.count(name) == 1 else f"{name}: {label(group, variants[0])}",
        )  # fmt: skip
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    _legend(figure)
    return figure


_Shape = tuple[tuple[int, float], ...]  # steps and rate of each rung


def _shapes(group: Group) -> dict[_Shape, list[Variant]]:
    """The variants by the rate over their steps, the foremost first."""
    together: dict[_Shape, list[Variant]] = {}
    for one in foremost(group):
        rungs = one.runs[0].row["rungs"]
        shape = tuple((rung["steps"], rung["omission_rate"]) for rung in rungs)
        together.setdefault(shape, []).append(one)
    return together


def _shared(variants: Sequence[Variant], keys: Sequence[str]) -> str:
    """What makes the rate of these what it is: the schedule, and those of its settings that vary
    in the picture, `keys`."""
    settings = variants[0].settings
    start = f"{settings['schedule']} from {shown(value_of(settings, 'rate'))}"
    return ", ".join([start, *([named({key: settings[key] for key in keys})] if keys else [])])


def _legend(figure: Figure, title: str | None = None) -> None:
    """Below the picture, so that it hides nothing: in two columns, where the names have room, or
    are many and can be broken to have it."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    half = int(5 * figure.get_figwidth())  # characters
    width = half if len(names) > _MANY and half >= _COLUMN else 64
    names = [textwrap.fill(name, width) for name in names]
    columns = 1 if max(len(line) for name in names for line in name.split("\n")) > half else 2
    lines = sum(name.count("\n") + 1 for name in names) / columns
    figure.set_figheight(_SIZE["height"] + max(0.0, lines - _MANY / 2) * _LINE)
    figure.legend(
        handles, names, title=title, loc="outside lower center", ncols=columns, fontsize=_FONT - 1,
        title_fontsize=_FONT - 1, frameon=False,
    )  # fmt: skip


def _kept(group: Group) -> list[Picture]:
    """The maps that runs drew when they ended, of the first seed of each variant."""
    pictures = []
    for one in group.sparse:
        place: Path | None = one.runs[0].place
        file = None if place is None else place / "figures" / "kept.png"
        if file is not None and file.is_file():
            words = f"{label(group, one)}; seed {one.runs[0].seed}"
            pictures.append(Picture("Kept neurons", words, _uri("png", file.read_bytes()), True))
    return pictures


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
