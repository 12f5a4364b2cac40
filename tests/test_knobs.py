"""No dead knobs: every setting changes what is computed, or is refused.

Each key is perturbed from a small base and has to change the stage that `STAGES` names: nothing is
trained. A new key without an entry fails. Keys of the data, the loop and the end of a run are
asserted where those are tested; `ELSEWHERE` says where.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest

from sat_jax.config import Config
from sat_jax.config_values import from_config_dict, keys
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.llama import LlamaConfig
from sat_jax.parallel.mesh import make_mesh
from sat_jax.sparsity.controller import Controller
from sat_jax.train import setup
from sat_jax.train.layouts import Teacher
from sat_jax.train.programs import Programs, compiler_options
from tests.conftest import ROOT, slow_after
from tests.test_config import nested

MODEL = LlamaConfig(
    vocab_size=32, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=8,
    max_positions=64,
)  # fmt: skip
BASE: dict[str, Any] = {
    "data.row_length": 8,
    "train.steps": 8,
    "train.rows_per_step": 2,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.1,
    "sparsity.rate": 0.5,
    "sparsity.rungs": 2,
}


def config_with(changes: dict[str, Any]) -> Config:
    return from_config_dict(nested(BASE | changes))


def controller_of(config: Config, model: LlamaConfig = MODEL) -> Controller:
    return setup.controller_of(config, model)


def programs_of(config: Config, model: LlamaConfig = MODEL) -> Programs:
    layout = layout_of(MODEL)
    teacher = Teacher(MODEL, layout, layout.shapes) if config.distills else None
    return Programs(config, model, make_mesh(config.mesh), controller_of(config, model), teacher)


def rungs(config: Config) -> Any:
    return controller_of(config).rungs


def stages(config: Config) -> Any:
    """Of a model with four layers."""
    return controller_of(config, dataclasses.replace(MODEL, n_layers=4)).rungs


def refreshes(config: Config) -> list[bool]:
    controller = controller_of(config)
    return [controller.refreshes(step) for step in range(config.train.steps)]


def step(config: Config, model: LlamaConfig = MODEL) -> str:
    programs = programs_of(config, model)
    text = programs.lower_step(controller_of(config, model).rungs[0].plan).as_text()
    programs.close()
    return text


KERNELS = {"sparsity.execution": "kernel", "sparsity.block": 128}


def kernel_step(config: Config) -> str:
    """Of channels that make two blocks."""
    return step(config, dataclasses.replace(MODEL, d_ff=256))


LORA = {"lora.rank": 2}
INT8 = {"sparsity.rate": 0.0, "quantization.bits": 8, "quantization.group": 64}
IN_LAYERS = {"sparsity.refresh_every": 0, "sparsity.metric": "sparselora"}
SPARSE_BASE = IN_LAYERS | {"sparsity.adapters": "dense"}
HIDDEN = {"distill.teacher": "teacher", "distill.hidden_weight": 1.0}
BLOCKS = {
    "sparsity.rate": 0.0,
    "sparsity.weights.density": 0.5,
    "sparsity.weights.block": 8,
}
RIGL = BLOCKS | {"sparsity.weights.update": "rigl", "sparsity.weights.update_every": 2}
WIDE = dataclasses.replace(MODEL, d_model=64, d_ff=64, head_dim=16)


def wide_step(config: Config) -> str:
    return step(config, WIDE)


def block_rungs(config: Config) -> Any:
    return controller_of(config, WIDE).rungs


def exchanges(config: Config) -> list[bool]:
    controller = controller_of(config, WIDE)
    return [controller.exchanges(step) for step in range(config.train.steps)]


def selection(config: Config) -> str:
    programs = programs_of(config)
    select = programs._select(controller_of(config).rungs[0].plan)
    text = str(jax.make_jaxpr(select)(programs.form(()).state, programs.stats))
    programs.close()
    return re.sub(r"0x[0-9a-f]+", "", text)


def probe(config: Config) -> str:
    programs = programs_of(config)
    text: str = programs.probe().result().as_text()
    programs.close()
    # Source locations of operations differ between calls and compute nothing.
    return re.sub(r", metadata=\{[^}]*\}", "", text[text.index("\n%") :])


def compiler(config: Config) -> Any:
    options = compiler_options("gpu", config)
    jax.jit(lambda x: x).lower(0.0).compile(options)  # raises for a name that XLA does not know
    return options


def refused(config: Config) -> str:
    """A mesh that needs more devices than exist is refused."""
    try:
        return str(make_mesh(config.mesh))
    except UserError as error:
        return str(error)


Stage = Callable[[Config], Any]

# Key → perturbed value, the stage that has to change, and what else the key needs to matter.
STAGES: dict[str, tuple[Any, Stage, dict[str, Any]]] = {
    "seed": (1, selection, {"sparsity.selection": "sample"}),
    "model.dtype": ("bfloat16", step, {}),
    "model.remat": ("full", step, {}),
    "model.loss_chunk": (4, step, {}),
    "data.row_length": (12, step, {}),
    "train.steps": (9, rungs, {}),
    "train.rows_per_step": (4, step, {}),
    "train.accumulate": (2, step, {}),
    "train.deterministic": (True, compiler, {}),
    "optimizer.name": ("lion", step, {}),
    "optimizer.learning_rate": (3e-4, step, {}),
    "optimizer.matrix_scale": (0.5, step, {}),
    "optimizer.warmup_steps": (3, step, {}),
    "optimizer.schedule": ("linear", step, {}),
    "optimizer.decay_share": (0.5, step, {"optimizer.schedule": "wsd"}),
    "optimizer.final_scale": (0.2, step, {}),
    "optimizer.weight_decay": (0.2, step, {}),
    "optimizer.beta1": (0.8, step, {}),
    "optimizer.beta2": (0.9, step, {}),
    "optimizer.momentum_dtype": ("bfloat16", step, {}),
    "optimizer.clip_norm": (0.5, step, {}),
    "optimizer.moments": ("decay", step, {"sparsity.execution": "mask"}),
    "sparsity.rate": (0.25, rungs, {}),
    "sparsity.rate_attention": (0.0, rungs, {}),
    "sparsity.rate_mlp": ((0.5, 0.0), rungs, {}),
    "sparsity.metric": ("magnitude", selection, {}),
    "sparsity.selection": ("sample", selection, {}),
    "sparsity.schedule": ("constant", rungs, {}),
    "sparsity.rungs": (1, rungs, {}),
    "sparsity.split": (0.25, rungs, {}),
    "sparsity.dense_start": (0.25, rungs, {}),
    "sparsity.refresh_every": (2, refreshes, {}),
    "sparsity.probe_tokens": (4, probe, {}),
    "sparsity.stats_decay": (0.5, probe, {}),
    "sparsity.attention_unit": ("query_head", rungs, {}),
    "sparsity.dense_layers": ((0,), rungs, {}),
    "sparsity.block": (2, selection, {}),
    "sparsity.balance": (2, selection, {}),
    "sparsity.passes": ("weights", step, {}),
    "sparsity.branch_rate": (0.5, step, {}),
    "sparsity.token_rate": (0.5, step, {}),
    "sparsity.token_skip_rate": (0.5, stages, {}),
    "sparsity.branches": ("mlp", step, {"sparsity.branch_rate": 0.5}),
    "sparsity.least_squares_correction": (True, step, {}),
    "sparsity.execution": ("mask", step, {}),
    "sparsity.adapters": ("dense", step, LORA | IN_LAYERS),
    "sparsity.predictor_rank": (4, step, LORA | SPARSE_BASE),
    "sparsity.dense_answers": (0.5, step, LORA | SPARSE_BASE),
    "sparsity.weights.density": (0.25, block_rungs, BLOCKS),
    "sparsity.weights.block": (16, block_rungs, BLOCKS),
    "sparsity.weights.matrices": ("mlp", block_rungs, BLOCKS),
    "sparsity.weights.pattern": ("magnitude", block_rungs, BLOCKS),
    "sparsity.weights.update": ("rigl", block_rungs, BLOCKS | {"train.steps": 400}),
    "sparsity.weights.update_every": (3, exchanges, RIGL),
    "model.kernels": ("pallas_tpu", kernel_step, KERNELS),
    "lora.rank": (2, step, {}),
    "lora.alpha": (8.0, step, LORA),
    "lora.targets": (("query",), step, LORA),
    "lora.rslora": (True, step, LORA),
    "lora.dora": (True, step, LORA | {"sparsity.rate": 0.0}),
    "lora.trained": (("norms",), step, LORA),
    "lora.base": ("nf4", wide_step, LORA | {"sparsity.rate": 0.0}),
    "lora.group": (32, wide_step, LORA | {"sparsity.rate": 0.0, "lora.base": "int8"}),
    "quantization.bits": (4, wide_step, INT8),
    "quantization.group": (32, wide_step, INT8),
    "distill.teacher": ("teacher", step, {}),
    "distill.topk": (3, step, {"distill.teacher": "teacher"}),
    "distill.hidden_weight": (1.0, step, {"distill.teacher": "teacher"}),
    "distill.hidden_loss": ("cosine", step, HIDDEN),
    "distill.hidden_layers": ((1,), step, HIDDEN),
    "distill.teacher_layers": ((1, 1), step, HIDDEN),
    "mesh.data": (3, refused, {}),
    "mesh.fsdp": (2, refused, {}),
    "mesh.context": (2, refused, {}),
    "mesh.tensor": (2, refused, {}),
    "mesh.pipeline": (2, refused, {"sparsity.rate": 0.0, "train.accumulate": 2}),
    "mesh.rounds": (2, stages, {"mesh.pipeline": 2, "train.accumulate": 2}),
}

# Asserted by these tests, which mention the key.
ELSEWHERE = {
    "model.preset": "test_config.py",
    "model.path": "test_config.py",
    "model.adapter": "test_adapters.py",
    "model.d_model": "test_presets.py",
    "model.n_layers": "test_presets.py",
    "model.n_heads": "test_presets.py",
    "model.d_ff": "test_presets.py",
    "model.vocab_size": "test_presets.py",
    "model.max_positions": "test_presets.py",
    "model.attention": "test_attention.py",
    "model.rope_type": "test_extension.py",
    "model.rope_factor": "test_extension.py",
    "data.pose_length": "test_extension.py",
    "model.retention": "test_retention_kernel.py",
    "data.sources": "test_data_sources.py",
    "data.tokenizer": "test_data_tokenizer.py",
    "data.held_out": "test_data_prepare.py",
    "data.max_tokens": "test_data_prepare.py",
    "data.format": "test_conversations.py",
    "data.text_field": "test_data_sources.py",
    "data.min_document_tokens": "test_data_long_documents.py",
    "data.prompt_field": "test_conversations.py",
    "data.completion_field": "test_conversations.py",
    "data.chat_template": "test_conversations.py",
    "data.system": "test_conversations.py",
    "data.loss_on": "test_conversations.py",
    "data.too_long": "test_conversations.py",
    "train.log_every": "test_run.py",
    "train.eval_every": "test_run.py",
    "train.eval_rows": "test_run.py",
    "train.measure_speed": "test_speed.py",
    "distill.weight": "test_distillation.py",
    "distill.temperature": "test_distillation.py",
    "distill.divergence": "test_distillation.py",
    "sparsity.max_segments": "test_plan.py",
    "sparsity.min_gain": "test_controller.py",
    "sparsity.weights.drop_fraction": "test_block_runs.py",
    "checkpoint.every": "test_run.py",
    "checkpoint.keep": "test_run.py",
    "checkpoint.keep_every": "test_run.py",
    "export.huggingface": "test_run.py",
}


def test_every_key_is_accounted_for() -> None:
    named = [*STAGES, *ELSEWHERE]
    assert sorted(named) == sorted(key.path for key in keys())
    for key, file in ELSEWHERE.items():
        assert key.rpartition(".")[2] in (ROOT / "tests" / file).read_text(), key


@functools.cache
def base(stage: Stage, extra: tuple[tuple[str, Any], ...]) -> Any:
    return stage(config_with(dict(extra)))


# What a key changes does not depend on the version of jax.
@pytest.mark.parametrize("key", slow_after(1, *STAGES))
def test_a_key_changes_its_stage(key: str) -> None:
    value, stage, extra = STAGES[key]
    changed = stage(config_with(extra | {key: value}))
    assert changed != base(stage, tuple(extra.items()))


@pytest.mark.parametrize("stage", [rungs, refreshes, step, selection, probe, compiler, refused])
def test_the_same_settings_give_the_same(stage: Stage) -> None:
    assert stage(config_with({})) == base(stage, ())
