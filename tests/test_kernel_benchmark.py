"""The measurement of kernels: every program runs, and a second call measures nothing again."""

import datetime
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels import benchmark, benchmark_torch, tune
from kernels.block_sparse_matmul import reference
from kernels.block_sparse_matmul.arg_specs import Spec, dense
from sat_jax.provenance import environment
from tests.conftest import RunPython
from tests.tolerances import assert_close

TAKEN = ("dense", "xla", "pallas_tpu")


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    few = ["--model", "small", "--tokens", "64", "--density", "0.5", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *few, *more])
    benchmark.main()


def test_each_program_has_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    call(monkeypatch, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["program"], row["implementation"]) for row in rows}
    assert found == {(p, i) for p in dense(benchmark.MODELS["small"]) for i in TAKEN}
    assert all(row["seconds"] > 0 for row in rows)
    whole, *sparse = [row for row in rows if row["program"] == "column"]
    assert whole["flops"] == 2 * 64 * 256 * 512
    assert {row["flops"] for row in sparse} == {whole["flops"] / 2}
    assert (whole["block"], {row["block"] for row in sparse}) == (None, {128})
    theirs = environment()
    assert whole["commit"] == theirs["commit"]
    assert whole["device"] | {"kind": theirs["device"]["kind"]} == theirs["device"]
    assert whole["versions"].items() <= theirs["versions"].items()
    assert datetime.datetime.fromisoformat(whole["date"]).tzinfo == datetime.UTC
    assert "x dense (bound 2.00x)" in capsys.readouterr().out

    text = out.read_text()
    out.write_text(text + '{"torn')
    call(monkeypatch, out)
    assert out.read_text() == text
    with pytest.raises(SystemExit, match="minutes are over"):
        call(monkeypatch, out, "--tokens", "128", "--minutes", "1e-9")


def test_blocks_are_measured_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a trace of each, where it ran: the kernels for TPU have no blocks of 64."""
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


HANGS = """
import functools, sys, time
from kernels import benchmark, measure, tune

measure.seconds = lambda *_: time.sleep(60)
measure.watched = functools.partial(measure.watched, 0.2)
module, *sys.argv = sys.argv[1:]
{"benchmark": benchmark, "tune": tune}[module].main()
"""


@pytest.mark.parametrize("module", ["benchmark", "tune"])
def test_what_never_ends_is_left_behind(
    module: str, run_python: RunPython, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = ["--model", "small", "--tokens", "64", "--density", "0.5", "--repeat", "1"]
    if module == "benchmark":
        few += ["--program", "column", "--out", str(tmp_path / "rows.jsonl")]
    else:
        few += ["--operation", "sampled", "--block", "128", "--interpret", "--out", str(tmp_path)]
    for left in (1, 2):  # each call goes on behind what ended the one before
        done = run_python("-c", HANGS, module, module, *few)
        assert done.returncode == 1 and "Timeout" in done.stderr
        (file,) = tmp_path.iterdir()
        assert file.read_text().count("begun, and has not ended") == left
    monkeypatch.setattr(sys, "argv", [module, *few])
    (benchmark if module == "benchmark" else tune).main()
    # All other tiles of so small a product come to the program that has not ended.
    assert file.read_text().count("begun, and has not ended") == (2 if module == "benchmark" else 4)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setitem(benchmark._KERNELS, "cpu", "pallas_gpu")
    call(monkeypatch, out, "--program", "column")
    *_, row = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["implementation"] == "pallas_gpu" and "seconds" not in row
    assert "interpret mode" in row["error"]


def test_torch_stands_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    few = ("--program", "row", "mask")
    call(monkeypatch, out, *few)
    said = "torch_bsr and torch_dense are left out: jax runs on cpu"
    assert said in capsys.readouterr().out

    def measured(spec: Spec, program: str, implementation: str, repeat: int) -> dict[str, float]:
        assert (spec.tokens, program, repeat) == (64, "mask", 1)
        if implementation == "torch_dense":
            raise RuntimeError("out of memory")
        return {"seconds": spec.density}

    monkeypatch.setattr(benchmark_torch, "absence", lambda: None)
    monkeypatch.setattr(benchmark_torch, "measure", measured)
    call(monkeypatch, out, *few)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole, sparse = [row for row in rows if row["implementation"].startswith("torch")]
    assert (whole["implementation"], whole["density"]) == ("torch_dense", 1.0)
    assert whole["error"] == "RuntimeError: out of memory" and whole["flops"] == 2 * sparse["flops"]
    assert (sparse["program"], sparse["density"], sparse["seconds"]) == ("mask", 0.5, 0.5)


def test_torch_multiplies_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it has no product sampled at blocks, which is whole here."""
    torch = pytest.importorskip("torch")
    from torch.sparse import _triton_ops

    monkeypatch.setattr(_triton_ops, "sampled_addmm", lambda _, a, c, beta: (1 - beta) * (a @ c))
    spec = Spec("small", 256, 512, tokens=64)
    mask = spec.mask()
    torch.manual_seed(0)
    y, dx, dw = benchmark_torch.bsr(spec, "mask, both ways", "cpu", torch.float32)()
    torch.manual_seed(0)
    assert benchmark_torch.bsr(spec, "mask", "cpu", torch.float32)().equal(y)
    torch.manual_seed(0)
    x, values = torch.randn(64, 256).numpy(), torch.randn(mask.nonzero, 128, 128).numpy()
    w = np.asarray(reference.scatter(values, mask))
    dy = np.sin(x @ w.T)
    for found, expected in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert_close(found.numpy(), expected, "float32", "backward")
    *_, dw = benchmark_torch.dense(spec, "mask, both ways", "cpu", torch.float32)()
    assert dw.shape == (512, 256)
