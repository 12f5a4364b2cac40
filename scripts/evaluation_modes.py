"""The modes of `evaluate`: each returns one evaluation per model from the command line.

All input is checked before the first model is evaluated.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.eval_model import EvalModel
from sat_jax.evaluate.exact_match import (
    ExtractionRule,
    PromptedQuestion,
    compare_answers,
    exact_match_score,
    prompt_question,
)
from sat_jax.evaluate.generate import check_prompts
from sat_jax.evaluate.likelihood import Pair, check_pairs
from sat_jax.evaluate.multiple_choice import encode_choices, evaluate_choices
from sat_jax.evaluate.perplexity import EvalData, perplexity, prepared_data, read_text, text_data
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import (
    MultipleChoiceQuestion,
    name_of,
    read_answers,
    read_choices,
)
from sat_jax.evaluate.usable import usable
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import perplexity_of
from scripts.evaluation_meter import Args, Evaluation, Figures, Meter, measured
from scripts.long_context_modes import context_evaluations, passkey_evaluations

R = TypeVar("R")

LENGTH = 1024  # default window, if the model has so many positions
_PRINTED = 10  # questions that are left out and named


def evaluations(mode: str, args: Args, models: list[EvalModel]) -> list[Evaluation]:
    """Return the evaluation of each of `models`, in order; sets the default prompt in `args`."""
    return _MODES[mode](args, models)


# --- Perplexity ------------------------------------------------------------------------------


def _text(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    log = partial(print, file=sys.stderr)
    texts = read_text(args.text, args.text_field, args.max_bytes, log)
    result = []
    for eval_model in models:
        config = eval_model.weights.config
        length = min(LENGTH, config.max_positions) if args.length is None else args.length
        config.check_length("--length", length)
        stride = length if args.stride is None else args.stride
        tokenizer = eval_model.tokenizer(args.tokenizer)
        data = text_data(texts, tokenizer, length, stride, args.rows)
        result.append(measured(data.tokens, partial(_perplexity, data)))
    return result


def _prepared(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    configs = [eval_model.weights.config for eval_model in models]
    data = [prepared_data(args.prepared, args.split, config, args.rows) for config in configs]
    return [measured(part.tokens, partial(_perplexity, part)) for part in data]


def _perplexity(data: EvalData, model: Decoder, meter: Meter) -> Figures:
    nll, tokens = perplexity(model, data.batches, meter)
    return {
        "tokens": tokens,
        "bytes": data.text_bytes,
        "nll": nll,
        "perplexity": perplexity_of(nll / tokens),
        "byte_perplexity": perplexity_of(nll / data.text_bytes),
        "bits_per_byte": nll / data.text_bytes / math.log(2),
        "length": data.length,
        "stride": data.stride,
    }


# --- Questions -------------------------------------------------------------------------------


def _shots(args: Args, file: str, read: Callable[..., list[Any]]) -> list[Any]:
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
    _print_faults(faults)
    if len(shots) < args.shots:
        raise UserError(f"{args.shots_from}: has {len(shots)} questions; --shots {args.shots}")
    return shots[: args.shots]


def _questions(args: Args, file: str, read: Callable[..., list[Any]]) -> tuple[list[Any], int]:
    """Return the questions of `file`, and the number of those that cannot be read."""
    faults: list[str] = []
    questions = read(file, args.question_field, args.answer_field, args.limit, faults)
    _print_faults(faults)
    return questions, len(faults)


def _usable_questions(convert: Callable[[Any], R], questions: list[Any]) -> tuple[list[R], int]:
    """Return `convert(question)` of all questions that a model can be asked, and the number of the
    others."""
    faults: list[str] = []
    result = usable(convert, questions, faults, name_of)
    _print_faults(faults)
    return result, len(faults)


def _print_faults(faults: list[str]) -> None:
    """Print one line on stderr for each item that is left out, and the number of further ones."""
    for fault in faults[:_PRINTED]:
        print(f"left out: {' '.join(fault.split())}", file=sys.stderr)
    if len(faults) > _PRINTED:
        print(f"left out: {len(faults) - _PRINTED} more", file=sys.stderr)


def _prompt_formats(
    args: Args, shots: list[QuestionAnswer], models: list[EvalModel]
) -> list[PromptFormat]:
    """Return the prompt format of each model, which may have a system prompt of its own."""
    template = None if args.prompt is None else args.prompt.replace(r"\n", "\n")
    prompt_format = PromptFormat(template, args.chat, shots)
    args.prompt = prompt_format.question_template
    systems = [model.system_prompt(args.system) if args.chat else None for model in models]
    return [replace(prompt_format, system=system) for system in systems]


def _choices(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    shots = [question.with_answer for question in _shots(args, args.choices, read_choices)]
    prompt_formats = _prompt_formats(args, shots, models)
    questions, unread = _questions(args, args.choices, read_choices)
    result = []
    for eval_model, prompt_format in zip(models, prompt_formats, strict=True):
        tokenizer, config = eval_model.tokenizer(args.tokenizer), eval_model.weights.config
        encode = partial(_encode_choices, tokenizer, prompt_format, config)
        encoded, faults = _usable_questions(encode, questions)
        total = sum(pair.length for _, pairs in encoded for pair in pairs)
        evaluate = partial(_multiple_choice, encoded, unread + faults, args.rows)
        result.append(measured(total, evaluate))
    return result


def _encode_choices(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    config: DecoderConfig,
    question: MultipleChoiceQuestion,
) -> tuple[MultipleChoiceQuestion, list[Pair]]:
    pairs = encode_choices(tokenizer, prompt_format, [question])
    check_pairs(config, pairs)
    return question, pairs


def _multiple_choice(
    encoded: list[tuple[MultipleChoiceQuestion, list[Pair]]],
    skipped: int,
    rows: int,
    model: Decoder,
    meter: Meter,
) -> Figures:
    questions = [question for question, _ in encoded]
    pairs = [pair for _, pairs in encoded for pair in pairs]
    faults: list[str] = []
    figures = evaluate_choices(questions, pairs, rows, model, meter, faults)
    _print_faults(faults)
    return {**figures, "skipped": skipped + len(faults)}


def _answers(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    rule = ExtractionRule(args.extract)
    shots = _shots(args, args.answers, read_answers)
    prompt_formats = _prompt_formats(args, shots, models)
    problems, unread = _questions(args, args.answers, read_answers)
    result = []
    for name, eval_model, prompt_format in zip(args.model, models, prompt_formats, strict=True):
        tokenizer = eval_model.tokenizer(args.tokenizer)
        config, limit = eval_model.weights.config, args.max_new_tokens
        prompt = partial(_prompt, tokenizer, prompt_format, rule, config, limit)
        questions, faults = _usable_questions(prompt, problems)
        stops = prompt_format.stops(tokenizer)
        skipped = unread + faults
        evaluate = partial(_exact_match, args, name, tokenizer, questions, skipped, rule, stops)
        result.append(measured(len(questions) * limit, evaluate))
    if args.generations is not None:
        args.generations.write_text("")
    return result


def _prompt(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    rule: ExtractionRule,
    config: DecoderConfig,
    max_new_tokens: int,
    problem: QuestionAnswer,
) -> PromptedQuestion:
    question = prompt_question(tokenizer, problem, prompt_format, rule)
    check_prompts(config, [question.ids], max_new_tokens)
    return question


def _exact_match(
    args: Args,
    name: str,
    tokenizer: Tokenizer,
    questions: list[PromptedQuestion],
    skipped: int,
    rule: ExtractionRule,
    stops: list[Stop],
    model: Decoder,
    meter: Meter,
) -> Figures:
    prompts, limit = [question.ids for question in questions], args.max_new_tokens
    completions = complete(model, tokenizer, prompts, limit, args.rows, stops=stops, on_batch=meter)
    answers = compare_answers(questions, completions, rule)
    if args.generations is not None:
        with args.generations.open("a", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps({"model": name, **answer}, ensure_ascii=False) + "\n")
    return {**exact_match_score(answers), "skipped": skipped}


# --- lm-evaluation-harness -------------------------------------------------------------------


def _lm_eval(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    # Imported here, because it needs the extra `eval`.
    from sat_jax.evaluate.harness import HarnessModel, find_tasks, run_tasks

    manager = find_tasks(args.lm_eval, args.include_path)

    def evaluate(tokenizer: Tokenizer, system: str | None, model: Decoder) -> list[Figures]:
        harness_model = HarnessModel(model, tokenizer, args.rows, system)
        return run_tasks(harness_model, manager, args.lm_eval, args.shots, args.limit, args.chat)

    return [
        partial(evaluate, model.tokenizer(args.tokenizer), model.system_prompt(args.system))
        for model in models
    ]


_MODES: Mapping[str, Callable[[Args, list[EvalModel]], list[Evaluation]]] = {
    "text": _text,
    "context": context_evaluations,
    "passkey": passkey_evaluations,
    "prepared": _prepared,
    "choices": _choices,
    "answers": _answers,
    "lm_eval": _lm_eval,
}
