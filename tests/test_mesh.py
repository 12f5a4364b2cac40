"""Runs on 8 virtual devices: every mesh has the losses and kept units of one device."""

import json
from typing import Any

import pytest

from sat_jax.config import MeshConfig
from sat_jax.errors import UserError
from sat_jax.parallel.mesh import make_mesh
from tests.conftest import RunPython
from tests.tolerances import assert_close

ON_EIGHT_DEVICES = """
import json, math, re, sys
import jax
import numpy as np
from sat_jax.config_values import from_config_dict
from sat_jax.data.batch import Batch
from sat_jax.models.build import initial_values, layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.retnet import RetNetConfig
from sat_jax.parallel.mesh import make_mesh
from sat_jax.sparsity.controller import make_controller
from sat_jax.sparsity.execution.state import PARAMS, new_state
from sat_jax.sparsity.plan import neurons_of
from sat_jax.train.programs import Programs, compact_state

steps, rows, length = 4, 8, 16
sizes = {"vocab_size": 64, "d_model": 16, "n_layers": 2, "d_ff": 32, "max_positions": 64}
MODELS = {
    "llama": LlamaConfig(**sizes, n_heads=8, n_kv_heads=4, head_dim=4),
    "retnet": RetNetConfig(**sizes, n_heads=4, d_value=32, chunk=8),
}
COLLECTIVE = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"

def train(family, sparsity, mesh_sizes):
    config = from_config_dict({
        "train": {
            "steps": steps, "rows_per_step": rows, "accumulate": mesh_sizes.get("pipeline", 1),
        },
        "data": {"row_length": length},
        "optimizer": {"learning_rate": 1e-2},
        "sparsity": {"rate": 0.5, "rungs": 1, "refresh_every": 1, "balance": 2, "split": 0.75,
                     **sparsity},
        "mesh": mesh_sizes,
    })
    model = MODELS[family]
    devices = jax.devices()[: math.prod(mesh_sizes.values())]
    mesh = make_mesh(config.mesh, devices)
    neurons = neurons_of(layout_of(model))
    controller = make_controller(config.sparsity, neurons, steps, config.layer_rates, 2)
    programs = Programs(config, model, mesh, controller)
    place = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    # The same values on every mesh: computed on one device, then split.
    full = jax.jit(lambda: new_state(initial_values(model, 0), programs.form(()).optimizer))()
    state = jax.device_put(full, place(programs.form(()).state))
    stats = jax.device_put(jax.jit(programs.no_statistics)(), place(programs.stats))
    probe = programs.probe().result()
    draw = np.random.default_rng(0)
    sparse = controller.rung_at(0).plan
    execution = programs.execution(sparse)
    compact = lambda full, kept: compact_state(execution, full, kept)
    compiled = programs.compile(compact, programs.form(()).state, programs.kept(sparse))
    collectives = re.findall(COLLECTIVE, compiled.as_text())
    losses, history = [], []
    for step in range(steps):
        tokens = draw.integers(0, 64, (rows, length + 1), np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        ones = np.ones((rows, length), np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(bool))
        batch = jax.device_put(batch, place(programs.batch(rows)))
        rung = programs.rung(controller.rung_at(step).plan)
        if controller.refreshes(step):
            stats = probe(state.params, stats, batch, state.optimizer)
        kept = rung.select(state, stats).kept
        corrections = rung.correct(state, stats, kept)
        for path, (correction,) in corrections.items():
            assert correction.sharding == programs.form(()).state.params[path].sharding, path
        trained, omitted = rung.compact(state, kept)
        for path, moment in trained.optimizer[0].mu.items():
            pairs = zip(jax.tree.leaves(moment), jax.tree.leaves(trained.params[path]), strict=True)
            assert all(a.sharding == b.sharding for a, b in pairs), path
        trained, stats, metrics = rung.step(
            trained, stats, kept, batch, omitted[PARAMS], corrections
        )
        state = rung.expand(trained, omitted, kept)
        losses.append(float(metrics.loss))
        history.append([np.asarray(leaf).tolist() for leaf in jax.tree.leaves(kept)])
    programs.close()
    return {"losses": losses, "kept": history, "collectives": collectives}

results = [
    [train(family, sparsity, sizes) for sizes in meshes]
    for family, sparsity, meshes in json.loads(sys.argv[1])
]
print(json.dumps(results))
"""


MESHES: list[dict[str, int]] = [
    {"data": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "context": 2},
    {"pipeline": 2, "data": 2, "tensor": 2},
]
SPARSE = {"schedule": "constant"}
CORRECTED = {"least_squares_correction": True}
PASSES = {"passes": "weights", "metric": "gradient_l2", "branch_rate": 0.5}
# Family, settings of sparsity, meshes. With the first the last step is dense.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, int]]]] = {
    "corrected": ("llama", CORRECTED, MESHES),
    "retention": ("retnet", SPARSE | CORRECTED, [*MESHES[:2], MESHES[3]]),
    "passes": ("llama", SPARSE | PASSES, MESHES[:2]),
    "tokens": ("llama", SPARSE | {"token_rate": 0.5}, MESHES[:2]),
}


@pytest.fixture(scope="module")
def results(run_python: RunPython) -> dict[str, Any]:
    """Losses, kept units and collectives of each mesh, by case, from one process."""
    done = run_python("-c", ON_EIGHT_DEVICES, json.dumps(list(CASES.values())), devices=8)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_mesh_trains_the_same(case: str, results: dict[str, Any]) -> None:
    single, *meshes = results[case]
    assert len(single["kept"][0]) == 2
    assert single["kept"][0] != single["kept"][2]  # the kept units change
    assert (single["kept"][3] == []) == (case == "corrected")  # the last rung is dense
    for actual in meshes:
        assert actual["kept"] == single["kept"]
        assert actual["collectives"] == []  # to compact, no weight leaves its device
        assert_close(actual["losses"], single["losses"], "float32", "forward")


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=3), MeshConfig(fsdp=2), MeshConfig(data=2, tensor=2)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: MeshConfig) -> None:
    with pytest.raises(UserError, match="does not fit 1 devices"):
        make_mesh(sizes)
