"""The steps of `compress` that are of matrices: budgets, saved layers, progress, costs."""

import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sat_jax.compress.budget import Allocation, Budget
from sat_jax.compress.costs import costs, quantized_costs
from sat_jax.compress.factors import FACTORS_FILE, factors_file
from sat_jax.compress.layers import (
    CompressedLayer,
    check_matrices,
    compress_layers,
    matrices,
    stack_layers,
    with_equal_bits,
)
from sat_jax.compress.method import ByMatrix
from sat_jax.compress.methods import OfMatrices
from sat_jax.compress.quantize import Quantization
from sat_jax.compress.saved_layers import SavedLayers
from sat_jax.compress.sensitivity import loss_increases
from sat_jax.data.batch import Batch
from sat_jax.data.prepare import Prepared
from sat_jax.interop import locate
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.layout import Layout
from sat_jax.train.run_weights import model_fingerprint
from scripts.calibration import context_of
from scripts.evaluation_meter import Args
from scripts.outcome import Outcome


def budget_of(args: Args, config: DecoderConfig, method: OfMatrices) -> Budget | None:
    """Return the budget that the options name, or None. Raises `UserError` if there is a matrix
    that the method cannot compress, or no setting fits."""
    layout = layout_of(config)
    for kind in ("size", "flops"):
        if (share := getattr(args, f"target_{kind}")) is not None:
            itemsize = jnp.dtype(args.dtype).itemsize
            return Budget(method, kind, share, layout, context_of(args, config), itemsize)
    check_matrices(layout, method)
    return None


def settings_of(method: OfMatrices, budget: Budget | None) -> dict[str, Any]:
    """Return the settings that a report has: with a budget, that in place of the varied one."""
    settings = dict(vars(method))
    if budget is not None:
        del settings[method.varied.name]
        settings[f"target_{budget.kind}"] = budget.share
    return settings


def print_matrices(
    args: Args, config: DecoderConfig, method: OfMatrices, budget: Budget | None
) -> None:
    """Print how many weights of each matrix would be removed, or the size of the quantized model;
    with a budget, the settings among which each matrix gets one."""
    layout = layout_of(config)
    if budget is not None:
        _print_budget(budget)
        return
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


def _print_budget(budget: Budget) -> None:
    varied = budget.method.varied
    count = budget.layout.layers * len(matrices(budget.layout))
    values = ", ".join("none" if s is None else f"{s:g}" for s in budget.settings)
    lowest, highest = budget.limits
    uniform = budget.uniform()
    print(
        f"target {budget.kind} {budget.share:g} of the model; {budget.method.method} reaches"
        f" {lowest:.3f} to {highest:.3f}\n"
        f"{count} matrices get their own {varied.name}: {values}\n"
        f"which one, the calibration text decides; the uniform {varied.name} that fits:"
        f" {'none' if uniform is None else f'{uniform:g}'}"
    )


def saved_layers(
    args: Args, prepared: Prepared, method: OfMatrices, budget: Budget | None
) -> SavedLayers:
    """Return the layers that the same command compressed before it was killed, if any."""
    settings = {
        "model": model_fingerprint(locate(args.model)),
        "method": settings_of(method, budget),
        "calibration": prepared.info.fingerprint,
        "calibration_rows": args.calibration_rows,
        "rows": args.rows,
    }
    if budget is not None:
        settings["dtype"] = args.dtype  # the share of a quantized matrix depends on it
    saved = SavedLayers(args.out.with_name(f"{args.out.name}.layers"), settings)
    if count := saved.count():
        print(f"continuing: {saved.folder} has {count} compressed layers")
    return saved


def compress_matrices(
    args: Args,
    config: DecoderConfig,
    values: dict[str, np.ndarray],
    batches: list[Batch],
    method: OfMatrices,
    budget: Budget | None,
    saved: SavedLayers,
) -> Outcome:
    """Return the model with compressed matrices, and print its size; `values` is emptied."""
    layout, allocation = layout_of(config), None
    chosen: OfMatrices | ByMatrix = method
    if budget is not None:
        allocation = _allocate(config, values, batches, budget, saved)
        chosen = allocation.method
    layers = _compress(layout, values, batches, chosen, saved)
    integers = with_equal_bits([layer.quantized for layer in layers])
    weights: dict[str, Any] = values | stack_layers(integers)
    values.clear()
    # One parameter at a time, so that the model is not in memory twice.
    model = layout.bind(
        {path: jax.tree.map(jnp.asarray, weights.pop(path)) for path in layout.leaves}
    )
    removed = sum((Counter(layer.removed) for layer in layers), Counter())
    report = _costs(args, layout, config, method, removed, chosen)
    _print_costs(report)
    if allocation is not None:
        report["allocation"] = _allocation_report(method, allocation)
    report["layers"] = [_layer_report(layer) for layer in layers]
    files: dict[str, bytes] = {}
    factors = [layer.factors for layer in layers]
    if any(factors):
        report["ranks"] = {
            path: [of.rank if (of := layer.get(path)) else None for layer in factors]
            for path in removed
        }
        files[FACTORS_FILE] = factors_file(factors, args.dtype)
    quantization = None
    if isinstance(method, Quantization):
        quantization = dict(method.file_settings)
        if allocation is not None:
            quantization["bits"] = allocation.values
    return Outcome(model, report, files, quantization)


def _allocate(
    config: DecoderConfig,
    values: dict[str, np.ndarray],
    batches: list[Batch],
    budget: Budget,
    saved: SavedLayers,
) -> Allocation:
    """Return the setting of each matrix, and print by how much the loss is expected to increase."""
    track = functools.partial(tqdm, desc="sensitivity", unit=" layers", leave=False)

    def measure() -> dict[str, Any]:
        increases = loss_increases(config, values, batches, budget.measured(), track)
        return {path: by_layer.tolist() for path, by_layer in increases.items()}

    known = saved.json("sensitivity", measure)
    allocation = budget.allocate({path: np.asarray(known[path]) for path in known})
    print(
        f"sum of the estimated increases of the loss: {allocation.increase:.4g} nats a token",
        end="",
    )
    if allocation.uniform is not None:
        name = budget.method.varied.name
        print(f"; {name} {allocation.uniform:g}: {allocation.uniform_increase:.4g}", end="")
    print(flush=True)
    return allocation


def _allocation_report(method: OfMatrices, allocation: Allocation) -> dict[str, Any]:
    return {
        "setting": method.varied.name,
        "values": allocation.values,
        "estimated_increase": allocation.increase,
        "uniform": allocation.uniform,
        "estimated_increase_uniform": allocation.uniform_increase,
    }


def _layer_report(layer: CompressedLayer) -> dict[str, Any]:
    removed = {} if layer.quantized else {"removed": layer.removed}
    return {"layer": layer.layer, **removed, "error": layer.error}


def _compress(
    layout: Any,
    values: dict[str, np.ndarray],
    batches: list[Batch],
    method: OfMatrices | ByMatrix,
    saved: SavedLayers,
) -> list[CompressedLayer]:
    """Compress all layers in place, with a progress bar."""
    layers = []
    with tqdm(desc="compressing", unit=" layers", total=layout.layers, leave=False) as bar:
        for layer in compress_layers(layout, values, batches, method, saved):
            layers.append(layer)
            bar.set_postfix(error=f"{layer.error:.3f}")
            bar.update()
    return layers


def _costs(
    args: Args,
    layout: Layout[Any],
    config: DecoderConfig,
    method: OfMatrices,
    removed: dict[str, int],
    chosen: OfMatrices | ByMatrix | None = None,
) -> dict[str, Any]:
    """Return size and FLOPs of the model, of which so many weights of each matrix are removed, or
    whose matrices are quantized, by the `chosen` methods if settings differ."""
    context, itemsize = context_of(args, config), jnp.dtype(args.dtype).itemsize
    if isinstance(method, Quantization):
        return quantized_costs(layout, chosen or method, context, itemsize)
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
