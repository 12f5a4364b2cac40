"""Steps of large models: rows that are added once, and programs that do what their names say."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from sat_jax.config import OptimizerConfig
from sat_jax.errors import UserError
from sat_jax.models.presets import preset
from sat_jax.sparsity.plan import make_plan
from scripts.efficiency import main
from scripts.large_steps import Case, add_rows, bytes_of, described, refresh_bytes
from scripts.step_program import filled, neurons_of, optimizer_program, whole_state
from tests.conftest import RunPython

TINY = preset("tiny")


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    given = ("--model", "tiny", "--rows", 1, "--row-length", 16, "--dtype", "float32", *arguments)
    monkeypatch.setattr(sys, "argv", ["efficiency", *map(str, given)])
    main()


def only(monkeypatch: pytest.MonkeyPatch, execution: str) -> None:
    """Each part has one case: what compiling takes is what these tests take."""

    def cases(part: str, _: object) -> list[Case]:
        return [Case(part, execution, 0.5)]

    monkeypatch.setattr("scripts.large_steps.sparse_cases", cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 0), "--rows 0; accepted: 1 or more"),
        (("--repeat", 0), "--repeat 0; accepted: 1 or more"),
        (("--rate", 0.4, 1), "--rate 1; accepted: above 0 and below 1"),
        (("--model", "llama"), "no preset 'llama'"),
        (("--minutes", 1e-9), "1e-09 minutes are over; the same command goes on"),
    ],
)
def test_bad_input_is_refused(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=message):
        measure(monkeypatch, "--out", out, *arguments)
    assert not out.exists()


def test_what_is_there_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    few = ("--out", out, "--repeat", 1, "--execution", "kernel")
    measure(monkeypatch, *few, "--rate", 0.5)
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
    dense, kernel, nothing = rows[1:4]
    assert dense["bound"] == 1 < kernel["bound"] < nothing["bound"]
    assert kernel["state_bytes"] >= dense["state_bytes"]  # whole, and the masks
    assert nothing["resting_bytes"] > 0 == kernel["resting_bytes"]
    capsys.readouterr()
    measure(monkeypatch, *few, "--rate", 0.5, 0.25)
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "step  kernel  r = 0.25",
        "optimizer  kernel  r = 0.25",
    ]


def test_what_ends_the_process_leaves_a_row(tmp_path: Path) -> None:
    """It stands there while a row is measured, and goes where that ends or is interrupted."""
    out, case = tmp_path / "rows.jsonl", Case("step", "dense", 0.0)
    given: Any = SimpleNamespace(model="tiny", **vars(GIVEN))

    def row_of(_: Case) -> dict[str, Any]:
        (row,) = map(json.loads, out.read_text().splitlines())
        assert row["error"] == "begun, and has not ended" and row["part"] == "step"
        raise stop

    for stop in (KeyboardInterrupt(), UserError("over")):
        with pytest.raises(type(stop)):
            next(add_rows(out, given, "cpu", [case], row_of))
        assert not out.exists()
    stop = ValueError("no room")
    (row,) = add_rows(out, given, "cpu", [case], row_of)
    assert row["error"] == "ValueError: no room"
    assert not list(add_rows(out, given, "cpu", [case], row_of))


GIVEN: Any = SimpleNamespace(
    rows=1, row_length=8, dtype="float32", remat="none", optimizer="lion", kernels=None
)


def test_a_profile_has_a_trace_of_each_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only(monkeypatch, "gather")
    few = ("--repeat", 1, "--out", tmp_path / "rows.jsonl")
    measure(monkeypatch, *few)
    measure(monkeypatch, *few, "--profile", tmp_path / "traces")  # rows that are there as well
    traces = {
        path.parents[3].name for path in tmp_path.glob("traces/*/plugins/profile/*/*.xplane.pb")
    }
    assert traces == {"step-gather-0.5", "step-gather-1", "optimizer-gather-0.5"}


def test_what_rests_is_what_is_omitted() -> None:
    row, _ = described(TINY, Case("step", "gather", 0.5), GIVEN, None)
    heads = 2 * TINY.head_dim * (TINY.n_heads + TINY.n_kv_heads) * (1 - row["kept_heads"])
    omitted = TINY.n_layers * TINY.d_model * (3 * TINY.d_ff * (1 - row["kept_channels"]) + heads)
    assert row["resting_bytes"] == omitted * (4 + 2)  # Lion's momentum is bfloat16


@pytest.mark.parametrize("largest", [1, 2**30])
def test_a_refresh_needs_the_state_and_a_parcel(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_jax.train.moves._PARCEL", largest)

    def analysed(function: Callable[..., Any], shapes: Any, _: Any) -> Any:
        made = jax.tree.leaves(jax.eval_shape(function, *shapes))
        return SimpleNamespace(
            output_size_in_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in made),
            alias_size_in_bytes=0,
            temp_size_in_bytes=1,
        )

    state = whole_state(TINY, OptimizerConfig("lion", momentum_dtype="bfloat16"))
    leaves = [leaf.size * 4 for leaf in state.params.values()]
    parcel = max(leaves) if largest == 1 else sum(leaves)
    found = refresh_bytes(TINY, Case("step", "gather", 0.5), GIVEN, analysed)
    assert found == bytes_of(state) + parcel + 1


def test_the_optimizer_alone_moves_the_kept_rows_alone() -> None:
    plan = make_plan(neurons_of(TINY), 0.5, 0.5, block=64)
    program = optimizer_program(TINY, plan, "kernel", OptimizerConfig())
    state, masks, grads = filled(program, TINY, plan)
    after, _ = jax.jit(program.function)(state, masks, grads)
    path = "layers/0/mlp/gate"
    moved = np.any(np.asarray(after.params[path] != state.params[path]), axis=2)
    assert masks[0].channels is not None
    kept = np.zeros_like(moved)
    np.put_along_axis(kept, np.asarray(masks[0].channels), True, axis=1)
    np.testing.assert_array_equal(moved, kept)


def test_what_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hopper's kernels on a CPU; nor is it tried again."""
    only(monkeypatch, "kernel")
    few = ("--out", tmp_path / "rows.jsonl", "--repeat", 1)
    measure(monkeypatch, *few, "--kernels", "pallas_gpu")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "peak  dense  r = 0",
        "step  kernel  r = 0.5",
        "step  gather  r = 1",
        "optimizer  kernel  r = 0.5",
    ]
    assert "ValueError: implementation pallas_gpu" in said[1]
    measure(monkeypatch, *few, "--kernels", "pallas_gpu")
    assert not capsys.readouterr().out


def test_an_unknown_target_is_refused(run_python: RunPython) -> None:
    done = run_python("-m", "scripts.memory", "--model", "tiny", "--target", "v6")
    assert "--target v6; accepted: h200, v5e, v5p" in done.stderr
    # Where these tests run there is a plain jax.
    done = run_python("-m", "scripts.memory", "--model", "tiny", "--row-length", "8")
    assert "--target h200: its compiler cannot be loaded" in done.stderr
    assert len(done.stderr.splitlines()) == 1
