"""What a run has done so far: tokens by rung, probes, and how often each neuron was kept.

Tokens are those that are no padding: speed and FLOPs are theirs. Of examples, only `loss_tokens` of
them bear loss; of text, all do.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int

from sat_jax.analysis.flops import compensation_flops, probe_flops, training_flops
from sat_jax.config import Config
from sat_jax.models.llama_config import LlamaConfig
from sat_jax.sparsity.controller import Controller, Rung
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.masks import Masks
from sat_jax.sparsity.plan import Neurons, Plan
from sat_jax.train.probe import probed
from sat_jax.train.step import StepMetrics

if TYPE_CHECKING:
    from sat_jax.train.setup import Task


class Account:
    """Counts that checkpoints keep, and the record of each step.

    `kept` has how often each query head `[L, K, G]` and each channel `[L, F]` was kept, and of how
    many selections, by layer: of those only that omitted some of the layer's heads or channels.
    """

    def __init__(self, controller: Controller):
        neurons = controller.neurons
        layers = neurons.layers
        self.kept: dict[str, Int[np.ndarray, ...]] = {
            "heads": np.zeros((layers, neurons.kv_groups, neurons.query_heads), np.int32),
            "of_heads": np.zeros(layers, np.int32),
            "channels": np.zeros((layers, neurons.channels), np.int32),
            "of_channels": np.zeros(layers, np.int32),
        }
        self.rung_selections = [0] * len(controller.rungs)
        self.probes = 0
        # Of every start; most of it in the background.
        self.compile_seconds = 0.0
        self.rung_tokens = [0] * len(controller.rungs)
        self.loss_tokens = 0
        # Wall time until the first step was done, of the start that did it.
        self.first_step_seconds: float | None = None
        self._controller = controller

    @property
    def tokens(self) -> int:
        """Tokens trained on, those without loss among them."""
        return sum(self.rung_tokens)

    @property
    def selections(self) -> int:
        """How often neurons were chosen."""
        return sum(self.rung_selections)

    def to_json(self) -> dict[str, Any]:
        """All but `kept`."""
        return {
            "rung_selections": self.rung_selections,
            "probes": self.probes,
            "rung_tokens": self.rung_tokens,
            "loss_tokens": self.loss_tokens,
            "first_step_seconds": self.first_step_seconds,
            "compile_seconds": self.compile_seconds,
        }

    def restore(self, kept: dict[str, Any], rest: dict[str, Any]) -> None:
        """The inverse of keeping `kept` and `to_json()`."""
        self.kept = {name: np.array(counts) for name, counts in kept.items()}
        self.rung_selections, self.probes = list(rest["rung_selections"]), rest["probes"]
        self.rung_tokens = list(rest["rung_tokens"])
        self.loss_tokens = rest["loss_tokens"]
        self.first_step_seconds = rest["first_step_seconds"]
        self.compile_seconds = rest["compile_seconds"]

    def chosen(self, rung: Rung, masks: Masks, probed: bool) -> None:
        """Counts one selection."""
        self.rung_selections[self._controller.rungs.index(rung)] += 1
        self.probes += probed
        self.count(rung.plan, masks)

    def count(self, plan: Plan, masks: Masks) -> None:
        """Counts what one selection kept."""
        for segment, mask in zip(plan.segments, jax.device_get(masks), strict=True):
            layers = slice(segment.start, segment.stop)
            for name, kept in (("heads", mask.heads), ("channels", mask.channels)):
                if kept is not None:
                    self.kept[f"of_{name}"][layers] += 1
                    _count(self.kept[name][layers], kept)

    def step(
        self, rung: Rung, metrics: StepMetrics, seconds: float, task: "Task", steady: bool
    ) -> dict[str, Any]:
        """Counts a step's tokens and what its layers chose; its record for `metrics.jsonl`."""
        number = self._controller.rungs.index(rung)
        if metrics.kept:
            self.rung_selections[number] += 1
            self.count(rung.plan, metrics.kept)
        tokens = int(metrics.tokens)
        self.rung_tokens[number] += tokens
        self.loss_tokens += int(metrics.loss_tokens)
        heads, channels = kept_shares(rung.plan, self._controller.neurons)
        return {
            "loss": metrics.loss,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "omission_rate": rung.rate,
            "kept_heads": heads,
            "kept_channels": channels,
            "rung": number,
            "probes": self.probes,
            "seconds": seconds,
            "steady": steady,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": step_flops(task.config, task.model, rung) * tokens / seconds,
        }


def step_flops(config: Config, model: LlamaConfig, rung: Rung | None = None) -> float:
    """Training FLOPs a token on a rung, recomputation included; None: densely. Mask execution
    computes everything on every rung."""
    segments, execution = None, config.sparsity.execution
    if rung is not None and execution != "mask":
        segments = rung.plan.segments
    flops = training_flops(
        *(model, config.data.row_length, segments, config.model.remat),
        kernels=execution == "kernel",
    )
    return flops.total


def flops_of_probe(config: Config, model: LlamaConfig) -> float:
    """FLOPs of one probe."""
    rows, length = probed(
        config.train.rows_per_step, config.data.row_length, config.sparsity.probe_tokens
    )
    gradients = "gradients" in METRICS[config.sparsity.metric].needs
    return rows * length * probe_flops(model, length, gradients, config.sparsity.compensate)


def flops_of_selection(config: Config, model: LlamaConfig, rung: Rung) -> float:
    """FLOPs of what follows a selection: making up for the omitted neurons."""
    return compensation_flops(model, rung.plan.segments) if config.sparsity.compensate else 0.0


def kept_shares(plan: Plan, neurons: Neurons) -> tuple[float, float]:
    """Realised shares of all query heads and of all channels."""
    heads = sum(s.layers * s.kv_groups * s.query_heads for s in plan.segments)
    channels = sum(s.layers * s.channels for s in plan.segments)
    all_heads = neurons.layers * neurons.kv_groups * neurons.query_heads
    return heads / all_heads, channels / (neurons.layers * neurons.channels)


def _count(counts: Int[np.ndarray, "..."], kept: Int[np.ndarray, "..."]) -> None:
    """Adds one for each kept neuron. A kept KV group keeps all its query heads."""
    layer = np.arange(len(counts)).reshape((-1,) + (1,) * (kept.ndim - 1))
    if kept.ndim == 3:
        counts[layer, np.arange(counts.shape[1])[None, :, None], kept] += 1
    else:
        counts[layer, kept] += 1
