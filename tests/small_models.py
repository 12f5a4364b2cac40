"""Small models with random weights, larger than trained ones so that mistakes show, and a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sat_jax.data.batch import Batch
from sat_jax.models.build import initial_values, layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.llama import LlamaConfig
from sat_jax.nn.param import CHANNEL
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.state import OmittedState, TrainState, path_trees
from sat_jax.sparsity.plan import Neurons, Plan, neurons_of
from sat_jax.sparsity.rows import Kept

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


def neurons(config: DecoderConfig) -> Neurons:
    return neurons_of(layout_of(config))


def initial_constants(config: DecoderConfig) -> dict[str, np.ndarray]:
    """A model's arrays that are not trained, by path."""
    paths = [path for path, leaf in layout_of(config).leaves.items() if not leaf.trained]
    if not paths:
        return {}
    values = jax.jit(lambda: initial_values(config, 0))()
    return {path: np.asarray(values[path]) for path in paths}


@functools.cache
def random_params(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A full model's parameters by path."""
    rng, layout = np.random.default_rng(seed), layout_of(config)
    params = initial_constants(config)
    for path, leaf in layout.leaves.items():
        if not leaf.trained:
            continue
        shape = layout.shapes[path].shape
        noise = rng.normal(size=shape)
        if path.endswith("norm"):
            noise = 1 + 0.2 * noise
        elif leaf.role == "vector":
            noise *= 0.5
        else:
            noise *= 0.3 if leaf.role == "write" else shape[-1] ** -0.5
        params[path] = noise.astype(np.float32)
    return params


class Rows(NamedTuple):
    """A batch, with the fields of `sat_jax.data.batch.Batch`."""

    tokens: jax.Array
    targets: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    loss_mask: jax.Array


def batch(config: DecoderConfig) -> Rows:
    """Three rows of 10: documents of 6 and 3 tokens and one of padding; one document; padding."""
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (3, 11)).astype(np.int32)
    segment_ids = np.asarray([[1] * 6 + [2] * 3 + [0], [1] * 10, [0] * 10], np.int32)
    positions = np.asarray([[*range(6), *range(3), 0], [*range(10)], [0] * 10], np.int32)
    loss_mask = segment_ids > 0
    loss_mask[0, 5] = False  # the first document's last token has no target
    arrays = (tokens[:, :-1], tokens[:, 1:], segment_ids, positions, loss_mask)
    return Rows(*map(jnp.asarray, arrays))


def documents(rows: int, length: int) -> Batch:
    """Rows of two documents of random lengths without padding, numpy arrays, for all configs."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, _GQA["vocab_size"], (rows, length + 1), np.int32)
    starts = draw.integers(1, length, (rows, 1))  # of the second document of each row
    places = np.arange(length)[None]
    second = places >= starts
    positions = np.where(second, places - starts, places).astype(np.int32)
    segments = np.where(second, 2, 1).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, segments > 0)


def nothing_omitted(plan: Plan) -> Kept:
    """Kept units of a plan that omits nothing: they only split the layers into segments."""
    return tuple({} for _ in plan.segments)


def random_kept(config: DecoderConfig, plan: Plan, seed: int = 3, always: bool = False) -> Kept:
    """Kept units of a plan, balanced as it says; `always`: outermost units also where all are
    kept."""
    full, rng = neurons(config), np.random.default_rng(seed)

    def kept(lead: tuple[int, ...], total: int, keep: int, balance: int) -> np.ndarray:
        size, share = total // balance, keep // balance
        indices = np.zeros((*lead, keep), np.int32)
        for place in np.ndindex(lead):
            indices[place] = np.concatenate(
                [np.sort(rng.permutation(size)[:share]) + part * size for part in range(balance)]
            )
        return indices

    segments = []
    for segment in plan.segments:
        omitted = {unit.name for unit in full.omitted(segment)}
        chosen: dict[str, Any] = {}
        for unit in full.units:
            is_extra = (
                always
                and not unit.within
                and not omitted & {u.name for u in full.branches[unit.branch]}
            )
            if unit.name not in omitted and not is_extra:
                continue
            lead = (segment.layers, *(full.size(name) for name in unit.within))
            block = plan.block if unit.name == CHANNEL else 1
            balance = 1 if unit.within else plan.balance
            runs = kept(lead, unit.size // block, segment.kept(unit.name) // block, balance)
            places = runs[..., None] * block + np.arange(block, dtype=np.int32)
            chosen[unit.name] = jnp.asarray(places.reshape(*lead, -1))
        segments.append(chosen)
    return tuple(segments)


@functools.partial(jax.jit, static_argnums=0)
def compact_state(
    execution: Execution, full: TrainState, kept: Kept
) -> tuple[TrainState, OmittedState]:
    """The state that is trained and what is omitted of each tree, at once."""
    trees, structure = path_trees(full)
    pairs = [execution.compact(t, kept) if isinstance(t, dict) else (t, {}) for t in trees]
    return jax.tree.unflatten(structure, [p[0] for p in pairs]), [p[1] for p in pairs]


@functools.partial(jax.jit, static_argnums=0)
def expand_state(
    execution: Execution, compact: TrainState, omitted: OmittedState, kept: Kept
) -> TrainState:
    """The inverse of `compact_state`."""
    trees, structure = path_trees(compact)
    full = [
        execution.expand(tree, rest, kept) if isinstance(tree, dict) else tree
        for tree, rest in zip(trees, omitted, strict=True)
    ]
    return jax.tree.unflatten(structure, full)
