"""The modes of `evaluate`: each returns one evaluation per model from the command line.

All input is checked before the first model is evaluated.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sat_jax.data.batch import Batch
from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.eval_model import EvalModel
from sat_jax.evaluate.exact_match import (
    ExtractionRule,
    PromptedQuestion,
    ScoredAnswer,
    answer_questions,
    exact_match_score,
    prompt_questions,
)
from sat_jax.evaluate.generate import check_prompts
from sat_jax.evaluate.likelihood import Pair, check_pairs
from sat_jax.evaluate.multiple_choice import encode_choices, evaluate_choices
from sat_jax.evaluate.perplexity import EvalData, perplexity, prepared_data, read_text, text_data
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import MultipleChoiceQuestion, read_answers, read_choices
from sat_jax.nn.decoder import Decoder

Args = argparse.Namespace
Figures = dict[str, Any]
Evaluation = Callable[[Decoder], list[Figures]]  # from a model to its lines of output

LENGTH = 1024  # default window, if the model has so many positions


def evaluations(mode: str, args: Args, models: list[EvalModel]) -> list[Evaluation]:
    """Return the evaluation of each of `models`, in order; sets the default prompt in `args`."""
    return _MODES[mode](args, models)


class Meter:
    """Progress bar on stderr that measures the speed; called with the tokens of each batch."""

    def __init__(self, total: int):
        self.batches: list[tuple[float, int]] = []  # end time and tokens
        self._bar = tqdm(
            desc="evaluating", unit=" tokens", unit_scale=True, total=total, leave=False
        )

    def __call__(self, tokens: int) -> None:
        self.batches.append((time.perf_counter(), tokens))
        self._bar.update(tokens)

    def speed(self) -> float | None:
        """Close the bar and return tokens/s, without the first batch because of its compilation."""
        self._bar.close()
        tokens = sum(count for _, count in self.batches[1:])
        return tokens / (self.batches[-1][0] - self.batches[0][0]) if tokens else None


# --- Perplexity ------------------------------------------------------------------------------


def _text(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    texts = read_text(args.text, args.text_field, args.max_bytes)
    result: list[Evaluation] = []
    for eval_model in models:
        config = eval_model.weights.config
        length = min(LENGTH, config.max_positions) if args.length is None else args.length
        config.check_length("--length", length)
        stride = length if args.stride is None else args.stride
        tokenizer = eval_model.tokenizer(args.tokenizer)
        data = text_data(texts, tokenizer, length, stride, args.rows)
        result.append(partial(_perplexity, data))
    return result


def _prepared(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    configs = [eval_model.weights.config for eval_model in models]
    return [
        partial(_perplexity, prepared_data(args.prepared, args.split, config, args.rows))
        for config in configs
    ]


def _perplexity(data: EvalData, model: Decoder) -> list[Figures]:
    meter = Meter(data.tokens)
    score = perplexity(model, _metered(data.batches, meter))
    return [
        {
            "tokens": score.tokens,
            "bytes": data.text_bytes,
            "nll": score.nll,
            "perplexity": score.per(score.tokens),
            "byte_perplexity": score.per(data.text_bytes),
            "bits_per_byte": score.bits_per(data.text_bytes),
            "length": data.length,
            "stride": data.stride,
            "tokens_per_second": meter.speed(),
        }
    ]


def _metered(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        meter(int(batch.loss_mask.sum()))


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
    shots = read(args.shots_from, args.question_field, args.answer_field, args.shots)
    if len(shots) < args.shots:
        raise UserError(f"{args.shots_from}: has {len(shots)} questions; --shots {args.shots}")
    return shots


def _prompt_format(args: Args, shots: list[QuestionAnswer]) -> PromptFormat:
    template = None if args.prompt is None else args.prompt.replace(r"\n", "\n")
    prompt_format = PromptFormat(template, args.chat, shots)
    args.prompt = prompt_format.question_template
    return prompt_format


def _with_system(prompt_format: PromptFormat, args: Args, eval_model: EvalModel) -> PromptFormat:
    if not args.chat:
        return prompt_format
    return replace(prompt_format, system=eval_model.system_prompt(args.system))


def _choices(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    shots = [question.with_answer for question in _shots(args, args.choices, read_choices)]
    prompt_format = _prompt_format(args, shots)
    questions = read_choices(args.choices, args.question_field, args.answer_field, args.limit)
    result: list[Evaluation] = []
    for eval_model in models:
        tokenizer = eval_model.tokenizer(args.tokenizer)
        format_with_system = _with_system(prompt_format, args, eval_model)
        pairs = encode_choices(tokenizer, format_with_system, questions)
        check_pairs(eval_model.weights.config, pairs)
        result.append(partial(_evaluate_choices, questions, pairs, args.rows))
    return result


def _evaluate_choices(
    questions: list[MultipleChoiceQuestion], pairs: list[Pair], rows: int, model: Decoder
) -> list[Figures]:
    meter = Meter(sum(pair.length for pair in pairs))
    score = evaluate_choices(model, questions, pairs, rows, meter)
    return [
        {
            "questions": len(questions),
            "accuracy": score.accuracy.value,
            "stderr": score.accuracy.standard_error,
            "accuracy_per_byte": score.accuracy_per_byte.value,
            "stderr_per_byte": score.accuracy_per_byte.standard_error,
            "chance": score.random_guess,
            "tokens_per_second": meter.speed(),
        }
    ]


def _answers(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    rule = ExtractionRule(args.extract)
    prompt_format = _prompt_format(args, _shots(args, args.answers, read_answers))
    problems = read_answers(args.answers, args.question_field, args.answer_field, args.limit)
    result: list[Evaluation] = []
    for name, eval_model in zip(args.model, models, strict=True):
        tokenizer = eval_model.tokenizer(args.tokenizer)
        format_with_system = _with_system(prompt_format, args, eval_model)
        questions = prompt_questions(tokenizer, problems, format_with_system, rule)
        prompts = [question.ids for question in questions]
        check_prompts(eval_model.weights.config, prompts, args.max_new_tokens)
        stops = prompt_format.stops(tokenizer)
        result.append(partial(_evaluate_answers, args, name, tokenizer, questions, rule, stops))
    if args.generations is not None:
        _write(args.generations, "w", [])
    return result


def _evaluate_answers(
    args: Args,
    name: str,
    tokenizer: Tokenizer,
    questions: list[PromptedQuestion],
    rule: ExtractionRule,
    stops: list[Stop],
    model: Decoder,
) -> list[Figures]:
    max_new_tokens = args.max_new_tokens
    meter = Meter(len(questions) * max_new_tokens)
    answers = answer_questions(
        model, tokenizer, questions, rule, max_new_tokens, args.rows, stops=stops, on_batch=meter
    )
    if args.generations is not None:
        _write(args.generations, "a", [_generation(name, answer) for answer in answers])
    score = exact_match_score(answers)
    return [
        {
            "questions": len(answers),
            "accuracy": score.accuracy.value,
            "stderr": score.accuracy.standard_error,
            "no_result": score.no_result,
            "cut": score.truncated,
            "new_tokens": sum(answer.completion.tokens for answer in answers),
            "tokens_per_second": meter.speed(),
        }
    ]


def _generation(model: str, answer: ScoredAnswer) -> str:
    """Return a line of --generations."""
    question, completion = answer.question, answer.completion
    line = {
        "model": model,
        "question": question.question,
        "prompt": question.prompt,
        "expected": question.expected,
        "text": completion.text,
        "tokens": completion.tokens,
        "cut": completion.truncated,
        "found": answer.result,
        "right": answer.correct,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write(file: Path, mode: str, lines: list[str]) -> None:
    try:
        with file.open(mode, encoding="utf-8") as out:
            out.writelines(lines)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error


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
    "prepared": _prepared,
    "choices": _choices,
    "answers": _answers,
    "lm_eval": _lm_eval,
}
