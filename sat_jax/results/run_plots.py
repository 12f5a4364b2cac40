"""Figures of one run: loss over tokens, and how often each neuron was kept.

Figures are built without pyplot, so that no global state of matplotlib changes. Colours are Okabe
and Ito's, and the heat maps use cividis: colour-blind readers can tell them apart.
"""

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

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#C8C8C8", "#333333"

_SIZE = (8.0, 4.5)  # inches: 1200 × 675 pixels
_FONT = 10


def new_figure(height: float = _SIZE[1], width: float = _SIZE[0]) -> Figure:
    """Return an empty white figure; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, title: str, x: str, y: str) -> None:
    """Set title and labels, and draw spines only on the left and at the bottom."""
    axes.set_title(title, loc="left", fontsize=_FONT + 2, color=INK, pad=12)
    axes.set_xlabel(x, fontsize=_FONT, color=INK)
    axes.set_ylabel(y, fontsize=_FONT, color=INK)
    axes.tick_params(labelsize=_FONT - 1, color=GREY, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG to `path`, 1200 pixels wide, and a PDF beside it; return `path`.

    The same figure gives the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    # TrueType fonts: publishers refuse matplotlib's default, Type 3.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None})
    return path


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a figure of loss and omission rate over tokens.

    `rows` are the records of `metrics.jsonl`, in order, with `step`, `tokens` (trained on so far)
    and optionally `loss` (under masks) and `eval_loss` (dense), in nats per token, and
    `omission_rate` (0 to 1) of the tokens up to this record. The position of a record without
    `tokens` is interpolated by its step.
    """
    counted = [row for row in rows if "tokens" in row]

    def series(key: str) -> tuple[np.ndarray, np.ndarray]:
        measured = [row for row in rows if row.get(key) is not None]
        tokens = np.interp(
            [row["step"] for row in measured],
            [row["step"] for row in counted],
            [row["tokens"] for row in counted],
        )
        return tokens, np.asarray([row[key] for row in measured])

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
    trained = axes.plot(*series("loss"), color=BLUE, linewidth=1, clip_on=False)
    held_out = axes.plot(
        *series("eval_loss"), color=ORANGE, linewidth=2, marker="D", markersize=5, clip_on=False
    )
    axes.set_xlim(0, max(row["tokens"] for row in counted) or 1)
    axes.margins(y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(
        [*trained, *held_out, shading],
        ["training loss, under masks", "held-out loss, nothing omitted", "omission rate (right)"],
        loc="upper right", fontsize=_FONT - 1, framealpha=0.9, edgecolor="none",
    )  # fmt: skip
    return figure


def exchange_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a figure of the share of stored blocks that each exchange replaced, over steps.

    `rows` are the records of `metrics.jsonl` with `step` and optionally `blocks_exchanged`.
    """
    points = [(row["step"], row["blocks_exchanged"]) for row in rows if "blocks_exchanged" in row]
    figure = new_figure()
    axes = figure.add_subplot()
    tidy(axes, title="Exchange of stored blocks", x="step", y="new blocks, share of stored ones")
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4, clip_on=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    return figure


class Kept(NamedTuple):
    """How often each neuron was kept, and how many selections omitted any neuron of its layer."""

    counts: Int[np.ndarray, "L N"]
    selections: Int[np.ndarray, " L"]

    def shares(self) -> Float[np.ndarray, "L N"]:
        """Return the share of selections that kept each neuron; 1 in layers that never omit."""
        selections = self.selections[:, None]
        return np.where(selections == 0, 1.0, self.counts / np.maximum(selections, 1))


def kept_figure(heads: Kept, channels: Kept, *, head_unit: str = "KV group") -> Figure:
    """Return heat maps of how often each head (or `head_unit`) and channel was kept."""
    figure = new_figure(height=min(max(_SIZE[1], 0.12 * len(heads.counts) + 1.5), 12.0))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.4))
    _map(left, heads.shares(), title="Heads", x=head_unit)
    image = _map(right, channels.shares(), title="Channels", x="channel")
    left.set_ylabel("layer", fontsize=_FONT, color=INK)
    bar = figure.colorbar(image, ax=[left, right], pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    figure.suptitle(
        "Share of selections that kept each neuron",
        fontsize=_FONT + 2, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _map(axes: Axes, shares: Float[np.ndarray, "L N"], *, title: str, x: str) -> AxesImage:
    image = axes.imshow(shares, aspect="auto", interpolation="auto", cmap="cividis", vmin=0, vmax=1)
    tidy(axes, title=title, x=x, y="")
    for axis, size in ((axes.xaxis, shares.shape[1]), (axes.yaxis, shares.shape[0])):
        axis.set_major_locator(MaxNLocator(min(8, size), integer=True, min_n_ticks=1))
    return image
