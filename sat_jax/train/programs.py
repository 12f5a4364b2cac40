"""Every compiled program of a run, made before it is needed.

A rung's programs are compiled from shapes alone, one rung after the other on a background thread,
while the first one trains: no step of a later rung waits for the compiler.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from sat_jax.config import Config
from sat_jax.data.batch import Batch
from sat_jax.errors import UserError
from sat_jax.models.live import Live
from sat_jax.models.llama import Compute
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.models.params import abstract, shapes
from sat_jax.ops import KernelConfig
from sat_jax.parallel.rules import BATCH, tree_shardings
from sat_jax.sparsity.compensation import compensation
from sat_jax.sparsity.controller import Controller
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.masks import Criteria, Masks, choose, selection_key
from sat_jax.sparsity.plan import Plan
from sat_jax.sparsity.statistics import Gates, InputSums, Products, Statistics
from sat_jax.train.moves import compile_moves, cut_only
from sat_jax.train.optimizer import clipping, learning_rate, make_optimizer
from sat_jax.train.probe import ProbeSettings, make_probe
from sat_jax.train.state import TrainState, compact_state, new_state, resting_params
from sat_jax.train.step import StepMetrics, StepSettings, make_evaluation, make_step

Compiled = Callable[..., Any]


class RungPrograms(NamedTuple):
    """Compiled for one plan. `enter` takes the whole state and masks to the state the step trains
    and what rests; `leave` goes back. Both give their arguments' buffers away; so does `step`.

    `select(state, stats)` → masks; `compensate(state, stats, masks)` → offsets;
    `enter(state, masks)` → (working state, resting);
    `step(working, stats, masks, batch, resting, offsets)` → (working, stats, metrics), `resting`
    being parameters, which are given away only by `leave`;
    `leave(working, resting, masks)` → whole state. `seconds` is what compiling took.
    """

    select: Compiled
    compensate: Compiled
    enter: Compiled
    step: Compiled
    leave: Compiled
    seconds: float


class Programs:
    """Compiles on one background thread; `rung(plan)` waits for the plan's programs.

    A compilation that fails raises where its result is asked for, and in `check`.
    """

    def __init__(self, config: Config, model: LlamaConfig, mesh: Mesh, controller: Controller):
        self._config, self._model, self._mesh = config, model, mesh
        self._neurons = controller.neurons
        settings = config.model
        self._compute = Compute(
            *(settings.dtype, settings.remat, settings.loss_chunk, settings.attention),
            kernels=self._kernels(config, model, mesh),
        )
        # Where layers choose for themselves, nothing is observed beside what they see.
        observes = controller.sparse and not self._live
        needs = METRICS[config.sparsity.metric].needs if observes else ()
        self.observe = (*needs, "products") if config.sparsity.compensate and observes else needs
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.state = self._placed(
            jax.eval_shape(lambda p: new_state(p, self.optimizer), shapes(model))
        )
        self.stats = self._placed(jax.eval_shape(self.no_statistics))
        self._options = compiler_options(mesh.devices.flat[0].platform, config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._rungs: dict[Plan, Future[RungPrograms]] = {}

    def close(self) -> None:
        """Forgets what is not compiled yet."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def prepare(self, plan: Plan) -> None:
        """Starts compiling the plan's programs in the background, unless that has been done."""
        if plan not in self._rungs:
            self._rungs[plan] = self._thread.submit(self._compile_rung, plan)

    def check(self) -> None:
        """Raises what a compilation has failed with, long before its rung begins."""
        for future in self._rungs.values():
            if future.done():
                future.result()

    @property
    def compiling(self) -> bool:
        """Whether the background thread has work."""
        return any(not future.done() for future in self._rungs.values())

    @property
    def seconds(self) -> float:
        """What compiling the finished rungs took, whether a step waited for it or not."""
        done = [future for future in self._rungs.values() if future.done()]
        return sum(future.result().seconds for future in done)

    def rung(self, plan: Plan) -> RungPrograms:
        """The plan's programs; waits for the compiler where they are not ready."""
        self.prepare(plan)
        return self._rungs[plan].result()

    def submit(self, function: Callable[..., Any], *args: Any, **jit: Any) -> "Future[Compiled]":
        """Compiles `function` for the (abstract) arguments in the background."""
        return self._thread.submit(self._compile, function, *args, **jit)

    def evaluation(self, rows: int) -> "Future[Compiled]":
        """`evaluate(params, batch)` on the whole model."""
        graph, _ = abstract(self._model, compute=self._compute)
        return self.submit(make_evaluation(graph), self.state.params, self.batch(rows))

    def probe(self) -> "Future[Compiled]":
        """`probe(params, stats, batch, step)`: the whole model on some of a step's tokens."""
        config, sparse = self._config, self._config.sparsity
        graph, _ = abstract(self._model, compute=self._compute)
        settings = ProbeSettings(
            self.observe,
            sparse.stats_decay,
            sparse.probe_tokens,
            sparse.probe_sampling,
            config.seed,
        )
        batch = self.batch(config.train.rows_per_step)
        state = self.state
        shapes = (state.params, self.stats, batch, state.step)
        return self.submit(make_probe(graph, settings), *shapes, donate_argnums=1)

    def batch(self, rows: int) -> Batch:
        """Shapes of a batch of `rows` rows, split over the mesh."""
        shape = (rows, self._config.data.row_length)
        sharding = NamedSharding(self._mesh, BATCH)
        whole = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        mask = jax.ShapeDtypeStruct(shape, np.bool_, sharding=sharding)
        return Batch(whole, whole, whole, whole, mask)

    def masks(self, plan: Plan) -> Masks:
        """Shapes of a plan's masks."""
        masks: Masks = self._placed(jax.eval_shape(self._select(plan), self.state, self.stats))
        return masks

    def offsets(self, plan: Plan) -> dict[str, Array]:
        """Shapes of what a plan's kept rows get for the omitted ones."""
        masks = self.masks(plan)
        offsets = jax.eval_shape(self._compensate(plan), self.state, self.stats, masks)
        placed: dict[str, Array] = self._placed(offsets)
        return placed

    def no_statistics(self) -> Statistics:
        """Statistics of nothing, for what the metric needs."""
        model, stats = self._model, Statistics(count=jnp.zeros(()))
        if "inputs" in self.observe:
            sums = InputSums(*[jnp.zeros((model.n_layers, model.d_model))] * 2)
            stats = stats._replace(attention=sums, mlp=sums)
        if {"outputs", "predicted"} & set(self.observe):
            pairs = (model.n_layers, model.n_kv_heads, model.query_heads, model.query_heads)
            stats = stats._replace(
                heads=jnp.zeros(pairs), channels=jnp.zeros((model.n_layers, model.d_ff))
            )
        if "gradients" in self.observe:
            heads = (model.n_layers, model.n_kv_heads, model.query_heads)
            gates = Gates(jnp.zeros(heads), jnp.zeros((model.n_layers, model.d_ff)))
            stats = stats._replace(gradients=gates)
        if "products" in self.observe:
            columns = (model.n_heads * model.head_dim, model.d_ff)
            products = Products(*(jnp.zeros((model.n_layers, c, c)) for c in columns))
            stats = stats._replace(products=products)
        return stats

    def _placed(self, tree: Any) -> Any:
        """Abstract values with their shardings on the mesh."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            tree_shardings(self._mesh, tree),
        )

    def _lower(self, function: Callable[..., Any], *args: Any, **jit: Any) -> jax.stages.Lowered:
        with jax.set_mesh(self._mesh):
            out = tree_shardings(self._mesh, jax.eval_shape(function, *args))
            return jax.jit(function, out_shardings=out, **jit).lower(*args)

    def _compile(self, function: Callable[..., Any], *args: Any, **jit: Any) -> Compiled:
        return self._lower(function, *args, **jit).compile(self._options)

    def lower_step(self, plan: Plan) -> jax.stages.Lowered:
        """The plan's training step, lowered and not compiled."""
        live = Live(self._criteria, plan.balance, plan.block) if self._live else None
        graph, _ = abstract(self._model, plan.segments, self._compute, self._masked, live)
        train = make_step(graph, self._step_settings(plan))

        forward_all = any(segment.forward_all for segment in plan.segments)

        def step(
            working: TrainState,
            stats: Statistics,
            masks: Masks,
            batch: Batch,
            resting: dict[str, Array],
            offsets: dict[str, Array],
        ) -> tuple[TrainState, Statistics, StepMetrics]:
            masks = () if self._gathers or live else masks
            return train(working, stats, masks, batch, resting if forward_all else {}, offsets)

        masks = self.masks(plan)
        cut = masks if self._gathers else cut_only(plan)
        working, resting = self._placed(
            jax.eval_shape(lambda state, masks: compact_state(state, masks, plan), self.state, cut)
        )
        batch, rest = self.batch(self._config.train.rows_per_step), resting_params(resting)
        beside = (masks, batch, rest, self.offsets(plan))
        return self._lower(step, working, self.stats, *beside, donate_argnums=(0, 1))

    def _compile_rung(self, plan: Plan) -> RungPrograms:
        started = time.perf_counter()
        moves = compile_moves(
            self.state, self.masks(plan), plan, self._gathers, self._placed, self._compile
        )
        return RungPrograms(
            select=self._compile(self._select(plan), self.state, self.stats),
            compensate=self._compile(
                self._compensate(plan), self.state, self.stats, self.masks(plan)
            ),
            enter=moves.enter,
            step=self.lower_step(plan).compile(self._options),
            leave=moves.leave,
            seconds=time.perf_counter() - started,
        )

    @property
    def _masked(self) -> bool:
        """Whether all is computed and multiplied by 0/1."""
        return self._config.sparsity.execution == "mask"

    @property
    def _gathers(self) -> bool:
        """Whether steps train the compacted state; the others' is whole."""
        return self._config.sparsity.execution == "gather"

    @staticmethod
    def _kernels(config: Config, model: LlamaConfig, mesh: Mesh) -> KernelConfig | None:
        """The kernels of kernel execution, refused where they cannot be."""
        if config.sparsity.execution != "kernel" or not max(config.rates):
            return None
        kernels = KernelConfig(config.sparsity.block, config.model.kernels)
        if mesh.size > 1:
            raise UserError(
                f"sparsity.execution 'kernel' on {mesh.size} devices; accepted: one, or another"
                " execution"
            )
        device = mesh.devices.flat[0]
        if reason := kernels.refusal(config.model.dtype, model.d_model, device):
            raise UserError(f"sparsity.execution 'kernel': {reason}")
        return kernels

    @property
    def _live(self) -> bool:
        """Whether each layer chooses neurons from each batch: no masks between steps."""
        return self._config.sparsity.refresh_every == 0

    @property
    def _criteria(self) -> Criteria:
        sparse = self._config.sparsity
        return Criteria(sparse.metric, sparse.aggregate, sparse.selection, sparse.temperature)

    def _select(self, plan: Plan) -> Callable[[TrainState, Statistics], Masks]:
        def select(whole: TrainState, stats: Statistics) -> Masks:
            if self._live:
                return cut_only(plan)
            key = selection_key(self._config.seed, whole.step)
            return choose(whole.params, stats, plan, self._neurons, self._criteria, key)

        return select

    def _compensate(
        self, plan: Plan
    ) -> Callable[[TrainState, Statistics, Masks], dict[str, Array]]:
        def compensate(whole: TrainState, stats: Statistics, masks: Masks) -> dict[str, Array]:
            if stats.products is None or self._neurons.is_dense(plan):
                return {}
            return compensation(whole.params, stats.products, masks, plan)

        return compensate

    def _step_settings(self, plan: Plan) -> StepSettings:
        config = self._config
        return StepSettings(
            optimizer=self.optimizer,
            clip=clipping(config.optimizer),
            schedule=learning_rate(config.optimizer, config.train.steps),
            microbatches=config.train.accumulate,
            observe=tuple(kind for kind in self.observe if kind == "inputs"),
            stats_decay=config.sparsity.stats_decay,
            freeze=config.optimizer.moments == "freeze",
            freeze_channels=not any(segment.dense_tokens for segment in plan.segments),
            seed=config.seed if self._live else None,
            in_place=self._compute.kernels is not None
            and not self._live
            and not self._neurons.is_dense(plan),
        )


def compiler_options(platform: str, config: Config) -> dict[str, str | bool]:
    """What XLA is asked for besides its defaults. Only on GPU does it need to be asked for the
    same bits at every run."""
    if platform == "gpu" and config.train.deterministic:
        return {"xla_gpu_deterministic_ops": True}
    return {}
