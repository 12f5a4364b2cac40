"""Settings that exclude each other, and some that do not."""

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
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "wanda",
                "sparsity__dense_forward": True,
            },
            "sparsity.dense_forward True has no meaning with sparsity.refresh_every 0, where each"
            " layer selects from its own input; accepted: False, or refresh_every 1 or more",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__refresh_every": 0},
            "sparsity.refresh_every 0 selects before the outputs are computed that sparsity.metric"
            " 'output' needs; accepted: the metrics uniform, magnitude, wanda, maxip, svd, or"
            " refresh_every 1 or more",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "svd",
                "train__accumulate": 2,
                "train__rows_per_step": 2,
            },
            "sparsity.refresh_every 0 selects from each batch, and the microbatches of"
            " train.accumulate 2 share one selection; accepted: train.accumulate 1, or"
            " refresh_every 1 or more",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "uniform",
                "sparsity__execution": "kernel",
                "sparsity__block": 64,
            },
            "sparsity.execution 'kernel' needs kept units before the step, and"
            " sparsity.refresh_every is 0; accepted: 'gather', 'mask', or refresh_every 1 or more",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__least_squares_correction": True,
                "sparsity__dense_forward": True,
            },
            "sparsity.least_squares_correction is added to kept output weights between two probes,"
            " which sparsity.dense_forward True does not allow; accepted: least_squares_correction"
            " False, or another sparsity.dense_forward",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__least_squares_correction": True,
                "sparsity__metric": "wanda",
            },
            "sparsity.least_squares_correction needs the outputs that probes observe, and"
            " sparsity.metric 'wanda' has no probe at every refresh; accepted: the metrics output,"
            " svd, taylor",
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


def test_settings_that_fit_together() -> None:
    assert built(sparsity__split=1.0).sparsity.rate == 0
    assert built(sparsity__rate=0.5, sparsity__split=1.0, sparsity__schedule="constant")
    assert built(sparsity__rate=0.5, sparsity__rungs=1)
    late = {"sparsity__dense_start": 0.6, "sparsity__schedule": "constant"}
    assert built(sparsity__rate=0.5, **late)
    assert built(mesh__tensor=2, sparsity__balance=4)
    assert built(model__preset=None, model__path="somewhere")
    assert built(optimizer__moments="decay", sparsity__execution="mask")
