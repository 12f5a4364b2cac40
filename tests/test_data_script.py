"""scripts/prepare_data.py; and that preparing needs neither TensorFlow nor a network."""

import json
import sys
from pathlib import Path

import pytest

from scripts import prepare_data
from tests.conftest import RunPython
from tests.user_errors import user_error


def texts(folder: Path) -> Path:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(30)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return folder / "in.jsonl"


@pytest.mark.slow
def test_preparing_needs_neither_tensorflow_nor_a_network(
    tmp_path: Path, run_python: RunPython
) -> None:
    folder = texts(tmp_path)
    code = f"""
import sys, socket
def no(*_): raise AssertionError("network")
socket.socket.connect = no
from pathlib import Path
from sat_jax.data.prepare import prepare
from sat_jax.data.batches import batches, open_split
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
prepared = prepare(sources={str(folder)!r}, tokenizer=load_tokenizer("bytes"), row_length=16,
                   held_out=0.2, root=Path({str(tmp_path / "prepared")!r}), log=print)
batches(open_split(prepared, "train"), 2, seed=0)(5)
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    process = run_python("-c", code)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.slow
def test_the_script(tmp_path: Path, run_python: RunPython) -> None:
    folder = texts(tmp_path)
    command = ("-m", "scripts.prepare_data", "--tokenizer", "bytes", "--row-length", "16")
    out = run_python(*command, "--sources", str(folder), "--out", str(tmp_path / "out"))
    assert (out.returncode, out.stderr) == (0, "")
    first, table, train, held_out, share, counts, last = out.stdout.splitlines()
    assert first.startswith("data: prepared, ")
    assert len(table.split()) == len(train.split()) == len(held_out.split())
    expected = "share of a row's tokens in its longest document: 100.0% (train), 100.0% (held_out)"
    assert share == expected  # no two documents fit into a row
    assert counts == "1 files, 30 documents; skipped: none"
    assert last.startswith("tokenizer with 257 ids")
    out = run_python(*command, "--sources", str(tmp_path / "none"))
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith("error: ") and out.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--row-lenght", "2"], "--row-lenght"),
        (["--held-out", "x"], "--held-out"),
        (["--tokenizer", "bytes", "--vocab-size", "200"], "ids up to 255"),
        (["--tokenizer", "bytes", "--held-out", "40"], "leaves none"),
        (["--tokenizer", "bytes", "--text-field", "body"], "no field 'body'"),
        (["--tokenizer", "bytes", "--max-tokens", "1"], "max tokens 1;"),
        (["--tokenizer", "bytes", "--row-length", "1"], "row length 1;"),
        (["--tokenizer", "bytes", "--vocab-size", "-5"], "--vocab-size -5; accepted: 1 or more"),
        (["--model-path", "none"], "none does not exist"),
        ([], "tokenizer 'model' needs the path of a pretrained model"),
    ],
)
def test_the_script_checks_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    folder = texts(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data", "--sources", str(folder), *arguments])
    assert problem in user_error(prepare_data.main)
