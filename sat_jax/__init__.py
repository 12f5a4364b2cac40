"""Sparsity-Accelerated Training of Llama-family models in JAX and Flax.

`load_model(path)` reads a Hugging Face directory or a GGUF file; `save_model(model, directory)`
writes a Hugging Face directory. Both are imported when first used: `import sat_jax` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_jax.interop import load_model, save_model

__all__ = ["__version__", "load_model", "save_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("load_model", "save_model"):
        from sat_jax import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
