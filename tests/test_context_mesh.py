"""Rows whose tokens are split over devices: loss, gradients, what is gathered, and refusals."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from sat_jax.config_values import from_config_dict
from sat_jax.models.presets import preset
from sat_jax.nn.attention import xla
from sat_jax.nn.attention.dot_product import refusals
from sat_jax.parallel.mesh import row_share
from sat_jax.train import setup
from tests.conftest import RunPython
from tests.test_attention import (
    BACKENDS,
    HEADS,
    LENGTH,
    SEGMENTS,
    arrays,
    assert_matches,
    on,
    reference,
    with_gradients,
)
from tests.user_errors import user_error


@pytest.mark.parametrize(("start", "length", "block"), [(73, 90, 256), (91, 130, 16)])
def test_queries_that_are_a_part_of_the_row(
    monkeypatch: pytest.MonkeyPatch, start: int, length: int, block: int
) -> None:
    q, k, v, do = arrays(len(SEGMENTS), LENGTH, HEADS)
    part = slice(start, start + length)
    alone = np.zeros_like(do)  # no other query has a gradient
    alone[:, part] = do[:, part]
    o, dq, dk, dv = reference(q, k, v, alone, SEGMENTS)
    monkeypatch.setattr(xla, "BLOCK", block)
    run = with_gradients(functools.partial(xla.attend, start=start))
    assert_matches(
        run(q[:, part], k, v, do[:, part], SEGMENTS), [o[:, part], dq[:, part], dk, dv], "float32"
    )


ON_EIGHT_DEVICES = r"""
import dataclasses, json, math, re, sys
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

cases, rows, length, width = json.loads(sys.argv[1]), 8, 24, 40
model = dataclasses.replace(CONFIGS["gqa"], d_model=width, d_ff=20, n_layers=2)
params, batch = random_params(model), documents(rows, length)
batch.segment_ids[0, 20:] = 0  # padding
scored = np.random.default_rng(1).random((rows, length)) < 0.8
batch = batch._replace(loss_mask=scored & (batch.segment_ids > 0))

def value_and_grad(compute):
    layout = layout_of(model, compute)
    return jax.value_and_grad(lambda params, batch: next_token_loss(layout.bind(params), *batch)[0])

loss, gradients = jax.jit(value_and_grad(Compute(loss_chunk=4)))(params, batch)
gathered = []
for sizes, remat, microbatches in cases:
    mesh, compute = make_mesh(MeshConfig(**sizes)), Compute("float32", remat, 4)
    shardings = tree_shardings(mesh, layout_of(model), params)
    placed = jax.device_put((params, batch), (shardings, NamedSharding(mesh, BATCH)))
    function = value_and_grad(dataclasses.replace(compute, microbatches=microbatches))
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, out_shardings=(None, shardings)).lower(*placed).compile()
    actual, split = compiled(*placed)
    assert_close(actual, loss, "float32", "forward")
    for path, gradient in gradients.items():
        assert_close(split[path], gradient, "float32", "backward")
    text = compiled.as_text()
    gathers = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text)
    shapes = {(kind, tuple(map(int, shape.split(",")))) for kind, shape in gathers}
    floats = [shape for kind, shape in shapes if kind == "f32"]
    by_token = sorted(shape for shape in floats if length in shape)
    gathered.append([by_token, max(map(math.prod, floats))])
print(json.dumps(gathered))
"""

MESHES = [
    ({"context": 4, "fsdp": 2}, "none", 1),
    ({"context": 2, "pipeline": 2, "tensor": 2}, "full", 2),
]


@pytest.mark.slow
def test_tokens_of_a_row_on_several_devices(run_python: RunPython) -> None:
    """Loss and gradients of one device. Of the arrays with an entry for each token of a row, keys
    and values alone are gathered."""
    done = run_python("-c", ON_EIGHT_DEVICES, json.dumps(MESHES), devices=8)
    assert done.returncode == 0, done.stderr
    gathered = json.loads(done.stdout)
    for (shapes, largest), (sizes, _, microbatches) in zip(gathered, MESHES, strict=True):
        rows = 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1) * microbatches)
        groups = 4 // sizes.get("tensor", 1)
        assert shapes == [[rows, 24, groups, 4]], sizes
        assert largest < rows * 24 * 40, "the residual stream, in chunks"


def test_processes_of_one_group_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for context, tensor in ((1, 2), (4, 1), (4, 2)):
        mesh = types.SimpleNamespace(size=8, shape={"context": context, "tensor": tensor})
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        for process in range(4):
            monkeypatch.setattr(jax, "process_index", lambda p=process: p)
            shares.append(row_share(mesh))  # type: ignore[arg-type]
    assert shares[:4] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares[4:8] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares[8:] == [(0, 1)] * 4


def test_backends_that_need_all_queries_of_a_row_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, "tpu")
    q = jax.ShapeDtypeStruct((1, 8, 1, 1, 64), "bfloat16")
    assert refusals(q)["splash"] is None
    reasons = refusals(q, context=2)
    assert reasons["splash"] == (
        "it needs all queries of a row on one device, and mesh.context is 2"
    )
    assert reasons["xla"] is None and set(reasons) >= {name.split()[0] for name in BACKENDS}


def test_retention_is_refused() -> None:
    config = from_config_dict({"mesh": {"context": 2}})
    assert user_error(lambda: setup._check_retention(config, preset("retnet-tiny"), None)) == (
        "mesh.context 2: the state of retention passes from token to token of a row; accepted: 1"
    )
