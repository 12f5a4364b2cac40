"""Questions of a file and their prompts, as the options of a command line say."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.eval_model import EvalModel
from sat_jax.evaluate.exact_match import ExtractionRule, PromptedQuestion, prompt_question
from sat_jax.evaluate.generate import check_prompts
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import SourceQuestion, name_of
from sat_jax.evaluate.usable import usable
from sat_jax.models.decoder_config import DecoderConfig
from scripts.evaluation_meter import Args

R = TypeVar("R")

_PRINTED = 10  # questions that are left out and named


def read_shots(args: Args, file: str, read: Callable[..., list[Any]]) -> list[Any]:
    """Return the few-shot examples for the questions of `file`."""
    if args.shots == 0:
        raise UserError("--shots 0; accepted for questions: 1 or more, or no --shots")
    if (args.shots is None) != (args.shots_from is None):
        raise UserError("--shots and --shots-from must be given together")
    if args.shots is None:
        return []
    if Path(args.shots_from).resolve() == Path(file).resolve():
        raise UserError(f"--shots-from {file}: contains the questions to be answered")
    faults: list[str] = []
    shots = read(args.shots_from, args.question_field, args.answer_field, None, faults)
    print_faults(faults)
    if len(shots) < args.shots:
        raise UserError(f"{args.shots_from}: has {len(shots)} questions; --shots {args.shots}")
    return shots[: args.shots]


def read_questions(args: Args, file: str, read: Callable[..., list[Any]]) -> tuple[list[Any], int]:
    """Return the questions of `file`, and the number of those that cannot be read."""
    faults: list[str] = []
    questions = read(file, args.question_field, args.answer_field, args.limit, faults)
    print_faults(faults)
    return questions, len(faults)


def usable_questions(convert: Callable[[Any], R], questions: list[Any]) -> tuple[list[R], int]:
    """Return `convert(question)` of all questions that a model can be asked, and the number of the
    others."""
    faults: list[str] = []
    result = usable(convert, questions, faults, name_of)
    print_faults(faults)
    return result, len(faults)


def print_faults(faults: list[str]) -> None:
    """Print one line on stderr for each item that is left out, and the number of further ones."""
    for fault in faults[:_PRINTED]:
        print(f"left out: {' '.join(fault.split())}", file=sys.stderr)
    if len(faults) > _PRINTED:
        print(f"left out: {len(faults) - _PRINTED} more", file=sys.stderr)


def formats_of_prompts(
    args: Args, shots: list[QuestionAnswer], models: list[EvalModel]
) -> list[PromptFormat]:
    """Return the prompt format of each model, which may have a system prompt of its own."""
    template = None if args.prompt is None else args.prompt.replace(r"\n", "\n")
    prompt_format = PromptFormat(template, args.chat, shots)
    args.prompt = prompt_format.question_template
    systems = [model.system_prompt(args.system) if args.chat else None for model in models]
    return [replace(prompt_format, system=system) for system in systems]


def prompt_problem(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    rule: ExtractionRule | None,
    config: DecoderConfig,
    max_new_tokens: int,
    problem: QuestionAnswer | SourceQuestion,
) -> PromptedQuestion:
    """Return the prompt of a problem. Raises `UserError` if the model does not accept it."""
    question = prompt_question(tokenizer, problem, prompt_format, rule)
    check_prompts(config, [question.ids], max_new_tokens)
    return question
