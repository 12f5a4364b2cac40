"""Pictures of a run: loss over tokens, speed of each rung, what was kept.

Plain data in, PNG out (1200 × 675 pixels, or taller for deep models). Figures are built without
pyplot, so that no global state of matplotlib changes. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; the heat maps use cividis for the same reason.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from sat_jax.analysis.tables import MINIMUM_STEPS, dense_speed, is_dense, is_measured

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#C8C8C8", "#333333"

_DPI = 150
_SIZE = (8.0, 4.5)  # inches: 1200 × 675 pixels
_MAX_BLOCKS = 96  # columns of the channel map that stay wider than a few pixels
_FEW_BARS = 7  # that leave room for labels in full size
_MANY_LOSSES = 60  # records beyond which single points only hide each other
_FONT = 10


def _figure(height: float = _SIZE[1]) -> Figure:
    figure = Figure(figsize=(_SIZE[0], height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=_FONT + 2, color=INK, pad=12)
    axes.set_xlabel(x, fontsize=_FONT, color=INK)
    axes.set_ylabel(y, fontsize=_FONT, color=INK)
    axes.tick_params(labelsize=_FONT - 1, color=GREY, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def save(figure: Figure, path: Path) -> Path:
    """Writes the PNG; the same figure gives the same bytes. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and omission rate over tokens.

    `rows` are those of `metrics.jsonl`, in order: `step`, `tokens` (trained on so far) and, each
    where it was measured, `loss` (under masks) and `eval_loss` (dense), both in nats a token, and
    `omission_rate` (0 to 1), at which the tokens up to this row were trained. A row without
    `tokens` is placed between its neighbours by its step. Many losses get their running mean.
    """
    placed = [row for row in rows if "tokens" in row]

    def series(key: str) -> tuple[np.ndarray, np.ndarray]:
        found = [row for row in rows if row.get(key) is not None]
        tokens = np.interp(
            [row["step"] for row in found],
            [row["step"] for row in placed],
            [row["tokens"] for row in placed],
        )
        return tokens, np.asarray([row[key] for row in found])

    figure = _figure()
    axes = figure.add_subplot()
    rate_axes = axes.twinx()
    axes.set_zorder(rate_axes.get_zorder() + 1)  # curves in front of the rate's shading
    axes.patch.set_visible(False)
    _tidy(axes, title="Loss and omission rate", x="tokens trained on", y="loss [nats per token]")
    _tidy(rate_axes, title="", x="", y="omission rate")

    tokens, rates = series("omission_rate")
    shading = rate_axes.fill_between(
        [0, *tokens], [*rates[:1], *rates], step="pre", color=GREY, alpha=0.45, linewidth=0
    )
    rate_axes.set_ylim(0, 1)
    rate_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    rate_axes.spines["left"].set_visible(False)
    rate_axes.spines["right"].set_visible(True)

    tokens, losses = series("loss")
    window = len(losses) // _MANY_LOSSES
    label = "training loss, under masks"
    if window > 1:
        axes.plot(tokens, losses, color=BLUE, linewidth=0.6, alpha=0.25)
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        middles = np.convolve(tokens, np.full(window, 1 / window), mode="valid")
        (trained,) = axes.plot(middles, means, color=BLUE, linewidth=1.6)
        label += f", mean of {window} records"
    else:
        marker = "o" if len(losses) <= _MANY_LOSSES else ""
        (trained,) = axes.plot(
            tokens, losses, color=BLUE, linewidth=1.4, marker=marker, markersize=3, clip_on=False
        )
    (held_out,) = axes.plot(
        *series("eval_loss"), color=ORANGE, linewidth=2, marker="D", markersize=5, clip_on=False
    )
    axes.set_xlim(0, max(row["tokens"] for row in placed) or 1)
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(
        [trained, held_out, shading],
        [label, "held-out loss, dense model", "omission rate (right)"],
        loc="upper right", fontsize=_FONT - 1, frameon=True, framealpha=0.9, edgecolor="none",
    )  # fmt: skip
    return figure


def speed_figure(rungs: Sequence[Mapping[str, Any]]) -> Figure:
    """Median tokens a second of every rung as bars, and the FLOP bound as a line over each.

    Takes the rungs of `sat_jax.analysis.tables.end_of_run`. The bound is the dense rung's speed
    times the rung's `bound`; it is left out where the dense rung is not measured.
    """
    dense = dense_speed(rungs)
    places = range(len(rungs))
    speeds = [rung["tokens_per_second"] if is_measured(rung) else 0.0 for rung in rungs]
    bounds = [dense * rung["bound"] for rung in rungs] if dense else []

    figure = _figure()
    axes = figure.add_subplot()
    _tidy(
        axes, title="Training speed of each rung", x="omission rate", y="tokens per second, median"
    )
    colours = [GREY if is_dense(rung) else BLUE for rung in rungs]
    measured = axes.bar(places, speeds, width=0.7, color=colours)
    if dense:
        ends = [place - 0.4 for place in places], [place + 0.4 for place in places]
        limits = axes.hlines(bounds, *ends, color=ORANGE, linewidth=2.2)
        axes.legend(
            [measured, limits],
            [
                "measured, and ratio to the dense rung",
                "bound: dense speed × dense FLOPs ÷ FLOPs of the rung",
            ],
            loc="upper right", fontsize=_FONT - 1, frameon=False,
        )  # fmt: skip
    size = _FONT if len(rungs) <= _FEW_BARS else _FONT - 2
    for place, rung, speed in zip(places, rungs, speeds, strict=True):
        if not speed:
            note = f"under {MINIMUM_STEPS}\ntimed steps"
            axes.text(place, 0, note, ha="center", va="bottom", fontsize=size, color=INK)
            continue
        text = f"{speed:,.0f}" + (f"\n{speed / dense:.2f}×" if dense else "")
        axes.text(
            place, speed * 0.97, text, ha="center", va="top", fontsize=size, linespacing=1.4,
            color=INK if is_dense(rung) else "white",
        )  # fmt: skip
    axes.set_xticks(places, [_rung_name(rung) for rung in rungs])
    spare = max(0, 4 - len(rungs)) / 2  # a lone bar is not blown up
    axes.set_xlim(-0.7 - spare, len(rungs) - 0.3 + spare)
    axes.set_ylim(0, 1.22 * max([*speeds, *bounds], default=0) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def _rung_name(rung: Mapping[str, Any]) -> str:
    return "dense" if is_dense(rung) else f"{100 * rung['omission_rate']:.3g} %"


def block_means(counts: Int[np.ndarray, "L N"], blocks: int) -> Float[np.ndarray, "L blocks"]:
    """Means over contiguous runs of ⌈N / blocks⌉ neurons (the last may be shorter)."""
    neurons = counts.shape[1]
    starts = np.arange(0, neurons, math.ceil(neurons / blocks))
    sizes = np.diff(np.append(starts, neurons))
    return np.add.reduceat(counts.astype(np.float64), starts, axis=1) / sizes


def kept_figure(
    head_counts: Int[np.ndarray, "L H"],
    channel_counts: Int[np.ndarray, "L F"],
    refreshes: int,
    *,
    head_unit: str = "KV group",
) -> Figure:
    """How often each head (or KV group, as `head_unit` says) and each block of channels was kept.

    `head_counts` and `channel_counts` say in how many of the `refreshes` selections a neuron was
    kept. More than 96 channels are averaged over contiguous blocks. Each map has a scale of its
    own, around the shares that occur in it.

    Raises:
      ValueError: no refresh, a count outside 0..refreshes, or different numbers of layers.
    """
    if refreshes < 1:
        raise ValueError(f"refreshes must be at least 1, got {refreshes}")
    for name, counts in (("head_counts", head_counts), ("channel_counts", channel_counts)):
        if counts.min() < 0 or counts.max() > refreshes:
            raise ValueError(f"{name} must lie in 0..{refreshes}")
    layers = head_counts.shape[0]
    if channel_counts.shape[0] != layers:
        raise ValueError(f"{layers} layers of heads, {channel_counts.shape[0]} of channels")

    heads = head_counts / refreshes
    channels = block_means(channel_counts, _MAX_BLOCKS) / refreshes
    block = math.ceil(channel_counts.shape[1] / _MAX_BLOCKS)
    noun = f"block of {block} channels" if block > 1 else "channel"
    figure = _figure(height=min(max(_SIZE[1], 0.12 * layers + 1.5), 12.0))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.4))
    _map(figure, left, heads, title="Heads", x=head_unit)
    _map(figure, right, channels, title="Channels", x=noun)
    left.set_ylabel("layer", fontsize=_FONT, color=INK)
    selections = f"{refreshes} selections" if refreshes > 1 else "1 selection"
    figure.suptitle(
        f"How often each neuron was kept, of {selections}",
        fontsize=_FONT + 2, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _map(
    figure: Figure, axes: Axes, shares: Float[np.ndarray, "L N"], *, title: str, x: str
) -> None:
    lowest, highest = math.floor(10 * shares.min()) / 10, math.ceil(10 * shares.max()) / 10
    scale = Normalize(lowest, highest) if lowest < highest else Normalize(0, 1)
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="cividis", norm=scale)
    _tidy(axes, title=title, x=x, y="")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis, size in ((axes.xaxis, shares.shape[1]), (axes.yaxis, shares.shape[0])):
        axis.set_major_locator(MaxNLocator(min(8, size), integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.ax.tick_params(labelsize=_FONT - 1, color=GREY, labelcolor=INK)


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes `loss_figure(rows)` to `path` and returns it."""
    return save(loss_figure(rows), path)


def plot_speed(rungs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes `speed_figure(rungs)` to `path` and returns it."""
    return save(speed_figure(rungs), path)


def plot_kept(
    head_counts: Int[np.ndarray, "L H"],
    channel_counts: Int[np.ndarray, "L F"],
    refreshes: int,
    path: Path,
    *,
    head_unit: str = "KV group",
) -> Path:
    """Writes `kept_figure(...)` to `path` and returns it."""
    return save(kept_figure(head_counts, channel_counts, refreshes, head_unit=head_unit), path)
