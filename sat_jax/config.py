"""The settings of a run: frozen dataclasses with types, help texts and bounds.

Experiment files change an ml_collections `ConfigDict` (`default_config`), and `from_config_dict`
converts it to a frozen `Config`. Unknown keys, wrong types and values out of range raise
`UserError`. The conversion is in `config_values.py`.
"""

import dataclasses
from typing import Literal

from sat_jax.config_checks import check_together
from sat_jax.config_key import key
from sat_jax.config_sparsity import SparsityConfig
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.data_format import DataFormat, Format, LossOn, TooLong
from sat_jax.models.presets import PRESETS
from sat_jax.nn.attention.dot_product import Implementation
from sat_jax.nn.distillation import DistillSettings, Divergence
from sat_jax.nn.hidden_distillation import HiddenLoss
from sat_jax.nn.lora import BASES, TRAINED, LoraSettings
from sat_jax.nn.rope import EXTENSIONS
from sat_jax.nn.stack import Remat
from sat_jax.ops import Implementation as Kernels
from sat_jax.ops import RetentionKernel
from sat_jax.sparsity.controller import overall
from sat_jax.sparsity.importance import METRICS
from sat_jax.sparsity.plan import LayerRates


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    preset: str | None = key(
        "tiny", "a published model shape by name, with random weights", choices=PRESETS
    )
    d_model: int | None = key(None, "width; None: that of the preset", low=1)
    n_layers: int | None = key(None, "number of layers; None: that of the preset", low=1)
    n_heads: int | None = key(None, "query heads of a layer; None: those of the preset", low=1)
    d_ff: int | None = key(None, "MLP channels of a layer; None: those of the preset", low=1)
    vocab_size: int | None = key(None, "tokens; None: those of the preset", low=1)
    max_positions: int | None = key(None, "longest row in tokens; None: that of the preset", low=2)
    path: str | None = key(
        None,
        "pretrained weights, used instead of preset: a Hugging Face directory, a .gguf file, or"
        " package:NAME for the .gguf file of an installed Python package",
    )
    adapter: str | None = key(
        None, "an adapter directory of PEFT that is merged with the weights of path"
    )
    rope_type: str | None = key(
        None,
        "scaling of rotary positions for a longer context; None: that of the model",
        choices=EXTENSIONS,
    )
    rope_factor: float = key(
        1.0, "with rope_type: new context length relative to that of the first training", low=1.0
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "compute dtype; parameters are stored in float32"
    )
    remat: Remat = key(
        "none",
        "activations that the backward pass recomputes: none, all except matmul outputs (dots), or"
        " all except the input of each layer (full)",
    )
    loss_chunk: int = key(512, "positions of each row whose logits are in memory at a time", low=1)
    attention: Implementation | None = key(
        None, "attention backend; None selects one by platform and dtype"
    )
    retention: RetentionKernel = key(
        "xla", "implementation of retention: XLA, or a kernel for TPU (interpret mode on a CPU)"
    )
    kernels: Kernels | None = key(
        None,
        "kernels of sparsity.execution kernel and of sparsity.weights; None selects by platform",
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that replace those of the preset."""
        names = ("d_model", "n_layers", "n_heads", "d_ff", "vocab_size", "max_positions")
        return {name: size for name in names if (size := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = key(
        (),
        "training texts: files, folders or globs (text, Markdown, JSON lines, CSV; gzip or zstd),"
        " package:NAME for files of an installed Python package, tfds:DIR for a prepared dataset",
    )
    tokenizer: str = key(
        "model", "'model' (that of the pretrained model), a path to a tokenizer.json, or 'bytes'"
    )
    row_length: int = key(1024, "tokens per row", low=2)
    pose_length: int | None = key(
        None,
        "context length that rows of fewer tokens are trained for: the positions of each document"
        " skip some at a random place (PoSE); None: consecutive positions",
        low=2,
    )
    held_out: float = key(
        0.05,
        "documents held out for evaluation: a fraction if below 1, otherwise a number; a single"
        " document is split, and this fraction at its end is held out",
        low=0.0,
    )
    max_tokens: int | None = key(None, "maximum number of tokens to prepare; None: no limit", low=4)
    format: Format = key(
        "text",
        "form of the data: plain text with loss on every token, or JSON lines with loss on the"
        " answers: messages (role, content), ShareGPT conversations (from, value), Alpaca"
        " (instruction, input, output), or a prompt and its completion",
    )
    text_field: str = key(
        "text", "field of JSON lines, CSV or a TFDS dataset that contains the text"
    )
    min_document_tokens: int | None = key(
        None,
        "format text: documents of fewer tokens are left out, so that long ones fill rows; None:"
        " none is left out",
        low=2,
    )
    prompt_field: str = key("prompt", "format prompt_completion: field of the prompt")
    completion_field: str = key("completion", "format prompt_completion: field of the completion")
    chat_template: str = key(
        "model",
        f"chat template: that of the model (model), {', '.join(TEMPLATES)}, or the path of a .jinja"
        " file",
    )
    system: str | None = key(None, "system prompt of examples that have none")
    loss_on: LossOn = key("all", "answers that bear loss: all of an example, or its last one")
    too_long: TooLong = key(
        "drop",
        "examples longer than a row: drop or truncate (cut_end) and count them, or raise an error"
        " (refuse)",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = key(100, "optimizer steps", low=1)
    rows_per_step: int = key(1, "rows per step, over all devices and microbatches", low=1)
    accumulate: int = key(1, "microbatches per step", low=1)
    log_every: int = key(1, "steps between logged records", low=1, free=True)
    eval_every: int = key(
        0, "steps between held-out evaluations; 0: only before and after training", low=0, free=True
    )
    eval_rows: int = key(16, "maximum number of held-out rows per evaluation", low=1)
    measure_speed: bool = key(
        True,
        "measure each rung's speed-up after training, in at most 5 % of the run's wall time",
        free=True,
    )
    deterministic: bool = key(False, "use deterministic XLA kernels on GPU (slower)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "lion"] = key("adamw", "update rule")
    learning_rate: float = key(1e-4, "peak learning rate", low=0.0)
    matrix_scale: float = key(
        1.0,
        "learning rate of the matrices of layers relative to that of embeddings, norms and biases;"
        " block-sparse ones have it divided by their density",
        above=0.0,
    )
    warmup_steps: int = key(
        0, "steps of linear warm-up; the last one has the peak learning rate", low=0
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "cosine",
        "learning rate after the warm-up; wsd: constant, then linear decay over decay_share",
    )
    decay_share: float = key(
        0.125,
        "schedule wsd: fraction of all steps in the final decay, at least one step",
        low=0.0,
        high=1,
    )
    final_scale: float = key(
        0.1, "final learning rate relative to the peak; unused if constant", low=0.0, high=1.0
    )
    weight_decay: float = key(0.0, "decoupled weight decay, applied to matrices only", low=0.0)
    beta1: float = key(0.9, "decay rate of the first moment", low=0.0, high=0.9999)
    beta2: float = key(0.95, "decay rate of the second moment", low=0.0, high=0.99999)
    momentum_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "storage dtype of the first moment"
    )
    clip_norm: float | None = key(1.0, "maximum global gradient norm; None: no clipping", above=0.0)
    moments: Literal["freeze", "decay"] = key(
        "freeze",
        "omitted neurons: not updated (freeze), or updated with zero gradients (decay; execution"
        " mask only)",
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig(LoraSettings):
    rank: int = key(
        0, "rank of low-rank adapters (LoRA) of frozen matrices; 0: train all parameters", low=0
    )
    alpha: float = key(
        16.0, "the product of an adapter's matrices is multiplied by alpha / rank", above=0.0
    )
    targets: tuple[str, ...] = key(
        (),
        "matrices of layers that have adapters, by name (query, or mlp/up with the name of the"
        " branch); none: all",
    )
    rslora: bool = key(False, "multiply by alpha / √rank instead (rsLoRA)")
    dora: bool = key(
        False, "train the norm of the weights of each output beside the adapters (DoRA)"
    )
    trained: tuple[str, ...] = key(
        (),
        "parameters that are trained in full beside the adapters: norms (scales and shifts),"
        " embeddings (of tokens and positions, and the output head)",
        choices=TRAINED,
    )
    base: str | None = key(
        None,
        "stored form of the frozen matrices of layers (QLoRA): 4-bit NormalFloat (nf4) or integers,"
        " rounded to nearest; None: float32, or as model.path has them, where scripts.compress"
        " quantized it",
        choices=BASES,
    )
    group: int = key(
        64, "with base: consecutive inputs of an output that share a scale; 0: all", low=0
    )


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    bits: Literal[4, 8] | None = key(
        None,
        "bits of the integers to which the matrices of layers are rounded in the forward pass"
        " (quantization-aware training); None: they are not",
    )
    group: int = key(
        128, "with bits: consecutive inputs of an output that share a scale; 0: all", low=0
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig(DistillSettings):
    teacher: str | None = key(
        None,
        "frozen model whose token distributions are learned beside the text: a Hugging Face"
        " directory, a .gguf file, package:NAME or the work directory of a run, with the tokenizer"
        " of the trained model; None: the text alone",
    )
    weight: float = key(
        0.5,
        "share w of the divergence in the loss: (1 - w) · cross-entropy + w · temperature² ·"
        " divergence; 0: the teacher is not used",
        low=0.0,
        high=1.0,
    )
    temperature: float = key(
        1.0, "logits of both models are divided by it in the divergence", above=0.0
    )
    divergence: Divergence = key(
        "forward",
        "KL(teacher ‖ student) (forward), KL(student ‖ teacher) (reverse), or Jensen-Shannon (js)",
    )
    topk: int | None = key(
        None,
        "number of most likely tokens of the teacher at each position, which are computed once and"
        " stored beside the prepared data; None: the teacher is computed in each step",
        low=1,
    )
    hidden_weight: float = key(
        0.0, "weight of the loss of hidden states, which is added; 0: none", low=0.0
    )
    hidden_loss: HiddenLoss = key(
        "mse",
        "distance of hidden states: squared difference relative to the teacher's square (mse), or"
        " 1 - cosine",
    )
    hidden_layers: tuple[int, ...] = key(
        (), "layers of the trained model whose hidden states learn, numbered from 0; none: all"
    )
    teacher_layers: tuple[int, ...] = key(
        (), "layer of the teacher for each of them; none: at the same relative depth"
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = key(-1, "devices that split the rows; -1: all remaining devices", low=-1)
    fsdp: int = key(1, "devices that split the rows and the embedding axis of the weights", low=1)
    context: int = key(
        1, "devices that split the tokens of each row and the embedding axis of the weights", low=1
    )
    tensor: int = key(1, "devices that split heads, channels and vocabulary", low=1)
    pipeline: int = key(
        1,
        "devices that split the layers; the microbatches of train.accumulate pass through them",
        low=1,
    )
    rounds: int = key(
        1, "stages on each device of mesh.pipeline: 1 is GPipe, more the circular schedule", low=1
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(0, "steps between checkpoints; 0: only after the last step", low=0, free=True)
    keep: int = key(2, "number of newest checkpoints to keep", low=1, free=True)
    keep_every: int | None = key(
        None, "also keep every checkpoint whose step is a multiple of this", low=1, free=True
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    huggingface: bool = key(False, "write the trained model to WORKDIR/huggingface", free=True)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = key(
        0, "random seed of initial weights, data order and selection", low=0, high=2**32 - 1
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    distill: DistillConfig = DistillConfig()
    sparsity: SparsityConfig = SparsityConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self) -> None:
        DataFormat.from_settings(self.data)  # raises for settings that the format does not use
        check_together(self)

    @property
    def layer_rates(self) -> tuple[LayerRates, LayerRates]:
        """Omission rates r0 of (attention, MLP): one number, or one per layer."""
        sparse = self.sparsity
        attention = sparse.rate if sparse.rate_attention is None else sparse.rate_attention
        return attention, sparse.rate if sparse.rate_mlp is None else sparse.rate_mlp

    @property
    def has_predictors(self) -> bool:
        """Whether low-rank approximations of frozen matrices are computed once."""
        sparse = self.sparsity
        dense_adapters = sparse.adapters == "dense" and max(self.rates) > 0
        return dense_adapters and METRICS[sparse.metric].predicts

    @property
    def distills(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.distill.teacher is not None and self.distill.weight > 0

    @property
    def stores_blocks(self) -> bool:
        """Whether matrices are block-sparse in some of the steps."""
        return self.sparsity.weights.density < 1

    @property
    def omitted_share(self) -> float:
        """The highest of all rates, and the share of blocks that is not stored; 0: dense."""
        sparse = self.sparsity
        tokens = max(sparse.token_rate, sparse.token_skip_rate)
        return max(*self.rates, self.branch_rate, tokens, 1 - sparse.weights.density)

    @property
    def branch_rate(self) -> float:
        """Probability r0 of a branch without backward pass, the mean over layers."""
        return overall(self.sparsity.branch_rate)

    @property
    def rates(self) -> tuple[float, float]:
        """Omission rates r0 of (attention, MLP), each the mean over layers."""
        attention, mlp = self.layer_rates
        return overall(attention), overall(mlp)
