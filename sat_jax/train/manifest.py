"""Manifests of checkpoints: sha256 and size of every file.

Orbax detects truncated files but restores flipped bytes without an error. Nothing is loaded before
its manifest is verified.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sat_jax.train.files import write_json

MANIFEST = "manifest.json"
_THREADS = 4  # hashing releases the GIL; more threads are not faster on one disk


def write_manifest(folder: Path, step: int) -> None:
    """Hash every file under `folder` and write `manifest.json` atomically."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests(folder, names), strict=True)
    }
    write_json(folder / MANIFEST, {"step": step, "files": files})


def find_fault(folder: Path, step: int) -> str | None:
    """Return why `folder` is not a complete checkpoint of `step`, or None. Reads every byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    try:
        manifest_step = manifest["step"]
        files = {str(name): (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    if manifest_step != step:
        return f"{MANIFEST} is that of step {manifest_step}"
    try:
        # Sizes first: reading them is fast and detects most damage.
        for name, (size, _) in files.items():
            current = (folder / name).stat().st_size
            if current != size:
                return f"{name} has {current} bytes instead of {size}"
        for name, digest in zip(files, digests(folder, list(files)), strict=True):
            if digest != files[name][1]:
                return f"{name} has another sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def digests(folder: Path, names: list[str]) -> list[str]:
    """Return the sha256 of the content of each file."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest, names))
