"""Every compiled program of a run, compiled before it is needed.

A rung's programs are compiled from shapes alone, one rung after the other on a background thread,
while the first one trains: no step of a later rung waits for the compiler.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from sat_jax.config import Config
from sat_jax.data.batch import Batch
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Compute, Decoder
from sat_jax.nn.distillation import Distillation
from sat_jax.nn.layout import Layout
from sat_jax.nn.quantized import Packing
from sat_jax.nn.top_tokens import TopTokens
from sat_jax.parallel.rules import BATCH, tree_shardings
from sat_jax.sparsity.choose import Choice, Criteria, choose, selection_key
from sat_jax.sparsity.controller import Controller
from sat_jax.sparsity.correction import Corrections, least_squares_correction
from sat_jax.sparsity.execution.base import Execution
from sat_jax.sparsity.execution.make import kernels_of, make_execution
from sat_jax.sparsity.execution.state import PARAMS, TrainState, map_trees, new_state, path_trees
from sat_jax.sparsity.plan import Plan, Stored
from sat_jax.sparsity.rows import Kept
from sat_jax.sparsity.statistics import Statistics
from sat_jax.sparsity.stored_blocks import block_layout
from sat_jax.train.layouts import Teacher, run_layout, trained_layout
from sat_jax.train.moves import compile_moves
from sat_jax.train.optimizer import (
    clipping,
    learning_rate,
    make_optimizer,
    parameter_changes,
)
from sat_jax.train.probe import ProbeSettings, make_probe, observe_batch, observed_by_probes
from sat_jax.train.step import StepSettings, make_evaluation, make_step

Compiled = Callable[..., Any]


class Form(NamedTuple):
    """The full form of a run's state where certain matrices store blocks alone: the layout, its
    optimizer, and the shapes of the state with their shardings."""

    layout: Layout[Decoder]
    optimizer: optax.GradientTransformation
    state: TrainState


class RungPrograms(NamedTuple):
    """Compiled for one plan.

    `select(full, stats)` → `Choice`; `correct(full, stats, kept)` → corrections;
    `compact(full, kept)` → (state, omitted); `expand(state, omitted, kept)` → full;
    `step(state, stats, kept, batch, omitted, corrections)` → (state, stats, metrics), where
    `omitted` are parameters; the `TopTokens` of a stored teacher are one more argument. `compact`,
    `expand` and `step` give their arguments' buffers away, but `step` not those of `omitted`.
    `seconds` is how long compiling took.
    """

    select: Compiled
    correct: Compiled
    compact: Compiled
    step: Compiled
    expand: Compiled
    seconds: float


class Programs:
    """Compiles on one background thread; `rung(plan)` waits for the plan's programs.

    `stored`: how the matrices of `model.path` are quantized. A compilation that fails raises where
    its result is asked for, and in `check`.
    """

    def __init__(
        self,
        config: Config,
        model: DecoderConfig,
        mesh: Mesh,
        controller: Controller,
        teacher: Teacher | None = None,
        stored: Packing | None = None,
    ):
        self._config, self._mesh, self._teacher = config, mesh, teacher
        self._reads_teacher = config.distill.topk is not None
        self.kernels = kernels_of(config, mesh)
        settings = config.model
        compute = Compute(
            settings.dtype,
            settings.remat,
            settings.loss_chunk,
            settings.attention,
            config.train.accumulate,
            settings.retention,
        )
        teacher_model = teacher.model if teacher else None
        self.layout = trained_layout(config, model, teacher_model, compute, stored)
        # Probes have few rows, and observe what stages do not return: without a pipeline.
        one = dataclasses.replace(compute, microbatches=1)
        self.probed = run_layout(config, model, one, stored)
        sparse = config.sparsity
        probes = controller.sparse and sparse.refresh_every > 0
        # Where layers choose for themselves, their inputs are observed inside them.
        self.observe = observed_by_probes(sparse) if probes else ()
        # In a dense matrix whose blocks were stored at different times, entries have their own
        # update counts.
        self._by_entry = {path for rung in controller.rungs for path, _ in rung.plan.stored}
        self._forms: dict[Stored, Form] = {}
        self.stats = self._placed(jax.eval_shape(self.no_statistics))
        self._options = compiler_options(mesh.devices.flat[0].platform, config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._rungs: dict[Plan, Future[RungPrograms]] = {}
        self._evaluations: dict[Stored, Future[Compiled]] = {}
        if not controller.neurons.is_dense(controller.rungs[0].plan):
            self.execution(controller.rungs[0].plan)  # what cannot be is refused at once

    def close(self) -> None:
        """Drop what is not compiled yet."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def prepare(self, plan: Plan) -> None:
        """Start compiling the plan's programs in the background, unless that has been done."""
        if plan not in self._rungs:
            self._rungs[plan] = self._thread.submit(self._compile_rung, plan)
        self.evaluation(plan.stored)

    def check(self) -> None:
        """Raises the error of a failed compilation, long before its rung begins."""
        for future in self._rungs.values():
            if future.done():
                future.result()

    @property
    def compiling(self) -> bool:
        """Whether the background thread has work."""
        rungs, evaluations = self._rungs.values(), self._evaluations.values()
        return not all(future.done() for future in rungs) or not all(
            future.done() for future in evaluations
        )

    @property
    def seconds(self) -> float:
        """How long compiling the finished rungs took, whether a step waited for it or not."""
        done = [future for future in self._rungs.values() if future.done()]
        return sum(future.result().seconds for future in done)

    def rung(self, plan: Plan) -> RungPrograms:
        """Return the plan's programs; waits for the compiler where they are not ready."""
        self.prepare(plan)
        return self._rungs[plan].result()

    def submit(self, function: Callable[..., Any], *args: Any, **jit: Any) -> "Future[Compiled]":
        """Compile `function` for the (abstract) arguments in the background."""
        return self._thread.submit(self.compile, function, *args, **jit)

    def form(self, stored: Stored) -> Form:
        """Return the full form of the state where these matrices store blocks."""
        if stored not in self._forms:
            config = self._config
            layout = block_layout(self.layout, stored, self.kernels)
            by_entry = self._by_entry - dict(stored).keys()
            optimizer = make_optimizer(
                config.optimizer, config.train.steps, layout, by_entry, stored
            )
            state = jax.eval_shape(lambda p: new_state(p, optimizer), dict(layout.shapes))
            self._forms[stored] = Form(layout, optimizer, self._placed(state, layout))
        return self._forms[stored]

    def execution(self, plan: Plan) -> Execution:
        """Return how the plan is trained."""
        layout = self.form(plan.stored).layout
        return make_execution(self._config, layout, plan, self._mesh, self._criteria)

    @property
    def eval_rows(self) -> int:
        """Rows per evaluation batch: those of a microbatch, which fit in memory, or of all
        microbatches of a pipeline."""
        train = self._config.train
        parts = 1 if self._config.mesh.pipeline > 1 else train.accumulate
        return train.rows_per_step // parts

    def evaluation(self, stored: Stored) -> "Future[Compiled]":
        """Compile `evaluate(params, batch)` of the model whose matrices store these blocks."""
        if stored not in self._evaluations:
            form = self.form(stored)
            self._evaluations[stored] = self.submit(
                make_evaluation(form.layout), form.state.params, self.batch(self.eval_rows)
            )
        return self._evaluations[stored]

    def probe(self) -> "Future[Compiled]":
        """Compile `probe(params, stats, batch, optimizer)`: the full model on some of a step's
        tokens."""
        config, sparse = self._config, self._config.sparsity
        form, clip = self.form(()), clipping(config.optimizer)
        changes = functools.partial(parameter_changes, form.optimizer, clip)
        settings = ProbeSettings(self.observe, sparse.stats_decay, sparse.probe_tokens, changes)
        batch = self.batch(config.train.rows_per_step)
        shapes = (form.state.params, self.stats, batch, form.state.optimizer)
        return self.submit(make_probe(self.probed, settings), *shapes, donate_argnums=1)

    def batch(self, rows: int) -> Batch:
        """Return the shapes of a batch of `rows` rows, split over the mesh."""
        shape = (rows, self._config.data.row_length)
        sharding = NamedSharding(self._mesh, BATCH)
        numbers = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        mask = jax.ShapeDtypeStruct(shape, np.bool_, sharding=sharding)
        return Batch(numbers, numbers, numbers, numbers, mask)

    def top_tokens(self, rows: int) -> TopTokens:
        """Return the shapes of the stored tokens of a teacher for a batch of `rows` rows."""
        k = self._config.distill.topk
        assert k is not None
        shape, sharding = (rows, self._config.data.row_length), NamedSharding(self._mesh, BATCH)
        return TopTokens(
            jax.ShapeDtypeStruct((*shape, k), np.int32, sharding=sharding),
            jax.ShapeDtypeStruct((*shape, k + 1), np.float32, sharding=sharding),
        )

    def kept(self, plan: Plan) -> Kept:
        """Return the shapes of a plan's kept indices."""
        choice = jax.eval_shape(self._select(plan), self.form(plan.stored).state, self.stats)
        kept: Kept = self._placed(choice.kept)
        return kept

    def corrections(self, plan: Plan) -> Corrections:
        """Return the shapes of a plan's corrections of kept rows."""
        state = self.form(plan.stored).state
        shapes = jax.eval_shape(self._correct(plan), state, self.stats, self.kept(plan))
        placed: Corrections = self._placed(shapes)
        return placed

    def no_statistics(self) -> Statistics:
        """Return statistics of no token, for what the metric needs."""
        batch = self.batch(1)
        shapes = jax.eval_shape(
            lambda params, batch: observe_batch(self.probed, params, batch, self.observe),
            dict(self.layout.shapes),
            batch,
        )
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def lower_step(self, plan: Plan) -> jax.stages.Lowered:
        """Return the plan's training step, lowered and not compiled."""
        form, execution, kept = self.form(plan.stored), self.execution(plan), self.kept(plan)
        step = make_step(execution, self._step_settings(form))
        shapes = jax.eval_shape(lambda s, k: compact_state(execution, s, k), form.state, kept)
        state, omitted = self._placed(shapes, form.layout)
        rows = self._config.train.rows_per_step
        batch = self.batch(rows)
        arguments: Any = (kept, batch, omitted, self.corrections(plan))
        if self._teacher is not None:
            known: Any = self.top_tokens(rows) if self._reads_teacher else self._teacher.params
            arguments = (*arguments, known)
        options: Any = {"donate_argnums": (0, 1), "layout": form.layout}
        return self._lower(step, state, self.stats, *arguments, **options)

    def _compile_rung(self, plan: Plan) -> RungPrograms:
        started = time.perf_counter()
        kept, form = self.kept(plan), self.form(plan.stored)
        placed, compile_ = (
            functools.partial(f, layout=form.layout) for f in (self._placed, self.compile)
        )
        moves = compile_moves(form.state, kept, self.execution(plan), placed, compile_)
        return RungPrograms(
            select=self.compile(self._select(plan), form.state, self.stats),
            correct=self.compile(self._correct(plan), form.state, self.stats, kept),
            compact=moves.compact,
            step=self._with_teacher(self.lower_step(plan).compile(self._options)),
            expand=moves.expand,
            seconds=time.perf_counter() - started,
        )

    def _with_teacher(self, step: Compiled) -> Compiled:
        """Return a step without the argument for the parameters of a teacher."""
        teacher = self._teacher
        if teacher is None or self._reads_teacher:
            return step
        return lambda *arguments: step(*arguments, teacher.params)

    def _placed(self, tree: Any, layout: Layout[Decoder] | None = None) -> Any:
        """Return abstract values with their shardings on the mesh; of the model without blocks by
        default."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            tree_shardings(self._mesh, layout or self.layout, tree),
        )

    def _lower(
        self,
        function: Callable[..., Any],
        *args: Any,
        layout: Layout[Decoder] | None = None,
        **jit: Any,
    ) -> jax.stages.Lowered:
        with jax.set_mesh(self._mesh):
            results = jax.eval_shape(function, *args)
            out = tree_shardings(self._mesh, layout or self.layout, results)
            return jax.jit(function, out_shardings=out, **jit).lower(*args)

    def compile(self, function: Callable[..., Any], *args: Any, **jit: Any) -> Compiled:
        """Compile `function` for the (abstract) arguments; `layout` as in `Form`, and options of
        `jax.jit`."""
        return self._lower(function, *args, **jit).compile(self._options)

    @property
    def _criteria(self) -> Criteria:
        sparse = self._config.sparsity
        return Criteria(sparse.metric, sparse.selection)

    def _select(self, plan: Plan) -> Callable[[TrainState, Statistics], Choice]:
        def select(full: TrainState, stats: Statistics) -> Choice:
            if self._config.sparsity.refresh_every == 0:  # each layer chooses for itself
                return Choice(tuple({} for _ in plan.segments), {})
            key = selection_key(self._config.seed, full.step)
            return choose(self.layout, full.params, stats, plan, self._criteria, key)

        return select

    def _correct(self, plan: Plan) -> Callable[[TrainState, Statistics, Kept], Corrections]:
        def correct(full: TrainState, stats: Statistics, kept: Kept) -> Corrections:
            if not stats.products:
                return {}
            return least_squares_correction(self.layout, full.params, stats.products, kept, plan)

        return correct

    def _step_settings(self, form: Form) -> StepSettings:
        config, teacher = self._config, self._teacher
        return StepSettings(
            optimizer=form.optimizer,
            clip=clipping(config.optimizer),
            schedule=learning_rate(config.optimizer, config.train.steps),
            # A pipeline takes all rows, and splits them itself.
            microbatches=1 if config.mesh.pipeline > 1 else config.train.accumulate,
            observe=tuple(kind for kind in self.observe if kind == "inputs"),
            stats_decay=config.sparsity.stats_decay,
            seed=config.seed,
            distillation=Distillation(teacher.layout, config.distill) if teacher else None,
        )


def compact_state(
    execution: Execution, full: TrainState, kept: Kept
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state that is trained, and the parameters that are not in it; `moves` does so
    without holding both states at once."""
    state = map_trees(lambda tree: execution.compact(tree, kept)[0], full)
    return state, execution.compact(path_trees(full)[0][PARAMS], kept)[1]


def compiler_options(platform: str, config: Config) -> dict[str, str | bool]:
    """Return XLA's options besides its defaults. Only on GPU does it need one for the same bits at
    every run."""
    if platform == "gpu" and config.train.deterministic:
        return {"xla_gpu_deterministic_ops": True}
    return {}
