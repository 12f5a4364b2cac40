"""The modes of `evaluate`: each returns one evaluation per model from the command line.

All input is checked before the first model is evaluated.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial

from sat_jax.data.end_of_turn import Stop
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.eval_model import EvalModel
from sat_jax.evaluate.exact_match import (
    ExtractionRule,
    PromptedQuestion,
    compare_answers,
    exact_match_score,
)
from sat_jax.evaluate.likelihood import Pair, check_pairs
from sat_jax.evaluate.multiple_choice import encode_choices, evaluate_choices
from sat_jax.evaluate.perplexity import EvalData, perplexity, prepared_data, read_text, text_data
from sat_jax.evaluate.prompts import PromptFormat
from sat_jax.evaluate.question_files import (
    MultipleChoiceQuestion,
    read_answers,
    read_choices,
)
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import perplexity_of
from scripts.evaluation_meter import Args, Evaluation, Figures, Meter, measured
from scripts.long_context_modes import context_evaluations, passkey_evaluations
from scripts.question_prompts import (
    formats_of_prompts,
    print_faults,
    prompt_problem,
    read_questions,
    read_shots,
    usable_questions,
)

LENGTH = 1024  # default window, if the model has so many positions


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


def _choices(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    shots = [question.with_answer for question in read_shots(args, args.choices, read_choices)]
    prompt_formats = formats_of_prompts(args, shots, models)
    questions, unread = read_questions(args, args.choices, read_choices)
    result = []
    for eval_model, prompt_format in zip(models, prompt_formats, strict=True):
        tokenizer, config = eval_model.tokenizer(args.tokenizer), eval_model.weights.config
        encode = partial(_encode_choices, tokenizer, prompt_format, config)
        encoded, faults = usable_questions(encode, questions)
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
    print_faults(faults)
    return {**figures, "skipped": skipped + len(faults)}


def _answers(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    rule = ExtractionRule(args.extract)
    shots = read_shots(args, args.answers, read_answers)
    prompt_formats = formats_of_prompts(args, shots, models)
    problems, unread = read_questions(args, args.answers, read_answers)
    result = []
    for name, eval_model, prompt_format in zip(args.model, models, prompt_formats, strict=True):
        tokenizer = eval_model.tokenizer(args.tokenizer)
        config, limit = eval_model.weights.config, args.max_new_tokens
        prompt = partial(prompt_problem, tokenizer, prompt_format, rule, config, limit)
        questions, faults = usable_questions(prompt, problems)
        stops = prompt_format.stops(tokenizer)
        skipped = unread + faults
        evaluate = partial(_exact_match, args, name, tokenizer, questions, skipped, rule, stops)
        result.append(measured(len(questions) * limit, evaluate))
    if args.generations is not None:
        args.generations.write_text("")
    return result


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
