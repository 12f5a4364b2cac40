"""Outputs of scripts that cannot be written: one line or silence, and no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def script(body: str, stdout: int = subprocess.PIPE, **env: str) -> "subprocess.Popen[str]":
    """Start a script whose `main` has the lines of `body`."""
    lines = "".join(f"\n    {line}" for line in body.splitlines())
    code = (
        f"import sys, threading, errno\nfrom sat_jax.cli import run\ndef main():{lines}\nrun(main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env},
    )


@pytest.mark.parametrize("flush", [True, False])
def test_a_closed_pipe_ends_a_script_quietly(flush: bool) -> None:
    process = script(f"print('first', flush=True)\nfor _ in range(10**5): print(1, flush={flush})")
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_characters_that_the_output_cannot_encode_are_replaced() -> None:
    out, error = script("print('a\\u00e9\\ud800b')", PYTHONIOENCODING="ascii").communicate()
    assert (out, error) == ("a??b\n", "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = script("print(1)", full.fileno())
        assert (
            process.communicate()[1]
            == "error: output: cannot be written: No space left on device\n"
        )
    assert process.returncode == 2
    write = "with open('/dev/full', 'w') as file: file.write('x')"
    thread = f"def write():\n    {write}\nthread = threading.Thread(target=write)\n"
    process = script(
        f"{thread}thread.start()\nthread.join()\nraise OSError(errno.EFBIG, 'Large', 'f')"
    )
    assert process.communicate()[1] == "error: f: cannot be written: Large\n"
    assert process.returncode == 2


def test_other_errors_keep_their_traceback() -> None:
    process = script("raise PermissionError(13, 'no')")
    assert "Traceback" in process.communicate()[1] and process.returncode == 1
