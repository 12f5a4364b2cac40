"""The house holds its rules: import arrows, file sizes, requirements, documents, tolerances."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sat_jax

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("scripts", "experiments", "sat_jax", "kernels", "tests")
MAX_LINES = 420

# Who never imports what. Streets are one-way: scripts → experiments → sat_jax → ops → kernels.
FORBIDDEN = {
    "scripts": ("tests", "kernels"),
    "experiments": ("tests", "kernels", "scripts"),
    "sat_jax": ("tests", "scripts", "experiments"),
    "kernels": ("tests", "scripts", "experiments", "sat_jax"),
    "sat_jax.models": (
        *("sat_jax.train", "sat_jax.data", "sat_jax.interop", "sat_jax.evaluate"),
        *("sat_jax.analysis", "sat_jax.results", "sat_jax.sparsity.controller"),
    ),
    "sat_jax.sparsity": (
        *("sat_jax.models", "sat_jax.train", "sat_jax.data", "sat_jax.interop"),
        "sat_jax.evaluate",
    ),
    "sat_jax.ops": ("sat_jax.models", "sat_jax.sparsity", "sat_jax.train", "sat_jax.data"),
}
# No products of theirs, but the compilers for devices that are not there.
SIDE_DOORS = {("scripts.memory", "kernels.aot")}
KERNELS_MAY_IMPORT = {"jax", "numpy", "jaxtyping", "kernels"}

# Text and figures of one run: `sat_jax.train` imports them, `sat_jax.results` imports `train`.
RUN_OUTPUT = {f"sat_jax.results.{name}" for name in ("run_plots", "speed", "text")}

# Listed in requirements.txt though no file of ours names them, and why.
IMPORTED_BY_OTHERS = {
    "array-record": "tensorflow-datasets' array_record format and grain's reader of it",
    "importlib-resources": "tensorflow-datasets imports it and does not declare it",
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def third_party(folder: str) -> set[str]:
    names = {name.partition(".")[0] for path in sources(folder) for name in imports(path)}
    return names - set(sys.stdlib_module_names) - set(FOLDERS)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(lines: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", line) for line in lines if not line.startswith("#"))
    return {normalised(match.group()) for match in names if match}


def documents() -> list[Path]:
    folders = [ROOT, ROOT / "experiments", ROOT / "docs"]
    return [path for folder in folders for path in sorted(folder.glob("*.md"))]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file that belongs to the project, as opposed to what running it leaves behind."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        made = parts[0] in {".git", ".venv", ".venv-aot", "runs"} or any(
            part.endswith(("_cache", "__pycache__", ".egg-info", ".hypothesis")) for part in parts
        )
        if made or not path.is_file():
            continue
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_arrows_point_one_way(importer: str) -> None:
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in sources(importer.partition(".")[0])
        if inside(module_name(path), importer)
        for name in sorted(imports(path))
        if any(inside(name, package) for package in FORBIDDEN[importer])
        and (module_name(path), name) not in SIDE_DOORS
    ]
    assert not wrong


def test_ops_is_the_only_door_to_the_kernels() -> None:
    importers = {
        module_name(path)
        for path in sources("sat_jax")
        if any(inside(name, "kernels") for name in imports(path))
    }
    assert importers <= {"sat_jax.ops"}


def test_kernels_need_jax_and_numpy_only() -> None:
    allowed = KERNELS_MAY_IMPORT | set(sys.stdlib_module_names)
    for path in sources("kernels"):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed, path


def test_packages_have_no_import_cycle() -> None:
    """Packages are the folders of sat_jax. `RUN_OUTPUT` is a package of its own."""
    folders = {path.parent.name for path in sources("sat_jax")} - {"sat_jax"}
    targets: dict[str, set[str]] = {}
    for path in sources("sat_jax"):
        package = "run output" if module_name(path) in RUN_OUTPUT else path.parent.name
        others = {name for name in imports(path) if not any(inside(name, m) for m in RUN_OUTPUT)}
        targets.setdefault(package, set()).update(
            folder
            for folder in folders - {package}
            if any(inside(name, f"sat_jax.{folder}") for name in others)
        )
    assert not targets.pop("run output")
    del targets["sat_jax"]
    while leaves := {name for name, imported in targets.items() if not imported}:
        targets = {n: imported - leaves for n, imported in targets.items() if n not in leaves}
    assert not targets, "these packages import each other in a circle"


def test_importing_the_library_is_free(run_python) -> None:
    code = "import sat_jax, sys; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_load_and_save_are_functions_of_the_library() -> None:
    assert callable(sat_jax.load_model)
    assert callable(sat_jax.save_model)
    with pytest.raises(AttributeError, match="'sat_jax' has no attribute 'load_modle'"):
        sat_jax.load_modle  # noqa: B018  # the misspelling is the point


def test_files_fit_a_reader() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in FOLDERS
        for path in [*sources(folder), *(ROOT / folder).rglob("*.sh")]
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_requirements_are_what_is_imported() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    listed = required((ROOT / "requirements.txt").read_text().splitlines())
    allowed = {
        "sat_jax": listed | required(extras["eval"]),
        "kernels": listed,
        "experiments": listed,
        "scripts": listed | required(extras["bench"]),
        "tests": listed.union(*(required(extras[extra]) for extra in ("bench", "eval", "test"))),
    }
    providers = packages_distributions()
    used: set[str] = set()
    for folder in FOLDERS:
        for name in third_party(folder):
            # A package of an extra that is not installed here goes by its own name.
            distributions = {normalised(given) for given in providers.get(name, [name])}
            assert distributions & allowed[folder], f"{folder} imports {name}, which is not listed"
            if folder != "tests":
                used |= distributions
    unused = listed - used
    assert unused == set(IMPORTED_BY_OTHERS), "listed and not imported, or the other way round"


def test_no_machine_is_named() -> None:
    # Character classes keep this file from finding itself.
    pattern = re.compile(
        r"(?<![\w.~$}])/(?:wor[k]|roo[t]|tm[p]|hom[e]|User[s])/\w"
        r"|pyp[i]\.org|pythonhoste[d]\.org|npmj[s]\.|debia[n]\.org|download\.pytorc[h]"
    )
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not named


def test_commands_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text() for path in documents())
    commands = set(re.findall(r"(?:`|^\s*)make ([a-z-]+)", text, re.MULTILINE))
    assert {"quickstart", "test"} <= commands <= targets
    files = {f"scripts/{name}.py" for name in re.findall(r"-m scripts\.(\w+)", text)}
    files |= set(re.findall(r"(?<![\w/])((?:experiments|scripts|sat_jax)/[\w/]+\.\w+)", text))
    assert {name for name in files if not (ROOT / name).is_file()} == set()


def test_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sat_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sat_jax.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest, *released = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert newest == "Unreleased"
    assert released[:1] in ([], [sat_jax.__version__])


def test_tolerances_stand_in_one_table() -> None:
    found = [
        f"{path.name}:{node.value.lineno} {node.arg}="
        for path in sources("tests")
        if path.name != "tolerances.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg in {"atol", "rtol", "rel", "rel_tol"}
    ]
    assert not found, "use tolerances.assert_close"
