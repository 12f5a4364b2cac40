"""Settings that exclude each other, and some that do not."""

from typing import Any

import pytest

from tests.test_config import built, refusal


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__preset": None}, "model: set preset to a name or path to pretrained weights"),
        ({"mesh__data": 0}, "mesh.data is 0; accepted: 1 or more, or -1 for all remaining devices"),
        (
            {"train__rows_per_step": 6, "train__accumulate": 4},
            "train.rows_per_step 6 is not a multiple of train.accumulate 4",
        ),
        (
            {"train__steps": 5, "optimizer__warmup_steps": 6},
            "optimizer.warmup_steps 6 is more than train.steps 5",
        ),
        ({"model__rope_factor": 2.0}, "model.rope_factor 2 needs model.rope_type"),
        (
            {"mesh__context": 3},
            "data.row_length 1024 is not a multiple of mesh.context 3",
        ),
        (
            {"data__format": "messages", "data__min_document_tokens": 9},
            "data.min_document_tokens 9 has no effect with data.format 'messages'; it is used by"
            " text",
        ),
        ({"data__pose_length": 512}, "data.pose_length 512 is below data.row_length 1024"),
        (
            {"optimizer__decay_share": 0.5},
            "optimizer.decay_share 0.5 needs optimizer.schedule 'wsd', not 'cosine'",
        ),
        (
            {"optimizer__moments": "decay"},
            "optimizer.moments 'decay' needs sparsity.execution 'mask', not 'gather'",
        ),
        (
            {"model__kernels": "xla"},
            "model.kernels 'xla' needs sparsity.execution 'kernel', not 'gather', or"
            " sparsity.weights.density below 1",
        ),
        (
            {"sparsity__execution": "kernel", "sparsity__block": 96},
            "sparsity.execution 'kernel' with sparsity.block 96; accepted: multiples of 64",
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
            "sparsity.schedule 'auto' needs held-out evaluations, and train.eval_every is 0;"
            " accepted: 1 or more",
        ),
        (
            {"sparsity__min_gain": 0.1},
            "sparsity.min_gain 0.1 needs sparsity.schedule 'auto', not 'ladder'",
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
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "wanda",
                "sparsity__passes": "backward",
            },
            "sparsity.refresh_every 0 does not use sparsity.passes 'backward'; accepted: 'all'",
        ),
        *(
            (
                {
                    "sparsity__rate": 0.1,
                    "sparsity__refresh_every": 0,
                    "sparsity__metric": "wanda",
                    f"sparsity__{name}": value,
                },
                f"sparsity.refresh_every 0 does not use sparsity.{name} {value}; accepted:"
                f" {default}",
            )
            for name, value, default in (("probe_tokens", 64, 1024), ("stats_decay", 0.5, 0.9))
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__refresh_every": 0},
            "sparsity.refresh_every 0 excludes sparsity.metric 'output', which needs outputs;"
            " accepted: uniform, magnitude, wanda, maxip, svd, sparselora",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "svd",
                "train__accumulate": 2,
                "train__rows_per_step": 2,
            },
            "sparsity.refresh_every 0 excludes train.accumulate 2: all microbatches share one"
            " selection; accepted: train.accumulate 1",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__refresh_every": 0,
                "sparsity__metric": "uniform",
                "sparsity__execution": "kernel",
                "sparsity__block": 64,
            },
            "sparsity.refresh_every 0 excludes sparsity.execution 'kernel': kernels need kept units"
            " before the step",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__least_squares_correction": True,
                "sparsity__passes": "backward",
            },
            "sparsity.least_squares_correction True excludes sparsity.passes 'backward': dense"
            " passes need no correction",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__passes": "weights",
                "sparsity__execution": "kernel",
                "sparsity__block": 64,
            },
            "sparsity.passes 'weights' excludes sparsity.execution 'kernel': kernels compute kept"
            " units alone",
        ),
        (
            {"sparsity__rate": 0.1, "sparsity__metric": "update_gain"},
            "sparsity.metric 'update_gain' excludes sparsity.passes 'all': it measures the updates"
            " of neurons, not what their omission does to the forward pass; accepted: passes"
            " backward or weights, or metric uniform, magnitude, wanda, maxip, output, svd,"
            " sparselora, taylor",
        ),
        (
            {
                "sparsity__branch_rate": 0.1,
                "optimizer__moments": "decay",
                "sparsity__execution": "mask",
            },
            "sparsity.branch_rate 0.1 excludes optimizer.moments decay; accepted: freeze",
        ),
        (
            {"sparsity__branch_rate": 0.1, "sparsity__weights__density": 0.5},
            "sparsity.branch_rate 0.1 excludes sparsity.weights.density 0.5; accepted: 1",
        ),
        *(
            (
                {"sparsity__rate": 0.1, "sparsity__token_rate": 0.5, **values},
                f"sparsity.token_rate 0.5 excludes {excluded}",
            )
            for values, excluded in (
                (
                    {"sparsity__passes": "weights"},
                    "sparsity.passes weights; accepted: all or backward",
                ),
                (
                    {"sparsity__refresh_every": 0, "sparsity__metric": "wanda"},
                    "sparsity.refresh_every 0; accepted: 1 or more",
                ),
                (
                    {"sparsity__execution": "kernel", "sparsity__block": 64},
                    "sparsity.execution kernel; accepted: gather or mask",
                ),
            )
        ),
        *(
            (
                {"sparsity__rate": 0.1, "sparsity__token_skip_rate": 0.5, **values},
                f"sparsity.token_skip_rate 0.5 excludes {excluded}",
            )
            for values, excluded in (
                ({"sparsity__execution": "mask"}, "sparsity.execution mask; accepted: gather"),
                ({"mesh__context": 2}, "mesh.context 2; accepted: 1"),
                (
                    {"mesh__pipeline": 2, "train__accumulate": 2, "train__rows_per_step": 2},
                    "mesh.pipeline 2; accepted: 1",
                ),
                (
                    {"sparsity__refresh_every": 0, "sparsity__metric": "magnitude"},
                    "sparsity.refresh_every 0; accepted: 1 or more",
                ),
                (
                    {"sparsity__metric": "wanda"},
                    "sparsity.metric wanda; accepted: uniform, magnitude, output, svd, sparselora,"
                    " taylor",
                ),
                ({"sparsity__token_rate": 0.1}, "sparsity.token_rate 0.1; accepted: 0"),
            )
        ),
        (
            {"sparsity__branch_rate": ()},
            "sparsity.branch_rate has no value; accepted: one, or one for each layer",
        ),
        (
            {"sparsity__branch_rate": 0.1, "sparsity__split": 1.0},
            "sparsity.split 1.0 leaves the ladder no dense step; accepted: below 1",
        ),
        (
            {
                "sparsity__rate": 0.1,
                "sparsity__least_squares_correction": True,
                "sparsity__metric": "wanda",
            },
            "sparsity.least_squares_correction excludes sparsity.metric 'wanda', which has no probe"
            " at refreshes; accepted: output, svd, sparselora, taylor",
        ),
        (
            {"sparsity__rate_mlp": (0.1, 1.1)},
            "sparsity.rate_mlp is (0.1, 1.1); accepted: float or floats separated by commas >= 0,"
            " <= 1, or None",
        ),
        (
            {"sparsity__weights__density": 0.25, "sparsity__rate": 0.5},
            "sparsity.weights.density 0.25 excludes omission rates above 0 (0.5): units are rows of"
            " dense matrices; accepted: one of the two",
        ),
        (
            {"sparsity__weights__density": 0.25, "sparsity__execution": "mask"},
            "sparsity.weights.density 0.25 excludes sparsity.execution 'mask', a setting of omitted"
            " units; accepted: 'gather'",
        ),
        (
            {"sparsity__weights__density": 0.25, "sparsity__dense_layers": (0,)},
            "sparsity.weights.density 0.25 excludes sparsity.dense_layers (0,), a setting of"
            " omitted units; accepted: ()",
        ),
        (
            {"sparsity__weights__drop_fraction": 0.5},
            "sparsity.weights.drop_fraction 0.5 needs sparsity.weights.update 'rigl', not 'none'",
        ),
        (
            {"sparsity__weights__density": 0.25, "sparsity__split": 1.0},
            "sparsity.split 1.0 leaves the ladder no dense step; accepted: below 1",
        ),
        (
            {"sparsity__weights__density": 0.0},
            "sparsity.weights.density is 0.0; accepted: float > 0, <= 1",
        ),
        (
            {"model__path": "somewhere", "model__d_ff": 64},
            "model.d_ff changes the shape of a preset, and model.path 'somewhere' has its own;"
            " accepted: one of the two",
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
    assert built(sparsity__weights__density=0.5, model__kernels="xla").stores_blocks
    assert built(model__preset=None, model__path="somewhere")
    assert built(optimizer__moments="decay", sparsity__execution="mask")
