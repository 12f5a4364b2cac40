"""The options of `compress` that belong to a method, and the method that they mean."""

import argparse
from typing import Any

from sat_jax.compress.methods import METHODS, Method, make_method
from sat_jax.compress.prune import Pruning
from sat_jax.errors import UserError
from scripts.structured import parse_shares

SETTINGS = ("sparsity", "pattern", "block", "ratio", "bits", "group", "remove", "importance")
TARGETS = ("target_size", "target_flops")
METHOD_OPTIONS = ("method", *SETTINGS, *TARGETS)


def chosen_method(args: argparse.Namespace) -> Method:
    """Return the method of a command line. Raises `UserError` for options that are not accepted."""
    if args.method is None:
        raise UserError(f"--method is missing; accepted: {', '.join(METHODS)}, or --recipe")
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if args.remove:
        settings["remove"] = parse_shares(args.remove, args.importance)
    method = make_method(args.method, settings)
    if "block" in settings and isinstance(method, Pruning) and not method.in_blocks:
        raise UserError("--block has no effect without --method sparsegpt or a block pattern")
    _check_target(args, method, settings)
    return method


def _check_target(args: argparse.Namespace, method: Method, settings: dict[str, Any]) -> None:
    """Raise `UserError` if a target does not go together with the method or another option."""
    targets = [option(name) for name in TARGETS if getattr(args, name) is not None]
    if not targets:
        return
    if len(targets) > 1:
        raise UserError(f"{' and '.join(targets)}; accepted: one of them")
    varied = getattr(method, "varied", None)
    if varied is None:
        raise UserError(
            f"{targets[0]} with method {args.method}: config.json cannot express layers of"
            " different sizes; accepted: --remove, or a method for matrices"
        )
    if varied.name in settings:
        raise UserError(
            f"--{varied.name} has no effect with {targets[0]}, which chooses it for each matrix;"
            " accepted: one of them"
        )


def option(name: str) -> str:
    """Return the option with this name of a setting."""
    return f"--{name.replace('_', '-')}"
