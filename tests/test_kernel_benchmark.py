"""The benchmark of the kernels: every program runs, and a second call measures no row again."""

import datetime
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels import benchmark, tune
from kernels.block_sparse_matmul import backends, reference
from kernels.block_sparse_matmul.workloads import MODELS, Workload
from sat_jax.provenance import environment
from tests.conftest import RunPython
from tests.tolerances import assert_close

IMPLEMENTATIONS = ("dense", "xla", "pallas_tpu")


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    few = ["--model", "small", "--tokens", "64", "--density", "0.5", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *few, *more])
    benchmark.main()


@pytest.mark.slow
def test_each_program_has_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    call(monkeypatch, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cases = {(row["program"], row["implementation"]) for row in rows}
    assert cases == set(itertools.product(benchmark._PROGRAMS, IMPLEMENTATIONS))
    assert all(row["seconds"] > 0 for row in rows)
    dense, *sparse = [row for row in rows if row["program"] == "column"]
    assert dense["flops"] == 2 * 64 * 256 * 512
    assert {row["flops"] for row in sparse} == {dense["flops"] / 2}
    assert (dense["block"], {row["block"] for row in sparse}) == (None, {128})
    expected = environment()
    assert dense["commit"] == expected["commit"]
    assert dense["device"] | {"kind": expected["device"]["kind"]} == expected["device"]
    dense["versions"].pop("torch", None)  # of the comparison, where it is installed
    assert dense["versions"].items() <= expected["versions"].items()
    assert datetime.datetime.fromisoformat(dense["date"]).tzinfo == datetime.UTC
    assert "x dense (bound 2.00x)" in capsys.readouterr().out

    text = out.read_text()
    out.write_text(text + '{"torn')
    call(monkeypatch, out)
    assert out.read_text() == text
    monkeypatch.setenv("SAT_JAX_COMMIT", "b" * 40)  # another commit: its rows are measured
    call(monkeypatch, out, "--program", "column")
    assert out.read_text().removeprefix(text).count("b" * 40) == len(IMPLEMENTATIONS)
    with pytest.raises(SystemExit, match="minutes are over"):
        call(monkeypatch, out, "--tokens", "128", "--minutes", "1e-9")


def test_each_block_size_has_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a trace if it runs: the kernels for TPU do not support blocks of 64."""
    out, few = tmp_path / "rows.jsonl", ("--program", "column", "--block", "64", "128")
    call(monkeypatch, out, *few, "--profile", str(tmp_path / "traces"))
    dense, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["block"], row["implementation"], "seconds" in row) for row in rows] == [
        *((64, "xla", True), (64, "pallas_tpu", False), (128, "xla", True)),
        (128, "pallas_tpu", True),
    ]
    assert capsys.readouterr().out.count("x dense") == len(rows)
    traces = {path.name for path in (tmp_path / "traces").iterdir()}
    name = "small-column-64-0.5-{}-{}"
    blocks = [name.format(row["block"], row["implementation"]) for row in rows if "seconds" in row]
    assert traces == {"small-column-64-1.0-dense", *blocks}
    assert len(list((tmp_path / "traces").rglob("*.xplane.pb"))) == 4
    del dense["device"]["kind"]
    out.write_text(json.dumps(dense) + "\n")
    with pytest.raises(SystemExit):
        call(monkeypatch, out, *few)
    message = "rows.jsonl: KeyError: 'kind'; accepted: rows of this command, or a new file\n"
    assert capsys.readouterr().err.endswith(message)


STALLED = """
import functools, sys, time
from kernels import benchmark, measure, tune

measure.seconds = lambda *_: time.sleep(60)
measure.time_limit = functools.partial(measure.time_limit, 0.2)
module, *sys.argv = sys.argv[1:]
{"benchmark": benchmark, "tune": tune}[module].main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["benchmark", "tune"])
def test_a_stalled_measurement_is_not_repeated(
    module: str, run_python: RunPython, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = ["--model", "small", "--tokens", "64", "--density", "0.5", "--repeat", "1"]
    if module == "benchmark":
        few += ["--program", "column", "--out", str(tmp_path / "rows.jsonl")]
    else:
        few += ["--operation", "sampled", "--block", "128", "--interpret", "--out", str(tmp_path)]
    for unfinished in (1, 2):  # each call continues after the measurement that ended the last
        done = run_python("-c", STALLED, module, module, *few)
        assert done.returncode == 1 and "Timeout" in done.stderr
        (file,) = tmp_path.iterdir()
        assert file.read_text().count("started, not finished") == unfinished
    monkeypatch.setattr(sys, "argv", [module, *few])
    (benchmark if module == "benchmark" else tune).main()
    # All other tiles result in the unfinished program, since the product is small.
    assert file.read_text().count("started, not finished") == (2 if module == "benchmark" else 4)


def test_failures_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setitem(backends.PLATFORM_KERNELS, "cpu", "pallas_gpu")
    call(monkeypatch, out, "--program", "column")
    *_, row = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["implementation"] == "pallas_gpu" and "seconds" not in row
    assert "interpret mode" in row["error"]


@pytest.mark.slow
def test_torch_is_measured_where_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    few = ("--program", "row", "mask")
    call(monkeypatch, out, *few)
    assert "torch_bsr is not measured: jax runs on cpu" in capsys.readouterr().out

    def measured(workload: Workload, program: str, repeat: int) -> dict[str, float]:
        assert (workload.tokens, program, repeat) == (64, "mask", 1)
        if workload.density == 0.25:
            raise RuntimeError("out of memory")
        return {"seconds": workload.density}

    monkeypatch.setattr(benchmark, "_torch_error", lambda: None)
    monkeypatch.setattr(benchmark, "_measure_torch", measured)
    call(monkeypatch, out, *few, "--density", "0.5", "0.25")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    measured_row, failed = [row for row in rows if row["implementation"] == "torch_bsr"]
    assert (measured_row["program"], measured_row["seconds"]) == ("mask", 0.5)
    assert failed["error"] == "RuntimeError: out of memory"
    assert measured_row["flops"] == 2 * failed["flops"]


def test_torch_computes_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no sampled product on a CPU; a dense product replaces it."""
    torch = pytest.importorskip("torch")
    from torch.sparse import _triton_ops

    monkeypatch.setattr(_triton_ops, "sampled_addmm", lambda _, a, c, beta: (1 - beta) * (a @ c))
    workload = MODELS["small"]._replace(tokens=64)
    mask = workload.mask()
    torch.manual_seed(0)
    product = benchmark.torch_product(workload, "mask_gradients", "cpu", torch.float32)
    y, dx, dw = product()
    torch.manual_seed(0)
    assert benchmark.torch_product(workload, "mask", "cpu", torch.float32)().equal(y)
    torch.manual_seed(0)
    x, values = torch.randn(64, 256).numpy(), torch.randn(mask.nonzero, 128, 128).numpy()
    w = np.asarray(reference.scatter(values, mask))
    dy = np.sin(x @ w.T)
    for actual, expected in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert_close(actual.numpy(), expected, "float32", "backward")
