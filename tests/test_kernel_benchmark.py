"""The measurement of kernels: every program runs, and a second call measures nothing again."""

import json
import sys
from pathlib import Path

import pytest

from kernels import benchmark
from kernels.block_sparse_matmul.arg_specs import dense

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
    assert "x dense (bound 2.00x)" in capsys.readouterr().out

    text = out.read_text()
    out.write_text(text + '{"torn')
    call(monkeypatch, out)
    assert out.read_text() == text
    with pytest.raises(SystemExit, match="minutes are over"):
        call(monkeypatch, out, "--tokens", "128", "--minutes", "1e-9")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setitem(benchmark._KERNELS, "cpu", "pallas_gpu")
    call(monkeypatch, out, "--program", "column")
    *_, row = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["implementation"] == "pallas_gpu" and "seconds" not in row
    assert "interpret mode" in row["error"]
