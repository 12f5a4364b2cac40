"""SAT in a pipeline: executions on 2 virtual devices, and what is refused. Complete runs, in which
all passes gather kept units, are in `test_pipeline_runs`."""

import dataclasses
from typing import Any

import pytest

from sat_jax.config_values import from_config_dict
from sat_jax.train.setup import controller_of
from tests.conftest import RunPython
from tests.small_models import CONFIGS
from tests.user_errors import user_error

EXECUTIONS = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding
from sat_jax.config import MeshConfig
from sat_jax.data.batch import Batch
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.nn.loss import next_token_loss
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import BATCH, tree_shardings
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.plan import make_plan
from tests.small_models import CONFIGS, neurons, random_kept, random_params
from tests.tolerances import assert_close

model = dataclasses.replace(CONFIGS["gqa"], n_layers=4)
params, draw = random_params(model), np.random.default_rng(0)
tokens = draw.integers(0, 32, (4, 9), np.int32)
ones, places = np.ones((4, 8), np.int32), np.tile(np.arange(8, dtype=np.int32), (4, 1))
batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, places, ones > 0)
mesh = make_mesh(MeshConfig(pipeline=2))

def value_and_grad(execution, kept, params, batch):
    def loss(trained, state, omitted):
        bound = execution.bind(trained, state, omitted, kept, {})
        return next_token_loss(bound, *batch)[0]

    state, omitted = execution.compact(params, kept)
    trained = execution.trained(state, kept)
    value, gradients = jax.value_and_grad(loss)(trained, state, omitted)
    return value, jax.tree.leaves(gradients)

for kind, passes, dense_layers in (
    (Gather, "backward", ()), (Gather, "weights", ()), (Mask, "all", (0,)), (Mask, "backward", ()),
):
    plan = make_plan(neurons(model), 0.5, 0.5, dense_layers=dense_layers)
    kept = random_kept(model, plan)
    results = []
    for microbatches in (1, 2):
        layout = layout_of(model, Compute(microbatches=microbatches))
        run = jax.jit(functools.partial(value_and_grad, kind(layout, plan, passes), kept))
        if microbatches == 1:
            results.append(run(params, batch))
            continue
        shardings = tree_shardings(mesh, layout, params)
        with jax.set_mesh(mesh):
            placed = jax.device_put((params, batch), (shardings, NamedSharding(mesh, BATCH)))
            results.append(run(*placed))
    (loss, gradients), (actual, split) = results
    assert_close(actual, loss, "float32", "forward")
    for one, two in zip(gradients, split, strict=True):
        assert_close(two, one, "float32", "backward")
"""


@pytest.mark.slow
def test_executions_in_a_pipeline_have_the_gradients_of_one_device(run_python: RunPython) -> None:
    done = run_python("-c", EXECUTIONS, devices=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "sparsity", [{"rate": 0.5, "dense_layers": (0,)}, {"rate_mlp": (0.5, 0.0, 0.0, 0.0)}]
)
def test_stages_with_different_counts_are_refused(sparsity: dict[str, Any]) -> None:
    def controller(**more: Any) -> Any:
        settings = {
            "mesh": {"pipeline": 2},
            "train": {"accumulate": 2, "rows_per_step": 2},
            "sparsity": sparsity | more,
        }
        model = dataclasses.replace(CONFIGS["gqa"], n_layers=4)
        return controller_of(from_config_dict(settings), model)

    assert user_error(controller) == (
        "mesh.pipeline 2: layers 0 to 0, 1 to 3 keep different numbers of neurons; accepted: one"
        " rate for all layers and no sparsity.dense_layers, or sparsity.execution mask"
    )
    assert controller(execution="mask").sparse


def test_stages_that_do_not_divide_the_layers_are_refused() -> None:
    settings = {
        "mesh": {"pipeline": 2, "rounds": 2},
        "train": {"accumulate": 2, "rows_per_step": 2},
    }
    message = user_error(lambda: controller_of(from_config_dict(settings), CONFIGS["gqa"]))
    assert message == (
        "mesh.pipeline 2 × mesh.rounds 2 = 4 stages do not divide the 3 layers of the model;"
        " accepted: divisors of 3"
    )
