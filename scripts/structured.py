"""The steps of `compress` that are of structured pruning: shares, scores with progress, costs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sat_jax.compress.costs import smaller_costs
from sat_jax.compress.structured import Structured, prune_units
from sat_jax.data.batch import Batch
from sat_jax.errors import UserError
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.models.resize import axis_sizes
from sat_jax.nn.param import EMBED, LAYER
from scripts.calibration import context_of
from scripts.evaluation_meter import Args
from scripts.outcome import Outcome


def parse_shares(texts: Sequence[str], importance: str | None) -> dict[str, float]:
    """Return shares by axis of texts such as `channel=0.25`.

    Raises `UserError` for other texts, and for an `importance` that has no effect on these axes.
    """
    shares: dict[str, float] = {}
    for text in texts:
        axis, _, share = text.partition("=")
        if axis in shares:
            raise UserError(f"--remove has {axis} twice; accepted: one share of each axis")
        if "," in share:
            raise UserError(
                f"--remove {text}: config.json cannot express layers of different sizes; accepted:"
                " one share for all layers"
            )
        try:
            shares[axis] = float(share)
        except ValueError as error:
            raise UserError(
                f"--remove {text}; accepted: AXIS=SHARE, such as channel=0.25"
            ) from error
    if importance is not None and shares.keys() <= {EMBED, LAYER}:
        raise UserError(f"--importance has no effect on {' and '.join(shares)}; accepted: none")
    return shares


def print_units(args: Args, config: DecoderConfig, method: Structured) -> None:
    """Print how many units of each axis would be removed, and what remains."""
    smaller, sizes = method.smaller(config), axis_sizes(config)
    print(f"{'axis':<12} {'size':>8} {'removed':>8} {'share':>7}")
    for axis, kept in method.kept(config).items():
        removed = sizes[axis] - kept
        print(f"{axis:<12} {sizes[axis]:>8,} {removed:>8,} {removed / sizes[axis]:>7.2%}")
    _print_costs(_costs(args, config, smaller))


def remove_units(
    args: Args,
    config: DecoderConfig,
    values: dict[str, np.ndarray],
    rows: list[Batch],
    method: Structured,
) -> Outcome:
    """Return the smaller model, and print its size; `values` is emptied."""
    track = functools.partial(tqdm, desc="scores", leave=False)
    pruned = prune_units(config, values, rows, method, track)
    report = _costs(args, config, pruned.config)
    _print_costs(report)
    model = layout_of(pruned.config).bind(pruned.values)
    return Outcome(model, report | {"removed": pruned.summary}, {})


def _costs(args: Args, config: DecoderConfig, smaller: DecoderConfig) -> dict[str, Any]:
    layouts = layout_of(config), layout_of(smaller)
    return smaller_costs(*layouts, context_of(args, config), jnp.dtype(args.dtype).itemsize)


def _print_costs(cost: dict[str, Any]) -> None:
    weights, sizes, flops = cost["weights"], cost["bytes"], cost["flops_per_token"]
    print(
        f"{weights['removed']:,} of {weights['all']:,} weights are removed\n"
        f"written model: {sizes['after']:,} bytes, {flops['after'] / 1e9:,.4g} GFLOP a token;"
        f" before: {sizes['before']:,} bytes, {flops['before'] / 1e9:,.4g} GFLOP"
    )
