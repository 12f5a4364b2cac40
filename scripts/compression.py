"""The steps of `compress`: calibration text, perplexity, compression, the written directory."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sat_jax.compress.methods import Method
from sat_jax.compress.structured import Structured
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.splits import HELD_OUT, TRAIN
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.evaluate.eval_model import EvalModel, open_eval_model
from sat_jax.interop import locate, quantized
from sat_jax.interop.huggingface import check_exportable, write_directory
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import PRESETS
from sat_jax.nn.layout import flat_values
from sat_jax.provenance import environment
from sat_jax.results import rows
from sat_jax.results.record import without_place
from sat_jax.train.metrics import to_json
from sat_jax.train.run_weights import exported
from scripts.calibration import calibration_report, context_of, held_out_perplexity, prepare_text
from scripts.evaluation_meter import Args
from scripts.matrices import (
    budget_of,
    compress_matrices,
    print_matrices,
    saved_layers,
    settings_of,
)
from scripts.outcome import Outcome
from scripts.structured import print_units, remove_units


def config_of(model: str) -> DecoderConfig:
    """Return the config of a model, which may be the name of a preset."""
    is_preset = model in PRESETS and not locate(model).exists()
    return PRESETS[model] if is_preset else _open(model).weights.config


def print_plan(args: Args, config: DecoderConfig, method: Method) -> None:
    """Print what would be removed of each matrix, or of each axis, and what remains, or the size of
    the model with quantized matrices."""
    if isinstance(method, Structured):
        print_units(args, config, method)
    else:
        print_matrices(args, config, method, budget_of(args, config, method))


def compress(args: Args, method: Method) -> None:
    """Compress the model, and write it with its report."""
    source = _open(args.model)
    config, layout = source.weights.config, layout_of(source.weights.config)
    check_exportable(config)
    budget = saved = None
    if isinstance(method, Structured):
        method.smaller(config)  # raises `UserError` if the model cannot be written
    else:
        budget = budget_of(args, config, method)
    tokenizer = source.tokenizer(args.tokenizer)
    prepared = prepare_text(args, tokenizer, context_of(args, config))
    if not isinstance(method, Structured):
        saved = saved_layers(args, prepared, method, budget)
    seconds: dict[str, float] = {}
    with _timed(seconds, "evaluate_before"):
        before = held_out_perplexity(source.model("float32"), prepared, args.rows)
    print(f"perplexity before: {before:.4f}", flush=True)
    values = {path: source.weights.read(path) for path in layout.leaves}
    with _timed(seconds, "compress"):
        batches = list(in_order(open_split(prepared, TRAIN), args.rows, args.calibration_rows))
        if isinstance(method, Structured):
            outcome = remove_units(args, config, values, batches, method)
        else:
            assert saved is not None
            outcome = compress_matrices(args, config, values, batches, method, budget, saved)
    with _timed(seconds, "evaluate_after"):
        after = held_out_perplexity(outcome.model, prepared, args.rows)
    print(f"perplexity after:  {after:.4f}")
    report = {
        "model": args.model,
        "method": vars(method) if isinstance(method, Structured) else settings_of(method, budget),
        "calibration": calibration_report(args, prepared, tokenizer),
        "perplexity": {
            "before": before,
            "after": after,
            "held_out_tokens": prepared.info.splits[HELD_OUT].targets,
            "context": prepared.info.row_length,
        },
        "dtype": args.dtype,
        **outcome.report,
        "seconds": seconds,
    }
    _write(args, source, tokenizer, outcome, report | environment())
    if saved is not None:
        saved.remove()
    if args.record is not None:
        rows.append(args.record, [recorded(report)])
    names = ", ".join(["its tokenizer", *outcome.files])
    dtypes = " and ".join([*outcome.dtypes, args.dtype])
    print(f"{args.out}: model in {dtypes}, with {names} and report.json")


def recorded(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of results: the report without places, and without what it says of layers."""
    of_layers = ("layers", "removed", "ranks", "allocation")
    row = {key: value for key, value in report.items() if key not in of_layers}
    row["model"] = without_place(report["model"], "model.path")
    calibration = dict(report["calibration"])
    calibration["sources"] = without_place(calibration["sources"], "data.sources")
    calibration["tokenizer"] = without_place(calibration["tokenizer"], "data.tokenizer")
    return to_json({"measure": "compression", **row, "calibration": calibration})


def _open(model: str) -> EvalModel:
    source = open_eval_model(model)
    source.weights.check_not_quantized(model)
    return source


def _write(
    args: Args,
    source: EvalModel,
    tokenizer: Tokenizer,
    outcome: Outcome,
    report: dict[str, Any],
) -> None:
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "files": {**tokenizer.files(), **outcome.files, "report.json": text.encode()},
        "generation": source.weights.generation,
    }
    model = outcome.model
    config = exported(model.config, tokenizer, source.data_format)
    if outcome.quantization is not None:
        quantized.write_directory(args.out, config, model, outcome.quantization, **settings)
    else:
        write_directory(args.out, config, flat_values(model).__getitem__, **settings)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
