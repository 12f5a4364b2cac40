"""The layouts of the models of a run: the trained one, with adapters where its settings ask for
them, and the teacher."""

import dataclasses
from collections.abc import Mapping

import jax

from sat_jax.compress.lora import lora_layout
from sat_jax.config import Config
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout
from sat_jax.sparsity.predictors import predictor_layout


def run_layout(
    config: Config, model: DecoderConfig, compute: Compute = Compute()
) -> Layout[Decoder]:
    """Return the layout of the arrays that a run trains or keeps frozen."""
    layout, sparse = layout_of(model, compute), config.sparsity
    if config.lora.rank:
        layout = lora_layout(layout, config.lora)
    return predictor_layout(layout, sparse.predictor_rank) if config.has_predictors else layout


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher: its model, and its parameters by path, on the mesh of the run."""

    model: DecoderConfig
    layout: Layout[Decoder]
    params: Mapping[str, jax.Array]


def teacher_layout(config: Config, model: DecoderConfig) -> Layout[Decoder]:
    """Return the layout of a teacher: as the trained model, it computes in `model.dtype` and passes
    through the pipeline. It chooses its attention backend by platform."""
    return layout_of(model, Compute(dtype=config.model.dtype, microbatches=config.train.accumulate))
