"""Models whose matrices are quantized in the forward pass of training."""

import functools

from sat_jax.nn.decoder import Decoder
from sat_jax.nn.fake_quantized import FakeQuantized
from sat_jax.nn.layout import Flat, Layout, make_layout
from sat_jax.nn.quantized import Bits


@functools.cache
def fake_quantized_layout(layout: Layout[Decoder], bits: Bits, group: int) -> Layout[Decoder]:
    """Return the layout of the model whose matrices of layers are `FakeQuantized`. Its arrays have
    the same paths."""
    values: Flat = dict(layout.shapes)
    for path, leaf in layout.with_role("read", "write"):
        unit_axes = len(leaf.axes) - 2
        values[path] = FakeQuantized(values[path], bits, group, unit_axes, leaf.role == "write")
    return make_layout(layout.bind(values))
