"""Settings that exclude each other, and those that only look as if they did."""

from typing import Any

import pytest

from tests.test_config import built, refusal


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__preset": None}, "model: give a preset by name or a path to pretrained weights"),
        ({"mesh__data": 0}, "mesh.data is 0; accepted: 1 or more, or -1 for all devices left"),
        (
            {"train__rows_per_step": 6, "train__accumulate": 4},
            "train.rows_per_step 6 is not a multiple of train.accumulate 4",
        ),
        (
            {"train__steps": 5, "optimizer__warmup_steps": 6},
            "optimizer.warmup_steps 6 is more than train.steps 5",
        ),
        (
            {"optimizer__decay_share": 0.5},
            "optimizer.decay_share 0.5 is for optimizer.schedule 'wsd', not 'cosine'",
        ),
        (
            {"optimizer__moments": "decay"},
            "optimizer.moments 'decay' is of sparsity.execution 'mask', not 'gather'; accepted:"
            " moments 'freeze', or execution 'mask'",
        ),
        (
            {"model__kernels": "xla"},
            "model.kernels 'xla' is for sparsity.execution 'kernel', not 'gather'",
        ),
        (
            {"sparsity__execution": "kernel", "sparsity__block": 96},
            "sparsity.execution 'kernel' with sparsity.block 96; accepted: multiples of 64",
        ),
        (
            {"sparsity__temperature": 0.5},
            "sparsity.temperature 0.5 is for sparsity.selection 'sample', not 'topk'",
        ),
        (
            {"mesh__tensor": 4, "sparsity__balance": 6},
            "sparsity.balance is 6; accepted: multiples of mesh.tensor 4, or None",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__split": 1.0},
            "sparsity.split 1.0 leaves the ladder no dense step; accepted: below 1",
        ),
        (
            {
                "sparsity__rate_mlp": 0.1,
                "sparsity__split": 1.0,
                "sparsity__schedule": "s2d",
            },
            "sparsity.split 1.0 leaves the s2d no dense step; accepted: below 1",
        ),
        (
            {
                "sparsity__rate_attention": 0.1,
                "sparsity__rungs": 1,
                "sparsity__schedule": "cosine",
            },
            "sparsity.rungs 1 leaves the cosine schedule no dense step; accepted: 2 or more",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__schedule": "auto"},
            "sparsity.schedule 'auto' follows the held-out loss, and train.eval_every is 0;"
            " accepted: 1 or more",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__patience": 2},
            "sparsity.patience and sparsity.min_gain are for sparsity.schedule 'auto', not"
            " 'ladder'",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__dense_start": 0.6},
            "sparsity.dense_start 0.6 and sparsity.split 0.5 leave the ladder no step at r0;"
            " accepted: a dense_start below split",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__dense_start": 0.5, "sparsity__schedule": "s2d"},
            "sparsity.dense_start 0.5 and sparsity.split 0.5 leave the s2d no step at r0;"
            " accepted: a dense_start below split",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__dense_start": 1.0, "sparsity__schedule": "linear"},
            "sparsity.dense_start 1.0 leaves no step at r0; accepted: below 1",
        ),
        (
            {"sparsity__rate_mlp": 0.1, "sparsity__layer_rates_mlp": (0.1,)},
            "sparsity.rate_mlp and sparsity.layer_rates_mlp are both given; accepted: one of them",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__layer_rates_attention": (0.1,),
                "sparsity__layer_rates_mlp": (0.1,),
            },
            "sparsity.rate 0.1 says nothing beside the rates of all layers; accepted: 0",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__refresh_every": 0, "sparsity__forward": "all"},
            "sparsity.refresh_every 0 is for forward passes that omit neurons, and sparsity.forward"
            " is 'all'; accepted: 'kept', or another sparsity.refresh_every",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__compensate": True, "sparsity__forward": "all"},
            "sparsity.compensate adds to the kept rows of output matrices what probes tell of the"
            " omitted ones, for which sparsity.forward 'all' leaves no place; accepted: compensate"
            " False, or another sparsity.forward",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__compensate": True, "sparsity__metric": "wanda"},
            "sparsity.compensate needs outputs, which probes see, and sparsity.metric 'wanda' has"
            " none at every refresh; accepted: the metrics output, svd, taylor",
        ),
        (
            {"sparsity__layer_rates_mlp": (0.1, 1.1)},
            "sparsity.layer_rates_mlp is (0.1, 1.1); accepted: floats separated by commas >= 0,"
            " <= 1",
        ),
        ({"sparsity": 3}, "sparsity is 3; accepted: a group of settings"),
    ],
)
def test_settings_that_do_not_fit_together(values: dict[str, Any], message: str) -> None:
    assert refusal(lambda: built(**values)) == message


def test_settings_that_only_look_as_if_they_did_not_fit() -> None:
    assert built(sparsity__split=1.0).sparsity.rate == 0
    assert built(sparsity__rate=0.5, sparsity__split=1.0, sparsity__schedule="constant")
    assert built(sparsity__rate=0.5, sparsity__rungs=1)
    late = {"sparsity__dense_start": 0.6, "sparsity__schedule": "constant"}
    assert built(sparsity__rate=0.5, **late)
    assert built(mesh__tensor=2, sparsity__balance=4)
    assert built(model__preset=None, model__path="somewhere")
    assert built(optimizer__moments="decay", sparsity__execution="mask")
