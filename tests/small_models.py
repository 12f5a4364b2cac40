"""Small models with random weights, larger than trained ones so that mistakes show, and a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.models.llama import LlamaConfig
from sat_jax.models.build import layout_of
from sat_jax.sparsity.masks import Masks, SegmentMasks
from sat_jax.sparsity.neurons import expand
from sat_jax.sparsity.plan import Neurons, Plan
from sat_jax.train.state import Resting, TrainState, keyed_trees

_GQA: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "n_layers": 3,
    "n_heads": 12,
    "n_kv_heads": 4,
    "head_dim": 4,
    "d_ff": 24,
    "max_positions": 32,
}
CONFIGS = {
    "mha": LlamaConfig(**_GQA | {"n_heads": 4}),
    "gqa": LlamaConfig(**_GQA),
    "bias": LlamaConfig(**_GQA, qkv_bias=True, tie_embeddings=True, family="qwen2"),
    "norm": LlamaConfig(**_GQA, qk_norm=True, family="qwen3"),
}


def neurons(config: LlamaConfig) -> Neurons:
    return Neurons(config.n_layers, config.n_kv_heads, config.query_heads, config.d_ff)


@functools.cache
def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A whole model's parameters by path."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in shapes(config).items():
        noise = rng.normal(size=shape.shape)
        if path.endswith("norm"):
            noise = 1 + 0.2 * noise
        elif path.endswith("bias"):
            noise *= 0.5
        elif path.endswith(("output", "down")):
            noise *= 0.3
        else:
            noise *= shape.shape[-1] ** -0.5
        params[path] = noise.astype(np.float32)
    return params


class Rows(NamedTuple):
    """A batch in the order in which `Llama.loss` takes it; as `sat_jax.data.batches.Batch`."""

    tokens: jax.Array
    targets: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    loss_mask: jax.Array


def batch(config: LlamaConfig) -> Rows:
    """Three rows of 10: documents of 6 and 3 tokens and one of padding; one document; padding."""
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (3, 11)).astype(np.int32)
    segment_ids = np.asarray([[1] * 6 + [2] * 3 + [0], [1] * 10, [0] * 10], np.int32)
    positions = np.asarray([[*range(6), *range(3), 0], [*range(10)], [0] * 10], np.int32)
    loss_mask = segment_ids > 0
    loss_mask[0, 5] = False  # the first document's last token has no target
    arrays = (tokens[:, :-1], tokens[:, 1:], segment_ids, positions, loss_mask)
    return Rows(*map(jnp.asarray, arrays))


def nothing_omitted(plan: Plan) -> Masks:
    """Masks that only cut the layers into the plan's segments."""
    return tuple(SegmentMasks(None, None) for _ in plan.segments)


def random_masks(config: LlamaConfig, plan: Plan, seed: int = 3, always: bool = False) -> Masks:
    """Kept neurons of a plan, balanced as it says; `always`: also where everything is kept."""
    whole, rng = neurons(config), np.random.default_rng(seed)

    def kept(lead: tuple[int, ...], total: int, keep: int, balance: int) -> jax.Array:
        size, share = total // balance, keep // balance
        indices = np.zeros((*lead, keep), np.int32)
        for place in np.ndindex(lead):
            indices[place] = np.concatenate(
                [np.sort(rng.permutation(size)[:share]) + part * size for part in range(balance)]
            )
        return jnp.asarray(indices)

    masks = []
    for segment in plan.segments:
        heads = channels = None
        if segment.query_heads < whole.query_heads:
            lead = (segment.layers, whole.kv_groups)
            heads = kept(lead, whole.query_heads, segment.query_heads, 1)
        elif always or not whole.heads_whole(segment):
            heads = kept((segment.layers,), whole.kv_groups, segment.kv_groups, plan.balance)
        if always or not whole.channels_whole(segment):
            blocks = whole.channels // plan.block, segment.channels // plan.block
            runs = kept((segment.layers,), *blocks, plan.balance)[..., None] * plan.block
            channels = (runs + jnp.arange(plan.block)[None, None]).reshape(segment.layers, -1)
        masks.append(SegmentMasks(heads, channels))
    return tuple(masks)


def expand_state(small: TrainState, resting: Resting, masks: Masks, plan: Plan) -> TrainState:
    """The inverse of `compact_state`."""
    trees, structure = keyed_trees(small)
    whole = [
        expand(tree, rest, masks, plan) if isinstance(tree, dict) else tree
        for tree, rest in zip(trees, resting, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)
