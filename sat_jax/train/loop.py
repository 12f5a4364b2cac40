"""The training loop around compiled steps."""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sat_jax.config import Config
from sat_jax.config_values import free_paths, to_dict
from sat_jax.data.batch import Batch
from sat_jax.data.batches import Prefetcher, in_order, open_split
from sat_jax.errors import UserError
from sat_jax.nn.top_tokens import TopTokens
from sat_jax.parallel.mesh import row_share
from sat_jax.parallel.processes import is_primary, on_host, on_primary
from sat_jax.sparsity.choose import describe_unranked
from sat_jax.sparsity.controller import Rung
from sat_jax.sparsity.execution.state import new_state
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import Plan
from sat_jax.train.block_changes import BlockChanges
from sat_jax.train.checkpoint import Checkpoints
from sat_jax.train.counters import RunCounters
from sat_jax.train.export import export_run
from sat_jax.train.finish import finish
from sat_jax.train.inputs import BY_CONTENT, check_inputs, write_inputs
from sat_jax.train.interrupt import Interrupt
from sat_jax.train.metrics import MetricsLog, check_finite
from sat_jax.train.programs import Programs
from sat_jax.train.progress import Progress
from sat_jax.train.run_state import RunState
from sat_jax.train.setup import Task, initial_params, set_up
from sat_jax.train.speed import SHARE, Speedup, measure_speed
from sat_jax.train.step import StepMetrics
from sat_jax.train.step_inputs import StepInputs, place, step_inputs
from sat_jax.train.summary import PhaseTimer
from sat_jax.train.workdir import WorkDir


def train(config: Config, directory: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Start or continue the run in `directory` and return its summary.

    A finished run is not changed. `log` is called with status messages. All processes of a run call
    this with the same shared `directory`. Raises `UserError` for bad settings or data, a directory
    that is in use or has a run with different settings, and a loss that is not finite. Raises
    `KeyboardInterrupt` after an interruption, with all steps saved.
    """
    workdir = WorkDir(directory)
    clock = PhaseTimer()
    log = log if is_primary() else lambda _: None
    with ExitStack() as stack:
        if on_primary(lambda: _lock(workdir, config, stack)):
            log(f"the run in {workdir.path} is finished; nothing to do")
        else:
            with clock("setup"):
                task = set_up(config, log)
                on_primary(lambda: _check(workdir, task))
            try:
                with Run(task, workdir, clock, log) as run:
                    run.run()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UserError(
                    f"out of device memory: {str(error).splitlines()[0]}; to use less: a larger"
                    " train.accumulate or smaller train.rows_per_step, model.remat=full,"
                    " model.dtype=bfloat16, a larger mesh.fsdp over more devices"
                ) from error
        summary = workdir.finished()
        assert summary is not None
        return summary


def _lock(workdir: WorkDir, config: Config, stack: ExitStack) -> bool:
    """Lock the work directory until `stack` is closed, compare settings, and return whether the run
    is finished."""
    stack.enter_context(workdir.lock())
    finished = workdir.finished() is not None
    by_content = () if finished else BY_CONTENT
    workdir.compare(to_dict(config), free_paths(config).union(by_content))
    return finished


def _check(workdir: WorkDir, task: Task) -> int:
    check_inputs(workdir, task)
    return 0


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that runs on the device. `steady`: nothing is compiled at the same time."""

    number: int
    rung: Rung
    metrics: StepMetrics
    started: float
    steady: bool


class Run:
    """One run, from its first step or its newest checkpoint to its summary."""

    def __init__(self, task: Task, workdir: WorkDir, clock: PhaseTimer, log: Callable[[str], None]):
        config = task.config
        self._task, self._config, self._workdir = task, config, workdir
        self._clock, self._log = clock, log
        self._counters = RunCounters(task.controller)
        self._held_out = open_split(task.data, "held_out")
        self._share = row_share(task.mesh)
        self._rung: Rung | None = None
        self._running: _Step | None = None
        self._done_at = self._compiled_before = 0.0

        self._stack = ExitStack()
        rest = (task.mesh, task.controller, task.teacher, task.stored)
        self._programs = Programs(config, task.model, *rest)
        self._blocks = BlockChanges(config, self._programs)
        self._stack.callback(self._programs.close)
        self._checkpoints = self._stack.enter_context(
            Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Train all remaining steps, evaluate, and write the outputs."""
        config, stack = self._config, self._stack
        self._programs.evaluation(self._task.controller.rungs[0].plan.stored)
        self._probing = self._programs.probe() if self._programs.observe else None
        start = self._restore_or_begin()
        # In order: later rungs are compiled while the first one trains.
        for rung in self._task.controller.rungs:
            if rung.stop > start:
                self._programs.prepare(rung.plan)
        self._progress = Progress(config.train.steps, start)
        self._metrics = None
        if is_primary():
            write_inputs(self._workdir, self._task)
            self._workdir.begin(to_dict(config))
            log = MetricsLog(self._workdir, start, self._progress)
            self._metrics = stack.enter_context(log)
        if start == 0:
            self._record(0, {"tokens": 0, "loss_tokens": 0})
            self._evaluate(0)
        inputs: StepInputs | None = None
        with Interrupt() as interrupt:
            for step, inputs in self._inputs(start):
                self._train(step, *inputs)
                self._programs.check()
                self._between_steps(step + 1, interrupt.requested(step))
        self._settle()
        self._state.expand()
        with self._clock("checkpoint"):
            self._checkpoints.wait()
        if config.export.huggingface:
            params = self._state.full.params
            read, names = on_host(params), list(params)
            on_primary(lambda: self._export(read, names))
            del params, read
        # The state is saved and exported: from here on it may change.
        speedups = self._measure_speed(inputs) if config.train.measure_speed else None
        on_primary(lambda: self._finish(speedups))

    def _export(self, read: Callable[[str], np.ndarray], names: Collection[str]) -> int:
        """Writes the exported model, on process 0."""
        export_run(self._task, self._workdir, read, names)
        return 0

    def _measure_speed(self, inputs: StepInputs | None) -> dict[Plan, Speedup]:
        """Return the speed-ups of the rungs that this start trained, on its last batch."""
        with self._clock("speed"):
            seconds = self._counters.step_seconds
            dense = next(filter(self._task.controller.neurons.is_dense, seconds), None)
            if inputs is None or dense is None or len(seconds) == 1:
                return {}
            programs = {plan: self._programs.rung(plan) for plan in seconds}
            for plan in seconds:
                self._blocks.prepare((), plan.stored)
                self._blocks.prepare(plan.stored, ())
            limit = SHARE * self._clock.seconds()["total"]
            change = functools.partial(self._blocks.enter_anew, self._state, batch=inputs[0])
            speedups = measure_speed(
                *(self._state, programs, dense, inputs, seconds, limit),
                lambda plan: change(plan.stored),
            )
        if missing := len(seconds) - len(speedups):
            why = f"it would take more than {SHARE:.0%} of the run's time"
            self._log(f"speed-up of {missing} of {len(seconds)} rungs not measured: {why}")
        return speedups

    def _finish(self, speedups: dict[Plan, Speedup] | None) -> int:
        """Writes the end of the run, on process 0."""
        assert self._metrics is not None
        finish(self._task, self._workdir, self._counters, self._metrics, self._clock, speedups)
        return 0

    def _record(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the record of a step, on process 0."""
        if self._metrics is not None:
            self._metrics.log(step, values)

    def _inputs(self, start: int) -> Iterator[tuple[int, StepInputs]]:
        """Yield each remaining step and its inputs on the devices."""
        config, programs = self._config, self._programs
        rows = config.train.rows_per_step
        shapes: tuple[Any, ...] = (programs.batch(rows),)
        if self._task.top_tokens is not None:
            shapes = (*shapes, programs.top_tokens(rows))
        get = step_inputs(self._task, self._share)
        steps = range(start, config.train.steps)
        with Prefetcher(get, steps) as ahead:
            for step in steps:
                with self._clock("data"):
                    inputs: StepInputs = place(next(ahead), shapes)
                yield step, inputs

    def _train(self, step: int, batch: Batch, *stored: TopTokens) -> None:
        controller = self._task.controller
        rung = controller.rung_at(step)
        refresh = controller.refreshes(step)
        if rung is not self._rung or refresh or controller.exchanges(step):
            self._settle()
            self._change(step, rung, refresh, batch)
        steady = not self._programs.compiling
        with self._clock("step"):
            started = time.perf_counter()
            metrics = self._state.step(batch, *stored)
            self._settle()
            self._running = _Step(step, rung, metrics, started, steady)

    def _change(self, step: int, rung: Rung, refresh: bool, batch: Batch) -> None:
        """Compact the state for a rung, with newly selected neurons if `refresh`."""
        state, controller = self._state, self._task.controller
        with self._clock("compile"):
            programs = self._programs.rung(rung.plan)
            probe = self._probe_for(step) if refresh else None
            exchange = controller.exchanges(step)
            self._blocks.prepare(state.stored, rung.plan.stored, exchange)
        with self._clock("refresh"):
            state.expand()
            self._blocks.enter(state, rung.plan.stored, batch)
            if exchange:
                share = self._blocks.exchange(state, rung, step, batch)
                self._record(step + 1, {"blocks_exchanged": share})
            if refresh:
                unranked = state.choose(programs, probe, batch)
                for text in describe_unranked(unranked, self._config.sparsity.metric):
                    self._log(f"refresh before step {step + 1}: {text}")
                assert state.kept is not None
                self._counters.count_selection(rung, state.kept, probed=probe is not None)
            elif controller.refresh_every == 0 or controller.neurons.keeps_all(rung.plan):
                state.choose(programs)
            state.compact(programs)
            state.wait()
        self._rung = rung

    def _probe_for(self, step: int) -> Any:
        """Return the probe if this refresh needs one. Training steps observe inputs: metrics of
        inputs need a probe before the first step only."""
        metric = METRICS[self._config.sparsity.metric]
        if self._probing is None or (step > 0 and not metric.probes):
            return None
        return self._probing.result()

    def _settle(self) -> None:
        """Wait for the running step and record it."""
        running, self._running = self._running, None
        if running is None:
            return
        with self._clock("step"):
            metrics = jax.device_get(running.metrics)
        now = time.perf_counter()
        seconds = now - max(running.started, self._done_at)
        self._done_at = now
        if self._counters.first_step_seconds is None:
            self._counters.first_step_seconds = self._clock.seconds()["total"]
        record = self._counters.count_step(
            running.rung, metrics, seconds, self._task, running.steady
        )
        done = running.number + 1
        if _due(done, self._config.train.log_every) or done == self._config.train.steps:
            self._record(done, record)
        check_finite(self._workdir, done, metrics.loss, metrics.grad_norm)

    def _between_steps(self, done: int, stop: bool) -> None:
        """Evaluate and save if due after `done` steps; raise `KeyboardInterrupt` if `stop`."""
        config = self._config
        last = done == config.train.steps
        evaluate = last or _due(done, config.train.eval_every)
        save = last or stop or _due(done, config.checkpoint.every)
        if not (evaluate or save):
            return
        self._settle()
        with self._clock("refresh"):
            self._state.expand()
        self._rung = None  # the next step compacts the state again
        if evaluate and self._task.controller.evaluated(done, self._evaluate(done)):
            rate = self._task.controller.rung_at(done).rate
            self._log(f"after step {done}: held-out loss plateau; omission rate {rate:.3g}")
        if save:
            if not evaluate:  # all checkpoints can be continued
                check_finite(self._workdir, done, self._held_out_loss(self._programs.eval_rows))
            self._save(done)
        if stop and not last:
            with self._clock("checkpoint"):
                self._checkpoints.wait()
            self._log(f"stopped and saved after step {done}; the same command continues")
            raise KeyboardInterrupt

    def _evaluate(self, done: int) -> float:
        """Record and return the held-out loss. Raises `UserError` if it is not finite."""
        loss = self._held_out_loss(self._config.train.eval_rows)
        self._record(done, {"eval_loss": loss})
        check_finite(self._workdir, done, loss)
        return loss

    def _held_out_loss(self, limit: int) -> float:
        """Return the mean loss, with nothing omitted but blocks that are not stored, over the loss
        tokens of `limit` held-out rows."""
        total = tokens = 0.0
        with self._clock("compile"):
            evaluate = self._programs.evaluation(self._state.stored).result()
        with self._clock("evaluate"):
            rows = self._programs.eval_rows
            for share in in_order(self._held_out, rows, limit, *self._share):
                loss, count = evaluate(
                    self._state.full.params, place(share, self._programs.batch(rows))
                )
                total += float(loss)
                tokens += float(count)
        return total / tokens

    def _save(self, done: int) -> None:
        state = self._state
        self._counters.compile_seconds = self._compiled_before + self._programs.seconds
        with self._clock("checkpoint"):
            if self._metrics is not None:
                self._metrics.flush()
            values = {
                **state.full._asdict(),
                "kept": state.kept,
                "corrections": state.corrections,
                "stats": state.stats,
                "kept_counts": self._counters.kept,
            }
            meta = {
                "counters": self._counters.to_json(),
                "controller": self._task.controller.to_json(),
                "segment_layers": [s.layers for s in self._plan_after(done).segments],
                "seconds": self._clock.seconds(),
            }
            self._checkpoints.save(done, values, meta)

    def _plan_after(self, done: int) -> Plan:
        """Return the plan of the last of `done` steps."""
        return self._task.controller.rung_at(done - 1).plan

    def _restore_or_begin(self) -> int:
        """Restore or initialise the state and return the number of completed steps."""
        programs, controller = self._programs, self._task.controller
        with self._clock("checkpoint"):
            newest = self._checkpoints.newest()
            if newest is not None:
                controller.restore(newest.meta["controller"])
                plan = self._plan_after(newest.step)
                full = programs.form(plan.stored).state
                target = {
                    **full._asdict(),
                    "kept": programs.kept(plan),
                    "corrections": programs.corrections(plan),
                    "stats": programs.stats,
                    "kept_counts": self._counters.kept,
                }
                restored = self._checkpoints.restore(target)
                assert restored is not None
                values = dict(restored.state)
                kept, stats, corrections, counts = (
                    values.pop(name) for name in ("kept", "stats", "corrections", "kept_counts")
                )
                self._counters.restore(counts, restored.meta["counters"])
                self._compiled_before = self._counters.compile_seconds
                self._clock.add(restored.meta["seconds"])
                full = full._replace(**values)
                self._state = RunState(full, stats, kept, corrections, plan.stored)
                self._log(f"continuing after step {newest.step}")
                return newest.step
        with self._clock("setup"):
            stored = controller.rungs[0].plan.stored
            params = self._blocks.initial(initial_params(self._task), stored)
        with self._clock("compile"):
            form = programs.form(stored)
            begin = jax.jit(
                lambda p: new_state(p, form.optimizer),
                donate_argnums=0,
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, form.state),
            )
            stats = jax.jit(
                programs.no_statistics,
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, programs.stats),
            )()
            self._state = RunState(begin(params), stats, None, stored=stored)
        return 0


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
