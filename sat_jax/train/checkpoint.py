"""Checkpoints that are written atomically and verified before they are read.

Orbax writes `30.saving.orbax-checkpoint-tmp` and renames it to `30.saving`. Then the sha256
manifest is added, and the folder is renamed to `30`. A folder that has a step's name was therefore
complete at that time, and the manifest shows whether it still is. A folder contains

    30/state/          the arrays, by their path in the pytree ("params/layers/mlp/gate")
    30/meta/meta.json  shapes and dtypes of the arrays, and the caller's metadata
    30/manifest.json   sha256 and size of every other file
"""

import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from sat_jax.errors import UserError
from sat_jax.parallel.processes import is_primary, on_primary
from sat_jax.train.files import read_json, sync_directory
from sat_jax.train.manifest import find_fault, write_manifest

_log = logging.getLogger(__name__)

# Suffixes of a step's folder while it is saved and deleted.
_SAVING, _DELETING = "saving", "deleting"
_NO_STEPS = -1  # steps are never negative


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoint:
    """A verified checkpoint on disk: the metadata of `save`, and shapes and dtypes by path."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step
        content = read_json(path / "meta" / "meta.json")
        self.meta: dict[str, Any] = content["meta"]
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
            for name, leaf in content["leaves"].items()
        }

    def read(
        self, names: Iterable[str], shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> dict[str, Any]:
        """Return the arrays `names`: on devices if `shardings` has the name, else host numpy."""
        shardings = shardings or {}
        result: dict[str, Any] = {}
        arguments: dict[str, ocp.RestoreArgs] = {}
        for name in names:
            leaf, sharding = self.leaves[name], shardings.get(name)
            if leaf.size == 0:  # not stored by orbax
                empty = np.zeros(leaf.shape, leaf.dtype)
                result[name] = empty if sharding is None else jax.device_put(empty, sharding)
            elif sharding is None:
                arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                arguments[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)
        if arguments:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                wanted = {name: self.leaves[name] for name in arguments}
                restore = ocp.args.PyTreeRestore(
                    item=wanted, restore_args=arguments, partial_restore=True
                )
                result |= reader.restore(self.path / "state", args=restore)
        return result


class Checkpoints:
    """The checkpoints of one run in `directory`, which is created if missing.

    The `keep_last` newest steps and the multiples of `keep_every` are kept. All processes of a run
    call the same methods in the same order; process 0 verifies and deletes.
    """

    def __init__(self, directory: Path, keep_last: int, keep_every: int | None = None) -> None:
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(
                f"checkpoints: keep_last {keep_last} and keep_every {keep_every} must be at least 1"
            )
        self.directory = directory.absolute()
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._damaged: set[int] = set()
        self._newest: Checkpoint | None = None
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        logging.getLogger("absl").addFilter(_is_not_of_a_save)
        sys.unraisablehook = _without_closed_loops
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler("meta.json")
            )
        )
        if is_primary():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Save a pytree of arrays (`jax.Array`, sharded or not, or numpy) and JSON `meta`.

        Afterwards the buffers may be donated or overwritten: orbax has copied them to the host or,
        on CPU, references them, so that a donation copies. Writing continues in the background.
        `wait` and `close` raise its errors; the next `save` logs them and continues, because a disk
        may be full for a limited time. Raises `ValueError` if the step exists, and `TypeError` for
        a leaf that is not an array.
        """
        try:
            self.wait()
        except UserError as error:
            _log.warning("%s; continuing with the next checkpoint", error)
        leaves = named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or jax.numpy.issubdtype(
                leaf.dtype, jax.dtypes.extended
            ):
                raise TypeError(f"{name} is a {type(leaf).__name__}; accepted: arrays")
        if is_primary() and step not in self._damaged and step in _steps(self.directory):
            raise ValueError(f"step {step} is already saved in {self.directory}")
        shapes = {
            name: {"shape": leaf.shape, "dtype": leaf.dtype.name} for name, leaf in leaves.items()
        }
        # A copy: the caller may change `meta` during the write in the background.
        content = json.loads(json.dumps({"meta": dict(meta), "leaves": shapes}, allow_nan=False))
        self._writer.save(
            self._saving(step),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({n: leaf for n, leaf in leaves.items() if leaf.size}),
                meta=ocp.args.JsonSave(content),
            ),
        )
        self._newest = None
        self._pending = self._finisher.submit(self._finish, step)

    def wait(self) -> None:
        """Wait until the last save is complete. Raises `UserError` if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None if there are no steps.

        All its bytes are verified. Newer steps that are damaged are logged with the reason and
        deleted by the next successful save. Raises `UserError` if all steps are damaged.
        """
        self.wait()
        if self._newest is None:
            step = on_primary(lambda: _newest_valid(self.directory, self._damaged))
            if step != _NO_STEPS:
                self._newest = Checkpoint(self.directory / str(step), step)
        return self._newest

    def restore(self, target: Any) -> Restored | None:
        """Return `newest()` in the structure of `target`, or None if there are no steps.

        Leaves of `target` are `jax.ShapeDtypeStruct`s. A leaf with a sharding, on any mesh, becomes
        a `jax.Array`, a leaf without becomes a host numpy array. Raises `UserError` with the paths
        whose names, shapes or dtypes differ; nothing is cast or padded.
        """
        newest = self.newest()
        if newest is None:
            return None
        wanted = named_leaves(target)
        _compare(newest, wanted)
        shardings = {
            name: leaf.sharding
            for name, leaf in wanted.items()
            if getattr(leaf, "sharding", None) is not None
        }
        arrays = newest.read(wanted, shardings)
        state = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])
        return Restored(newest.step, state, newest.meta)

    def close(self) -> None:
        """Wait for the last save and stop the threads. Without this call the save can be lost."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _saving(self, step: int) -> Path:
        return self.directory / f"{step}.{_SAVING}"

    def _finish(self, step: int) -> None:
        """Complete the save in the background and delete old steps.

        Orbax returns on process 0 after every process has written, so that no barrier is needed.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)}: not written: {error}"
            ) from error
        if not is_primary():
            return
        folder, final = self._saving(step), self.directory / str(step)
        try:
            write_manifest(folder, step)
            if final.exists():  # damaged, or empty
                self._remove(final)
            folder.rename(final)
            sync_directory(self.directory)
        except OSError as error:
            raise UserError(f"checkpoint {final}: not written: {error}") from error
        self._damaged.discard(step)
        steps = [s for s in _steps(self.directory) if s not in self._damaged]
        kept = set(steps[-self._keep_last :])
        if self._keep_every is not None:
            kept |= {s for s in steps if s % self._keep_every == 0}
        for old in self._damaged.union(steps) - kept:
            self._remove(self.directory / str(old))
        self._damaged.clear()

    @staticmethod
    def _remove(folder: Path) -> None:
        """Rename, then delete: an interrupted deletion leaves no incomplete step."""
        deleting = folder.with_name(f"{folder.name}.{_DELETING}")
        try:
            folder.rename(deleting)
            shutil.rmtree(deleting)
        except OSError as error:  # NFS keeps files that are being read; a later run deletes them
            _log.warning("%s could not be removed: %s", folder, error)

    def _clean(self) -> None:
        """Delete folders of incomplete saves and deletions of an earlier process."""
        for path in self.directory.iterdir():
            step, _, suffix = path.name.partition(".")
            if step.isdecimal() and suffix.partition(".")[0] in (_SAVING, _DELETING):
                _log.info("removing %s of an interrupted run", path)
                shutil.rmtree(path)


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a failed save, which every thread of orbax logs; `wait`
    raises its error."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _without_closed_loops(error: "sys.UnraisableHookArgs") -> None:
    """Print an error that cannot be raised, unless it is that of the remaining writes of a failed
    save: orbax has closed their event loop."""
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return leaves by path ("params/layers/mlp/gate"), in the order of the tree.

    Names do not contain the `value` of an `nnx.Variable`: an `nnx.State` has the same names as its
    pure dictionary.
    """
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in result:
            raise TypeError(f"two leaves of the state have the path {name}")
        result[name] = leaf
    return result


def find(directory: Path, step: int | None = None) -> Checkpoint:
    """Return the checkpoint of `step`, or the newest valid one, without changing `directory`.

    Raises `UserError` if it does not exist or is damaged.
    """
    steps = _steps(directory) if directory.is_dir() else []
    if not steps:
        raise UserError(f"{directory} has no checkpoints")
    if step is None:
        step = _newest_valid(directory, set())
    elif step not in steps:
        raise UserError(f"{directory} has no step {step}; it has {_listed(map(str, steps))}")
    elif fault := find_fault(directory / str(step), step):
        raise UserError(f"checkpoint {directory / str(step)} is damaged: {fault}")
    return Checkpoint(directory / str(step), step)


def _steps(directory: Path) -> list[int]:
    """Return the steps in increasing order, without empty folders."""
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and str(int(path.name)) == path.name
        if path.is_dir() and any(path.iterdir())
    )


def _newest_valid(directory: Path, damaged: set[int]) -> int:
    """Return the newest valid step, or `_NO_STEPS`, and add newer steps to `damaged`.

    Raises `UserError` if all steps are damaged.
    """
    faults: dict[int, str] = {}
    for step in reversed(_steps(directory)):
        fault = find_fault(directory / str(step), step)
        if fault is None:
            if faults:
                _log.warning("falling back to checkpoint %s", directory / str(step))
            return step
        _log.warning("checkpoint %s is damaged: %s", directory / str(step), fault)
        faults[step] = fault
        damaged.add(step)
    if faults:
        reasons = _listed(f"{step} ({fault})" for step, fault in faults.items())
        raise UserError(
            f"all checkpoints in {directory} are damaged: {reasons}; remove them to restart the run"
        )
    return _NO_STEPS


def _compare(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    def form(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    saved = checkpoint.leaves
    differences = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    differences += [f"{name} is not expected" for name in saved.keys() - wanted.keys()]
    differences += [
        f"{name} is {form(saved[name])}, not {form(leaf)}"
        for name, leaf in wanted.items()
        if name in saved and form(saved[name]) != form(leaf)
    ]
    if differences:
        differing = _listed(sorted(differences))
        raise UserError(f"checkpoint {checkpoint.path} is not of this run: {differing}")


def _listed(items: Iterable[str], limit: int = 4) -> str:
    texts = list(items)
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
