"""The configuration fields that all decoder families share."""

import dataclasses
import warnings

from sat_jax.errors import UserError
from sat_jax.nn.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and function of a decoder-only language model: everything that a checkpoint fixes.

    `family` is the Hugging Face model type. `max_positions` is the longest row in tokens.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_positions: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    family: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def rope(self) -> RopeConfig | None:
        """Rotary positions; None: positions are not rotated."""
        return None

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return 0

    @property
    def has_dynamic_rope(self) -> bool:
        """Whether angles depend on the length of a document."""
        return self.rope is not None and self.rope.scaling.by_length

    def check_length(self, name: str, length: int) -> None:
        """Raise `UserError` if a row of `length` tokens, which is called `name`, is too long, and
        warn if RoPE is not defined for it."""
        rope = self.rope
        unlimited = rope is not None and rope.scaling.unlimited
        if length > self.max_positions and not unlimited:
            raise UserError(f"{name} {length} exceeds the model's {self.max_positions} positions")
        if rope is not None and rope.defined_length is not None and length > rope.defined_length:
            warnings.warn(
                f"{name} {length}: rope type {rope.type!r} with factor {rope.factor:g} and "
                f"original_max_positions {rope.original_max_positions} is defined to "
                f"{rope.defined_length} tokens",
                stacklevel=2,
            )
