"""The one tolerance table. It is never loosened to make a test pass.

An array passes where  max |actual - desired| <= absolute + relative * max |desired|.
The error is measured against the largest entry because a float32 sum is rounded relative to its
summands: entry by entry, a relative bound means nothing for a result that is near zero.

`dtype` is the one that the computation under test runs in, `direction` what was computed:
  forward        outputs of a function or a model: activations, logits, losses
  backward       gradients, entry by entry
  gradient_norm  L2 norms of whole gradients, one at a time: the rounding errors average out
  product        a sum of products rounded once to its dtype, and gradients through two of them
  retention      one form of retention against another, after the norm of its heads, and gradients
  exact          the same shape, dtype and values (NaN equals NaN)

float64 is for formulas in Python and NumPy, whose order of operations may differ. The other values
come from the golden Llama models (3 layers, width 64, weights larger than trained
ones) against the same models in float64:
  float32   Two independent implementations were within 2.0e-5 of all logits (the largest is
            10.1), within 4e-6 of every gradient's largest entry and 1.4e-6 of its norm. An
            RMSNorm eps wrong by a factor of ten moves the logits by 9e-4, 40 times as much.
  bfloat16  With all but the loss in bfloat16 (8 bits, up to 4e-3 a rounding): within 5.7 % of the
            largest logit, 12 % of a gradient's largest entry and 3.7 % of its norm. A swapped
            matrix or a missing rotation moves the logits by 70 % and more.
Those of products come from the block-sparse kernels, 64 to 512 summands: within 1.1e-6 (float32),
7.2e-3 (bfloat16) and 6.1e-4 (float16) of the largest entry of the same with float32 operands; a
block left out of eight moves it by 30 %.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Direction = Literal["forward", "backward", "gradient_norm", "product", "retention", "exact"]


class Tolerance(NamedTuple):
    absolute: float
    relative: float


TOLERANCES: dict[tuple[str, Direction], Tolerance] = {
    ("float64", "forward"): Tolerance(0.0, 1e-12),
    ("float32", "forward"): Tolerance(2e-5, 1e-6),
    ("float32", "backward"): Tolerance(0.0, 5e-6),
    ("float32", "gradient_norm"): Tolerance(0.0, 2e-6),
    ("bfloat16", "forward"): Tolerance(0.0, 6e-2),
    ("bfloat16", "backward"): Tolerance(0.0, 1.2e-1),
    ("bfloat16", "gradient_norm"): Tolerance(0.0, 4e-2),
    ("float64", "retention"): Tolerance(0.0, 1e-10),
    ("float32", "retention"): Tolerance(0.0, 5e-5),
    ("float32", "product"): Tolerance(0.0, 5e-6),
    ("bfloat16", "product"): Tolerance(0.0, 1.2e-2),
    ("float16", "product"): Tolerance(0.0, 1.5e-3),
}


def assert_close(actual: ArrayLike, desired: ArrayLike, dtype: str, direction: Direction) -> None:
    """Fails unless both have one shape and agree within TOLERANCES[dtype, direction]."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape, f"shape {actual.shape}, expected {desired.shape}"
    if direction == "exact":
        assert (str(actual.dtype), str(desired.dtype)) == (dtype, dtype)
        if actual.dtype.kind == "V":  # bfloat16, whose NaN NumPy does not know; widening is exact
            actual, desired = actual.astype(np.float32), desired.astype(np.float32)
        np.testing.assert_array_equal(actual, desired)
        return
    absolute, relative = TOLERANCES[dtype, direction]
    actual, desired = actual.astype(np.float64), desired.astype(np.float64)
    assert np.isfinite(desired).all(), "the expected values are not finite; compare them exactly"
    scale = np.abs(desired).max(initial=0.0)
    np.testing.assert_allclose(
        actual, desired, rtol=0.0, atol=absolute + relative * scale, err_msg=f"{dtype} {direction}"
    )
