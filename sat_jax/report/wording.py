"""How a report words settings, variants and what a table's runs have in common."""

from collections.abc import Sequence
from typing import Any

from sat_jax.analysis.tables import percent
from sat_jax.config import ModelConfig, OptimizerConfig
from sat_jax.data.data_format import TOO_LONG_ACTIONS
from sat_jax.report.groups import Group, Variant
from sat_jax.report.records import SPARSE, Record, Settings


def caption_of(group: Group, variants: Sequence[Variant], varied: Sequence[str]) -> str:
    """What all runs of a table have in common, so far as it is no default."""
    run = group.runs[0]
    settings = run.settings
    preset = settings.get("model.preset", ModelConfig().preset)
    known = "settings" in run.row
    parts = [str(settings.get("model.path") or preset) if known else run.row["experiment"]]
    tokens = sum(one.row["tokens"] for one in group.runs) / len(group.runs)
    parts.append(f"{run.row['steps']:,} steps, {tokens:,.0f} tokens")
    if run.fine_tuned and "loss_tokens" in run.row:
        parts.append(f"{percent(run.row['loss_tokens'] / run.row['tokens'])} of them learnt")
    parts += _examples(run) if run.fine_tuned and "prepared" in run.row else []
    if known:
        rate, schedule = (
            settings.get(f"optimizer.{key}", getattr(OptimizerConfig, key))
            for key in ("learning_rate", "schedule")
        )
        parts.append(f"learning rate {rate:g}, {schedule}")
    shared = variants[0].settings if variants else {}
    common = {k: v for k, v in shared.items() if k not in varied and v != SPARSE[k]}
    parts += [named(common)] if common else []
    parts.append(f"data {run.row['data'][:8]}")
    parts.append(" and ".join(dict.fromkeys(one.device for one in group.runs)))
    return "; ".join(parts)


def _examples(run: Record) -> list[str]:
    """How full the training rows are, and what of the examples is not in them."""
    prepared = run.row["prepared"]
    done = TOO_LONG_ACTIONS[prepared["too_long"]]
    counts = {**prepared["left_out"], f"longer than a row ({done})": prepared["long_documents"]}
    changed = ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
    examples = f"{prepared['documents']:,} examples"
    return [
        f"{percent(prepared['useful_share'])} of the slots useful",
        f"{examples}, not as they were: {changed}" if changed else f"{examples}, none left out",
    ]


def rate_of(settings: Settings) -> str:
    """The omission rate asked for: of heads and of channels where they differ, the least and the
    most where layers do."""
    heads, channels = (_asked(settings, module) for module in ("attention", "mlp"))
    return heads if heads == channels else f"{heads} of heads, {channels} of channels"


def _asked(settings: Settings, module: str) -> str:
    own, layers = settings[f"rate_{module}"], settings[f"layer_rates_{module}"]
    if layers and min(layers) != max(layers):
        return f"{shown(min(layers))} to {shown(max(layers))}"
    return shown(layers[0] if layers else settings["rate"] if own is None else own)


def value_of(settings: Settings, key: str) -> Any:
    """A setting as a table has it: a rate as it is asked for, what follows the rate as that."""
    if key == "rate" and (asked := rate_of(settings)) != shown(settings["rate"]):
        return asked
    if key in ("rate_attention", "rate_mlp") and settings[key] is None:
        return settings["rate"]
    return settings[key]


def dense_name(variant: Variant) -> str:
    """Of the dense runs that the others are held against, or of fewer steps."""
    return "dense" if variant.reference else f"dense, {variant.runs[0].row['steps']:,} steps"


def named(settings: Settings) -> str:
    """Settings for people: `rate 0.4, dense layers 0,1`."""
    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in settings.items())


def shown(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
