"""Pictures of a run: loss over tokens, speed of each rung, what was kept.

Plain data in; out a PNG (1200 × 675 pixels, or taller for deep models) and, for print, a PDF beside
it. Figures are built without pyplot, so that no global state of matplotlib changes. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; the heat maps use cividis for the same
reason.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from sat_jax.analysis.tables import MINIMUM_STEPS, dense_speed, is_dense, is_measured

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#C8C8C8", "#333333"

_DPI = 150
_SIZE = (8.0, 4.5)  # inches: 1200 × 675 pixels
_MAX_BLOCKS = 96  # columns of the channel map that stay wider than a few pixels
_FEW_BARS = 7  # that leave room for labels in full size
_SMOOTHED_LOSSES = 16  # records from which a mean over a few of them says more than each
_MANY_LOSSES = 60  # records beyond which markers only hide each other
_FONT = 10


def new_figure(height: float = _SIZE[1], width: float = _SIZE[0]) -> Figure:
    """An empty figure, white; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Title and labels in the style of all pictures; lines only on the left and at the bottom."""
    axes.set_title(title, loc="left", fontsize=_FONT + 2, color=INK, pad=12)
    axes.set_xlabel(x, fontsize=_FONT, color=INK)
    axes.set_ylabel(y, fontsize=_FONT, color=INK)
    axes.tick_params(labelsize=_FONT - 1, color=GREY, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def save(figure: Figure, path: Path) -> Path:
    """Writes the PNG and a PDF of the same stem; the same figure gives the same bytes. Returns
    `path`, the PNG's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    # As TrueType: publishers refuse matplotlib's default, Type 3.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None})
    return path


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and omission rate over tokens.

    `rows` are those of `metrics.jsonl`, in order: `step`, `tokens` (trained on so far) and, each
    where it was measured, `loss` (under masks) and `eval_loss` (dense), both in nats a token, and
    `omission_rate` (0 to 1), at which the tokens up to this row were trained. A row without
    `tokens` is placed between its neighbours by its step. From 16 losses on, their centred running
    mean is drawn over them.
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

    figure = new_figure()
    axes = figure.add_subplot()
    rate_axes = axes.twinx()
    axes.set_zorder(rate_axes.get_zorder() + 1)  # curves in front of the rate's shading
    axes.patch.set_visible(False)
    tidy(axes, title="Loss and omission rate", x="tokens trained on", y="loss [nats per token]")
    tidy(rate_axes, title="", x="", y="omission rate")

    tokens, rates = series("omission_rate")
    shading = rate_axes.fill_between(
        [0, *tokens], [*rates[:1], *rates], step="pre", color=GREY, alpha=0.45, linewidth=0
    )
    rate_axes.set_ylim(0, 1)
    rate_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    rate_axes.spines["left"].set_visible(False)
    rate_axes.spines["right"].set_visible(True)

    tokens, losses = series("loss")
    smoothed = len(losses) >= _SMOOTHED_LOSSES
    marker = "o" if len(losses) <= _MANY_LOSSES else ""
    trained = axes.plot(
        tokens, losses, color=BLUE, marker=marker, markersize=3, clip_on=False,
        linewidth=0.7 if smoothed else 1.4, alpha=0.4 if smoothed else 1,
    )  # fmt: skip
    names = ["training loss, under masks"]
    if smoothed:
        window = max(5, len(losses) // 40) | 1  # odd, so that a mean has a middle
        middles, means = (
            np.convolve(values, np.full(window, 1 / window), mode="valid")
            for values in (tokens, losses)
        )
        trained += axes.plot(middles, means, color=BLUE, linewidth=2)
        names.append(f"its mean over {window} records, centred")
    (held_out,) = axes.plot(
        *series("eval_loss"), color=ORANGE, linewidth=2, marker="D", markersize=5, clip_on=False
    )
    axes.set_xlim(0, max(row["tokens"] for row in placed) or 1)
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(
        [*trained, held_out, shading],
        [*names, "held-out loss, dense model", "omission rate (right)"],
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

    figure = new_figure()
    axes = figure.add_subplot()
    tidy(
        axes, title="Training speed of each rung", x="omission rate", y="tokens per second, median"
    )
    colours = [GREY if is_dense(rung) else BLUE for rung in rungs]
    measured = axes.bar(places, speeds, width=0.7, color=colours)
    if dense:
        ends = [place - 0.4 for place in places], [place + 0.4 for place in places]
        limits = axes.hlines(bounds, *ends, color=ORANGE, linewidth=2.2)
        figure.legend(
            [measured[0], limits],
            [
                "measured, and ratio to the dense rung",
                "bound: dense speed × dense FLOPs ÷ FLOPs of the rung",
            ],
            loc="outside lower center", ncols=2, fontsize=_FONT - 1, frameon=False,
        )  # fmt: skip
    # In one row above all bars and bounds, so that no line cuts through a number.
    size = _FONT if len(rungs) <= _FEW_BARS else _FONT - 2
    for place, speed in zip(places, speeds, strict=True):
        if speed:
            text = f"{speed:,.0f}" + (f"\n{speed / dense:.2f}×" if dense else "")
        else:
            text = f"not timed:\nunder {MINIMUM_STEPS} steps"
        axes.text(
            place, 0.99, text, transform=axes.get_xaxis_transform(), ha="center", va="top",
            fontsize=size, linespacing=1.4, color=INK,
        )  # fmt: skip
    axes.set_xticks(places, [_rung_name(rung) for rung in rungs])
    spare = max(0, 4 - len(rungs)) / 2  # a lone bar is not blown up
    axes.set_xlim(-0.7 - spare, len(rungs) - 0.3 + spare)
    axes.set_ylim(0, 1.25 * max([*speeds, *bounds], default=0) or 1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def _rung_name(rung: Mapping[str, Any]) -> str:
    return "dense" if is_dense(rung) else f"{100 * rung['omission_rate']:.3g} %"


class Kept(NamedTuple):
    """How often each neuron was kept, `[L, N]`, in the selections that omitted any in its layer,
    `[L]`."""

    counts: Int[np.ndarray, "L N"]
    selections: Int[np.ndarray, " L"]

    def shares(self) -> Float[np.ndarray, "L N"]:
        """0 to 1; a layer from which nothing was ever omitted kept all of it."""
        counts, selections = self.counts, self.selections[:, None]
        if (counts < 0).any() or (counts > selections).any():
            raise ValueError("counts must lie in 0..selections")
        return np.where(selections == 0, 1.0, counts / np.maximum(selections, 1))

    def times(self) -> str:
        """In words, the most selections of a layer."""
        most = self.selections.max()
        plural = "" if most == 1 else "s"
        return f"{most} selection{plural}" if most else "never omitted"


def block_means(shares: Float[np.ndarray, "L N"], blocks: int) -> Float[np.ndarray, "L blocks"]:
    """Means over contiguous runs of ⌈N / blocks⌉ neurons (the last may be shorter)."""
    neurons = shares.shape[1]
    starts = np.arange(0, neurons, math.ceil(neurons / blocks))
    sizes = np.diff(np.append(starts, neurons))
    return np.add.reduceat(shares, starts, axis=1) / sizes


def kept_figure(heads: Kept, channels: Kept, *, head_unit: str = "KV group") -> Figure:
    """How often each head (or KV group, as `head_unit` says) and each block of channels was kept.

    More than 96 channels are averaged over contiguous blocks. Both maps have the scale 0 to 100 %.

    Raises:
      ValueError: a count outside 0..selections, or different numbers of layers.
    """
    layers = len(heads.counts)
    if len(channels.counts) != layers:
        raise ValueError(f"{layers} layers of heads, {len(channels.counts)} of channels")
    block = math.ceil(channels.counts.shape[1] / _MAX_BLOCKS)
    noun = f"block of {block} channels" if block > 1 else "channel"
    figure = new_figure(height=min(max(_SIZE[1], 0.12 * layers + 1.5), 12.0))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.4))
    _map(left, heads.shares(), title=f"Heads, {heads.times()}", x=head_unit)
    image = _map(
        right,
        block_means(channels.shares(), _MAX_BLOCKS),
        title=f"Channels, {channels.times()}",
        x=noun,
    )
    left.set_ylabel("layer", fontsize=_FONT, color=INK)
    bar = figure.colorbar(image, ax=[left, right], pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bar.ax.tick_params(labelsize=_FONT - 1, color=GREY, labelcolor=INK)
    figure.suptitle(
        "How often each neuron was kept, in the selections that omitted some",
        fontsize=_FONT + 2, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _map(axes: Axes, shares: Float[np.ndarray, "L N"], *, title: str, x: str) -> AxesImage:
    image = axes.imshow(
        shares, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1
    )
    tidy(axes, title=title, x=x, y="")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for axis, size in ((axes.xaxis, shares.shape[1]), (axes.yaxis, shares.shape[0])):
        axis.set_major_locator(MaxNLocator(min(8, size), integer=True, min_n_ticks=1))
    return image


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes `loss_figure(rows)` to `path` and returns it."""
    return save(loss_figure(rows), path)


def plot_speed(rungs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes `speed_figure(rungs)` to `path` and returns it."""
    return save(speed_figure(rungs), path)


def plot_kept(heads: Kept, channels: Kept, path: Path, *, head_unit: str = "KV group") -> Path:
    """Writes `kept_figure(...)` to `path` and returns it."""
    return save(kept_figure(heads, channels, head_unit=head_unit), path)
