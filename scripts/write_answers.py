"""Write the answers of a model to questions into a file that supervised fine-tuning reads.

  python -m scripts.write_answers --model TEACHER --questions gsm8k-train.jsonl.gz --chat \\
      --temperature 0.7 --samples 4 --extract number --out answers.jsonl
  python -m scripts.train --config=FILE --config.data.sources=answers.jsonl \\
      --config.data.format=messages ...

--questions: JSON lines with a question in a field question, input, prompt, problem or query (or
--question-field), also .gz or .zst. Each line of --out is an example of data.format 'messages': the
question as the user's turn and the answer as the turn of the assistant, and in the field `source`
all fields of the question's line. Few-shot examples, --prompt and --system are what the teacher
reads; they are not in the examples.

--extract RULE keeps only answers with the right result: the rule extracts the result from the
answer of the model and from the reference answer (field answer, answerKey, label, target, gold or
output), and compares them as scripts.evaluate --answers does. Rules: `number` (the last number),
`hashes` (the number after ####), `text`, or a regular expression with at most one group. What is
kept is the whole answer, with its reasoning.

Left out and counted are also answers that reach --max-new-tokens, those without text, and equal
answers to one question. An answer depends on --seed, its question and its number alone, not on
--rows, except for rounding.

OUT.progress has all answers, also those that are left out. With the same options an interrupted
command is continued with the batch after the last complete one. An existing --out is refused.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from sat_jax.cli import MODEL_HELP, SYSTEM_HELP, TOKENIZER_HELP, Parser, add_sampling, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("write_answers", __doc__)
    add = options.add_argument
    add("--model", required=True, metavar="PATH", help=MODEL_HELP)
    add("--questions", required=True, metavar="FILE", help="questions, .jsonl")
    add("--out", type=Path, required=True, metavar="FILE", help="a new .jsonl file")
    add("--extract", metavar="RULE", help="keep only answers with the right result; default: all")
    add("--samples", type=int, default=1, metavar="N", help="answers per question; default 1")
    add("--limit", type=int, metavar="N", help="only the first N questions of the file")
    add("--chat", action="store_true", help="use the model's chat template")
    add("--system", metavar="TEXT", help=SYSTEM_HELP)
    prompt = (
        "a text that contains {question}, with \\n for a new line; default"
        r" 'Question: {question}\nAnswer:', with --chat '{question}'"
    )
    add("--prompt", metavar="TEXT", help=prompt)
    add("--shots", type=int, metavar="N", help="number of few-shot examples")
    add("--shots-from", metavar="FILE", help="file of the few-shot examples; its first N are used")
    add("--question-field", metavar="NAME", help="field of the question")
    add("--answer-field", metavar="NAME", help="field of the reference answer")
    add("--tokenizer", help=TOKENIZER_HELP)
    add_sampling(options)
    add("--rows", type=int, default=16, metavar="N", help="answers per batch; default 16")
    return options


def main() -> None:
    """Generate the answers that are missing, and write those that are kept."""
    args = parser().parse_args()
    _check(args)
    from tqdm import tqdm

    from sat_jax.data.sources import counted
    from sat_jax.evaluate.completions import complete_batches
    from sat_jax.evaluate.eval_model import open_eval_model
    from sat_jax.evaluate.exact_match import ExtractionRule
    from sat_jax.evaluate.generate import Sampling
    from sat_jax.evaluate.question_files import read_answers, read_sources
    from sat_jax.evaluate.written_answers import open_progress, rows_as_text, training_rows
    from sat_jax.interop import locate
    from sat_jax.train.files import write_atomically
    from sat_jax.train.run_weights import model_fingerprint
    from scripts.question_prompts import (
        formats_of_prompts,
        prompt_problem,
        read_questions,
        read_shots,
        usable_questions,
    )

    rule = None if args.extract is None else ExtractionRule(args.extract)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    eval_model = open_eval_model(args.model)
    shots = read_shots(args, args.questions, read_answers)
    (prompt_format,) = formats_of_prompts(args, shots, [eval_model])
    tokenizer, config = eval_model.tokenizer(args.tokenizer), eval_model.weights.config
    read = partial(read_sources, with_answers=rule is not None)
    problems, _ = read_questions(args, args.questions, read)
    as_prompt = partial(prompt_problem, tokenizer, prompt_format, rule, config, args.max_new_tokens)
    questions, _ = usable_questions(lambda problem: (problem, as_prompt(problem)), problems)
    prompts = [prompted.ids for _, prompted in questions for _ in range(args.samples)]
    stops = prompt_format.stops(tokenizer)
    settings = {
        "model": model_fingerprint(locate(args.model)),
        "prompts": _digest([prompts, stops]),
        **{name: getattr(args, name) for name in ("samples", "rows", "max_new_tokens")},
        **{name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")},
        "dtype": args.dtype,
    }
    with open_progress(args.out.with_name(f"{args.out.name}.progress"), settings) as progress:
        start, total = len(progress.batches), -(-len(prompts) // args.rows)
        if start < total:
            batches = complete_batches(
                eval_model.model(args.dtype),
                tokenizer,
                prompts,
                args.max_new_tokens,
                args.rows,
                stops=stops,
                sampling=sampling,
                seed=args.seed,
                start=start,
            )
            for batch in tqdm(batches, initial=start, total=total, unit=" batches"):
                progress.append(batch)
        rows, left_out = training_rows(questions, progress.completions, args.samples, rule)
        if not rows:
            raise UserError(f"{args.out}: no answer can be kept: {counted(left_out)}")
        write_atomically(args.out, rows_as_text(rows))
    answered = len({row["messages"][0]["content"] for row in rows})
    print(
        f"{args.out}: {len(rows)} of {len(prompts)} answers, to {answered} of {len(questions)}"
        f" questions; left out: {counted(left_out)}"
    )


def _check(args: Any) -> None:
    """Check the options that need no model."""
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists; accepted: a new file")
    if ".jsonl" not in args.out.suffixes[-1:]:
        raise UserError(f"--out {args.out}: accepted: a name that ends in .jsonl")
    for name in ("samples", "rows", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}; accepted: 1 or more")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples}: answers at --temperature 0 are equal; accepted: 1, or a"
            " temperature above 0"
        )
    if args.system is not None and not args.chat:
        raise UserError("--system has no effect without --chat")
    if args.answer_field is not None and args.extract is None and args.shots is None:
        raise UserError("--answer-field has no effect without --extract and --shots")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


if __name__ == "__main__":
    run(main)
