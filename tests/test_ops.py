"""Kernel execution: where it is refused. That it agrees with the others: test_invariants.py."""

from typing import Any

import jax
import pytest

from sat_jax.errors import UserError
from sat_jax.models.presets import preset
from sat_jax.ops import BlockSparse
from sat_jax.train.programs import Programs
from tests.test_config import built


@pytest.mark.parametrize(
    ("kernels", "arguments", "reason"),
    [
        (BlockSparse(64), ("float32", 576, "cpu"), None),
        (BlockSparse(128, "pallas_tpu"), ("float32", 576, "cpu"), None),  # interpreted
        (BlockSparse(64, "pallas_tpu"), ("bfloat16", 576, "tpu"), "blocks of 64, accepted mul"),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 576, "cpu"), "pallas_gpu on cpu"),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 576, "gpu"), None),
        (BlockSparse(128, "pallas_gpu"), ("bfloat16", 520, "gpu"), "rows of 520, accepted mul"),
    ],
)
def test_what_kernels_take(kernels: BlockSparse, arguments: Any, reason: str | None) -> None:
    found = kernels.refusal(*arguments)
    assert found is None if reason is None else reason in str(found)


def test_kernels_run_on_one_device() -> None:
    config = built(sparsity__rate=0.5, sparsity__execution="kernel", sparsity__block=64)
    mesh: Any = jax.sharding.AbstractMesh((2,), ("data",))
    with pytest.raises(UserError, match="'kernel' on 2 devices; accepted: one, or 'gather'"):
        Programs._kernels(config, preset("tiny"), mesh)
