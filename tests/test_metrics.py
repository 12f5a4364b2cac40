"""Metrics round-trip, survive a kill, never wait for the device; timer, progress, summary."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sat_jax import provenance
from sat_jax.errors import UserError
from sat_jax.provenance import environment
from sat_jax.train import progress as progress_module
from sat_jax.train import summary as summary_module
from sat_jax.train.metrics import MetricsLog, read_metrics, to_json
from sat_jax.train.progress import Progress, describe
from sat_jax.train.summary import PhaseTimer, peak_memory, write_summary
from sat_jax.train.workdir import WorkDir
from tests.conftest import ROOT, RunPython


def logged(workdir: WorkDir, start: int, *steps: int) -> None:
    with MetricsLog(workdir, start) as log:
        for step in steps:
            log.log(step, {"loss": jnp.float32(step) / 3})


def steps_of(workdir: WorkDir) -> list[int]:
    return [record["step"] for record in read_metrics(workdir.metrics)]


def test_values_come_back_exactly(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    third = jnp.float32(1) / 3
    values = {
        "loss": third,
        "narrow": jnp.bfloat16(1.2578125),
        "double": 0.1 + 0.2,
        "tokens": np.int64(2**53 + 1),
        "flag": jnp.array(True),
        "kept_channels": jnp.array([3, 5]),
        "note": "é",
        "eval_loss": None,
    }
    with MetricsLog(workdir, 0) as log:
        log.log(1, values)
    (record,) = read_metrics(workdir.metrics)
    assert np.float32(record["loss"]) == np.asarray(third)
    expected = {
        "step": 1,
        "loss": float(third),
        "narrow": 1.2578125,
        "double": 0.1 + 0.2,
        "tokens": 2**53 + 1,
        "flag": True,
        "kept_channels": [3, 5],
        "note": "é",
        "eval_loss": None,
    }
    assert record == expected and record["flag"] is True


def test_no_nan_tokens_and_nothing_lost(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    with MetricsLog(workdir, 0) as log:
        log.log(1, {"loss": jnp.nan, "norms": jnp.array([[1.0, jnp.inf], [-jnp.inf, 2.0]])})
        log.log(2, {"loss": 1.0})

    def refuse(token: str) -> None:
        raise AssertionError(token)

    lines = workdir.metrics.read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first["loss"] is None and first["norms"] == [[1.0, None], [None, 2.0]]
    assert first["nonfinite"] == {"loss": "nan", "norms[0][1]": "inf", "norms[1][0]": "-inf"}
    assert second == {"step": 2, "loss": 1.0}
    record = read_metrics(workdir.metrics)[0]
    assert np.isnan(record["loss"]) and "nonfinite" not in record
    assert record["norms"] == [[1.0, np.inf], [-np.inf, 2.0]]
    assert to_json({"a": (1.0,)}) == {"a": [1.0]}


def test_a_record_is_written_when_the_next_comes(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    with MetricsLog(workdir, 0) as log:
        log.log(0, {"eval_loss": 9.0})  # before the first step
        log.log(1, {"loss": 3.0})
        assert steps_of(workdir) == [0]
        log.log(1, {"eval_loss": 4.0})
        log.log(3, {"loss": 2.0})
        assert read_metrics(workdir.metrics)[1:] == [{"step": 1, "loss": 3.0, "eval_loss": 4.0}]
        log.flush()
        assert steps_of(workdir) == [0, 1, 3]
        for step, values in ((3, {"x": 1}), (2, {"x": 1})):
            with pytest.raises(ValueError, match=f"step {step} is logged after step 3"):
                log.log(step, values)
        log.log(4, {})
        with pytest.raises(ValueError, match="step 4 already has step"):
            log.log(4, {"step": 4})
        log.log(4, {"x": 1})
        with pytest.raises(ValueError, match="step 4 already has x"):
            log.log(4, {"x": 1})
    assert steps_of(workdir) == [0, 1, 3, 4]


def test_logging_does_not_wait_for_the_device(tmp_path: Path) -> None:
    @jax.jit
    def slow(x: jax.Array, count: int) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ y, x).sum()

    x = jnp.eye(256)
    slow(x, 1).block_until_ready()  # compiles
    workdir = WorkDir(tmp_path)
    with MetricsLog(workdir, 0) as log:
        loss = slow(x, 500)
        log.log(1, {"loss": loss})
        assert not loss.is_ready() and steps_of(workdir) == []
    assert read_metrics(workdir.metrics) == [{"step": 1, "loss": 256.0}]


def test_resume_drops_later_records_and_a_torn_last_line(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    logged(workdir, 0, 1, 2, 3, 4)
    whole = workdir.metrics.read_bytes()
    for torn in (b'{"step": 5, "lo', b'{"step": 5', b"\0\0\0", b"5\n", b"{}\n"):
        workdir.metrics.write_bytes(whole + torn)
        assert steps_of(workdir) == [1, 2, 3, 4]
        logged(workdir, 4)
        assert workdir.metrics.read_bytes() == whole
    logged(workdir, 2, 3, 4)
    assert workdir.metrics.read_bytes() == whole
    logged(workdir, 2, 5)
    assert steps_of(workdir) == [1, 2, 5]
    logged(workdir, 0, 0, 1)
    assert steps_of(workdir) == [0, 1]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.slow
@pytest.mark.parametrize("values", [1, 60])
def test_a_log_that_cannot_be_written_is_one_line(
    values: int, tmp_path: Path, run_python: RunPython
) -> None:
    code = f"""
import resource
from sat_jax.cli import run
from sat_jax.train.metrics import MetricsLog
from sat_jax.train.workdir import WorkDir

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with MetricsLog(WorkDir({str(tmp_path)!r}), 0) as log:
        for step in range(1, 300):
            log.log(step, {{f"value_{{i}}": 1.0 for i in range({values})}})

run(main)
"""
    process = run_python("-c", code)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path}: cannot be written: File too large\n"


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    workdir.metrics.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    before = workdir.metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a record of a step"):
        MetricsLog(workdir, 3)
    assert workdir.metrics.read_bytes() == before
    assert read_metrics(tmp_path / "none.jsonl") == []


KILLED = """
import os, signal, sys
from sat_jax.train.metrics import MetricsLog
from sat_jax.train.workdir import WorkDir

log = MetricsLog(WorkDir(sys.argv[1]), 0)
for step in range(1, 6):
    log.log(step, {"loss": step / 7})
    if step == 4:
        log.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    records = read_metrics(WorkDir(tmp_path).metrics)
    assert records == [{"step": step, "loss": step / 7} for step in range(1, 5)]


def events(folder: Path) -> list[Event]:
    """TFRecords: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_shows_the_scalars_and_purges_on_resume(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    with MetricsLog(workdir, 6) as log:
        log.log(7, {"loss": jnp.float32(2.5), "kept": [1, 2], "name": "x", "ok": True})
    found = events(workdir.tensorboard)
    scalars = {
        value.tag: (event.step, value.simple_value)
        for event in found
        for value in event.summary.value
    }
    assert scalars == {"loss": (7, 2.5), "ok": (7, 1.0)}
    assert [e.step for e in found if e.HasField("session_log")] == [7]


def test_clock_counts_each_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(summary_module.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    timer = PhaseTimer()
    spend(1)
    with timer("step"):
        spend(2)
        with timer("compile"):
            spend(4)
        spend(8)
        with pytest.raises(RuntimeError), timer("data"):
            spend(16)
            raise RuntimeError
    spend(32)
    expected = dict.fromkeys(summary_module.PARTS, 0.0) | {
        "compile": 4.0,
        "data": 16.0,
        "step": 10.0,
        "other": 33.0,
        "total": 63.0,
    }
    assert timer.seconds() == expected
    again = PhaseTimer()
    spend(64)
    again.add(expected)
    assert again.seconds() == {**expected, "other": 97.0, "total": 127.0}
    with pytest.raises(ValueError, match="accepted: setup, compile, data, step"), timer("lunch"):
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RECORD = {
    "loss": 3.25,
    "eval_loss": 3.5,
    "rung": 0,
    "kept_heads": 2 / 3,
    "kept_channels": 0.6,
    "tokens_per_second": 1234.0,
}


def test_describe_says_what_it_knows() -> None:
    assert describe(RECORD) == "loss 3.2500  eval 3.5000  heads 67 % channels 60 %  1.23k tok/s"
    assert describe({"loss": float("nan"), "eval_loss": None}) == "loss nan"


def test_progress_without_a_terminal_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, start=10, stream=stream, every=10)

    def update(step: int, at: float, rung: int, evaluated: bool = False) -> str:
        now[0] = at
        stream.truncate(0)
        stream.seek(0)
        progress.update(step, {**RECORD, "rung": rung, "eval_loss": 3.5 if evaluated else None})
        return stream.getvalue()

    assert update(11, 0, 0, evaluated=True) == f"step 11/100  {describe(RECORD)}  left ?\n"
    assert update(12, 4, 0) == ""
    assert update(13, 8, 1).endswith("1.23k tok/s  left 05:48\n")  # a new rung
    assert update(15, 17, 1) == ""
    tenth_second = update(16, 18, 1)
    assert tenth_second.startswith("step 16/100") and tenth_second.endswith("left 04:29\n")
    assert "eval 3.5" in update(17, 18.5, 1, evaluated=True)
    assert update(100, 19, 1).endswith("left 00:00\n")
    progress.note("done")
    assert stream.getvalue().endswith("\ndone\n")
    progress.close()


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    progress = Progress(20, start=10, stream=stream)
    progress.update(15, RECORD)
    progress.note("a line")
    progress.close()
    shown = stream.getvalue()
    assert "15/20" in shown and describe(RECORD) in shown and "a line\n" in shown
    assert f"step 15/20  {describe(RECORD)}\n" in shown  # an evaluation stays


def test_the_log_drives_the_progress(tmp_path: Path) -> None:
    stream = io.StringIO()
    with MetricsLog(WorkDir(tmp_path), 0, Progress(2, stream=stream)) as log:
        log.log(1, {"loss": jnp.float32(1.5)})
        assert stream.getvalue() == ""
        log.log(2, {"loss": jnp.float32(0.5)})
        assert "step 1/2  loss 1.5000" in stream.getvalue()
    assert "step 2/2  loss 0.5000" in stream.getvalue()
    terminal = Terminal()
    (tmp_path / "bar").mkdir()
    with MetricsLog(WorkDir(tmp_path / "bar"), 0, Progress(2, stream=terminal)) as log:
        log.log(1, {"loss": 1.5})
        assert not terminal.getvalue().endswith("\n")
    assert terminal.getvalue().endswith("\n")  # the bar is closed with the log


def test_summary_marks_the_run_finished_and_says_where_it_ran(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    written = write_summary(
        workdir,
        steps=8,
        tokens=8192,
        losses={"loss": 2.5, "eval_loss": float("nan")},
        dense_flops=2e12,
        spent_flops=1.5e12,
        seconds=PhaseTimer().seconds(),
        more={"rungs": [{"rate": 0.4, "speed_up": 1.5}]},
    )
    assert workdir.finished() == written
    assert written["loss"] == 2.5 and written["eval_loss"] is None
    assert written["nonfinite"] == {"eval_loss": "nan"}
    assert written["seconds"].keys() == {*summary_module.PARTS, "other", "total"}
    assert written["versions"]["jax"] == jax.__version__
    assert written["device"]["platform"] == "cpu" and written["device"]["count"] >= 1
    assert written["energy_joules"] is None
    assert written["rungs"] == [{"rate": 0.4, "speed_up": 1.5}]


def test_peak_memory_is_the_device_s_or_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    here = peak_memory()
    assert here["of"] == "process" and 10**7 < here["bytes"] < 10**12

    class Device:
        def __init__(self, stats: Any) -> None:
            self.memory_stats = lambda: stats

    stats = [None, {"peak_bytes_in_use": 7}, {"peak_bytes_in_use": 9}]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(s) for s in stats])
    assert peak_memory() == {"bytes": 9, "of": "device"}


def test_commit_is_ours_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, timeout=60)

    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert environment()["commit"] is None
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    commit = environment()["commit"]
    assert len(commit) == 40
    for folder in map(tmp_path.joinpath, provenance._MEASURED):
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("")
    assert environment()["commit"] == commit
    (tmp_path / "new").write_text("")
    assert environment()["commit"] == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(provenance, "_ROOT", tmp_path / "inside")
    assert environment()["commit"] is None
    monkeypatch.setenv("SAT_JAX_COMMIT", "b" * 40)
    assert environment()["commit"] == "b" * 40


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert environment()["device"]["host_cpus"] == 3
