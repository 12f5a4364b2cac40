"""The layouts of the models of a run: the trained one, with adapters where its settings ask for
them, and the teacher."""

import dataclasses
from collections.abc import Mapping

import jax

from sat_jax.compress.fake_quantization import fake_quantized_layout
from sat_jax.compress.lora import lora_layout
from sat_jax.compress.packed import base_method
from sat_jax.compress.quantize import Quantization
from sat_jax.config import Config, LoraConfig
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.hidden_distillation import layer_pairs, projected_layout
from sat_jax.nn.layout import Layout
from sat_jax.nn.quantized import Packing
from sat_jax.sparsity.predictors import predictor_layout


def run_layout(
    config: Config,
    model: DecoderConfig,
    compute: Compute = Compute(),
    stored: Packing | None = None,
) -> Layout[Decoder]:
    """Return the layout of the arrays that a run trains or keeps frozen. `stored`: how the matrices
    of `model.path` are quantized; None: they are not."""
    layout, sparse = layout_of(model, compute), config.sparsity
    if config.quantization.bits is not None:
        return fake_quantized_layout(layout, config.quantization.bits, config.quantization.group)
    if not config.lora.rank:
        return layout
    layout = lora_layout(layout, config.lora, base_packing(config.lora, stored))
    return predictor_layout(layout, sparse.predictor_rank) if config.has_predictors else layout


def trained_quantization(config: Config) -> Quantization | None:
    """Return the method that quantizes the weights of a run as its forward passes do; None: these
    compute with float weights."""
    bits, group = config.quantization.bits, config.quantization.group
    return None if bits is None else Quantization("rtn", bits, group)


def base_packing(lora: LoraConfig, stored: Packing | None) -> Packing | None:
    """Return how frozen matrices of layers are quantized; None: they are not."""
    method = base_method(lora.base, lora.group)
    return stored if method is None else method.packing


def projection_shape(
    config: Config, model: DecoderConfig, teacher: DecoderConfig | None
) -> tuple[int, int, int] | None:
    """Return the shape of the projections of hidden states `[pairs, E, D]`, from the width D of the
    trained model to that of the teacher; None without projections."""
    if teacher is None or config.distill.hidden_weight == 0 or model.d_model == teacher.d_model:
        return None
    layers, teacher_layers = (layout_of(part).layers for part in (model, teacher))
    own, _ = layer_pairs(config.distill, layers, teacher_layers)
    return len(own), teacher.d_model, model.d_model


def trained_layout(
    config: Config,
    model: DecoderConfig,
    teacher: DecoderConfig | None,
    compute: Compute = Compute(),
    stored: Packing | None = None,
) -> Layout[Decoder]:
    """Return the layout of `run_layout` with what is trained beside the model, and not exported:
    the projections of its hidden states."""
    layout = run_layout(config, model, compute, stored)
    shape = projection_shape(config, model, teacher)
    return layout if shape is None else projected_layout(layout, *shape[:2])


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
