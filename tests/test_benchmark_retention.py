"""The benchmark of RetNet beside a transformer: models, programs, tables and figure."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.results.documents import draw, is_outdated
from sat_jax.results.retention import retention_figure, retention_tables
from scripts import benchmark, benchmark_retention
from scripts.benchmark_retention import DECODED, Measured, models_of
from scripts.benchmark_turns import Cost
from tests.test_benchmark import call
from tests.user_errors import user_error

SMALL = ("--only", "retention", "--width", 64, "--layers", 2, "--heads", 2, "--lengths", 32)


def options(*arguments: object) -> Any:
    return benchmark.parser().parse_args(list(map(str, arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", 0), "--width 0; accepted: 1 or more"),
        (
            ("--width", 200),
            "model.d_model 200 with values of 3456 / 2048 of it; accepted: multiple",
        ),
        (("--heads", 5), "model.n_heads 5 does not divide model.d_model 64"),
        (("--lengths", 64, 31), "--lengths 31; accepted: 32 or more"),
    ],
)
def test_bad_sizes_are_refused_before_measuring(
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out = tmp_path / "rows.jsonl"
    error = user_error(lambda: call(monkeypatch, benchmark, "--results", out, *SMALL, *arguments))
    assert error.startswith(message) and not out.exists()


@pytest.mark.parametrize("arguments", [(), ("--width", 2048, "--layers", 24, "--heads", 16)])
def test_both_models_have_the_same_number_of_parameters(arguments: tuple[object, ...]) -> None:
    models = models_of(options(*arguments))
    counts = []
    for model in models:
        layout = layout_of(model)
        trained = [layout.shapes[path].size for path, leaf in layout.leaves.items() if leaf.trained]
        counts.append(sum(trained))
        assert model.max_positions == 16_384
    assert abs(counts[0] / counts[1] - 1) < 0.001
    assert models.transformer.n_kv_heads == models.transformer.n_heads


def test_a_decoded_row_is_measured_with_its_state() -> None:
    """Two layers of width 64, two heads: values of 108 together, keys of 32."""
    args = options(*SMALL)
    models, batch, length = models_of(args), 3, 32
    for model, size in (
        # A float32 state of each head, the document and the number of tokens.
        (models.retnet, 2 * batch * (2 * 32 * 54 + 1 + 1) * 4),
        (models.transformer, 2 * batch * length * 2 * 64 * 4),
    ):
        measured = benchmark_retention._decoding(model, Compute(), batch, length)
        assert measured.state_bytes == size < measured.needed_bytes
        if model is models.retnet:
            assert measured.variant()().wall > 0


def test_programs_that_do_not_fit_have_the_reason_in_place_of_times() -> None:
    def measured(gibibytes: float, wall: float) -> Measured:
        size = int(gibibytes * 2**30)
        memory = SimpleNamespace(
            argument_size_in_bytes=size // 2, temp_size_in_bytes=size // 4,
            output_size_in_bytes=size, alias_size_in_bytes=size - size // 4,
        )  # fmt: skip
        return Measured(3, memory, lambda: lambda: Cost(wall, wall))

    programs = {"a": measured(1.0, 2.0), "b": measured(1.01, 5.0), "attention": measured(1, 8.0)}
    a, b, other = benchmark_retention._rows(programs, options("--memory-limit", 1, "--turns", 1))
    assert (a["wall_seconds"], a["speedup_wall"], a["temporary_bytes"]) == (2.0, 4.0, 2**28)
    assert b["not_run"] == "needs more than 1 GiB" and not {"wall_seconds", "speedup_wall"} & {*b}
    assert other["speedup_wall"] == 1


def row(work: str, variant: str, rows: int, length: int, **more: Any) -> dict[str, Any]:
    device = {"platform": "gpu", "kind": "a GPU", "count": 1}
    setting = {"model": "width 8, 2 layers, 2 heads", "dtype": "float32", "remat": "none"}
    fields = {"benchmark": "retention", "work": work, "variant": variant, "date": "d"}
    shape = {"rows": rows, "row_length": length, "temporary_bytes": 3 * 10**9, "state_bytes": 5000}
    return {**fields, **setting, **shape, "device": device, **more}


ROWS = [
    row("training", "chunkwise retention", 1, 512, wall_seconds=0.5, date="earlier"),
    row("training", "chunkwise retention", 2, 512, wall_seconds=0.25),
    row("training", "parallel retention", 2, 512, not_run="needs more than 8 GiB"),
    row("training", "attention", 2, 512, wall_seconds=0.5),
    row("decoding", "retention", 8, 1024, wall_seconds=0.16, decoded=DECODED),
    row("decoding", "attention", 8, 1024, wall_seconds=0.32, decoded=DECODED),
]


def test_tables_by_hand() -> None:
    training, decoding = retention_tables(ROWS)
    memory = ("3.00 GB",) * 3
    assert training.rows == (("512", "2", "4,096", "needs more than 8 GiB", "2,048", *memory),)
    assert training.caption.endswith("width 8, 2 layers, 2 heads; float32; remat none; a GPU")
    times = ("10.00 ms", "20.00 ms", "800", "400")
    assert decoding.rows == (("8", "1,024", *times, "5.00 kB", "5.00 kB"),)
    assert retention_tables(ROWS[:0]) == []


def test_the_figure_has_what_was_not_run_in_its_memory_alone(tmp_path: Path) -> None:
    figure = retention_figure(ROWS)
    assert figure is not None and retention_figure(ROWS[:4]) is None
    speed, memory, latency = figure.axes
    parallel = [axes.get_lines()[1].get_xydata() for axes in (speed, memory)]
    assert [len(points) for points in parallel] == [0, 1]
    assert [line.get_ydata()[0] for line in latency.get_lines()] == [10, 20]
    rows, picture = tmp_path / "benchmark.jsonl", tmp_path / "retention.png"
    other = json.dumps({"benchmark": "steps"}) + "\n"
    rows.write_text(other)
    assert not is_outdated(rows, picture)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert is_outdated(rows, picture)
    draw(rows, picture)
    rows.write_text(other + rows.read_text())
    assert not is_outdated(rows, picture)
    rows.write_text(json.dumps(ROWS[-1]) + "\n" + rows.read_text())
    assert is_outdated(rows, picture)


@pytest.mark.slow
def test_rows_of_training_and_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    call(monkeypatch, benchmark, *SMALL, "--step-tokens", 64, "--results", out, "--turns", 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    shapes = {(row["work"], row["rows"], row["row_length"], row["model"]) for row in rows}
    model = "width 64, 2 layers, 2 heads"
    assert shapes == {("training", 2, 32, model)} | {("decoding", b, 32, model) for b in (1, 8)}
    assert [len(table.rows) for table in retention_tables(rows)] == [1, 2]
