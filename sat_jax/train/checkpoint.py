"""Checkpoints that are either whole or not there.

A save goes through three names: orbax writes `30.saving.orbax-checkpoint-tmp` and renames it to
`30.saving`; then the sha256 manifest is written into it, and only then does it become `30`. What
has a step's name was therefore whole once, and the manifest says if it still is. Inside:

    30/state/          the arrays, each under its path in the pytree ("params/layers/mlp/gate")
    30/meta/meta.json  shapes and dtypes of the arrays, and what the caller wanted kept
    30/manifest.json   sha256 and size of every other file
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from sat_jax.errors import UserError
from sat_jax.parallel.processes import decide, is_primary
from sat_jax.train.files import read_json, sync_directory
from sat_jax.train.manifest import find_fault, write_manifest

_log = logging.getLogger(__name__)

# What a step's folder ends in before and after its life.
_SAVING, _DELETING = "saving", "deleting"
_NO_STEPS = -1  # instead of a step, which is never negative


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back."""

    step: int
    state: Any
    meta: dict[str, Any]


class Stored:
    """One whole checkpoint on disk.

    `meta` is what was given to `save`; `leaves` maps paths to the arrays' shapes and dtypes. The
    arrays themselves are read by `read`.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step
        held = read_json(path / "meta" / "meta.json")
        self.meta: dict[str, Any] = held["meta"]
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
            for name, leaf in held["leaves"].items()
        }

    def read(
        self, names: Iterable[str], shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> dict[str, Any]:
        """Reads the arrays `names`: on devices where `shardings` says so, otherwise host numpy."""
        shardings = shardings or {}
        result: dict[str, Any] = {}
        arguments: dict[str, ocp.RestoreArgs] = {}
        for name in names:
            leaf, sharding = self.leaves[name], shardings.get(name)
            if leaf.size == 0:  # orbax stores none of these
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
    """The checkpoints of one run, kept in `directory` (made if missing).

    `keep_last` newest steps stay, and every step that `keep_every` divides. All processes of a run
    make one and call the same methods in the same order; process 0 judges, and removes.
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
        self._newest: Stored | None = None
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler("meta.json")
            )
        )
        if is_primary():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Saves any pytree of arrays (`jax.Array`, sharded or not, or numpy) and JSON `meta`.

        When it returns, the buffers may be donated or overwritten: orbax has copied them to the
        host or, on CPU, holds them so that a donation copies instead. The rest goes on in the
        background; what fails there is raised by `wait` or `close`, while the next `save` logs it
        and tries anew: a disk may be full for a while. Raises
        `ValueError` if the step is there already, `TypeError` for a leaf that is no array.
        """
        try:
            self.wait()
        except UserError as error:
            _log.warning("%s; the next one is tried", error)
        leaves = named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or jax.numpy.issubdtype(
                leaf.dtype, jax.dtypes.extended
            ):
                raise TypeError(f"{name} is a {type(leaf).__name__} that no checkpoint can hold")
        if is_primary() and step not in self._damaged and step in _steps(self.directory):
            raise ValueError(f"step {step} is already saved in {self.directory}")
        shapes = {
            name: {"shape": leaf.shape, "dtype": leaf.dtype.name} for name, leaf in leaves.items()
        }
        # A round trip through text: the caller may change `meta` while the background writes.
        held = json.loads(json.dumps({"meta": dict(meta), "leaves": shapes}, allow_nan=False))
        self._writer.save(
            self._staged(step),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({n: leaf for n, leaf in leaves.items() if leaf.size}),
                meta=ocp.args.JsonSave(held),
            ),
        )
        self._newest = None
        self._pending = self._finisher.submit(self._finish, step)

    def wait(self) -> None:
        """Blocks until the last save is whole on disk; `UserError` if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Stored | None:
        """The newest step that verifies, or None if there are no steps.

        Reads every byte of it once. Each newer step that fails is logged with the reason, and
        removed by the next successful save. Raises `UserError` if there are steps and none
        verifies.
        """
        self.wait()
        if self._newest is None:
            step = decide(lambda: _newest_whole(self.directory, self._damaged))
            if step != _NO_STEPS:
                self._newest = Stored(self.directory / str(step), step)
        return self._newest

    def restore(self, target: Any) -> Restored | None:
        """Reads `newest()` into the structure of `target`; None if there are no steps.

        Each leaf of `target` has a shape and a dtype (`jax.ShapeDtypeStruct`). One with a sharding,
        on any mesh, becomes a `jax.Array`; one without becomes a host numpy array. Raises
        `UserError` naming the paths where names, shapes or dtypes differ; nothing is cast or
        padded.
        """
        stored = self.newest()
        if stored is None:
            return None
        wanted = named_leaves(target)
        _compare(stored, wanted)
        shardings = {
            name: leaf.sharding
            for name, leaf in wanted.items()
            if getattr(leaf, "sharding", None) is not None
        }
        arrays = stored.read(wanted, shardings)
        state = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])
        return Restored(stored.step, state, stored.meta)

    def close(self) -> None:
        """Waits for the last save and ends the threads; an interpreter that ends first loses it."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _staged(self, step: int) -> Path:
        return self.directory / f"{step}.{_SAVING}"

    def _finish(self, step: int) -> None:
        """In the background: waits for orbax, then makes the step whole and drops old ones.

        Orbax returns on process 0 only after every process has written, so no barrier is needed
        here.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)}: not written: {error}"
            ) from error
        if not is_primary():
            return
        staged, final = self._staged(step), self.directory / str(step)
        try:
            write_manifest(staged, step)
            if final.exists():  # damaged, or empty
                self._remove(final)
            staged.rename(final)
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
        """Takes the step's name away first: a removal cut short leaves no half checkpoint."""
        doomed = folder.with_name(f"{folder.name}.{_DELETING}")
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:  # NFS keeps files that are being read; a later run cleans up
            _log.warning("%s could not be removed: %s", folder, error)

    def _clean(self) -> None:
        """Removes the folders of saves and removals that an earlier process did not finish."""
        for path in self.directory.iterdir():
            step, _, rest = path.name.partition(".")
            if step.isdecimal() and rest.partition(".")[0] in (_SAVING, _DELETING):
                _log.info("removing %s, left over by an interrupted run", path)
                shutil.rmtree(path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path ("params/layers/mlp/gate"), in the order of the tree.

    The `value` inside an `nnx.Variable` is no part of the name: an `nnx.State` and its plain form
    have the same names.
    """
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in result:
            raise TypeError(f"two leaves of the state are called {name}")
        result[name] = leaf
    return result


def find(directory: Path, step: int | None = None) -> Stored:
    """A checkpoint to read from, without a model: `step`, or the newest that verifies.

    Changes nothing in `directory`. Raises `UserError` if there is none, or it is not whole.
    """
    steps = _steps(directory) if directory.is_dir() else []
    if not steps:
        raise UserError(f"{directory} holds no checkpoints")
    if step is None:
        step = _newest_whole(directory, set())
    elif step not in steps:
        raise UserError(f"{directory} holds no step {step}; it holds {_listed(map(str, steps))}")
    elif fault := find_fault(directory / str(step), step):
        raise UserError(f"checkpoint {directory / str(step)} is not whole: {fault}")
    return Stored(directory / str(step), step)


def _steps(directory: Path) -> list[int]:
    """Steps in rising order. An empty folder with a number for a name is no step."""
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and str(int(path.name)) == path.name
        if path.is_dir() and any(path.iterdir())
    )


def _newest_whole(directory: Path, damaged: set[int]) -> int:
    """The newest step that verifies, or `_NO_STEPS`; adds newer ones to `damaged`.

    Raises `UserError` if there are steps and none verifies.
    """
    faults: dict[int, str] = {}
    for step in reversed(_steps(directory)):
        fault = find_fault(directory / str(step), step)
        if fault is None:
            if faults:
                _log.warning("falling back to checkpoint %s", directory / str(step))
            return step
        _log.warning("checkpoint %s is not whole: %s", directory / str(step), fault)
        faults[step] = fault
        damaged.add(step)
    if faults:
        reasons = _listed(f"{step} ({fault})" for step, fault in faults.items())
        raise UserError(
            f"no checkpoint in {directory} is whole: {reasons}; remove them to start anew"
        )
    return _NO_STEPS


def _compare(stored: Stored, wanted: Mapping[str, Any]) -> None:
    def told(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences = [f"{name} is missing there" for name in wanted.keys() - stored.leaves.keys()]
    differences += [f"{name} is not expected" for name in stored.leaves.keys() - wanted.keys()]
    differences += [
        f"{name} is {told(stored.leaves[name])} there and {told(leaf)} here"
        for name, leaf in wanted.items()
        if name in stored.leaves and told(stored.leaves[name]) != told(leaf)
    ]
    if differences:
        raise UserError(f"checkpoint {stored.path} does not fit: {_listed(sorted(differences))}")


def _listed(items: Iterable[str], shown: int = 4) -> str:
    found = list(items)
    rest = f", and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + rest
