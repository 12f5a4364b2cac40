"""Memory of a pipeline: temporaries of the gradients, from the memory analysis of XLA."""

import json

import pytest

from tests.conftest import RunPython

DEVICES, ROWS, LENGTH = 2, 2, 16  # rows and tokens of a microbatch

TEMPORARIES = """
import dataclasses, json, sys
import jax, numpy as np
from jax.sharding import NamedSharding
from sat_jax.config import MeshConfig
from sat_jax.data.batch import Batch
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.nn.loss import next_token_loss
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import BATCH, tree_shardings
from tests.small_models import CONFIGS

devices, rows, length, cases = json.loads(sys.argv[1])
model = dataclasses.replace(CONFIGS["gqa"], n_layers=4, d_ff=256)
mesh = make_mesh(MeshConfig(pipeline=devices))

def temporaries(remat, rounds, microbatches):
    layout = layout_of(model, Compute(remat=remat, microbatches=microbatches, loss_chunk=8))
    params = {
        path: rounds * (jax.ShapeDtypeStruct((4 // rounds, *shape.shape[1:]), shape.dtype),)
        if layout.leaves[path].in_layers else shape
        for path, shape in layout.shapes.items()
    }
    numbers = jax.ShapeDtypeStruct((rows * microbatches, length), np.int32)
    batch = Batch(numbers, numbers, numbers, numbers, jax.ShapeDtypeStruct(numbers.shape, bool))
    shardings = tree_shardings(mesh, layout, params), NamedSharding(mesh, BATCH)

    def gradients(params, batch):
        return jax.grad(lambda params: next_token_loss(layout.bind(params), *batch)[0])(params)

    with jax.set_mesh(mesh):
        step = jax.jit(gradients, in_shardings=shardings, out_shardings=shardings[0])
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

print(json.dumps([temporaries(*case) for case in cases]))
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_microbatches(run_python: RunPython) -> None:
    """With remat `full` a device has for each microbatch its input of each of the device's stages,
    and a share of the rows before and after the pipeline and of their gradients."""
    few, more = 8, 16
    cases = [("full", 1, few), ("full", 1, more), ("full", 2, few), ("full", 2, more)]
    cases.append(("none", 1, more))
    done = run_python(
        "-c", TEMPORARIES, json.dumps([DEVICES, ROWS, LENGTH, cases]), devices=DEVICES
    )
    assert done.returncode == 0, done.stderr
    # The residual stream, segment numbers, cosines and sines.
    inputs = ROWS * LENGTH * 4 * (16 + 1 + 4)
    sizes = [size / inputs for size in json.loads(done.stdout)]
    gpipe, circular = ((sizes[n + 1] - sizes[n]) / (more - few) for n in (0, 2))
    streams = 4 / DEVICES
    assert gpipe <= 1 + streams
    assert circular <= 2 + streams
    # With the activations of all layers.
    assert (sizes[4] - sizes[1]) / more > 9 * (1 + streams)
