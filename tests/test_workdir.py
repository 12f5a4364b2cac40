"""Work directories: created, locked, recognised and compared; other folders are not changed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sat_jax.errors import UserError
from sat_jax.train.files import read_json, write_atomically, write_json
from sat_jax.train.workdir import WorkDir
from tests.conftest import ROOT

HOLDER = """
import os, sys
from sat_jax.train.workdir import WorkDir

with WorkDir(sys.argv[1]).lock():
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_lock_makes_the_folder_and_excludes_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    with hold(path) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        pid = int(holder.stdout.readline())
        expected = f"{path} is in use by process {pid} on {socket.gethostname()}"
        with pytest.raises(UserError) as caught, WorkDir(path).lock():
            pass
        assert str(caught.value) == expected
        holder.stdin.close()
        assert holder.wait(timeout=30) == 0
    own = f"process {os.getpid()} on"
    with WorkDir(path).lock(), pytest.raises(UserError, match=own), WorkDir(path).lock():
        pass
    with WorkDir(path).lock():
        assert os.listdir(path) == ["lock"]


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
    with WorkDir(tmp_path).lock():
        pass


def test_a_program_started_while_locked_does_not_keep_the_lock(tmp_path: Path) -> None:
    with WorkDir(tmp_path).lock():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with WorkDir(tmp_path).lock():
            pass
    finally:
        child.communicate(b"\n", timeout=30)


def test_a_folder_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": []}')  # a model, say
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="is not a work directory"), WorkDir(tmp_path).lock():
        pass
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_copy_without_its_lock_is_recognised(tmp_path: Path) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    with WorkDir(tmp_path).lock():
        pass


@pytest.mark.parametrize(
    ("place", "why"), [("file", "is a file, not a folder"), ("file/below", "Not a directory")]
)
def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    with pytest.raises(UserError, match=f"work directory {path}: {why}"), WorkDir(path).lock():
        pass


def settle(workdir: WorkDir, config: dict[str, Any], *free: str) -> None:
    with workdir.lock():
        workdir.compare(config, free)
        workdir.begin(config)


CONFIG: dict[str, Any] = {
    "seed": 0,
    "train": {"steps": 8, "log_every": 1},
    "sparsity": {"rate": 0.4, "rungs": (1, 2), "rate_mlp": None, "dense_layers": {}},
    "export": {"huggingface": False},
    "model": {"adapter": None, "path": None},
    "data": {"sources": ["a.txt"]},
    "distill": {"teacher": None},
}


def changed(group: str, **values: Any) -> dict[str, Any]:
    return {**CONFIG, group: {**CONFIG[group], **values}}


def test_config_is_written_once_and_compared(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    settle(workdir, CONFIG)
    written = workdir.config.read_text()
    settle(workdir, CONFIG)  # tuples are lists in JSON, and the same setting

    def refused(config: dict[str, Any], *free: str) -> str:
        with pytest.raises(UserError) as caught:
            settle(workdir, config, *free)
        return (
            str(caught.value)
            .split("different settings", 1)[1]
            .strip(": ")
            .split("; accepted: the old")[0]
        )

    different = {**changed("train", steps=9, log_every=2), "seed": 1}
    assert (
        refused(different, "train.log_every") == "seed was 0 and is 1; train.steps was 8 and is 9"
    )
    assert refused(changed("sparsity", rate_mlp=0.5)) == "sparsity.rate_mlp was null and is 0.5"
    assert refused({**CONFIG, "seed": "ü"}) == 'seed was 0 and is "ü"'
    another = "({}); accepted: that version, or a new work directory"
    assert refused(changed("sparsity", new=None)) == another.format("sparsity.new")
    settle(workdir, changed("sparsity", new=None), "sparsity.new")
    assert refused(changed("sparsity", rungs=(2, 1))) == ("sparsity.rungs was [1, 2] and is [2, 1]")
    without = {key: value for key, value in CONFIG.items() if key != "export"}
    assert refused(without) == another.format("export.huggingface")
    # A key is no prefix of a longer word.
    assert refused(changed("train", log_every=2), "train.log") == ("train.log_every was 1 and is 2")
    settle(workdir, changed("train", log_every=2), "train.log_every")
    settle(workdir, changed("export", huggingface=True), "export")
    assert workdir.config.read_text() == written
    moved = changed("data", sources=["b.txt"])
    assert refused(moved) == 'data.sources was ["a.txt"] and is ["b.txt"]'
    settle(workdir, {**moved, "train": {"steps": 8, "log_every": 2}}, "data.sources", "train")
    assert json.loads(workdir.config.read_text()) == json.loads(json.dumps(moved))


def test_a_finished_run_is_recognised(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    assert workdir.finished() is None
    write_json(workdir.summary, {"steps": 8})
    assert workdir.finished() == {"steps": 8}


@pytest.mark.parametrize("text", ["", '{"a": ', "[]", "\xff"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    workdir = WorkDir(tmp_path)
    with workdir.lock():
        workdir.config.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=str(workdir.config)):
            workdir.compare(CONFIG)


def test_atomic_writes_replace_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    write_atomically(path, json.dumps({"a": 2}))
    assert read_json(path) == {"a": 2}
    assert os.listdir(tmp_path) == ["x.json"]
