"""Calibration and held-out text of `compress`, and the perplexity on it."""

from typing import Any

from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.splits import HELD_OUT, TRAIN
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.perplexity import perplexity, prepared_data
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import perplexity_of
from scripts.evaluation_meter import Args, Meter

_CONTEXT = 2048  # default, if the model has so many positions


def context_of(args: Args, config: DecoderConfig) -> int:
    """Return the tokens of a row."""
    if args.context is None:
        return min(_CONTEXT, config.max_positions)
    config.check_length("--context", args.context)
    return int(args.context)


def prepare_text(args: Args, tokenizer: Tokenizer, context: int) -> Prepared:
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


def held_out_perplexity(model: Decoder, prepared: Prepared, rows: int) -> float:
    """Return the perplexity on the held-out text, with a progress bar."""
    data = prepared_data(prepared.path, HELD_OUT, model.config, rows)
    meter = Meter(data.tokens)
    nll, tokens = perplexity(model, data.batches, meter)
    meter.speed()  # closes the bar
    return perplexity_of(nll / tokens)


def calibration_report(args: Args, prepared: Prepared, tokenizer: Tokenizer) -> dict[str, Any]:
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
