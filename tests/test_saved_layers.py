"""A compression that is killed and continued, against one that is not."""

from pathlib import Path

import jax
import numpy as np
import pytest

from sat_jax.compress import Factorization, Quantization
from sat_jax.compress.layers import compress_layers
from sat_jax.compress.method import MatrixMethod
from sat_jax.compress.saved_layers import SavedLayers
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from tests.small_models import batch
from tests.test_compress_layers import LLAMA, copied


class Counted:
    """A method that counts the matrices that it compresses."""

    def __init__(self, method: MatrixMethod) -> None:
        self.method, self.calls = method, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def __call__(self, *arguments: object) -> object:
        self.calls += 1
        return self.method(*arguments)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Quantization("awq", group=8), id="awq"),
        pytest.param(Quantization("nf4", group=8), id="nf4", marks=pytest.mark.slow),
        pytest.param(Factorization("svd"), id="svd", marks=pytest.mark.slow),
    ],
)
def test_the_result_is_that_of_an_uninterrupted_run(method: MatrixMethod, tmp_path: Path) -> None:
    layout, rows = layout_of(LLAMA), [batch(LLAMA)]
    values, again = copied(LLAMA), copied(LLAMA)
    expected = list(compress_layers(layout, values, rows, method))
    saved = SavedLayers(tmp_path / "out.layers", {"bits": 4})
    first, *_ = compress_layers(layout, again, rows, method, saved)
    (saved.folder / "layer-1.safetensors").write_bytes(b"not whole")
    counted = Counted(method)
    saved = SavedLayers(tmp_path / "out.layers", {"bits": 4})
    again = copied(LLAMA)
    continued = list(compress_layers(layout, again, rows, counted, saved))
    assert counted.calls == 7  # the matrices of the second layer
    for one, other in zip(expected, continued, strict=True):
        assert (one.layer, one.removed, one.error) == (other.layer, other.removed, other.error)
        for field in ("factors", "quantized"):
            jax.tree.map(np.testing.assert_array_equal, getattr(one, field), getattr(other, field))
    assert first.error == expected[0].error
    for path, value in values.items():
        np.testing.assert_array_equal(again[path], value)
    saved.remove()
    assert not saved.folder.exists()


def test_layers_of_other_settings_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.layers"
    assert SavedLayers(folder, {"bits": 4}).count() == 0
    with pytest.raises(UserError, match=r"out\.layers: has layers of a compression with other"):
        SavedLayers(folder, {"bits": 8})
