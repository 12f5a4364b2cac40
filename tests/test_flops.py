"""FLOPs a token against the traced model (exactly), the compiled one, and numbers by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sat_jax.data.batch import Batch
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.models.presets import PRESETS
from sat_jax.nn.attention.xla import BLOCK
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.layout import Layout
from sat_jax.nn.loss import next_token_loss
from sat_jax.nn.stack import Remat
from sat_jax.ops import KernelConfig
from sat_jax.sparsity.choose import Criteria
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.dynamic import Dynamic
from sat_jax.sparsity.execution.gather import Gather
from sat_jax.sparsity.execution.kernel import Kernel
from sat_jax.sparsity.execution.mask import Mask
from sat_jax.sparsity.flops import (
    FlopCount,
    correction_flops,
    forward_flops,
    probe_flops,
    speedup_bound,
    traced_flops,
    training_flops,
)
from sat_jax.sparsity.plan import Plan, Segment
from sat_jax.sparsity.statistics import Observable
from sat_jax.train.costs import observation_flops
from sat_jax.train.probe import observe_batch
from tests.conftest import slow_after
from tests.small_models import CONFIGS, nothing_omitted, random_kept
from tests.tolerances import assert_close

GQA = CONFIGS["gqa"]  # 3 layers; 4 KV groups of 3 query heads of 4; 24 channels; width 16
LAYOUT = layout_of(GQA)


def segment(start: int, stop: int, *counts: int) -> Segment:
    """`counts` of KV groups, query heads in each group, and channels."""
    return Segment(start, stop, tuple(zip(LAYOUT.units, counts, strict=True)))


PLANS: dict[str, tuple[Segment, ...]] = {
    "dense": (segment(0, 3, 4, 3, 24),),
    "groups": (segment(0, 1, 4, 3, 24), segment(1, 3, 2, 3, 24)),
    "query heads": (segment(0, 3, 4, 1, 24),),
    "channels": (segment(0, 2, 4, 3, 8), segment(2, 3, 4, 3, 24)),
    "both": (segment(0, 1, 1, 3, 8), segment(1, 2, 4, 3, 24), segment(2, 3, 4, 2, 16)),
}
REMATS: list[Remat] = ["none", "dots", "full"]
ROWS, LENGTH = 2, 40  # one attention block
TOKENS = ROWS * LENGTH
# Inside one block of attention every query meets every key: as many pairs as the causal half has
# in rows of this length.
COMPUTED = 2 * LENGTH - 1

Make = Callable[[Layout[Decoder], Plan], Execution]
BACKWARD: dict[str, Make] = {
    "gather": lambda layout, plan: Gather(layout, plan, "backward"),
    "kernel": lambda layout, plan: Kernel(layout, plan, "backward", KernelConfig(8, "xla")),
}
# Norms of weights are no matrix products: scoring in the layers is not counted.
CRITERIA = Criteria("magnitude")
COMPUTES_ALL: dict[str, Make] = {
    "mask": Mask,
    "dynamic mask": lambda layout, plan: Dynamic(layout, plan, criteria=CRITERIA, masked=True),
}
COMPUTES_KEPT: dict[str, Make] = {
    "gather": Gather,
    "kernel": lambda layout, plan: Kernel(layout, plan, kernel=KernelConfig(8, "xla")),
    "dynamic gather": lambda layout, plan: Dynamic(layout, plan, criteria=CRITERIA),
}


class Traced:
    """A plan's programs by shape alone."""

    def __init__(
        self,
        config: LlamaConfig,
        segments: tuple[Segment, ...],
        make: Make = Gather,
        remat: Remat = "none",
        rows: int = ROWS,
        length: int = LENGTH,
    ):
        layout, plan = layout_of(config, Compute(remat=remat)), Plan(segments, block=8)
        self.execution = make(layout, plan)
        is_dynamic = isinstance(self.execution, Dynamic)
        self.kept = nothing_omitted(plan) if is_dynamic else random_kept(config, plan)
        self.values = jax.eval_shape(
            lambda params: self.execution.compact(params, self.kept), dict(layout.shapes)
        )
        self.tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        self.mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)

    def bind(self, trained: Any, values: Any) -> Decoder:
        return self.execution.bind(trained, *values, self.kept, {})

    @property
    def logits(self) -> tuple[Any, ...]:
        """Function and arguments."""
        return lambda v, t: self.bind({}, v)(t), self.values, self.tokens

    @property
    def hidden(self) -> tuple[Any, ...]:
        return lambda v, *t: self.bind({}, v).hidden(*t)[0], self.values, *[self.tokens] * 3

    @property
    def step(self) -> tuple[Any, ...]:
        selection = self.execution.selection
        options = {"selection": selection, "key": jax.random.key(0)} if selection else {}

        def gradients(values: Any, *batch: Any) -> Any:
            def loss(trained: Any) -> Any:
                return next_token_loss(self.bind(trained, values), *batch, **options)[0]

            return jax.value_and_grad(loss)(self.execution.trained(values[0], self.kept))

        return gradients, self.values, *[self.tokens] * 4, self.mask


def compiled_flops(function: Any, *arguments: Any) -> float:
    """What XLA reports of the compiled program; it counts the body of a loop once."""
    fast = {"xla_backend_optimization_level": 0}  # saves on machine code, which comes after
    return jax.jit(function).lower(*arguments).compile(fast).cost_analysis()["flops"]


def test_a_layer_by_hand() -> None:
    config = LlamaConfig(
        vocab_size=7, d_model=3, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=5, d_ff=11,
        max_positions=8,
    )  # fmt: skip
    # One query meets one key. Queries and outputs 4 · 5 wide, keys and values 2 · 5.
    assert forward_flops(layout_of(config), 1) == FlopCount(
        read=2 * 2 * 3 * (20 + 10 + 10 + 11 + 11),
        write=2 * 2 * 3 * (20 + 11),
        mixing=2 * 2 * (20 + 20),
        head=2 * 3 * 7,
        last_write=2 * 2 * 3 * 11,
        mlp_read=2 * 2 * 3 * (11 + 11),
    )


def test_attention_counts_the_causal_half() -> None:
    pairs = sum(1 for query in range(40) for key in range(40) if key <= query)
    heads = GQA.n_layers * GQA.n_heads
    expected = heads * 2 * 2 * GQA.head_dim * pairs / 40
    assert forward_flops(LAYOUT, 40).mixing == expected


@pytest.mark.parametrize("plan", PLANS)
def test_forward_counts_every_matrix_product(plan: str) -> None:
    model, expected = Traced(GQA, PLANS[plan]), forward_flops(LAYOUT, COMPUTED, PLANS[plan])
    assert traced_flops(*model.logits) == ROWS * LENGTH * expected.total
    assert traced_flops(*model.hidden) == ROWS * LENGTH * expected.layers


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("plan", slow_after(1, "both", *(name for name in PLANS if name != "both")))
@pytest.mark.parametrize("execution", COMPUTES_KEPT)
def test_training_counts_every_matrix_product(execution: str, plan: str, remat: Remat) -> None:
    model = Traced(GQA, PLANS[plan], COMPUTES_KEPT[execution], remat)
    kernels = execution == "kernel"
    expected = training_flops(LAYOUT, COMPUTED, PLANS[plan], remat, kernels=kernels)
    assert_close(traced_flops(*model.step), ROWS * LENGTH * expected.total, "float64", "forward")


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("execution", slow_after(1, *COMPUTES_ALL))
def test_masks_compute_everything(execution: str, remat: Remat) -> None:
    model = Traced(GQA, PLANS["both"], COMPUTES_ALL[execution], remat)
    expected = training_flops(LAYOUT, COMPUTED, remat=remat)
    assert traced_flops(*model.step) == ROWS * LENGTH * expected.total


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("plan", slow_after(1, "channels", "groups", "query heads"))
@pytest.mark.parametrize("execution", BACKWARD)
def test_only_the_backward_pass_omits(execution: str, plan: str, remat: Remat) -> None:
    model = Traced(GQA, PLANS[plan], BACKWARD[execution], remat)
    options = {"kernels": execution == "kernel", "passes": "backward"}
    expected = training_flops(LAYOUT, COMPUTED, PLANS[plan], remat, **options)
    assert_close(traced_flops(*model.step), ROWS * LENGTH * expected.total, "float64", "forward")


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("plan", slow_after(1, "both", "query heads"))
def test_only_weight_gradients_are_omitted(plan: str, remat: Remat) -> None:
    make: Make = lambda layout, plan: Gather(layout, plan, "weights")  # noqa: E731
    expected = training_flops(LAYOUT, COMPUTED, PLANS[plan], remat, passes="weights")
    traced = traced_flops(*Traced(GQA, PLANS[plan], make, remat).step)
    assert_close(traced, ROWS * LENGTH * expected.total, "float64", "forward")


def test_masks_of_weight_gradients_compute_everything() -> None:
    plan = PLANS["query heads"]
    masked = Traced(GQA, plan, lambda layout, plan: Mask(layout, plan, "weights"))
    dense = training_flops(LAYOUT, COMPUTED)
    assert traced_flops(*masked.step) == ROWS * LENGTH * dense.total


def test_bounds_of_passes_by_hand() -> None:
    """Half of the groups and of the channels are kept. For products with weights alone the bounds
    are 3 / (3 - 2p) and 3 / (2 + k), with k kept and p omitted."""
    half = (segment(0, 3, 2, 3, 12),)
    one, dense = forward_flops(LAYOUT, 64), training_flops(LAYOUT, 64).total
    for passes, saved, bound in (
        ("backward", one.products + 2.5 / 2 * one.mixing, 3 / (3 - 2 * 0.5)),
        ("weights", one.products / 2, 3 / (2 + 0.5)),
    ):
        total = training_flops(LAYOUT, 64, half, passes=passes).total  # type: ignore[arg-type]
        assert_close(dense - total, saved, "float64", "forward")
        products = 3 * one.products
        saved_products = saved - (2.5 / 2 * one.mixing if passes == "backward" else 0)
        assert_close(products / (products - saved_products), bound, "float64", "forward")


@pytest.mark.parametrize("name", ["mha", "bias", "norm"])
def test_other_attentions_multiply_the_same_matrices(name: str) -> None:
    config = CONFIGS[name]
    layout = layout_of(config)
    counts = tuple((unit.name, unit.size) for unit in layout.units.values())
    model = Traced(config, (Segment(0, config.n_layers, counts),))
    expected = training_flops(layout, COMPUTED).total
    assert traced_flops(*model.step) == ROWS * LENGTH * expected


def test_a_probe_computes_no_logits() -> None:
    dense = forward_flops(LAYOUT, LENGTH)
    assert probe_flops(LAYOUT, LENGTH) == dense.total - dense.head


def test_a_probe_of_gradients_leaves_out_those_of_weights() -> None:
    step, dense = training_flops(LAYOUT, LENGTH).total, forward_flops(LAYOUT, LENGTH)
    weights = dense.read + dense.write + dense.head
    assert probe_flops(LAYOUT, LENGTH, gradients=True) == step - weights


@pytest.mark.parametrize(
    ("observe", "expected"),
    [
        # Σa², a product with the tokens' weights. Gram matrices of 3 heads of 4, in each of 4
        # groups: activations for each token, and weights once.
        ({"outputs"}, TOKENS * (2 * 24 + 2 * 4 * 12**2) + 2 * 4 * 12**2 * 16),
        ({"products"}, TOKENS * 2 * (48**2 + 24**2)),
        ({"gradients"}, 0),
    ],
)
def test_observations_by_hand(observe: set[Observable], expected: float) -> None:
    assert observation_flops(GQA, ROWS, LENGTH, frozenset(observe)) == 3 * expected


def test_correction_by_hand() -> None:
    """12 heads of 4 columns and 24 channels; kept are 6 heads in each of 2 layers, and in one of
    them 8 channels."""
    segments = (segment(0, 1, 4, 3, 24), segment(1, 2, 2, 3, 24), segment(2, 3, 2, 3, 8))
    of_heads = 24**3 / 3 + 2 * 16 * (24 * 24 + 24 * 24)
    of_channels = 8**3 / 3 + 2 * 16 * (8 * 16 + 8 * 8)
    assert_close(
        correction_flops(LAYOUT, segments), 2 * of_heads + of_channels, "float64", "forward"
    )


# Wide enough that what is not a matrix product (norms, rotations, softmax, SiLU: some 20 operations
# a channel against 2 · 1024) stays under 1 %; XLA's counts are 0.2 % and 0.4 % above ours.
WIDE = LlamaConfig(
    vocab_size=2048, d_model=1024, n_layers=2, n_heads=16, n_kv_heads=4, head_dim=64, d_ff=3072,
    max_positions=128,
)  # fmt: skip
XLA_TOLERANCE = 0.01
OUTPUTS, PRODUCTS = frozenset[Observable]({"outputs"}), frozenset[Observable]({"products"})


def probe(observe: tuple[Observable, ...]) -> tuple[Any, ...]:
    """Function and arguments of the observation of one block of tokens."""
    numbers = jax.ShapeDtypeStruct((1, BLOCK), jnp.int32)
    layout, batch = layout_of(WIDE), Batch(*[numbers] * 5)
    return lambda params, b: observe_batch(layout, params, b, observe), dict(layout.shapes), batch


def test_xla_counts_the_same() -> None:
    model = Traced(WIDE, (segment(0, 2, 2, 4, 1280),), rows=1, length=BLOCK)
    counted = (segment(0, 1, 2, 4, 1280),)  # the body of the scan over layers, once
    layout, computed = layout_of(WIDE), 2 * BLOCK - 1
    one_layer = dataclasses.replace(WIDE, n_layers=1)
    probed = BLOCK * probe_flops(layout_of(one_layer), computed)
    for program, expected in (
        (model.logits, BLOCK * forward_flops(layout, computed, counted).total),
        (model.step, BLOCK * training_flops(layout, computed, counted).total),
        (probe(("outputs",)), probed + observation_flops(one_layer, 1, BLOCK, OUTPUTS)),
        (probe(("products",)), probed + observation_flops(one_layer, 1, BLOCK, PRODUCTS)),
    ):
        ratio = compiled_flops(*program) / expected
        assert 1 - XLA_TOLERANCE < ratio < 1 + XLA_TOLERANCE


def share_in_layers(layout: Layout[Any], row_length: int, remat: Remat = "none") -> float:
    """f: the share of a dense step's operations that is spent in heads and channels."""
    head = 3 * forward_flops(layout, row_length).head
    return 1 - head / training_flops(layout, row_length, remat=remat).total


def test_share_of_heads_and_channels_in_llama_2_7b() -> None:
    assert round(share_in_layers(layout_of(PRESETS["llama-2-7b"]), 2048), 2) == 0.98
    # Small models with large vocabularies leave far less to omit.
    assert share_in_layers(layout_of(PRESETS["smollm2-135m"]), 2048) < 0.85


@pytest.mark.parametrize("remat", REMATS)
def test_bound_is_one_over_one_minus_r_f(remat: Remat) -> None:
    half = (segment(0, 3, 2, 3, 12),)  # r = 1/2 of the groups and of the channels
    share = share_in_layers(LAYOUT, 64, remat)
    bound = speedup_bound(LAYOUT, 64, half, remat)
    assert_close(bound, 1 / (1 - 0.5 * share), "float64", "forward")
    assert speedup_bound(LAYOUT, 64, PLANS["dense"], remat) == 1
