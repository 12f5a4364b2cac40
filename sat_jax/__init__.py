"""Sparsity-Accelerated Training of language models in JAX and Flax.

`load_model(path)` reads a Hugging Face directory, a GGUF file or the work directory of a run;
`save_model(model, directory)` writes a Hugging Face directory. `compress` is the package of
compression methods. All are imported when first used, so that `import sat_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_jax import compress
    from sat_jax.interop import save_model
    from sat_jax.train.run_weights import load_model

__all__ = ["__version__", "compress", "load_model", "save_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from sat_jax.train.run_weights import load_model

        return load_model
    if name == "save_model":
        from sat_jax.interop import save_model

        return save_model
    if name == "compress":
        return importlib.import_module("sat_jax.compress")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
