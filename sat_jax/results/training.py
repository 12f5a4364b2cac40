"""All that sweeps need of models and training before a run starts: shapes, costs, data."""

import dataclasses
import math
from collections.abc import Callable

from sat_jax.config import Config
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.sparsity.controller import Controller, Rung
from sat_jax.sparsity.importance import METRICS
from sat_jax.train.costs import flops_of_probe, flops_of_selection, step_flops
from sat_jax.train.run_weights import starting_point
from sat_jax.train.setup import controller_of, prepared_data


@dataclasses.dataclass(frozen=True)
class Plan:
    """The model and the schedule of a run that is not started."""

    config: Config
    model: DecoderConfig
    controller: Controller

    def dense_flops(self) -> float:
        """FLOPs of dense training on the same tokens, if all rows are full."""
        steps = self.config.train.steps
        return steps * self._tokens_per_step * step_flops(self.config, self.model)

    def spent_flops(self) -> float:
        """FLOPs of the run with probes and selections, if all rows are full."""
        config, model = self.config, self.model
        flops = self.probes() * flops_of_probe(config, model)
        for rung in self.controller.rungs:
            steps = rung.stop - rung.start
            flops += steps * self._tokens_per_step * step_flops(config, model, rung)
            flops += self.selections(rung) * flops_of_selection(config, model, rung)
        return flops

    def probes(self) -> int:
        """Number of refreshes with a probe: all of them, or the first for metrics of inputs."""
        controller, metric = self.controller, METRICS[self.config.sparsity.metric]
        if not controller.sparse or not metric.needs or controller.refresh_every == 0:
            return 0
        return sum(map(self.selections, controller.rungs)) if metric.probes else 1

    def selections(self, rung: Rung) -> int:
        """Number of selections between the steps of a rung."""
        controller = self.controller
        if controller.refresh_every == 0 or controller.neurons.is_dense(rung.plan):
            return 0
        return math.ceil((rung.stop - rung.start) / controller.refresh_every)

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.rows_per_step * self.config.data.row_length


def make_plan(config: Config, models: dict[tuple[str | None, str | None], DecoderConfig]) -> Plan:
    """Return the plan of a run; `models` caches the models that were read.

    Raises `UserError` for settings that the model or the schedule cannot have.
    """
    source = (config.model.path, config.model.preset)
    if source not in models:
        models[source] = starting_point(config)[0]
    models[source].check_length("data.row_length", config.data.row_length)
    return Plan(config, models[source], controller_of(config, models[source]))


def prepare_data(plan: Plan, log: Callable[[str], None]) -> str:
    """Prepare the data of a run, if they are not yet; return their fingerprint."""
    return prepared_data(plan.config, plan.model, log)[1].info.fingerprint
