"""Runs a recipe. Finished steps are not repeated, and one that was killed continues."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_jax.compress.structured import Structured
from sat_jax.data.prepare import Prepared
from sat_jax.errors import UserError
from sat_jax.evaluate.eval_model import open_eval_model
from sat_jax.interop import locate
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.train.files import read_json, write_json
from sat_jax.train.loop import train
from sat_jax.train.metrics import to_json
from sat_jax.train.run_weights import model_fingerprint
from scripts.calibration import calibration_report, context_of, held_out_perplexity, prepare_text
from scripts.compression import compress, config_of, print_plan
from scripts.evaluation_meter import Args
from scripts.matrices import budget_of
from scripts.recipe import COMMON, Step, flat

_CONTENTS, _REPORT = "recipe.json", "report.json"
_SHOWN = ("method", "dtype", "weights", "bytes", "flops_per_token", "bits_per_weight", "seconds")


def print_recipe(args: Args, steps: Sequence[Step]) -> None:
    """Print the steps, and what each compression would remove."""
    for step, config in _with_configs(args, steps):
        print(f"{step.directory.name}: {_in_words(step)}")
        if step.method is not None and step.args is not None:
            print_plan(step.args, config, step.method)


def _with_configs(args: Args, steps: Sequence[Step]) -> Iterator[tuple[Step, DecoderConfig]]:
    """Yield the steps with the config of the model that each begins with. Raises `UserError` if the
    method of a step cannot compress it."""
    config: DecoderConfig = config_of(args.model)
    for step in steps:
        yield step, config
        if isinstance(step.method, Structured):
            config = step.method.smaller(config)
        elif step.method is not None and step.args is not None:
            budget_of(step.args, config, step.method)


def _in_words(step: Step) -> str:
    (settings,) = (value for name, value in step.settings.items() if name != "name")
    words = ", ".join(f"{name} {_value(value)}" for name, value in flat(settings))
    if step.config is not None:
        return f"train for {step.config.train.steps:,} steps ({words})"
    return words


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def run_recipe(args: Args, steps: Sequence[Step]) -> None:
    """Run all steps that are not finished, and write the report with the perplexity after each."""
    out: Path = args.out
    for _ in _with_configs(args, steps):
        pass  # raises `UserError` before anything is computed
    _begin(args, steps, out)
    report = read_json(out / _REPORT) if (out / _REPORT).exists() else {"steps": []}
    source = open_eval_model(args.model)
    tokenizer = source.tokenizer(args.tokenizer)
    prepared = prepare_text(args, tokenizer, context_of(args, source.weights.config))
    if not report["steps"]:
        before = held_out_perplexity(source.model("float32"), prepared, args.rows)
        report = {
            "model": args.model,
            "calibration": calibration_report(args, prepared, tokenizer),
            "perplexity_before": before,
            "steps": [],
        }
    for number, step in enumerate(steps):
        if number < len(report["steps"]):
            print(f"{step.directory.name}: finished before")
            continue
        print(f"{step.directory.name}: {_in_words(step)}", flush=True)
        done = _compress(step) if step.config is None else _train(args, step, prepared)
        report["steps"].append({**step.settings, "name": step.directory.name, **done})
        write_json(out / _REPORT, to_json(report))
    _print_table(report)


def _begin(args: Args, steps: Sequence[Step], out: Path) -> None:
    """Make the folder of a recipe, or check that it is one of this recipe. Raises `UserError` for
    one of another recipe, with what differs."""
    contents = {
        "model": model_fingerprint(locate(args.model)),
        **{name: getattr(args, name) for name in COMMON},
        **{f"step {step.directory.name}": step.settings for step in steps},
    }
    file = out / _CONTENTS
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: exists and is no folder of a recipe; accepted: a new one")
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, contents)
        return
    before = read_json(file)
    for name in [*before, *contents]:
        if before.get(name) != contents.get(name):
            raise UserError(
                f"{out}: was begun with another recipe: {name} differs; accepted: the recipe and"
                " the options that began it, or a new --out"
            )


def _compress(step: Step) -> dict[str, Any]:
    """Compress, unless the step is finished, and return its part of the report."""
    assert step.args is not None and step.method is not None
    if not step.directory.exists():
        compress(step.args, step.method)
    report = read_json(step.directory / _REPORT)
    shown = {key: report[key] for key in _SHOWN if key in report}
    return {"perplexity": report["perplexity"]["after"], **shown}


def _train(args: Args, step: Step, prepared: Prepared) -> dict[str, Any]:
    """Train, or continue, and return the part of the report."""
    assert step.config is not None
    start = time.perf_counter()
    train(step.config, step.directory, lambda line: print(line, file=sys.stderr))
    seconds = round(time.perf_counter() - start, 3)  # of this command, if it was continued
    model = open_eval_model(str(step.directory)).model("float32")
    after = held_out_perplexity(model, prepared, args.rows)
    print(f"perplexity after:  {after:.4f}")
    return {"perplexity": after, "seconds": seconds}


def _print_table(report: Mapping[str, Any]) -> None:
    print(f"{'step':<24} {'perplexity':>12}")
    print(f"{'before':<24} {report['perplexity_before']:>12.4f}")
    for step in report["steps"]:
        print(f"{step['name']:<24} {step['perplexity']:>12.4f}")
