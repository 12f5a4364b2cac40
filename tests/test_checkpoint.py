"""Checkpoints are complete or not used: damage, other shapes, partial files, retention."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sat_jax.errors import UserError
from sat_jax.train.checkpoint import Checkpoints, find, named_leaves
from tests.conftest import RunPython


class State(NamedTuple):
    params: Any
    moments: Any
    step: Any


def make_state(step: int) -> State:
    """Every kind of leaf: matrices, scalars, bfloat16, integers, numpy, empty arrays."""
    gate = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + step
    return State(
        params={"layers": {"gate": gate}, "embed": jnp.full((8, 2), 1 / 3, jnp.bfloat16)},
        moments=[{"kept": jnp.zeros((2, 0), jnp.int32)}, np.arange(5) + step],
        step=jnp.int32(step),
    )


def abstract(tree: Any) -> Any:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(leaf, tree)


def assert_same(actual: Any, desired: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for (name, a), b in zip(
        named_leaves(actual).items(), named_leaves(desired).values(), strict=True
    ):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array), name
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


GATE = "params/layers/gate"


def save_steps(directory: Path, *steps: int, keep_last: int = 9) -> None:
    with Checkpoints(directory, keep_last) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"rows": step * 8})


def read_gate(directory: Path, step: int | None = None) -> Any:
    return find(directory, step).read([GATE])[GATE]


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def largest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    meta = {"rows": 24, "plan": {"rate": 0.1, "kept": [1, 2]}, "name": "é"}
    with Checkpoints(tmp_path / "new" / "folder", keep_last=1) as checkpoints:
        assert checkpoints.newest() is None
        assert checkpoints.restore(abstract(make_state(0))) is None
        checkpoints.save(3, make_state(3), meta)
        restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None and restored.step == 3 and restored.meta == meta
    assert_same(restored.state, make_state(3))


def test_names_of_a_module_state_are_those_of_its_plain_form() -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert list(named_leaves({"params": state})) == ["params/bias", "params/kernel"]
    assert list(named_leaves({"params": nnx.as_pure(state)})) == ["params/bias", "params/kernel"]
    with pytest.raises(TypeError, match="two leaves of the state have the path a/b"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_a_module_state_comes_back(tmp_path: Path) -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert_same(restored.state, state)


def test_buffers_may_be_donated_and_overwritten_after_save(tmp_path: Path) -> None:
    @jax.jit
    def fill() -> jax.Array:
        return jnp.full((1 << 21,), 7, jnp.float32)

    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    meta: dict[str, Any] = {"rows": 1}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        device = [fill() for _ in range(4)]
        host = np.full(1 << 21, 7, np.float32)
        checkpoints.save(1, {"device": device, "host": host}, meta)
        freed = [fill(), fill()]
        checkpoints.save(2, {"device": freed, "host": host}, meta)
        for array in freed:
            array.delete()
        device = [spoil(x) for x in [*device, *(fill() for _ in freed)]]
        host[:] = -1
        meta["rows"] = -1
        jax.block_until_ready(device)
    stored = find(tmp_path)
    assert stored.meta == {"rows": 1}
    for name, array in stored.read(stored.leaves).items():
        assert (array == 7).all(), name


def test_a_restored_state_may_be_donated(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, [jnp.zeros((64, 64))], {})
        restored = checkpoints.restore(abstract([jnp.zeros((64, 64))]))
    assert restored is not None
    assert (step(step(restored.state[0])) == 2).all()


def flip(folder: Path) -> None:
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 8):
        content[place] ^= 0xFF
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    largest_file(folder / "state").unlink()


def remove_meta(folder: Path) -> None:
    (folder / "meta" / "meta.json").unlink()


def change_meta(folder: Path) -> None:
    path = folder / "meta" / "meta.json"
    path.write_text(path.read_text().replace('"rows": 24', '"rows": 25'))


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def tear_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def swap_steps(folder: Path) -> None:
    folder.rename(folder.with_name("9"))
    (folder.with_name("2")).rename(folder)
    folder.with_name("9").rename(folder.with_name("2"))


DAMAGES: dict[Callable[[Path], None], str] = {
    flip: "has another sha256",
    truncate: "bytes instead of",
    remove_file: "is missing",
    remove_meta: "meta/meta.json is missing",
    change_meta: "meta/meta.json has another sha256",
    remove_manifest: "manifest.json is missing",
    tear_manifest: "manifest.json cannot be read",
    empty_manifest: "manifest.json is damaged",
    swap_steps: "is that of step 2",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_named_and_fallen_back_from(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    whole = 1 if damage is swap_steps else 2
    with Checkpoints(tmp_path, keep_last=2) as checkpoints, caplog.at_level(logging.WARNING):
        restored = checkpoints.restore(abstract(make_state(0)))
        assert restored is not None and restored.step == whole
        assert restored.meta == {"rows": whole * 8}
        assert_same(restored.state, make_state(whole))
        assert f"checkpoint {tmp_path / '3'} is damaged" in caplog.text
        assert DAMAGES[damage] in caplog.text
        assert f"falling back to checkpoint {tmp_path / str(whole)}" in caplog.text
        with pytest.raises(UserError, match=r"3 is damaged: "):
            find(tmp_path, 3)
        # The run continues from there and saves the damaged step again.
        checkpoints.save(3, make_state(3), {"rows": 24})
        checkpoints.wait()
        assert find(tmp_path).step == 3
    assert steps_in(tmp_path) == [whole, 3]
    assert_same(read_gate(tmp_path, 3), np.asarray(make_state(3).params["layers"]["gate"]))


def test_none_whole_is_an_error_and_removes_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip(tmp_path / "1")
    remove_manifest(tmp_path / "2")
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for attempt in (checkpoints.newest, lambda: find(tmp_path)):
            with pytest.raises(UserError) as caught:
                attempt()
            assert "2 (manifest.json is missing), 1 (state/" in str(caught.value)
            assert "remove them to restart the run" in str(caught.value)
    assert steps_in(tmp_path) == [1, 2]


def test_an_empty_folder_is_no_step(tmp_path: Path) -> None:
    (tmp_path / "30").mkdir()
    with pytest.raises(UserError, match="has no checkpoints"):
        find(tmp_path)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        assert checkpoints.newest() is None
        checkpoints.save(30, make_state(30), {})
        newest = checkpoints.newest()
        assert newest is not None and newest.step == 30
        checkpoints.save(31, make_state(31), {})
        newest = checkpoints.newest()
        assert newest is not None and newest.step == 31


def test_left_overs_are_no_steps_and_are_cleaned(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for name in ("7.saving.orbax-checkpoint-tmp", "8.saving", "9.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "30").mkdir()  # a stray empty one
    (tmp_path / "notes.saving").write_text("mine")
    (tmp_path / "31").write_text("a file")
    assert find(tmp_path).step == 1
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        newest = checkpoints.newest()
        assert newest is not None and newest.step == 1
        assert {p.name for p in tmp_path.iterdir()} == {"1", "30", "31", "notes.saving"}
        checkpoints.save(30, make_state(30), {})
    assert find(tmp_path).step == 30


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [7]), (3, None, [5, 6, 7]), (1, 3, [3, 6, 7]), (2, 4, [4, 6, 7])],
)
def test_what_is_kept(
    tmp_path: Path, keep_last: int, keep_every: int | None, kept: list[int]
) -> None:
    with Checkpoints(tmp_path, keep_last, keep_every) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.int32(step)}, {})
    assert steps_in(tmp_path) == kept


def test_the_last_good_step_outlives_a_damaged_newer_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip(tmp_path / "2")
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.newest()
        assert steps_in(tmp_path) == [1, 2]
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        assert steps_in(tmp_path) == [3]


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from sat_jax.cli import run
from sat_jax.train.checkpoint import Checkpoints

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    arrays = np.random.default_rng(0).normal(size=(8, 10_000))  # does not compress
    with Checkpoints(Path(sys.argv[1]), 1) as checkpoints:
        checkpoints.save(1, {f"leaf{i}": array for i, array in enumerate(arrays)}, {})

run(main)
"""


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_one_line(
    tmp_path: Path, run_python: RunPython
) -> None:
    process = run_python("-c", FULL, str(tmp_path))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: checkpoint {tmp_path / '1'}: not written: ")
    assert "File too large" in line


def test_refusals(tmp_path: Path) -> None:
    for limits in ((0, None), (1, 0)):
        with pytest.raises(UserError, match="must be at least 1"):
            Checkpoints(tmp_path, *limits)
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        with pytest.raises(ValueError, match="step 1 is already saved"):
            checkpoints.save(1, make_state(1), {})
        with pytest.raises(TypeError, match="a/0 is a int; accepted: arrays"):
            checkpoints.save(2, {"a": [1]}, {})
        with pytest.raises(TypeError, match=r"key is a .*; accepted: arrays"):
            checkpoints.save(2, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match="not JSON compliant"):
            checkpoints.save(2, make_state(2), {"loss": float("nan")})
    assert steps_in(tmp_path) == [1]
    with pytest.raises(UserError, match=r"has no step 5; it has 1$"):
        find(tmp_path, 5)
    with pytest.raises(UserError, match="has no checkpoints"):
        find(tmp_path / "nowhere")


def test_another_structure_shape_or_dtype_is_named(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    state = make_state(1)

    def problem(target: Any) -> str:
        with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(UserError) as caught:
            checkpoints.restore(abstract(target))
        return str(caught.value).removeprefix(f"checkpoint {tmp_path / '1'} is not of this run: ")

    gate = state.params["layers"]["gate"]
    half = {**state.params, "layers": {"gate": gate.astype(jnp.bfloat16)}}
    assert problem(state._replace(params=half)) == (
        "params/layers/gate is float32[3, 4], not bfloat16[3, 4]"
    )
    wide = {**state.params, "layers": {"gate": gate.T}}
    assert problem(state._replace(params=wide)) == (
        "params/layers/gate is float32[3, 4], not float32[4, 3]"
    )
    more = {**state.params, "lm_head": gate}
    assert problem(state._replace(params=more)) == "params/lm_head is missing"
    assert problem(state._replace(params={"layers": {}})) == (
        "params/embed is not expected, params/layers/gate is not expected"
    )
    many = {f"x{i}": gate for i in range(9)}
    assert problem(state._replace(params={**state.params, **many})).endswith(", and 5 more")


def test_params_are_read_without_a_model(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    embed = find(tmp_path).read(["params/embed"])["params/embed"]
    assert type(embed) is np.ndarray and embed.dtype == jnp.bfloat16
    assert_same(read_gate(tmp_path), np.asarray(make_state(2).params["layers"]["gate"]))
    assert read_gate(tmp_path, 1)[0, 0] == 1


def test_the_manifest_covers_every_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    files = {
        p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()
    }
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["step"] == 1
