"""Figures of a run: the values drawn, and the files written."""

import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from sat_jax.results.run_plots import Kept, kept_figure, loss_figure, save
from tests.tolerances import assert_close

METRICS: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "eval_loss": 3.5},
    {"step": 1, "tokens": 100, "loss": 3.0, "omission_rate": 0.4},
    {"step": 2, "tokens": 200, "loss": None, "omission_rate": 0.4},
    {"step": 3, "eval_loss": 2.5},
    {"step": 4, "tokens": 400, "loss": 2.0, "eval_loss": 2.25, "omission_rate": 0.0},
]
# Of the heads of the first layer two selections omitted some, of those of the second none.
HEADS = Kept(np.array([[2, 0, 1], [0, 0, 0]]), np.array([2, 0]))
CHANNELS = Kept(np.array([[4, 4, 0, 1], [2, 2, 3, 4]]), np.array([4, 4]))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height that the header states."""
    start = path.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", start[16:])


def points(axes: Axes, line: int) -> list[tuple[float, float]]:
    x, y = axes.lines[line].get_data()
    return list(zip(map(float, x), map(float, y), strict=True))


def test_files_have_the_stated_size(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    deep = Kept(np.ones((60, 3), int), np.ones(60, int))
    written = [
        save(loss_figure(METRICS), folder / "loss.png"),
        save(kept_figure(HEADS, CHANNELS), folder / "kept.png"),
        save(kept_figure(deep, deep), folder / "deep.png"),
    ]
    assert [path.name for path in written] == ["loss.png", "kept.png", "deep.png"]
    assert [png_size(path) for path in written] == [*[(1200, 675)] * 2, (1200, 1305)]


def test_a_pdf_with_its_fonts_lies_beside_the_png(tmp_path: Path) -> None:
    for name, figure in {"a.png": loss_figure(METRICS), "b": kept_figure(HEADS, CHANNELS)}.items():
        pdf = save(figure, tmp_path / name).with_suffix(".pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [save(loss_figure(METRICS), tmp_path / f"{name}.png") for name in "ab"]
    for ending in (".png", ".pdf"):
        first, second = (path.with_suffix(ending).read_bytes() for path in paths)
        assert first == second and b"CreationDate" not in first


def test_no_global_state_changes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save(loss_figure(METRICS), tmp_path / "loss.png")
    assert dict(matplotlib.rcParams) == before


def test_losses_lie_at_their_tokens() -> None:
    axes, rate_axes = loss_figure(METRICS).axes
    assert points(axes, 0) == [(100, 3.0), (400, 2.0)]
    # The evaluation after step 3 has no count of tokens: half-way between steps 2 and 4.
    assert points(axes, 1) == [(0, 3.5), (300, 2.5), (400, 2.25)]
    assert axes.get_xlim() == (0, 400)
    assert "token" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert rate_axes.get_ylim() == (0, 1)


def test_omission_rate_is_that_of_the_tokens_before() -> None:
    _, rate_axes = loss_figure(METRICS).axes
    (shading,) = rate_axes.collections
    inside = shading.get_paths()[0].contains_point
    assert inside((50, 0.39)) and inside((199, 0.39)) and not inside((50, 0.41))
    assert not inside((201, 0.01)) and not inside((399, 0.01))


def test_a_run_of_no_steps_still_draws(tmp_path: Path) -> None:
    assert save(loss_figure(METRICS[:1]), tmp_path / "loss.png").exists()


def test_maps_show_shares_layer_by_layer_on_one_whole_scale() -> None:
    heads, channels, *bars = kept_figure(HEADS, CHANNELS, head_unit="query head").axes
    assert_close(heads.images[0].get_array(), [[1, 0, 0.5], [1, 1, 1]], "float64", "forward")
    assert_close(channels.images[0].get_array(), CHANNELS.counts / 4, "float64", "forward")
    assert heads.get_title(loc="left") == "Heads"
    assert heads.get_xlabel() == "query head" and channels.get_xlabel() == "channel"
    assert heads.get_ylabel() == "layer" and len(bars) == 1
    assert heads.images[0].get_clim() == channels.images[0].get_clim() == (0, 1)


def test_layers_that_never_omit_keep_everything() -> None:
    heads = kept_figure(Kept(np.zeros((2, 3), int), np.zeros(2, int)), CHANNELS).axes[0]
    assert_close(heads.images[0].get_array(), np.ones((2, 3)), "float64", "exact")
