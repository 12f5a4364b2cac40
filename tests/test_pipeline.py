"""Pipeline parallelism on 8 virtual devices: loss, gradients, communication, and refusals."""

import json

import jax
import pytest
from jax.sharding import AxisType

from sat_jax.config_values import from_config_dict
from sat_jax.models.build import layout_of
from sat_jax.nn.pipeline import number_of_stages
from sat_jax.parallel.mesh import AXES
from sat_jax.parallel.rules import check_divisible, parameter_spec
from tests.conftest import RunPython
from tests.small_models import CONFIGS
from tests.user_errors import user_error

ON_EIGHT_DEVICES = r"""
import dataclasses, json, re, sys
import jax, numpy as np
from jax.sharding import NamedSharding
from sat_jax.config import MeshConfig
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Compute
from sat_jax.nn.loss import next_token_loss
from sat_jax.parallel.mesh import make_mesh
from sat_jax.parallel.rules import BATCH, tree_shardings
from tests.small_models import CONFIGS, documents, random_params
from tests.tolerances import assert_close

rows, length = 16, 12
batch = documents(rows, length)
batch.segment_ids[0] = 0  # padding
batch.loss_mask[0] = False

def value_and_grad(model, compute):
    layout = layout_of(model, compute)
    return jax.value_and_grad(lambda params, batch: next_token_loss(layout.bind(params), *batch)[0])

def compiled_pipeline(sizes, remat, microbatches, family, rounds):
    # Return the program, after a comparison of its results with those of one device.
    model = dataclasses.replace(CONFIGS[family], n_layers=4)
    params = random_params(model)
    # On one device, row by row, which rounds less than all rows in one product.
    reference = jax.jit(value_and_grad(model, Compute(loss_chunk=8)))
    parts = [reference(params, jax.tree.map(lambda a: a[row, None], batch)) for row in range(rows)]
    loss, gradients = jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=np.float64), *parts)
    mesh, layout = make_mesh(MeshConfig(**sizes)), layout_of(model)
    pipelined = value_and_grad(
        model, Compute(remat=remat, loss_chunk=8, microbatches=microbatches)
    )
    segments = {
        path: tuple(np.split(value, rounds)) if layout.leaves[path].in_layers else value
        for path, value in params.items()
    }
    shardings = tree_shardings(mesh, layout, segments)
    with jax.set_mesh(mesh):
        placed = jax.device_put((segments, batch), (shardings, NamedSharding(mesh, BATCH)))
        traced = jax.jit(pipelined, out_shardings=(None, shardings)).trace(*placed)
        compiled = traced.lower().compile()
        actual, split = compiled(*placed)
    assert_close(actual, loss, "float32", "forward")
    for path, gradient in gradients.items():
        parts = split[path] if layout.leaves[path].in_layers else (split[path],)
        assert_close(np.concatenate(parts), gradient, "float32", "backward")
    lengths = re.findall(r"length=(\d+)", str(traced.jaxpr))
    assert str(rounds * microbatches + sizes["pipeline"] - 1) in lengths, lengths
    return compiled

def groups(line):
    # Devices that communicate with each other, a row for each group.
    if lists := re.search(r"(?:replica_groups|source_target_pairs)={({.*?})}", line):
        return json.loads("[" + lists[1].replace("{", "[").replace("}", "]") + "]")
    grid = re.search(r"replica_groups=\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", line)
    if grid is None:
        return [range(8)]
    shape, dims, order = (part and json.loads(f"[{part}]") for part in grid.groups())
    return np.arange(8).reshape(dims).transpose(order).reshape(shape).tolist()

COLLECTIVE = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"

def between_stages(text, stages):
    # Communication of different stages, inside the pipeline and outside it.
    inside, outside = set(), set()
    for line in text.splitlines():
        kind = re.search(rf" ({COLLECTIVE})(?:-start)?\(", line)
        if kind and any(len({d * stages // 8 for d in group}) > 1 for group in groups(line)):
            (inside if "/shard_map/" in line else outside).add(kind[1])
    return sorted(inside), sorted(outside)

print(json.dumps([
    between_stages(compiled_pipeline(*case).as_text(), case[0]["pipeline"])
    for case in json.loads(sys.argv[1])
]))
"""


# Mesh, remat, microbatches, model, rounds.
CASES: list[tuple[dict[str, int], str, int, str, int]] = [
    ({"pipeline": 2, "data": 2, "tensor": 2}, "none", 4, "gqa", 2),
    ({"pipeline": 4, "data": 2}, "full", 8, "bias", 1),
    ({"pipeline": 2, "data": 2, "fsdp": 2}, "dots", 2, "norm", 1),
]


@pytest.mark.slow
def test_a_pipeline_has_the_loss_and_gradients_of_one_device(run_python: RunPython) -> None:
    done = run_python("-c", ON_EIGHT_DEVICES, json.dumps(CASES), devices=8)
    assert done.returncode == 0, done.stderr
    for (sizes, *_), (inside, outside) in zip(CASES, json.loads(done.stdout), strict=True):
        assert inside == ["collective-permute"]
        if "fsdp" not in sizes:  # whose embedding is gathered
            assert outside == ["all-reduce"]  # gradients outside the layers, and the loss


def test_stages_split_the_layers() -> None:
    layout = layout_of(CONFIGS["gqa"])
    for path, leaf in layout.leaves.items():
        spec = parameter_spec(layout, path, len(leaf.axes))
        assert (spec[0] == "pipeline") == leaf.in_layers, path


def test_stages_are_counted_only_outside_a_pipeline() -> None:
    assert number_of_stages() == 1
    mesh = jax.sharding.AbstractMesh((2, 1), ("pipeline", "data"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert number_of_stages() == 2


def test_stages_that_do_not_divide_the_layers_are_refused() -> None:
    mesh = jax.sharding.AbstractMesh((2, *[1] * (len(AXES) - 1)), AXES)
    message = user_error(lambda: check_divisible(mesh, layout_of(CONFIGS["gqa"])))
    assert message.startswith("mesh.pipeline = 2 does not divide the 3 of axis layer of layers/")


FOUR = {"train": {"accumulate": 4, "rows_per_step": 4}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": {"accumulate": 2, "rows_per_step": 2}},
            "train.accumulate 2 is the number of microbatches of mesh.pipeline 4; accepted:"
            " multiples of 4",
        ),
        (
            FOUR | {"sparsity": {"rate_mlp": 0.5, "metric": "wanda"}},
            "sparsity.metric 'wanda' excludes mesh.pipeline 4: stages do not observe the inputs of"
            " training steps; accepted: uniform, magnitude, output, svd, sparselora, taylor",
        ),
        (
            FOUR | {"mesh": {"pipeline": 4, "rounds": 2}, "sparsity": {"execution": "mask"}},
            "sparsity.execution 'mask' excludes mesh.rounds 2: masked layers are not split into"
            " rounds; accepted: gather, or mesh.rounds 1",
        ),
        ({"mesh": {"rounds": 2}}, "mesh.rounds 2 needs mesh.pipeline 2 or more, not 1"),
        (
            FOUR | {"sparsity": {"rate": 0.5, "refresh_every": 0}},
            "sparsity.refresh_every 0 excludes mesh.pipeline 4: all microbatches share one"
            " selection; accepted: refresh_every 1 or more",
        ),
    ],
)
def test_settings_without_a_pipeline_are_refused(settings: dict, message: str) -> None:
    settings = {"mesh": {"pipeline": 4}} | settings
    assert user_error(lambda: from_config_dict(settings)) == message
