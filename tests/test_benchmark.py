"""scripts/benchmark.py: bad input is refused before anything is measured, rows are appended."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sat_jax.errors import UserError
from scripts.benchmark import main
from tests.conftest import RunPython


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 0), "--rows 0; accepted: 1 or more"),
        (("--turns", -1), "--turns -1; accepted: 1 or more"),
        (("--row-length", 0), "--row-length 0; accepted: 1 or more"),
        (("--row-length", 513), "--row-length 513; accepted: up to 512, the positions of tiny"),
        (("--model", "smollm"), "no preset 'smollm'; did you mean"),
    ],
)
def test_bad_input_is_refused(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=message):
        call(monkeypatch, "--model", "tiny", "--results", results, *arguments)
    assert not results.exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_the_peer_says_what_it_needs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> Any:
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(UserError, match=rf"peer needs {missing}, .* pip install -e '\.\[bench\]'"):
        call(monkeypatch, "--only", "peer")


def test_steps_need_nothing_of_the_data_pipeline(run_python: RunPython) -> None:
    code = "import scripts.benchmark, scripts.efficiency, scripts.large_steps"
    code += ", sys; print(sorted(sys.modules))"
    loaded = set(run_python("-c", code).stdout.replace("'", "").strip("[]\n").split(", "))
    assert "scripts.benchmark_steps" in loaded
    heavy = {"array_record", "grain", "matplotlib", "orbax", "safetensors", "tokenizers", "torch"}
    heavy |= {"ml_collections", "tensorflow_datasets"}
    assert not loaded & heavy


@pytest.mark.slow
def test_rows_are_appended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    few = ("--model", "tiny", "--rows", 1, "--row-length", 32, "--turns", 1)
    call(monkeypatch, "--only", "moves", "--results", results, *few)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["move"] for row in rows] == [
        "step",
        "probe",
        "select",
        "compact",
        "expand",
    ]
    assert rows[0]["share_of_a_step"] == 1
    assert {(row["benchmark"], row["model"], row["row_length"]) for row in rows} == {
        ("moves", "tiny", 32)
    }
