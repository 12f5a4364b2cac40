"""Every experiment file gives valid settings; those for accelerators build and lower."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import table_context, table_from_scratch, table_retnet, table_s2d
from sat_jax.config_values import experiment, find, load
from sat_jax.models.build import layout_of
from sat_jax.results.finished import DEFAULTS
from sat_jax.results.planned import plan_runs
from sat_jax.results.record import dense_baseline, dense_version
from sat_jax.results.sweep import combine, sweep_of
from sat_jax.train.run_weights import starting_point
from tests.conftest import ROOT, RunPython

TABLES = sorted((ROOT / "experiments").glob("table_*.py"))
OTHERS = (ROOT / "experiments" / "__init__.py", ROOT / "experiments" / "scales.py")
FROM_SCRATCH = sorted(
    file
    for name in ("s2d", "retnet", "table_context", "table_continued", "from_scratch")
    for file in (ROOT / "experiments").glob(f"*{name}*.py")
)
TABLES = [file for file in TABLES if file not in FROM_SCRATCH]
FILES = sorted({*(ROOT / "experiments").glob("*.py")} - {*TABLES, *OTHERS, *FROM_SCRATCH})
SCALES = {
    "smoke": "smollm2-135m",
    "small": "smollm2-135m",
    "paper": "tinyllama-1.1b",
    "paper-7b": "llama-2-7b",
    "paper-13b": "llama-2-13b",
}
OWN_MODEL = {"tinyllama_cpt": "tinyllama-1.1b", "llama2_7b_cpt": "llama-2-7b"}

LOWER = """
import json, sys
import jax
from sat_jax.config_values import load
from sat_jax.parallel.mesh import make_mesh
from sat_jax.train.programs import Programs
from sat_jax.train.run_weights import starting_point
from sat_jax.train.setup import controller_of

def lower(spec, preset):
    name, variant = spec.split(":")
    config = load(f"experiments/{name}.py:{variant}", [f"model.preset={preset}"])
    model, _ = starting_point(config)
    controller = controller_of(config, model)
    programs = Programs(config, model, make_mesh(config.mesh), controller)
    first, last = controller.rungs[0].plan, controller.rungs[-1].plan
    texts = [programs.lower_step(plan).as_text() for plan in (first, last)]
    programs.close()
    gate = f"x{first.segments[-1].kept('channel')}x{model.d_model}xf32"
    return {
        "devices": jax.device_count(),
        "rungs": len(controller.rungs),
        "dense_last": controller.neurons.is_dense(last),
        "kept_in_first": gate in texts[0],
        "kept_in_last": gate in texts[1],
    }

print(json.dumps({spec: lower(spec, preset) for spec, preset in json.loads(sys.argv[1]).items()}))
"""
PAPER = {
    f"{name}:sat": preset for name, preset in (OWN_MODEL | {"retnet_1b": "retnet-1.3b"}).items()
}
LONG = {"extend_context:llama-2-7b-128k": "llama-2-7b"}  # rows of 131,072 tokens


@pytest.fixture(scope="module")
def lowered(run_python: RunPython) -> dict[str, dict[str, Any]]:
    """Steps of models with 8 devices, by experiment, lowered in one process."""
    done = run_python("-c", LOWER, json.dumps(PAPER | LONG), devices=8)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", ["sat", "dense"])
def test_settings_are_valid(file: Path, variant: str) -> None:
    needs_model = [f"model.preset={OWN_MODEL[file.stem]}"] if file.stem in OWN_MODEL else []
    config = load(f"{file}:{variant}", needs_model)
    assert (config.sparsity.rate > 0) == (variant == "sat")


@pytest.mark.parametrize("file", TABLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", SCALES)
def test_sweeps_of_the_tables_are_valid(file: Path, scale: str) -> None:
    check_sweep(
        file, scale, {"model.path": None, "model.preset": SCALES[scale], "data.tokenizer": "bytes"}
    )


@pytest.mark.parametrize("name", ["table_retnet", "table_retnet_learning_rates"])
@pytest.mark.parametrize("scale", table_retnet.SEEDS)
def test_sweeps_of_retnet_are_valid(name: str, scale: str) -> None:
    check_sweep(ROOT / "experiments" / f"{name}.py", scale, {})


@pytest.mark.parametrize("scale", table_from_scratch.SCALES)
def test_sweeps_of_sat_from_scratch_are_valid(scale: str) -> None:
    check_sweep(ROOT / "experiments" / "table_from_scratch.py", scale, {}, paired=False)


def test_the_sweep_of_a_continued_model_is_valid() -> None:
    own = {f"model.{name}": None for name in ("path", "d_model", "n_layers", "n_heads", "d_ff")}
    shape = own | {"model.preset": "smollm2-135m", "data.tokenizer": "bytes"}
    file = ROOT / "experiments" / "table_continued.py"
    check_sweep(file, "smoke", shape, paired=False)
    base, _ = starting_point(load(f"{file}:base", []))
    assert base.vocab_size == 2048


@pytest.mark.parametrize("variant", table_context.FACTORS)
def test_sweeps_of_contexts_are_valid(variant: str) -> None:
    check_sweep(ROOT / "experiments" / "table_context.py", variant, {})


def test_contexts_are_extended_from_the_length_of_the_base() -> None:
    spec = f"{ROOT}/experiments/table_context.py"
    base, _ = starting_point(load(f"{spec}:base", []))
    assert base.max_positions == load(f"{spec}:base", []).data.row_length == table_context.LENGTH
    for variant, factor in table_context.FACTORS.items():
        config = load(f"{spec}:{variant}", [])
        assert config.model.rope_factor == factor
        tokens = config.train.rows_per_step * config.data.row_length
        assert tokens == table_context.TOKENS_PER_STEP


@pytest.mark.parametrize("scale", table_retnet.SEEDS)
def test_retnet_and_the_transformer_have_equal_parameters(scale: str) -> None:
    spec = f"{ROOT}/experiments/table_retnet.py:{scale}"
    counts = []
    for settings in table_retnet.models(scale):
        overrides = [f"{path}={value}" for path, value in settings.items()]
        model, _ = starting_point(load(spec, overrides))
        layout = layout_of(model)
        sizes = [layout.shapes[path].size for path, leaf in layout.leaves.items() if leaf.trained]
        counts.append(sum(sizes))
    retnet, transformer = counts
    assert abs(transformer / retnet - 1) <= (0.0025 if scale == "paper" else 0)


@pytest.mark.parametrize("file", ["retnet_small", "retnet_1b"])
def test_variants_of_retnet(file: str) -> None:
    path = ROOT / "experiments" / f"{file}.py"
    configs = {v: load(f"{path}:{v}", []) for v in ("retnet", "transformer", "sat")}
    families = {v: starting_point(config)[0].family for v, config in configs.items()}
    assert families == {"retnet": "retnet", "transformer": "llama", "sat": "retnet"}
    rates = {v: config.sparsity.rate for v, config in configs.items()}
    assert rates == {"retnet": 0, "transformer": 0, "sat": 0.4}
    assert dense_version(configs["sat"]) == dense_version(configs["retnet"])


@pytest.mark.parametrize("name", ["table_s2d", "table_s2d_learning_rates"])
@pytest.mark.parametrize("scale", table_s2d.SEEDS)
def test_sweeps_from_scratch_are_valid(name: str, scale: str) -> None:
    # Dense and block-sparse training have learning rates of their own in one of the tables.
    paired = name != "table_s2d"
    check_sweep(ROOT / "experiments" / f"{name}.py", scale, {}, paired=paired)


def check_sweep(file: Path, scale: str, shape: dict[str, Any], *, paired: bool = True) -> None:
    """Every run of every scale is valid and different, and each has its dense baseline, if
    `paired`."""
    spec = f"{file}:{scale}"
    sweep = sweep_of(spec)
    assert sweep is not None and sweep.comparisons
    fixed, settings = combine([], {}, sweep.runs, None)
    runs = plan_runs(experiment(spec), {**fixed, **shape}, settings)
    assert len(runs) == len(settings) > 4
    baselines = {dense_baseline(run.config) for run in runs if run.config.omitted_share == 0}
    assert baselines and (not paired or {dense_baseline(r.config) for r in runs} == baselines)
    for comparison in sweep.comparisons:
        assert all(path in DEFAULTS or find(path) for path in comparison.settings)
    assert f"--config=experiments/{file.name}" in file.read_text()


@pytest.mark.parametrize(
    ("spec", "density"),
    [("s2d_small:s2d", 0.25), ("s2d_small:sparse", 0.25), ("s2d_small:dense", 1.0),
     ("s2d_gpt13b", 0.125)],
)  # fmt: skip
def test_settings_from_scratch_are_valid(spec: str, density: float) -> None:
    name, _, variant = spec.partition(":")
    file = ROOT / "experiments" / f"{name}.py"
    config = load(f"{file}:{variant}" if variant else str(file), [])
    assert config.sparsity.weights.density == density
    assert FROM_SCRATCH and file in FROM_SCRATCH


BLOCKS = """
import json, sys
import jax
from sat_jax.config_values import load
from sat_jax.models.presets import preset
from sat_jax.parallel.mesh import make_mesh
from sat_jax.train.programs import Programs
from sat_jax.train.setup import controller_of

config = load("experiments/s2d_gpt13b.py", [])
model = preset(config.model.preset)
controller = controller_of(config, model)
programs = Programs(config, model, make_mesh(config.mesh), controller)
first, last = controller.rungs[0].plan, controller.rungs[-1].plan
texts = [programs.lower_step(plan).as_text() for plan in (first, last)]
print(json.dumps({
    "devices": jax.device_count(),
    "blocks": ["40x160x5x128x128xf32" in text for text in texts],
    "dense": ["40x20480x5120xf32" in text for text in texts],
}))
programs.close()
"""


@pytest.mark.slow
def test_the_gpt_of_13b_lowers_on_virtual_devices(run_python: RunPython) -> None:
    done = run_python("-c", BLOCKS, devices=8)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "devices": 8,
        "blocks": [True, False],
        "dense": [False, True],
    }


@pytest.mark.slow
@pytest.mark.parametrize("spec", PAPER)
def test_paper_models_lower_on_virtual_devices(
    spec: str, lowered: dict[str, dict[str, Any]]
) -> None:
    assert lowered[spec] == {
        "devices": 8,
        "rungs": 5,
        "dense_last": True,
        "kept_in_first": True,
        "kept_in_last": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("spec", LONG)
def test_rows_of_131072_tokens_lower_on_virtual_devices(
    spec: str, lowered: dict[str, dict[str, Any]]
) -> None:
    result = lowered[spec]
    assert result["devices"] == 8 and result["rungs"] == 1 and result["dense_last"]
