"""Pictures of a run: loss over tokens, speed of each rung, what was kept.

Plain data in, PNG out (1200 × 675 pixels, or taller for deep models). Figures are built without
pyplot, so that no global state of matplotlib changes. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; the heat maps use cividis for the same reason.
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

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#C8C8C8", "#333333"

_DPI = 150
_SIZE = (8.0, 4.5)  # inches: 1200 × 675 pixels
_MAX_BLOCKS = 96  # columns of the channel map that stay wider than a few pixels
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

    `rows` are those of `metrics.jsonl`, in order: `tokens` (trained on so far) and, in any row,
    `loss` (under masks), `eval_loss` (dense), both in nats a token, and `omission_rate` (0 to 1),
    the rate at which the tokens up to this row were trained.
    """

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

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

    few = len(tokens) <= 60
    (trained,) = axes.plot(
        *series("loss"), color=BLUE, linewidth=1.4, marker="o" if few else "", markersize=3
    )
    (held_out,) = axes.plot(
        *series("eval_loss"), color=ORANGE, linewidth=2, marker="D", markersize=5
    )
    axes.set_xlim(0, max(tokens, default=1))
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(
        [trained, held_out, shading],
        ["training loss, under masks", "held-out loss, dense model", "omission rate (right)"],
        loc="upper right", fontsize=_FONT - 1, frameon=True, framealpha=0.9, edgecolor="none",
    )  # fmt: skip
    return figure


def speed_figure(rungs: Sequence[Mapping[str, Any]]) -> Figure:
    """Median tokens a second of every rung as bars, the FLOP bound as an outline above each.

    `rungs` are those of `sat_jax.analysis.tables.end_of_run`: `omission_rate`,
    `tokens_per_second` (None where nothing was timed) and `bound`. The outline is the dense rung's
    speed times the bound, and is left out where the dense rung was not timed.
    """
    timed = [rung for rung in rungs if rung["tokens_per_second"]]
    dense = next((r["tokens_per_second"] for r in timed if r["omission_rate"] == 0), None)
    speeds = [rung["tokens_per_second"] for rung in timed]
    bounds = [dense * rung["bound"] for rung in timed] if dense else []
    places = range(len(timed))

    figure = _figure()
    axes = figure.add_subplot()
    _tidy(
        axes, title="Training speed of each rung", x="omission rate", y="tokens per second, median"
    )
    colours = [BLUE if rung["omission_rate"] else GREY for rung in timed]
    axes.bar(places, speeds, width=0.62, color=colours, label="measured")
    for place, bound in zip(places, bounds, strict=False):
        label = "FLOP bound: dense speed × dense FLOPs ÷ FLOPs of the rung" if not place else None
        axes.hlines(bound, place - 0.36, place + 0.36, color=ORANGE, linewidth=2.2, label=label)
    for place, speed in zip(places, speeds, strict=True):
        text = f"{speed:,.0f}" + (f"\n{speed / dense:.2f}×" if dense else "")
        axes.text(
            place, speed * 0.97, text, ha="center", va="top", fontsize=_FONT, linespacing=1.4,
            color="white" if timed[place]["omission_rate"] else INK,
        )  # fmt: skip
    axes.set_xticks(places, [_rate_name(rung["omission_rate"]) for rung in timed])
    axes.set_ylim(0, 1.22 * max([*speeds, *bounds], default=1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if bounds:
        axes.legend(loc="upper right", fontsize=_FONT - 1, frameon=False)
    return figure


def _rate_name(rate: float) -> str:
    return f"{100 * rate:.0f} %" if rate else "0 % (dense)"


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
    kept. More than 96 channels are averaged over contiguous blocks. The two maps have a scale each,
    from their smallest share to 100 %.

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
        f"Kept in how many of {selections}", fontsize=_FONT + 2, color=INK, x=0.01, ha="left"
    )
    return figure


def _map(
    figure: Figure, axes: Axes, shares: Float[np.ndarray, "L N"], *, title: str, x: str
) -> None:
    lowest = math.floor(10 * shares.min()) / 10 if shares.min() < 1 else 0.0
    image = axes.imshow(
        shares, aspect="auto", interpolation="nearest", cmap="cividis", norm=Normalize(lowest, 1)
    )
    _tidy(axes, title=title, x=x, y="")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis, size in ((axes.xaxis, shares.shape[1]), (axes.yaxis, shares.shape[0])):
        axis.set_major_locator(MaxNLocator(min(8, size), integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]  # stubs call it a method's result
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
