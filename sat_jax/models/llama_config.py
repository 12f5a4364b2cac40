"""What a checkpoint fixes: the shape of a model, and the function it computes."""

import dataclasses
from typing import Literal

from sat_jax.errors import UserError
from sat_jax.nn.rope import RopeConfig

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and function of a model; everything that a checkpoint fixes.

    `family` names the Hugging Face model type. `n_heads` is a multiple of `n_kv_heads`.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    family: Family = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def query_heads(self) -> int:
        """Query heads in each KV group, G."""
        return self.n_heads // self.n_kv_heads

    def check_length(self, name: str, length: int) -> None:
        """Raises `UserError` where a row of `length`, which is called `name`, is too long."""
        if length > self.max_positions:
            raise UserError(f"{name} {length} exceeds the model's {self.max_positions} positions")

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head that are rotated: all."""
        return self.head_dim
