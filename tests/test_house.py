"""Rules of the repository: imports, file sizes, requirements, documents, tolerances."""

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sat_jax
from sat_jax.models.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("scripts", "experiments", "sat_jax", "kernels", "tests")
MAX_LINES = 420

# Packages that a package must not import. Imports go one way: scripts → experiments → sat_jax →
# kernels; inside sat_jax: train, results and evaluate → compress and sparsity → models → nn. Train
# and evaluate also import data and file formats (interop).
USERS = ("sat_jax.train", "sat_jax.results", "sat_jax.evaluate")
METHODS = ("sat_jax.sparsity", "sat_jax.compress")
FORBIDDEN = {
    "scripts": ("tests", "kernels"),
    "experiments": ("tests", "kernels", "scripts"),
    "sat_jax": ("tests", "scripts", "experiments"),
    "kernels": ("tests", "scripts", "experiments", "sat_jax"),
    "sat_jax.ops": ("sat_jax.nn", "sat_jax.models", "sat_jax.data", *METHODS, *USERS),
    "sat_jax.nn": ("sat_jax.models", "sat_jax.data", "sat_jax.interop", *METHODS, *USERS),
    "sat_jax.models": ("sat_jax.data", "sat_jax.interop", *METHODS, *USERS),
    "sat_jax.sparsity": ("sat_jax.models", "sat_jax.data", "sat_jax.interop", *USERS),
    "sat_jax.compress": ("sat_jax.data", *USERS),
    "sat_jax.interop": ("sat_jax.data", *METHODS, *USERS),
    "sat_jax.data": ("sat_jax.models", "sat_jax.nn", *METHODS, *USERS),
    "sat_jax.parallel": ("sat_jax.models", "sat_jax.data", *METHODS, *USERS),
    "sat_jax.train": ("sat_jax.evaluate",),
}
# Ahead-of-time compilation for devices that are absent, and products that are timed alone.
EXCEPTIONS = {
    ("scripts.memory", "kernels.aot"),
    ("scripts.benchmark_blocks", "kernels.block_sparse_matmul"),
}
# Settings of kernels are types; the products themselves are for types of weights, and retention.
KERNEL_TYPES = {"KernelConfig", "Implementation", "RetentionKernel"}
# What a family's file must not mention: methods, and what they do to a model.
METHOD_WORDS = re.compile(
    r"omit|kept|sparse|sparsity|kernel|lora|quanti[sz]|prun|dynamic_selection|(?-i:\bMask)", re.I
)
FAMILY_NAMES = re.compile(
    r"(?<![a-z])(llama|mistral|mixtral|qwen|gpt_?2|gpt_?neox|pythia|retnet|phi3|gemma)", re.I
)
# Files with names of tokenizers, chat templates and scalings of rotary positions, which contain
# those of families.
OTHER_NAMES = {
    f"sat_jax/{n}.py"
    for n in ("data/tokenizer", "data/gguf_tokenizer", "data/chat_templates", "nn/rope")
}
KERNELS_MAY_IMPORT = {"jax", "numpy", "jaxtyping", "kernels"}

# Text and figures of one run: `sat_jax.train` imports them, `sat_jax.results` imports `train`.
RUN_OUTPUT = {f"sat_jax.results.{name}" for name in ("run_plots", "speed", "text")}

# Listed in requirements.txt though no file here imports them, and why.
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
    """Yield every text file of the project, without the files that runs and tools write."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        made = (
            parts[0] in {".git", "runs"}
            or parts[0].startswith(".venv")
            or any(
                part.endswith(("_cache", "__pycache__", ".egg-info", ".hypothesis"))
                for part in parts
            )
        )
        if made or not path.is_file():
            continue
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_go_one_way(importer: str) -> None:
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in sources(importer.partition(".")[0])
        if inside(module_name(path), importer)
        for name in sorted(imports(path))
        if any(inside(name, package) for package in FORBIDDEN[importer])
        and (module_name(path), name) not in EXCEPTIONS
    ]
    assert not wrong


def test_kernels_are_imported_by_ops_alone() -> None:
    importers = {
        module_name(path)
        for path in sources("sat_jax")
        if any(inside(name, "kernels") for name in imports(path))
    }
    assert importers == {"sat_jax.ops"}


def test_products_of_kernels_are_imported_by_types_of_weights_and_retention_alone() -> None:
    types = {"sat_jax.ops", *(f"sat_jax.ops.{name}" for name in KERNEL_TYPES)}
    importers = {
        module_name(path)
        for path in sources("sat_jax")
        if any(inside(name, "sat_jax.ops") and name not in types for name in imports(path))
    }
    modules = ("linear", "block_sparse", "retention", "retention_forms")
    assert importers == {f"sat_jax.nn.{name}" for name in modules}


def family_files() -> set[Path]:
    """The files of the registered families."""
    return {Path(inspect.getfile(family.model)) for family in FAMILIES.values()}


def test_files_of_families_mention_no_method() -> None:
    assert ROOT / "sat_jax/models/llama.py" in family_files()
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted(family_files())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if METHOD_WORDS.search(line)
    ]
    assert not found


def names_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the identifiers and strings in a file, without docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If)
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield node.lineno, text
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text):
                yield node.lineno, text
            case ast.ClassDef(name=text) | ast.FunctionDef(name=text) | ast.keyword(arg=str(text)):
                yield node.lineno, text
            case ast.alias(name=text):
                yield node.lineno, text


def test_families_are_named_in_models_alone() -> None:
    paths = {path: path.relative_to(ROOT).as_posix() for path in sources("sat_jax")}
    assert all(FAMILY_NAMES.match(model_type) for model_type in FAMILIES)
    assert set(paths.values()) >= OTHER_NAMES
    found = [
        f"{name}:{line}: {text}"
        for path, name in paths.items()
        if not name.startswith("sat_jax/models/") and name not in OTHER_NAMES
        for line, text in names_in_code(path)
        if FAMILY_NAMES.search(text)
    ]
    assert not found


def test_kernels_need_jax_and_numpy_only() -> None:
    allowed = KERNELS_MAY_IMPORT | set(sys.stdlib_module_names)
    for path in sources("kernels"):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed, path


def test_packages_have_no_import_cycle() -> None:
    """Packages are the folders of sat_jax. `RUN_OUTPUT` is a package of its own."""
    folder_of = {p: p.relative_to(ROOT / "sat_jax").parts[0] for p in sources("sat_jax")}
    folders = {folder for folder in folder_of.values() if not folder.endswith(".py")}
    targets: dict[str, set[str]] = {}
    for path, folder in folder_of.items():
        if folder not in folders:
            continue
        package = "run output" if module_name(path) in RUN_OUTPUT else folder
        others = {name for name in imports(path) if not any(inside(name, m) for m in RUN_OUTPUT)}
        targets.setdefault(package, set()).update(
            other
            for other in folders - {folder}
            if any(inside(name, f"sat_jax.{other}") for name in others)
        )
    assert not targets.pop("run output", None)
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


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in FOLDERS
        for path in [*sources(folder), *(ROOT / folder).rglob("*.sh")]
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_requirements_are_imported() -> None:
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
            # An extra that is not installed has no distribution; its own name is used.
            distributions = {normalised(provider) for provider in providers.get(name, [name])}
            assert distributions & allowed[folder], f"{folder} imports {name}, which is not listed"
            if folder != "tests":
                used |= distributions
    unused = listed - used
    assert unused == set(IMPORTED_BY_OTHERS), "listed and not imported, or imported and not listed"


@pytest.mark.slow
def test_no_machine_is_named() -> None:
    # Character classes, so that the patterns do not match this file. Each begins with a literal,
    # which is found fast in long rows.
    patterns = (
        r"/(?<![\w.~$}]/)(?:wor[k]|roo[t]|tm[p]|hom[e]|User[s])/\w",
        r"pyp[i]\.org",
        r"pythonhoste[d]\.org",
        r"npmj[s]\.",
        r"debia[n]\.org",
        r"download\.pytorc[h]",
    )
    named = [
        f"{path.relative_to(ROOT)}: {text[max(found.start() - 50, 0) : found.end() + 50]}"
        for path, text in texts()
        for pattern in patterns
        for found in re.finditer(pattern, text)
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


def test_tolerances_are_in_one_table() -> None:
    found = [
        f"{path.name}:{node.value.lineno} {node.arg}="
        for path in sources("tests")
        if path.name != "tolerances.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg in {"atol", "rtol", "rel", "rel_tol"}
    ]
    assert not found, "use tolerances.assert_close"
