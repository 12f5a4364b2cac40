"""Neurons chosen inside a layer, from the very batch that it is about to process.

The layer's weights stay whole. What is kept is what `masks.choose` keeps for statistics of this
batch's normed inputs; then the kept rows are gathered, or what the others output is multiplied
by 0. No gradient flows through the choice; that of gathered rows is scattered into whole arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sat_jax.models.attention import Attention
from sat_jax.models.layers import Mask, WholeMatrices
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.mlp import MATRICES, MLP
from sat_jax.models.observe import attention_input, mlp_input
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.masks import Criteria, SegmentMasks, choose
from sat_jax.sparsity.neurons import compact
from sat_jax.sparsity.plan import Neurons, Plan, Segment
from sat_jax.sparsity.statistics import Statistics

Module = TypeVar("Module", Attention, MLP)

_SAVED = "kept neurons"


class _Part(NamedTuple):
    """What a module is called, what its neurons are, and what its input tells of them."""

    name: str
    neurons: str
    observe: Callable[..., dict[str, Any]]


_ATTENTION = _Part("attention", "heads", attention_input)
_MLP = _Part("mlp", "channels", mlp_input)


@dataclasses.dataclass(frozen=True)
class Live:
    """How the layers of a model choose; `balance` and `block` as in `Plan`. Static under jit."""

    criteria: Criteria
    balance: int = 1
    block: int = 1


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """How one module of one layer chooses: by a plan of this layer that keeps all of the other
    module. `masked`: it multiplies by 0/1 and gathers nothing. Static under jit."""

    part: _Part
    criteria: Criteria
    neurons: Neurons
    plan: Plan
    masked: bool

    def __call__(
        self,
        whole: Module,
        x_BTD: Float[Array, "B T D"],
        weight_BT: Float[Array, "B T"],
        key: PRNGKeyArray | None,
    ) -> tuple[Module, Int[Array, "*K kept"]]:
        """The module with the neurons that its normed input chooses, and which they are, as in
        `SegmentMasks` without the layer axis. `weight_BT` is 0 for padding and 1 for the rest."""
        if key is None:
            raise ValueError("a live model needs a key")
        mask = self._choose(_still(whole), jax.lax.stop_gradient(x_BTD), weight_BT, key)
        # The backward pass finds the indices and does not choose again, from inputs that it
        # computes again and may round otherwise.
        mask = jax.tree.map(lambda kept: checkpoint_name(kept, _SAVED), mask)
        kept: Array = getattr(mask, self.part.neurons)[0]
        module = _copy(whole) if self.masked else self._gathered(whole, mask)
        if self.masked:
            setattr(module, f"kept_{self.part.neurons}", nnx.data(Mask(kept)))
        elif isinstance(module, MLP) and module.kernels is not None:
            matrices = {name: getattr(_still(whole), name)[...] for name in MATRICES}
            module.whole = nnx.data(WholeMatrices(kept, matrices))
        return module, kept

    def _choose(
        self, still: Attention | MLP, x_BTD: Array, weight_BT: Array, key: PRNGKeyArray
    ) -> SegmentMasks:
        """As a model of one layer, of which only this module is asked for."""
        needs = METRICS[self.criteria.metric].needs
        seen = self.part.observe(needs, still, x_BTD, weight_BT)
        stats = Statistics(jnp.sum(weight_BT), **jax.tree.map(lambda x: x[None], seen))
        params = jax.tree.map(lambda w: w.astype(jnp.float32), self._params(still))
        (mask,) = choose(params, stats, self.plan, self.neurons, self.criteria, key)
        return mask

    def _gathered(self, whole: Module, mask: SegmentMasks) -> Module:
        small, _ = compact(self._params(whole), (mask,), self.plan)
        kept = {tuple(path.split("/")[3:]): value[0] for path, value in small.items()}
        module: Module = nnx.merge(nnx.split(whole)[0], unflatten_dict(kept))
        return module

    def _params(self, module: Attention | MLP) -> dict[str, Array]:
        """By path, with a layer axis."""
        values = flatten_dict(nnx.to_pure_dict(nnx.split(module)[1]))
        return {f"layers/{self.part.name}/{'/'.join(p)}": v[None] for p, v in values.items()}


def layer_choices(
    live: Live | None, config: LlamaConfig, segment: Segment, masked: bool
) -> tuple[LayerChoice | None, LayerChoice | None]:
    """How each layer of the segment chooses heads and channels; None: it keeps them all, or is
    told which."""
    if live is None:
        return None, None
    neurons = Neurons(1, config.n_kv_heads, config.query_heads, config.d_ff)
    one = dataclasses.replace(segment, start=0, stop=1)
    heads = dataclasses.replace(one, channels=neurons.channels)
    channels = dataclasses.replace(
        one, kv_groups=neurons.kv_groups, query_heads=neurons.query_heads
    )

    def choice(part: _Part, segment: Segment) -> LayerChoice | None:
        plan = Plan((segment,), live.balance, live.block)
        if neurons.is_dense(plan):
            return None
        return LayerChoice(part, live.criteria, neurons, plan, masked)

    return choice(_ATTENTION, heads), choice(_MLP, channels)


def saving_kept(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy of `jax.checkpoint` that saves which neurons were chosen, too."""
    policies = jax.checkpoint_policies
    saving: Callable[..., Any] = policies.save_from_both_policies(
        policy, policies.save_only_these_names(_SAVED)
    )
    return saving


def _copy(module: Module) -> Module:
    copy: Module = nnx.merge(*nnx.split(module))
    return copy


def _still(module: Module) -> Module:
    """The module, through which no gradient flows."""
    graph, state = nnx.split(module)
    still: Module = nnx.merge(graph, jax.lax.stop_gradient(state))
    return still
