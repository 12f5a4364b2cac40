"""Every setting of a run: frozen, typed, with its meaning and what it accepts.

Experiment files fill an ml_collections `ConfigDict` (`default_config`); `from_config_dict` turns it
into the frozen `Config` that everything else reads. Unknown keys, wrong types and values out of
range are refused by name. Conversion between the two is in `config_values.py`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from sat_jax.config_checks import check_sparsity
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.data_format import DataFormat, Format, LossOn, TooLong
from sat_jax.errors import UserError
from sat_jax.models.presets import PRESETS
from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.nn.stack import Remat
from sat_jax.ops import Implementation as Kernels
from sat_jax.sparsity.controller import overall
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import LayerRates
from sat_jax.sparsity.schedule import Schedule


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    free: bool = False,
) -> Any:
    """A setting with its help text; for numbers inclusive bounds, for names those that exist.

    `free`: a resumed run may change it, since no result depends on it.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "choices": tuple(choices), "free": free},
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    preset: str | None = key("tiny", "a shape by name, with random weights", choices=PRESETS)
    path: str | None = key(
        None,
        "pretrained weights, in place of preset: a Hugging Face directory, a .gguf file, or"
        " package:NAME for the .gguf file inside an installed Python package",
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "compute dtype; the trained weights are always float32"
    )
    remat: Remat = key(
        "none",
        "what the backward pass recomputes: nothing, all but matmul outputs (dots), or all but"
        " each layer's input (full)",
    )
    loss_chunk: int = key(512, "positions of each row whose logits exist at once", low=1)
    attention: Implementation | None = key(
        None, "attention backend; None chooses by platform and dtype"
    )
    kernels: Kernels | None = key(
        None, "block-sparse kernels of sparsity.execution 'kernel'; None chooses by platform"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = key(
        (),
        "texts: files, folders or globs (text, Markdown, JSON-lines; gzip or zstd), package:NAME"
        " for an installed Python package's files, tfds:DIR for a prepared dataset",
    )
    tokenizer: str = key("model", "'model', a path to a tokenizer.json, or 'bytes'")
    row_length: int = key(1024, "tokens a row", low=2)
    held_out: float = key(
        0.05,
        "documents kept for evaluation: a share below 1, a count from 1 on; of a single document a"
        " share of it, its end",
        low=0.0,
    )
    max_tokens: int | None = key(None, "tokens prepared at most; None takes everything", low=4)
    format: Format = key(
        "text",
        "what is learnt: every token of texts, or the answers in JSON lines of messages"
        " (role, content), ShareGPT's conversations (from, value), Alpaca's instruction, input and"
        " output, or a prompt and its completion",
    )
    text_field: str = key("text", "the field of JSON-lines (or of a TFDS dataset) that holds text")
    prompt_field: str = key("prompt", "of prompt_completion: the field that holds the prompt")
    completion_field: str = key("completion", "of prompt_completion: the field of the answer")
    chat_template: str = key(
        "model",
        f"what writes an example as text: the model's own (model), {', '.join(TEMPLATES)}, or the"
        " path of a .jinja file",
    )
    system: str | None = key(None, "the system prompt of examples that have none")
    loss_on: LossOn = key("all", "answers that are learnt: all of an example, or its last")
    too_long: TooLong = key(
        "drop",
        "an example longer than a row, which is never split: dropped, cut at its end, or refused;"
        " the first two are counted",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = key(100, "optimizer steps", low=1)
    rows_per_step: int = key(1, "rows a step, over all devices and microbatches", low=1)
    accumulate: int = key(1, "microbatches a step", low=1)
    log_every: int = key(1, "steps between logged records", low=1, free=True)
    eval_every: int = key(
        0, "steps between held-out evaluations; 0: only before and after", low=0, free=True
    )
    eval_rows: int = key(16, "held-out rows evaluated at most", low=1)
    measure_speed: bool = key(
        True,
        "measure each rung's speed-up after training, in at most 5 % of the run's wall time",
        free=True,
    )
    deterministic: bool = key(False, "ask XLA for deterministic kernels on GPU (slower)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "lion"] = key("adamw", "the update rule")
    learning_rate: float = key(1e-4, "peak learning rate", low=0.0)
    warmup_steps: int = key(0, "steps of linear warm-up, the last of them at the peak", low=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "cosine", "after the warm-up; wsd: constant, then falling in a line over decay_share"
    )
    decay_share: float = key(
        0.125,
        "of wsd: share of all steps, at the end, over which the rate falls, one at the least",
        low=0.0,
        high=1,
    )
    final_scale: float = key(
        0.1, "last learning rate as a share of the peak, unless constant", low=0.0, high=1.0
    )
    weight_decay: float = key(0.0, "decoupled, on matrices only", low=0.0)
    beta1: float = key(0.9, "decay of the first moment", low=0.0, high=0.9999)
    beta2: float = key(0.95, "decay of the second moment", low=0.0, high=0.99999)
    momentum_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "of the first moment as it is kept between steps"
    )
    clip_norm: float | None = key(1.0, "global gradient norm clipped to; None: never", low=0.0)
    moments: Literal["freeze", "decay"] = key(
        "freeze",
        "omitted neurons: untouched (freeze), or updated with zero gradient (decay; in mask"
        " execution only)",
    )
    bias_correction: Literal["neuron", "global"] = key(
        "neuron", "Adam's step count: each neuron's own updates, or the run's steps"
    )


@dataclasses.dataclass(frozen=True)
class SparsityConfig:
    rate: float = key(
        0.0, "omission rate r0 of heads and channels; 0 trains densely", low=0.0, high=1.0
    )
    rate_attention: float | None = key(None, "r0 of heads; None: rate", low=0.0, high=1.0)
    rate_mlp: float | None = key(None, "r0 of MLP channels; None: rate", low=0.0, high=1.0)
    metric: str = key("output", "what makes a neuron important", choices=METRICS)
    selection: Literal["topk", "sample"] = key(
        "topk", "the most important, or drawn without replacement in proportion to importance"
    )
    temperature: float = key(
        1.0, "drawn in proportion to importance to the power 1 / temperature", low=0.01
    )
    schedule: Schedule = key(
        "ladder", "omission rate over steps; auto: a ladder that steps down early at a stall"
    )
    rungs: int = key(4, "stairs from r0 down to dense", low=1)
    dense_start: float = key(
        0.0, "share of the steps trained densely before the first at r0", low=0.0, high=1.0
    )
    split: float = key(
        0.5, "share of the steps that are over when the first stair begins", low=0.0, high=1.0
    )
    patience: int = key(
        1, "held-out evaluations without progress after which auto steps down", low=1
    )
    min_gain: float = key(
        0.005, "share by which the held-out loss falls where auto sees progress", low=0.0, high=0.99
    )
    refresh_every: int = key(
        10,
        "steps between new selections; 0: every layer selects from each batch as it comes, by a"
        " metric that needs no outputs",
        low=0,
    )
    probe_tokens: int = key(1024, "tokens of the batch that a refresh observes", low=1)
    probe_sampling: Literal["first", "random"] = key(
        "first", "which of the batch's tokens: the first rows, or windows of random ones"
    )
    stats_decay: float = key(
        0.9, "weight of older observations at each new one", low=0.0, high=0.9999
    )
    attention_unit: Literal["kv_group", "query_head"] = key(
        "kv_group",
        "what is omitted in attention: whole KV groups, or query heads in each group; one and the"
        " same in multi-head attention",
    )
    dense_layers: tuple[int, ...] = key((), "layers that keep everything; -1 is the last")
    layer_rates_attention: tuple[float, ...] = key(
        (), "r0 of heads layer by layer, in place of rate_attention", low=0.0, high=1.0
    )
    layer_rates_mlp: tuple[float, ...] = key(
        (), "r0 of MLP channels layer by layer, in place of rate_mlp", low=0.0, high=1.0
    )
    max_segments: int = key(4, "runs of layers with equal counts at most", low=1)
    block: int = key(1, "channels are chosen in aligned runs of this many", low=1)
    balance: int | None = key(
        None, "equal parts that keep equally many neurons; None: mesh.tensor", low=1
    )
    least_squares_correction: bool = key(
        False,
        "correct the kept output weights by least squares for the omitted neurons, from the outputs"
        " that probes observe",
    )
    dense_forward: bool = key(
        False, "compute omitted neurons in the forward pass too; the backward pass alone omits them"
    )
    execution: Literal["gather", "mask", "kernel"] = key(
        "gather",
        "train the compact model (gather), compute everything and multiply by 0/1 (mask), or leave"
        " full weights in place and compute with their kept blocks (kernel)",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = key(-1, "devices that split rows; -1: all that are left", low=-1)
    fsdp: int = key(1, "devices that split rows and the width of the weights", low=1)
    tensor: int = key(1, "devices that split heads, channels and vocabulary", low=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(0, "steps between checkpoints; 0: only at the end", low=0, free=True)
    keep: int = key(2, "newest checkpoints kept", low=1, free=True)
    keep_every: int | None = key(
        None, "checkpoints at multiples of this many steps are kept for good", low=1, free=True
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    huggingface: bool = key(False, "write WORKDIR/huggingface at the end", free=True)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = key(0, "of weights, data order and selection", low=0, high=2**32 - 1)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sparsity: SparsityConfig = SparsityConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self) -> None:
        self._check_model()
        DataFormat.from_settings(self.data)  # refuses a setting that the format does not use
        self._check_steps()
        check_sparsity(self)

    def _check_model(self) -> None:
        if self.model.preset is None and self.model.path is None:
            raise UserError("model: give a preset by name or a path to pretrained weights")
        if self.mesh.data == 0:
            raise UserError("mesh.data is 0; accepted: 1 or more, or -1 for all devices left")

    def _check_steps(self) -> None:
        rows, parts = self.train.rows_per_step, self.train.accumulate
        if rows % parts:
            raise UserError(
                f"train.rows_per_step {rows} is not a multiple of train.accumulate {parts}"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise UserError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than train.steps"
                f" {self.train.steps}"
            )
        share, usual = self.optimizer.decay_share, OptimizerConfig.decay_share
        if self.optimizer.schedule != "wsd" and share != usual:
            raise UserError(
                f"optimizer.decay_share {share} is for optimizer.schedule 'wsd', not"
                f" {self.optimizer.schedule!r}"
            )

    @property
    def layer_rates(self) -> tuple[LayerRates, LayerRates]:
        """Omission rates r0 of (attention, MLP): one for all layers, or one for each."""
        sparse = self.sparsity
        attention = sparse.rate if sparse.rate_attention is None else sparse.rate_attention
        mlp = sparse.rate if sparse.rate_mlp is None else sparse.rate_mlp
        return sparse.layer_rates_attention or attention, sparse.layer_rates_mlp or mlp

    @property
    def rates(self) -> tuple[float, float]:
        """The same as one rate each, the mean over layers."""
        attention, mlp = self.layer_rates
        return overall(attention), overall(mlp)
