"""The layout of the model of a run, with adapters where its settings ask for them."""

from sat_jax.compress.lora import lora_layout
from sat_jax.config import Config
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout


def run_layout(
    config: Config, model: DecoderConfig, compute: Compute = Compute()
) -> Layout[Decoder]:
    """Return the layout of the arrays that a run trains or keeps frozen."""
    layout = layout_of(model, compute)
    return lora_layout(layout, config.lora) if config.lora.rank else layout
