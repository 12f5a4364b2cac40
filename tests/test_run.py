"""Complete runs of a two-layer model: their files, and how an interrupted run continues."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sat_jax
from sat_jax.config import Config
from sat_jax.config_values import load
from sat_jax.data.batches import in_order, open_split
from sat_jax.errors import UserError
from sat_jax.nn.param import Mask
from sat_jax.train.checkpoint import find
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.programs import Programs
from sat_jax.train.run_state import RunState
from sat_jax.train.setup import set_up
from tests.conftest import ROOT, RunPython
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow  # a run takes seconds, most of them to compile

STEPS = 12
# Three rungs: half omitted for 6 steps, a quarter for 3, nothing for 3. Steps 4 and 5 share kept
# units, so that the checkpoint at 5 is between two refreshes.
BASE = {
    "data.row_length": 32,
    "train.steps": STEPS,
    "train.rows_per_step": 4,
    "train.eval_every": 0,
    "train.eval_rows": 16,
    "sparsity.refresh_every": 2,
    "sparsity.probe_tokens": 64,
    "checkpoint.every": 5,
}
BITWISE = (
    "loss",
    "eval_loss",
    "grad_norm",
    "tokens",
    "loss_tokens",
    "learning_rate",
    "kept_channels",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five documents of random words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioustrnl"), rng.integers(2, 7))) for _ in range(40)]
    for number in range(5):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 200)) + "\n")
    return folder


def overrides(text: Path, changes: dict[str, Any]) -> list[str]:
    values = BASE | {"data.sources": text} | changes
    return [f"{key}={value}" for key, value in values.items()]


def settings(text: Path, **changes: Any) -> Config:
    """The tiny experiment on `text`; `__` stands for the dot in a key."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load(str(ROOT / "experiments/tiny.py"), overrides(text, named))


@dataclasses.dataclass
class Finished:
    """A run that finished in this process."""

    path: Path
    config: Config
    summary: dict[str, Any]
    lines: list[str]
    seconds: float
    # (thread, event, steps begun, whether in a step) of every trace, lowering and compilation
    compiled: list[tuple[str, str, int, bool]]

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    config, path = settings(text), tmp_path_factory.mktemp("runs") / "unbroken"
    run = Finished(path, config, {}, [], 0.0, [])
    begun, inside, watching, step = 0, False, True, RunState.step

    def listen(event: str, duration: float, **_: Any) -> None:
        del duration
        if watching and event.startswith("/jax/core/compile/"):
            run.compiled.append((threading.current_thread().name, event, begun, inside))

    def counted(self: RunState, batch: Any) -> Any:
        nonlocal begun, inside
        begun, inside = begun + 1, True
        try:
            return step(self, batch)
        finally:
            inside = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "step", counted)
        jax.monitoring.register_event_duration_secs_listener(listen)
        started = time.perf_counter()
        run.summary = train(config, path, run.lines.append)
        run.seconds = time.perf_counter() - started
    watching = False
    yield run


def checkpoints(path: Path) -> list[int]:
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir())


# --- the files of a run ---


def test_the_ladder_goes_down_to_dense(unbroken: Finished) -> None:
    steps = [r for r in unbroken.records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["omission_rate"] for r in steps] == [0.5] * 6 + [0.25] * 3 + [0.0] * 3
    assert [r["kept_channels"] for r in steps] == [0.5] * 6 + [0.75] * 3 + [1.0] * 3
    assert [r["kept_heads"] for r in steps] == [0.5] * 6 + [1.0] * 6
    assert steps[-1]["loss"] < steps[0]["loss"] - 1


def test_records_and_summary_hold_what_others_rely_on(unbroken: Finished) -> None:
    first, last = unbroken.records[0], unbroken.records[-1]
    assert (first["step"], first["tokens"]) == (0, 0)
    promised = "step loss eval_loss tokens learning_rate omission_rate kept_heads kept_channels"
    promised += " loss_tokens tokens_per_second flops_per_second grad_norm"
    assert set(promised.split()) <= last.keys()

    summary = json.loads((unbroken.path / "summary.json").read_text())
    assert summary == unbroken.summary
    promised = "loss eval_loss dense_flops spent_flops seconds peak_memory energy_joules versions"
    assert set((promised + " device commit").split()) <= summary.keys()
    assert summary["loss"] == last["loss"]
    assert summary["eval_loss"] == last["eval_loss"]
    assert summary["tokens"] == last["tokens"] == sum(r["tokens"] for r in summary["rungs"])
    assert summary["loss_tokens"] == last["loss_tokens"] == last["tokens"]  # of text
    assert summary["perplexity_before"] == math.exp(first["eval_loss"])
    assert 0.5 * summary["dense_flops"] < summary["spent_flops"] < summary["dense_flops"]
    assert json.loads((unbroken.path / "config.json").read_text())["train"]["steps"] == STEPS


def test_wall_time_is_split_without_a_remainder(unbroken: Finished) -> None:
    seconds = dict(unbroken.summary["seconds"])
    total = seconds.pop("total")
    assert set(seconds) >= {"compile", "data", "step", "checkpoint", "other"}
    assert all(value >= 0 for value in seconds.values())
    assert math.isclose(sum(seconds.values()), total)
    assert seconds["compile"] > 0
    assert 0.5 * unbroken.seconds < total <= unbroken.seconds


def test_kept_neurons_are_counted(unbroken: Finished) -> None:
    """Selections before steps 0, 2, 4 of one group of two and 64 channels, 6 and 8 of 96 channels
    and no heads."""
    assert unbroken.summary["selections"] == unbroken.summary["probes"] == 5
    names = [f"kept_counts/{b}/{name}" for b in ("attention", "mlp") for name in ("times", "of")]
    counts = find(unbroken.path / "checkpoints").read(names)
    heads, of_heads, channels, of_channels = (counts[name] for name in names)
    assert (of_heads.tolist(), of_channels.tolist()) == ([3, 3], [5, 5])
    assert channels.sum(axis=1).tolist() == [3 * 64 + 2 * 96] * 2
    assert channels.max() <= 5 and heads.max() <= 3
    assert heads.sum(axis=(1, 2)).tolist() == [3 * 2] * 2  # a group has two query heads


def test_pictures_are_drawn(unbroken: Finished) -> None:
    figures = [Path(figure) for figure in unbroken.summary["figures"]]
    assert {figure.name for figure in figures} == {"loss.png", "kept.png"}
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.with_suffix(".pdf").exists()


def test_the_exported_model_has_the_loss_of_the_run(unbroken: Finished) -> None:
    assert unbroken.summary["export"] == str(unbroken.path / "huggingface")
    model = sat_jax.load_model(unbroken.path / "huggingface")
    held_out = open_split(set_up(unbroken.config, unbroken.lines.append).data, "held_out")
    (rows,) = in_order(held_out, 16, 16)
    logits = np.asarray(
        model(*(jnp.asarray(x) for x in (rows.tokens, rows.segment_ids, rows.positions))),
        np.float64,
    )
    chosen = np.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
    assert rows.loss_mask.sum() > 16 * 16
    assert_close(losses[rows.loss_mask].mean(), unbroken.summary["eval_loss"], "float32", "forward")


def test_a_work_directory_gives_back_the_masks_of_a_checkpoint(unbroken: Finished) -> None:
    """Those of the first checkpoint, and none at the dense end."""

    def masks(step: int | None) -> dict[str, Any]:
        state = nnx.state(sat_jax.load_model(unbroken.path, step=step), Mask)
        paths = nnx.to_flat_state(state)
        return {path[-1]: mask.get_value() for path, mask in paths}

    sparse = checkpoints(unbroken.path)[0]
    kept = {name: mask for name, mask in masks(sparse).items() if mask is not None}
    stored = find(unbroken.path / "checkpoints", sparse)
    assert kept.keys() == {name.split("/")[-1] for name in stored.leaves if "kept/" in name}
    for name, mask in kept.items():
        (indices,) = stored.read([f"kept/0/{name}"]).values()
        np.testing.assert_array_equal(np.nonzero(mask)[1].reshape(indices.shape), indices)
    assert set(masks(None).values()) == {None}


def test_no_step_traces_or_compiles_on_the_main_thread(unbroken: Finished) -> None:
    """From the beginning of the first step to the end of the last, over two changes of rung."""
    main = threading.main_thread().name
    window = [
        (thread, event)
        for thread, event, begun, inside in unbroken.compiled
        if 1 <= begun < STEPS or (begun == STEPS and inside)
    ]
    assert [event for thread, event in window if thread == main] == []
    compiled = [e for thread, e in window if thread.startswith("compile")]
    assert any("backend_compile" in event for event in compiled)  # while steps went on
    assert any(thread == main for thread, *_ in unbroken.compiled)  # main is heard, too


def test_a_compilation_that_fails_is_raised_where_it_is_needed(
    unbroken: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = set_up(unbroken.config, unbroken.lines.append)
    programs = Programs(unbroken.config, task.model, task.mesh, task.controller)

    def fail(programs: Programs, plan: Any) -> None:
        del programs
        raise RuntimeError(f"no program for {plan.segments[0].kept('channel')} channels")

    monkeypatch.setattr(Programs, "_compile_rung", fail)
    plan = task.controller.rungs[0].plan
    programs.prepare(plan)
    with pytest.raises(RuntimeError, match="no program for 64 channels"):
        programs.rung(plan)
    programs.close()


# --- an interrupted run ---

DIES = """
import os, runpy, signal
from sat_jax.train.checkpoint import Checkpoints

finish = Checkpoints._finish

def finish_and_die(self, step):
    finish(self, step)
    os.kill(os.getpid(), signal.SIGKILL)

Checkpoints._finish = finish_and_die
runpy.run_module("scripts.train", run_name="__main__", alter_sys=True)
"""


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_a_killed_run_is_continued_by_the_same_command_bit_by_bit(
    text: Path, unbroken: Finished, tmp_path: Path, run_python: RunPython
) -> None:
    path = tmp_path / "killed"
    arguments = ["--config=experiments/tiny.py", f"--workdir={path}"]
    arguments += [f"--config.{override}" for override in overrides(text, {})]
    # Killed as soon as the first checkpoint is complete, at whatever step.
    killed = subprocess.run(
        [sys.executable, "-c", DIES, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    assert checkpoints(path)[0] == 5
    assert not (path / "summary.json").exists()

    continued = run_python("-m", "scripts.train", *arguments)
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 5" in continued.stderr
    assert "Held-out perplexity" in continued.stdout
    records = read_metrics(path / "metrics.jsonl")
    assert len(records) == STEPS + 1
    for record, expected in zip(records, unbroken.records, strict=True):
        for name in ("step", *BITWISE):
            assert record.get(name) == expected.get(name), (record["step"], name)
    summary = json.loads((path / "summary.json").read_text())
    for name in ("loss", "eval_loss", "tokens", "loss_tokens", "probes", "spent_flops", "data"):
        assert summary[name] == unbroken.summary[name], name
    finished = [find(run / "checkpoints") for run in (path, unbroken.path)]
    names = [name for name in finished[0].leaves if not name.startswith("meta")]
    arrays = [stored.read(names) for stored in finished]
    for name in names:
        np.testing.assert_array_equal(arrays[0][name], arrays[1][name], err_msg=name, strict=True)

    before, lines = everything(path), list[str]()
    assert train(settings(text), path, lines.append) == summary
    assert lines == [f"the run in {path} is finished; nothing to do"]
    after = everything(path)
    del before[str(path / "lock")], after[str(path / "lock")]
    assert after == before


@pytest.fixture(scope="module")
def other(text: Path, unbroken: Finished) -> Finished:
    """The same run with another value of every setting that only the loop reads."""
    config = settings(
        text,
        train__log_every=5,
        train__eval_every=4,
        train__eval_rows=3,
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__keep_every=4,
        export__huggingface=False,
    )
    path = unbroken.path.with_name("other")
    lines: list[str] = []
    return Finished(path, config, train(config, path, lines.append), lines, 0.0, [])


def test_log_every_says_which_steps_are_logged(unbroken: Finished, other: Finished) -> None:
    """The last step is always logged; logged values do not depend on `log_every`."""
    logged = {r["step"]: r for r in other.records if "loss" in r}
    assert list(logged) == [5, 10, 12]
    for record in unbroken.records:
        if record["step"] in logged:
            found = logged[record["step"]]
            assert [found[name] for name in ("loss", "grad_norm", "tokens")] == [
                record[name] for name in ("loss", "grad_norm", "tokens")
            ]


def test_eval_every_says_when_held_out_rows_are_evaluated(
    unbroken: Finished, other: Finished
) -> None:
    assert [r["step"] for r in other.records if "eval_loss" in r] == [0, 4, 8, 12]
    assert [r["step"] for r in unbroken.records if "eval_loss" in r] == [0, 12]


def test_eval_rows_says_how_many(unbroken: Finished, other: Finished) -> None:
    assert other.records[0]["eval_loss"] != unbroken.records[0]["eval_loss"]
    assert abs(other.records[0]["eval_loss"] - unbroken.records[0]["eval_loss"]) < 0.1


def test_checkpoint_keys_say_which_are_made_and_kept(unbroken: Finished, other: Finished) -> None:
    assert checkpoints(other.path) == [4, 8, 12]  # of 2, 4, ...: the last, and multiples of 4
    assert checkpoints(unbroken.path) == [10, 12]  # of 5, 10, 12: the last two


def test_huggingface_is_written_when_asked(unbroken: Finished, other: Finished) -> None:
    assert (unbroken.path / "huggingface/model.safetensors").is_file()
    assert other.summary["export"] is None
    assert not (other.path / "huggingface").exists()


def test_a_run_cut_short_at_its_end_ends(text: Path, other: Finished, tmp_path: Path) -> None:
    """Even if it had begun to write the model; settings of the export may change, texts move."""
    path = tmp_path / "again"
    shutil.copytree(text, tmp_path / "moved")
    shutil.copytree(other.path, path)
    (path / "summary.json").unlink()
    (path / "huggingface").mkdir()
    (path / "huggingface/config.json").write_text("{")
    export = dataclasses.replace(other.config.export, huggingface=True)
    data = dataclasses.replace(other.config.data, sources=(str(tmp_path / "moved"),))
    config = dataclasses.replace(other.config, export=export, data=data)
    lines: list[str] = []
    summary = train(config, path, lines.append)
    assert "continuing after step 12" in lines
    assert sat_jax.load_model(path / "huggingface").config.n_layers == 2
    assert json.loads((path / "config.json").read_text())["data"]["sources"] == [*data.sources]
    for name in ("loss", "eval_loss", "tokens", "selections", "spent_flops", "data"):
        assert summary[name] == other.summary[name], name
    assert read_metrics(path / "metrics.jsonl") == other.records
    assert summary["seconds"]["total"] > other.summary["seconds"]["step"]
    with pytest.raises(UserError, match=r"data\.sources was .*moved"):  # a finished run
        train(other.config, path, lines.append)


def test_other_settings_are_refused_by_name(text: Path, unbroken: Finished) -> None:
    changed = settings(text, optimizer__learning_rate=0.5, sparsity__rate=0.25, train__log_every=3)
    with pytest.raises(UserError) as caught:
        train(changed, unbroken.path, unbroken.lines.append)
    assert "optimizer.learning_rate was 0.003 and is 0.5; sparsity.rate was 0.5 and is 0.25" in str(
        caught.value
    )
    assert "log_every" not in str(caught.value)


def test_other_texts_are_refused(text: Path, other: Finished, tmp_path: Path) -> None:
    path, changed = tmp_path / "again", tmp_path / "changed"
    shutil.copytree(other.path, path)
    (path / "summary.json").unlink()
    shutil.copytree(text, changed)
    (changed / "1.txt").write_text("other")
    data = dataclasses.replace(other.config.data, sources=(str(changed),))
    with pytest.raises(UserError, match=rf"{path}: the content of data\.sources is not"):
        train(dataclasses.replace(other.config, data=data), path, other.lines.append)
