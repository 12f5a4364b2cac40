"""The steps of `compress`: calibration text, perplexity, compression, the written directory."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sat_jax.compress.costs import costs, quantized_costs
from sat_jax.compress.factors import FACTORS_FILE, factors_file, stack_layers
from sat_jax.compress.layers import CompressedLayer, check_matrices, compress_layers, matrices
from sat_jax.compress.methods import Method, OfMatrices
from sat_jax.compress.quantize import Quantization
from sat_jax.compress.saved_layers import SavedLayers
from sat_jax.compress.structured import Structured
from sat_jax.data.batch import Batch
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.splits import HELD_OUT, TRAIN
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.eval_model import EvalModel, open_eval_model
from sat_jax.evaluate.perplexity import perplexity, prepared_data
from sat_jax.interop import locate, quantized
from sat_jax.interop.huggingface import check_exportable, write_directory
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.presets import PRESETS
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import perplexity_of
from sat_jax.provenance import environment
from sat_jax.results import rows
from sat_jax.results.record import without_place
from sat_jax.train.metrics import to_json
from sat_jax.train.run_weights import exported, model_fingerprint
from scripts.evaluation_meter import Args, Meter
from scripts.structured import Outcome, print_units, remove_units

_CONTEXT = 2048  # default, if the model has so many positions


def dry_run(args: Args, method: Method) -> None:
    """Print what would be removed of each matrix, or of each axis, and what remains, or the size of
    the model with quantized matrices."""
    is_preset = args.model in PRESETS and not locate(args.model).exists()
    config = PRESETS[args.model] if is_preset else _open(args.model).weights.config
    if isinstance(method, Structured):
        print_units(args, config, method, _context(args, config))
        return
    layout = layout_of(config)
    check_matrices(layout, method)
    if isinstance(method, Quantization):
        _print_costs(_costs(args, layout, config, method, {}))
        return
    removed: dict[str, int] = {}
    print(f"{'matrix':<24} {'out × in':>15} {'layers':>6} {'removed':>15} {'share':>7}")
    for matrix in matrices(layout):
        count = method.count(matrix.rows, matrix.columns)
        removed[matrix.path] = layout.layers * count
        shape = f"{matrix.rows} × {matrix.columns}"
        name = matrix.path.removeprefix("layers/")
        print(
            f"{name:<24} {shape:>15} {layout.layers:>6} {layout.layers * count:>15,}"
            f" {count / math.prod(matrix.shape):>7.2%}"
        )
    _print_costs(_costs(args, layout, config, method, removed))


def compress(args: Args, method: Method) -> None:
    """Compress the model, and write it with its report."""
    source = _open(args.model)
    config, layout = source.weights.config, layout_of(source.weights.config)
    check_exportable(config)
    if isinstance(method, Structured):
        method.smaller(config)  # raises `UserError` if the model cannot be written
    else:
        check_matrices(layout, method)
    tokenizer, context = source.tokenizer(args.tokenizer), _context(args, config)
    prepared = _prepare(args, tokenizer, context)
    saved = None if isinstance(method, Structured) else _saved(args, prepared, method)
    seconds: dict[str, float] = {}
    with _timed(seconds, "evaluate_before"):
        before = _perplexity(source.model("float32"), prepared, args.rows)
    print(f"perplexity before: {before:.4f}", flush=True)
    values = {path: source.weights.read(path) for path in layout.leaves}
    with _timed(seconds, "compress"):
        batches = list(in_order(open_split(prepared, TRAIN), args.rows, args.calibration_rows))
        if isinstance(method, Structured):
            outcome = remove_units(args, config, values, batches, method, context)
        else:
            outcome = _compress_matrices(args, config, values, batches, method, saved)
    with _timed(seconds, "evaluate_after"):
        after = _perplexity(outcome.model, prepared, args.rows)
    print(f"perplexity after:  {after:.4f}")
    report = {
        "model": args.model,
        "method": vars(method),
        "calibration": _calibration(args, prepared, tokenizer),
        "perplexity": {
            "before": before,
            "after": after,
            "held_out_tokens": prepared.info.splits[HELD_OUT].targets,
            "context": context,
        },
        "dtype": args.dtype,
        **outcome.report,
        "seconds": seconds,
    }
    _write(args, source, tokenizer, outcome.model, method, report | environment(), outcome.files)
    if saved is not None:
        saved.remove()
    if args.record is not None:
        rows.append(args.record, [recorded(report)])
    names = ", ".join(["its tokenizer", *outcome.files])
    dtypes = f"int{method.bits} and " if isinstance(method, Quantization) else ""
    print(f"{args.out}: model in {dtypes}{args.dtype}, with {names} and report.json")


def _saved(args: Args, prepared: Prepared, method: OfMatrices) -> SavedLayers:
    """Return the layers that the same command compressed before it was killed, if any."""
    settings = {
        "model": model_fingerprint(locate(args.model)),
        "method": vars(method),
        "calibration": prepared.info.fingerprint,
        "calibration_rows": args.calibration_rows,
        "rows": args.rows,
    }
    saved = SavedLayers(args.out.with_name(f"{args.out.name}.layers"), settings)
    if count := saved.count():
        print(f"continuing: {saved.folder} has {count} compressed layers")
    return saved


def recorded(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of results: the report without places, and without what it says of layers."""
    of_layers = ("layers", "removed", "ranks")
    row = {key: value for key, value in report.items() if key not in of_layers}
    row["model"] = without_place(report["model"], "model.path")
    calibration = dict(report["calibration"])
    calibration["sources"] = without_place(calibration["sources"], "data.sources")
    calibration["tokenizer"] = without_place(calibration["tokenizer"], "data.tokenizer")
    return to_json({"measure": "compression", **row, "calibration": calibration})


def _compress_matrices(
    args: Args,
    config: DecoderConfig,
    values: dict[str, np.ndarray],
    batches: list[Batch],
    method: OfMatrices,
    saved: SavedLayers | None,
) -> Outcome:
    """Return the model with compressed matrices, and print its size; `values` is emptied."""
    layout = layout_of(config)
    layers = _compress(layout, values, batches, method, saved)
    weights: dict[str, Any] = values | stack_layers([layer.quantized for layer in layers])
    values.clear()
    # One parameter at a time, so that the model is not in memory twice.
    model = layout.bind(
        {path: jax.tree.map(jnp.asarray, weights.pop(path)) for path in layout.leaves}
    )
    removed = sum((Counter(layer.removed) for layer in layers), Counter())
    report = _costs(args, layout, config, method, removed)
    _print_costs(report)
    report["layers"] = [_layer_report(layer) for layer in layers]
    files: dict[str, bytes] = {}
    if factors := stack_layers([layer.factors for layer in layers]):
        report["ranks"] = {path: weight.rank for path, weight in factors.items()}
        files[FACTORS_FILE] = factors_file(factors, args.dtype)
    return Outcome(model, report, files)


def _layer_report(layer: CompressedLayer) -> dict[str, Any]:
    removed = {} if layer.quantized else {"removed": layer.removed}
    return {"layer": layer.layer, **removed, "error": layer.error}


def _open(model: str) -> EvalModel:
    source = open_eval_model(model)
    source.weights.check_not_quantized(model)
    return source


def _context(args: Args, config: DecoderConfig) -> int:
    """Return the tokens of a row."""
    if args.context is None:
        return min(_CONTEXT, config.max_positions)
    config.check_length("--context", args.context)
    return int(args.context)


def _prepare(args: Args, tokenizer: Tokenizer, context: int) -> Prepared:
    """Return the packed calibration and held-out text. Raises `UserError` if it is too short."""
    needed = args.calibration_rows * context
    prepared = prepare(
        sources=args.calibration,
        tokenizer=tokenizer,
        row_length=context,
        held_out=args.held_out,
        # Of few documents up to half are held out.
        max_tokens=2 * needed,
        data_format=DataFormat(text_field=args.text_field),
        log=print,
    )
    split = prepared.info.splits[TRAIN]
    if split.rows < args.calibration_rows:
        raise UserError(
            f"{' '.join(args.calibration)}: too short for calibration: {split.tokens:,} tokens"
            f" remain beside the held-out text; needed: {needed:,} ({args.calibration_rows} rows of"
            f" {context}); accepted: more text, or a smaller --calibration-rows or --context"
        )
    return prepared


def _perplexity(model: Decoder, prepared: Prepared, rows: int) -> float:
    """Return the perplexity on the held-out text, with a progress bar."""
    data = prepared_data(prepared.path, HELD_OUT, model.config, rows)
    meter = Meter(data.tokens)
    nll, tokens = perplexity(model, data.batches, meter)
    meter.speed()  # closes the bar
    return perplexity_of(nll / tokens)


def _compress(
    layout: Any,
    values: dict[str, np.ndarray],
    batches: list[Batch],
    method: OfMatrices,
    saved: SavedLayers | None,
) -> list[CompressedLayer]:
    """Compress all layers in place, with a progress bar."""
    layers = []
    with tqdm(desc="compressing", unit=" layers", total=layout.layers, leave=False) as bar:
        for layer in compress_layers(layout, values, batches, method, saved):
            layers.append(layer)
            bar.set_postfix(error=f"{layer.error:.3f}")
            bar.update()
    return layers


def _calibration(args: Args, prepared: Prepared, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what identifies the calibration rows, and how documents begin and end."""
    return {
        "sources": args.calibration,
        "fingerprint": prepared.info.fingerprint,
        "rows": args.calibration_rows,
        "context": prepared.info.row_length,
        "held_out": args.held_out,
        "tokenizer": tokenizer.name,
        "adds_bos": tokenizer.adds_bos,
        "adds_eos": tokenizer.eos_id is not None,
    }


def _write(
    args: Args,
    source: EvalModel,
    tokenizer: Tokenizer,
    model: Decoder,
    method: Method,
    report: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "files": {**tokenizer.files(), **files, "report.json": text.encode()},
        "generation": source.weights.generation,
    }
    config = exported(model.config, tokenizer, source.data_format)
    if isinstance(method, Quantization):
        quantized.write_directory(args.out, config, model, method.file_settings, **settings)
    else:
        write_directory(args.out, config, flat_values(model).__getitem__, **settings)


def _costs(
    args: Args, layout: Any, config: DecoderConfig, method: OfMatrices, removed: dict[str, int]
) -> dict[str, Any]:
    """Return size and FLOPs of the model, of which so many weights of each matrix are removed."""
    context, itemsize = _context(args, config), jnp.dtype(args.dtype).itemsize
    if isinstance(method, Quantization):
        return quantized_costs(layout, method, context, itemsize)
    return costs(layout, removed, context, itemsize, method.saving)


def _print_costs(cost: dict[str, Any]) -> None:
    weights, sizes, flops = cost["weights"], cost["bytes"], cost["flops_per_token"]
    written = f"written model: {sizes['after']:,} bytes"
    if bits := cost.get("bits_per_weight"):
        print(
            f"{bits['in_matrices']:.4g} bits a weight for {weights['in_matrices']:,} weights in"
            f" matrices, of {weights['all']:,} in the model"
        )
        print(f"{written}, before: {sizes['before']:,} bytes")
        return
    print(
        f"{weights['removed']:,} of {weights['in_matrices']:,} weights in matrices are removed, of"
        f" {weights['all']:,} in the model"
    )
    *_, saving = sizes
    print(
        f"{written}, {flops['after'] / 1e9:,.4g} GFLOP a token; {saving.replace('_', ' ')}:"
        f" {sizes[saving]:,} bytes, {flops[saving] / 1e9:,.4g} GFLOP"
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
