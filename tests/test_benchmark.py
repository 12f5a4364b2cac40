"""The scripts that time and compile training steps, and the programs that they are made of."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.presets import preset
from sat_jax.train.step_program import (
    count_bytes,
    full_state,
    make_case,
    optimizer_program,
    random_arguments,
    refresh_bytes,
)
from scripts import benchmark, efficiency
from scripts.efficiency import Case, add_rows, describe, make_program
from tests.conftest import RunPython

LION = OptimizerConfig("lion", momentum_dtype="bfloat16")
ARGS: Any = SimpleNamespace(
    model="tiny",
    rows=1,
    row_length=8,
    dtype="float32",
    remat="none",
    optimizer="lion",
    kernels=None,
    attention=None,
)
# The scripts have to run on a machine without these packages.
PIPELINE = ("array_record", "gguf", "grain", "matplotlib", "ml_collections", "safetensors")
PIPELINE += ("qwix", "tensorflow_datasets", "tokenizers", "torch", "transformers")
SMALL = ("--model", "tiny", "--rows", 1, "--row-length", 16, "--dtype", "float32")


def call(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, (*SMALL, *arguments))])
    script.main()


@pytest.mark.parametrize(
    ("script", "out", "arguments", "message"),
    [
        (benchmark, "--results", ("--rows", 0), "--rows 0; accepted: 1 or more"),
        (benchmark, "--results", ("--turns", -1), "--turns -1; accepted: 1 or more"),
        (benchmark, "--results", ("--row-length", 0), "--row-length 0; accepted: 1 or more"),
        (benchmark, "--results", ("--model", "smollm"), "no preset 'smollm'; near"),
        (efficiency, "--out", ("--repeat", 0), "--repeat 0; accepted: 1 or more"),
        (efficiency, "--out", ("--rate", 0.4, 1), "--rate 1; accepted: above 0 and below 1"),
        (efficiency, "--out", ("--minutes", 1e-9), "1e-09 minutes are over; the same command"),
    ],
)
def test_bad_input_is_refused_before_measuring(
    script: ModuleType,
    out: str,
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=message):
        call(monkeypatch, script, out, path, *arguments)
    assert not path.exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_peer_names_the_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(
        UserError, match=rf"peer and blocks need {missing}, .* pip install -e '\.\[bench\]'"
    ):
        call(monkeypatch, benchmark, "--only", "peer")


@pytest.mark.slow
def test_efficiency_measures_each_case_once(run_python: RunPython, tmp_path: Path) -> None:
    """On a CPU, and without the packages of the data pipeline."""
    out = tmp_path / "rows.jsonl"
    code = f"import sys; sys.modules.update(dict.fromkeys({PIPELINE}))\n"
    code += "import scripts.benchmark; from scripts.efficiency import main; main()"

    options = ("--out", out, "--repeat", 1, "--execution", "kernel", "--rate", 0.5)

    def measure() -> int:
        done = run_python("-c", code, *map(str, (*SMALL, *options)))
        assert not done.stderr
        return len(done.stdout.splitlines())

    assert measure() == 6
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["part"], row["execution"], row["rate"]) for row in rows] == [
        ("peak", "dense", 0),
        ("step", "dense", 0),
        ("step", "kernel", 0.5),
        ("step", "gather", 1),
        ("optimizer", "dense", 0),
        ("optimizer", "kernel", 0.5),
    ]
    assert all(row["seconds"] > 0 and row["target"] == "cpu" for row in rows)
    dense, kernel, empty = rows[1:4]
    assert dense["bound"] == 1 < kernel["bound"] < empty["bound"]
    assert kernel["state_bytes"] >= dense["state_bytes"]  # the full state, and the kept indices
    assert empty["resting_bytes"] > 0 == kernel["resting_bytes"]
    assert measure() == 0


def test_a_measurement_that_ends_the_process_leaves_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The row exists while a case is measured, and is removed when that ends or is interrupted."""
    out, case = tmp_path / "rows.jsonl", Case("step", "dense", 0.0)

    def measure(_: Case) -> dict[str, Any]:
        (row,) = map(json.loads, out.read_text().splitlines())
        assert row["error"] == "started, not finished" and row["part"] == "step"
        raise failure

    for failure in (KeyboardInterrupt(), UserError("over")):
        with pytest.raises(type(failure)):
            next(add_rows(out, ARGS, "cpu", [case], measure))
        assert not out.exists()
    failure = ValueError("no memory")
    (row,) = add_rows(out, ARGS, "cpu", [case], measure)
    assert row["error"] == "ValueError: no memory"
    assert not list(add_rows(out, ARGS, "cpu", [case], measure))
    monkeypatch.setenv("SAT_JAX_COMMIT", "b" * 40)
    (row,) = add_rows(out, ARGS, "cpu", [case], lambda _: {"seconds": 1.0})
    assert not list(add_rows(out, ARGS, "cpu", [case], measure))
    monkeypatch.setenv("SAT_JAX_COMMIT", "c" * 40)
    assert len(list(add_rows(out, ARGS, "cpu", [case], lambda _: {"seconds": 1.0}))) == 1


def test_the_omitted_state_is_counted() -> None:
    tiny: Any = preset("tiny")
    execution, program = make_program(tiny, Case("step", "gather", 0.5), ARGS)
    row = describe(execution, program, ARGS)
    heads = 2 * tiny.head_dim * (tiny.n_heads + tiny.n_kv_heads) * (1 - row["kept_heads"])
    omitted = tiny.n_layers * tiny.d_model * (3 * tiny.d_ff * (1 - row["kept_channels"]) + heads)
    assert row["resting_bytes"] == omitted * (4 + 2)  # Lion's momentum is bfloat16


@pytest.mark.parametrize("chunk", [1, 2**30])
def test_a_refresh_needs_the_state_and_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sat_jax.train.moves._CHUNK", chunk)

    def memory_of(function: Callable[..., Any], shapes: Any, _: Any) -> Any:
        results = jax.tree.leaves(jax.eval_shape(function, *shapes))
        return SimpleNamespace(
            output_size_in_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in results),
            alias_size_in_bytes=0,
            temp_size_in_bytes=1,
        )

    layout = layout_of(preset("tiny"))
    sizes = [leaf.size * 4 for leaf in layout.shapes.values()]
    largest = max(sizes) if chunk == 1 else sum(sizes)
    state = count_bytes(full_state(layout, LION))
    found = refresh_bytes(make_case(layout, "gather", 0.5), LION, memory_of)
    assert found == state + largest + 1


def test_the_optimizer_alone_updates_the_kept_rows_alone() -> None:
    execution = make_case(layout_of(preset("tiny")), "kernel", 0.5)
    program = optimizer_program(execution, OptimizerConfig())
    state, kept, grads = random_arguments(program, execution)
    after, _ = jax.jit(program.function)(state, kept, grads)
    (before_gate,), (after_gate,) = (s.params["layers/mlp/gate"] for s in (state, after))
    moved = np.any(np.asarray(after_gate != before_gate), axis=2)
    expected = np.zeros_like(moved)
    np.put_along_axis(expected, np.asarray(kept[0]["channel"]), True, axis=1)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.slow
def test_memory_refuses_an_absent_compiler(run_python: RunPython) -> None:
    done = run_python("-m", "scripts.memory", *map(str, SMALL), "--target", "v6")
    assert "--target v6; accepted: h200, v5e, v5p" in done.stderr
    # The tests run with a jax that has no compiler for absent GPUs.
    done = run_python("-m", "scripts.memory", *map(str, SMALL))
    assert "--target h200: its compiler cannot be loaded" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_rows_with_other_fields_are_printed_together() -> None:
    table = benchmark._table([{"a": 1}, {"a": 0.5, "b": "x"}])
    assert [line.split() for line in table.splitlines()[2:]] == [["1", "-"], ["0.500", "x"]]


@pytest.mark.slow
def test_the_parts_of_a_refresh_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    call(monkeypatch, benchmark, "--only", "moves", "--results", out, "--turns", 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["step", "probe", "select", "compact", "expand"]
    assert [row["move"] for row in rows] == names
    assert rows[0]["share_of_a_step"] == 1
    fields = {(row["benchmark"], row["model"], row["row_length"]) for row in rows}
    assert fields == {("moves", "tiny", 16)}
