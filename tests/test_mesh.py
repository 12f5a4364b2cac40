"""Runs on 8 virtual devices: every mesh has the losses and kept units of one device."""

import json
from typing import Any

import pytest

from sat_jax.config import MeshConfig
from sat_jax.errors import UserError
from sat_jax.parallel.mesh import make_mesh
from tests.conftest import RunPython
from tests.tolerances import assert_close

STEPS = """
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

mesh_sizes, family, sparsity = json.loads(sys.argv[1])
steps, rows, length = 4, 8, 16
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
sizes = {"vocab_size": 64, "d_model": 16, "n_layers": 2, "d_ff": 32, "max_positions": 64}
model = {
    "llama": LlamaConfig(**sizes, n_heads=8, n_kv_heads=4, head_dim=4),
    "retnet": RetNetConfig(**sizes, n_heads=4, d_value=32, chunk=8),
}[family]
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
COLLECTIVE = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
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
print(json.dumps({"losses": losses, "kept": history, "collectives": collectives}))
programs.close()
"""


MESHES: list[dict[str, int]] = [
    {"data": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "context": 2},
    {"pipeline": 2, "data": 2, "tensor": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sparsity", "meshes"),
    [
        ("llama", {"least_squares_correction": True}, MESHES),
        ("retnet", {"least_squares_correction": True}, [*MESHES[:2], MESHES[3]]),
        (
            "llama",
            {"passes": "weights", "metric": "gradient_l2", "branch_rate": 0.5},
            MESHES[:2],
        ),
        ("llama", {"token_rate": 0.5}, MESHES[:2]),
    ],
)
def test_every_mesh_trains_the_same(
    family: str, sparsity: Any, meshes: Any, run_python: RunPython
) -> None:
    results = []
    for sizes in meshes:
        done = run_python("-c", STEPS, json.dumps([sizes, family, sparsity]), devices=8)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    one, *others = results
    assert len(one["kept"][0]) == 2 and one["kept"][0] != one["kept"][2]  # the kept units change
    assert one["kept"][3] == []  # the last rung is dense
    for other in others:
        assert other["kept"] == one["kept"]
        assert other["collectives"] == []  # to compact, no weight leaves its device
        assert_close(other["losses"], one["losses"], "float32", "forward")


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=3), MeshConfig(fsdp=2), MeshConfig(data=2, tensor=2)]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: MeshConfig) -> None:
    with pytest.raises(UserError, match="does not fit 1 devices"):
        make_mesh(sizes)
