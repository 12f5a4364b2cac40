"""scripts/setup.sh with fake interpreters: which one it chooses, and what it runs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("python3.13", "python3.12", "python3.11", "python3")

BROKEN = "#!/bin/sh\necho 'shim: not found' >&2\nexit 127\n"
# Reports VERSION, creates a virtual environment of itself, and records its arguments.
WORKING = f"""#!/bin/sh
case "$1 $2" in
  "-m venv") echo "venv $0" >>"$CALLS"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip")
    [ "$3" = --version ] && exit 0
    shift 2
    echo "pip $*" >>"$CALLS"
    [ "${{PIP_MEETS:-}}" = kill ] && kill -9 "$PPID" && exit 1
    [ "${{PIP_MEETS:-}}" = interrupt ] && kill -INT "$PPID" && exit 1
    [ "${{PIP_MEETS:-}}" = error ] && exit 1
    exit 0 ;;
  "--version ") echo Python VERSION ;;
  *) exec "{sys.executable}" -c 'import sys
sys.version_info = tuple(map(int, "VERSION".split(".")))
exec(sys.argv[1])' "$2" ;;
esac
"""

# In background jobs SIGINT is ignored, and a shell would inherit that.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""

Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what set-up reads, in a path with a space; no interpreter works."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    (tmp_path / "bin").mkdir()
    for name in NAMES:
        stand_in(tmp_path, name, BROKEN)
    return root


def stand_in(folder: Path, name: str, text: str = WORKING, version: str = "3.11.4") -> None:
    path = folder / "bin" / name
    path.write_text(text.replace("VERSION", version))
    path.chmod(0o755)


@pytest.fixture
def setup(checkout: Path, tmp_path: Path) -> Setup:
    calls = tmp_path / "calls"

    def run(
        *parts: str, root: Path = checkout, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Return the recorded calls in place of the standard output."""
        calls.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTIBLE, str(root / "scripts/setup.sh"), *parts],
            env={"PATH": f"{tmp_path / 'bin'}:{os.defpath}", "CALLS": str(calls), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        done.stdout = calls.read_text()
        return done

    return run


def test_the_newest_that_works_is_taken(setup: Setup, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3")
    stand_in(tmp_path, "python3.12")
    done = setup("test")
    assert done.returncode == 0, done.stderr
    venv, pip = done.stdout.splitlines()
    assert venv == f"venv {tmp_path}/bin/python3.12"
    assert pip.endswith("--editable .[test]")


@pytest.mark.parametrize("version", ["3.10.9", "3.14.0"])
def test_an_unsupported_python_is_one_line(setup: Setup, tmp_path: Path, version: str) -> None:
    stand_in(tmp_path, "python3", version=version)
    done = setup("test")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no working Python 3.11, 3.12 or 3.13")
    assert f"(python3 is Python {version})" in line


def test_a_missing_python_is_one_line(setup: Setup) -> None:
    done = setup("test")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "(python3 is missing or broken)" in line


@pytest.mark.parametrize("version", ["3.11.0", "3.13.9"])
def test_both_ends_of_the_range_fit(setup: Setup, tmp_path: Path, version: str) -> None:
    stand_in(tmp_path, "python3", version=version)
    assert setup("test").returncode == 0


def test_an_interpreter_asked_for_by_name_is_the_one(setup: Setup, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3.13")
    done = setup(PYTHON="python3.12")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PYTHON=python3.12 is not a working Python")
    stand_in(tmp_path, "python3.12")
    assert "bin/python3.12" in setup(PYTHON="python3.12").stdout


def test_it_is_done_once(setup: Setup, checkout: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3")
    setup("base", "quickstart")
    assert setup("base", "quickstart").stdout == ""
    assert [call.split()[0] for call in setup("test").stdout.splitlines()] == ["pip"]
    with (checkout / "requirements.txt").open("a") as file:
        file.write("one-more\n")
    assert setup("base").stdout.count("pip install") == 1
    assert setup("base").stdout == ""
    moved = checkout.rename(checkout.with_name("moved"))
    assert setup("base", root=moved).stdout.count("pip install") == 1, "its path was installed"


@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_an_interrupted_one_starts_afresh(setup: Setup, tmp_path: Path, end: str) -> None:
    stand_in(tmp_path, "python3")
    assert setup("base").returncode == 0
    assert setup("test", PIP_MEETS=end).returncode != 0
    assert [call.split()[0] for call in setup("test").stdout.splitlines()] == ["venv", "pip"]
    assert setup("test").stdout == ""


def test_a_failed_one_keeps_the_environment(setup: Setup, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3")
    setup("base")
    done = setup("test", PIP_MEETS="error")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: set-up failed")
    assert setup("base").stdout == ""
    assert [call.split()[0] for call in setup("test").stdout.splitlines()] == ["pip"]


def test_a_broken_environment_is_made_anew(setup: Setup, checkout: Path, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3")
    setup("base")
    (checkout / ".venv/bin/python").unlink()
    assert [call.split()[0] for call in setup("base").stdout.splitlines()] == ["venv", "pip"]


def test_aot_compilers_have_their_own_environment(
    setup: Setup, checkout: Path, tmp_path: Path
) -> None:
    stand_in(tmp_path, "python3")
    setup("base")
    done = setup("aot", "test").stdout.splitlines()
    assert [call.split()[0] for call in done] == ["venv", "pip", "pip"]
    assert (checkout / ".venv-aot/ready-aot").exists()
    assert not (checkout / ".venv/ready-aot").exists()
    assert setup("aot", "test").stdout == ""


def test_an_unknown_part_is_refused(setup: Setup, tmp_path: Path) -> None:
    stand_in(tmp_path, "python3")
    done = setup("everything")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'everything'; accepted: base, test, bench, quickstart" in done.stderr
