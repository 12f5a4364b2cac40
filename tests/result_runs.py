"""Finished runs with round numbers, for the tests of reports."""

from pathlib import Path
from typing import Any

from sat_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from sat_jax.config_sparsity import SparsityConfig
from sat_jax.results.finished import collect
from sat_jax.results.record import record_run, row_of
from sat_jax.results.rows import Row
from sat_jax.results.sweep import Comparison
from tests.test_tables import rung

DEVICE = {"platform": "gpu", "kind": "NVIDIA H200", "count": 1, "processes": 1, "host_cpus": 16}


def config_of(seed: int, **changed: Any) -> Config:
    """`changed`: settings of sparsity by name, `moments`, `kernels`."""
    optimizer = {k: changed.pop(k) for k in ("moments",) if k in changed}
    model = ModelConfig(kernels=changed.pop("kernels", None))
    return Config(
        seed=seed,
        model=model,
        train=TrainConfig(eval_every=5 if changed.get("schedule") == "auto" else 0),
        optimizer=OptimizerConfig(**optimizer),
        sparsity=SparsityConfig(**changed),
    )


def summary_of(
    after: float, step: float, rungs: list[dict[str, Any]], **changed: Any
) -> dict[str, Any]:
    return {
        "steps": 8, "tokens": 4000, "loss_tokens": 4000, "perplexity_before": 20.0,
        "perplexity_after": after, "spent_flops": 8e9, "dense_flops": 1e10, "rungs": rungs,
        "selections": 2, "probes": 2, "compile_seconds": 5.0, "data": "d" * 20,
        "seconds": {"compile": 9.0, "data": 1.0, "step": step, "refresh": 0.5, "evaluate": 7.0,
                    "checkpoint": 0.5, "other": 3.0, "total": 21.0 + step},
        "peak_memory": {"bytes": 2_000_000_000, "of": "device"},
        "versions": {"python": "3.11.7"}, "device": DEVICE, "commit": "a" * 40,
    } | changed  # fmt: skip


RECORDS = [
    {"step": 0, "eval_loss": 3.0},
    *(
        {"step": step, "loss": 4.0 - step / 4, "tokens": 500 * step, "seconds": 1.0,
         "tokens_per_second": 500.0, "flops_per_second": 1e9, "omission_rate": 0.5}
        for step in range(1, 8)
    ),
    {"step": 8, "loss": 2.0, "tokens": 4000, "seconds": 1.0, "tokens_per_second": 500.0,
     "flops_per_second": 1e9, "omission_rate": 0.0, "eval_loss": float("inf")},
]  # fmt: skip


def runs(tmp_path: Path, *finished: tuple[Config, dict[str, Any]]) -> list[Row]:
    """Return the recorded rows of runs."""
    file = tmp_path / "rows.jsonl"
    for config, summary in finished:
        record_run(file, row_of("experiments/x.py", config, summary, RECORDS))
    return collect([file], print)[0]


DENSE = [rung(0.0, 100.0)]
SPARSE = [rung(0.5, 150.0, tokens=3000), rung(0.0, 100.0, tokens=1000)]


RATES = Comparison("rates", "Omission rate", ("sparsity.rate",))


def study(tmp_path: Path) -> list[Row]:
    return runs(
        tmp_path,
        (config_of(0), summary_of(10.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(1), summary_of(20.0, 38.0, DENSE, spent_flops=1e10)),
        (config_of(0, rate=0.4), summary_of(11.0, 18.0, SPARSE)),
        (config_of(1, rate=0.4), summary_of(24.0, 14.0, SPARSE)),
        (config_of(0, rate=0.2), summary_of(10.5, 18.0, SPARSE, commit="b" * 40)),
    )
