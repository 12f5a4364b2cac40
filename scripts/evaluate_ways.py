"""The ways of `evaluate`: of the command line and the models to what is done with each model.

All that can be wrong with the input is found before the first model is evaluated.
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
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.answers import Answered, Asked, Rule, answer, ask, marks
from sat_jax.evaluate.choices import choose, encode_choices
from sat_jax.evaluate.generate import check_prompts
from sat_jax.evaluate.likelihood import check_pairs
from sat_jax.evaluate.perplexity import Data, perplexity, prepared_data, read_text, text_data
from sat_jax.evaluate.prompts import Prompting
from sat_jax.evaluate.questions import read_answers, read_choices
from sat_jax.evaluate.subject import Subject
from sat_jax.nn.decoder import Decoder

Given = argparse.Namespace
Figures = dict[str, Any]
Work = Callable[[Decoder], list[Figures]]  # a model to the lines that are printed of it

LENGTH = 1024  # of a window, where the model has the positions


def prepare(way: str, given: Given, subjects: list[Subject]) -> list[Work]:
    """The work on each of `subjects`, in order; defaults that are made here go into `given`."""
    return _WAYS[way](given, subjects)


class Meter:
    """A bar on stderr; called with how many tokens a batch was done with, it measures the speed."""

    def __init__(self, total: int):
        self.counted: list[tuple[float, int]] = []
        self._bar = tqdm(
            desc="evaluating", unit=" tokens", unit_scale=True, total=total, leave=False
        )

    def __call__(self, tokens: int) -> None:
        self.counted.append((time.perf_counter(), tokens))
        self._bar.update(tokens)

    def speed(self) -> float | None:
        """Ends the bar. Tokens/s; the first batch, which is compiled for, is left out."""
        self._bar.close()
        tokens = sum(count for _, count in self.counted[1:])
        return tokens / (self.counted[-1][0] - self.counted[0][0]) if tokens else None


# --- Perplexity ------------------------------------------------------------------------------


def _text(given: Given, subjects: list[Subject]) -> list[Work]:
    texts = read_text(given.text, given.text_field, given.max_bytes)
    work: list[Work] = []
    for subject in subjects:
        config = subject.weights.config
        length = min(LENGTH, config.max_positions) if given.length is None else given.length
        config.check_length("--length", length)
        stride = length if given.stride is None else given.stride
        tokenizer = subject.tokenizer(given.tokenizer)
        data = text_data(texts, tokenizer, length, stride, given.rows)
        work.append(partial(_perplexity, data))
    return work


def _prepared(given: Given, subjects: list[Subject]) -> list[Work]:
    configs = [subject.weights.config for subject in subjects]
    return [
        partial(_perplexity, prepared_data(given.prepared, given.split, config, given.rows))
        for config in configs
    ]


def _perplexity(data: Data, model: Decoder) -> list[Figures]:
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


def _shots(given: Given, file: str, read: Callable[..., list[Any]]) -> list[Any]:
    """The examples that are shown in front of the questions of `file`."""
    if given.shots == 0:
        raise UserError("--shots 0; of questions accepted: 1 or more, or no --shots at all")
    if (given.shots is None) != (given.shots_from is None):
        raise UserError("--shots and --shots-from need each other")
    if given.shots is None:
        return []
    if Path(given.shots_from).resolve() == Path(file).resolve():
        raise UserError(f"--shots-from {file}: holds the questions that are asked")
    found = read(given.shots_from, given.question_field, given.answer_field, given.shots)
    if len(found) < given.shots:
        raise UserError(f"{given.shots_from}: has {len(found)} questions; --shots {given.shots}")
    return found


def _prompting(given: Given, shots: list[Any]) -> Prompting:
    template = None if given.prompt is None else given.prompt.replace(r"\n", "\n")
    made = Prompting(template, given.chat, shots)
    given.prompt = made.asks
    return made


def _of(subject: Subject, prompting: Prompting, given: Given) -> Prompting:
    return replace(prompting, system=subject.system(given.system)) if given.chat else prompting


def _choices(given: Given, subjects: list[Subject]) -> list[Work]:
    shots = [question.shot for question in _shots(given, given.choices, read_choices)]
    prompting = _prompting(given, shots)
    questions = read_choices(given.choices, given.question_field, given.answer_field, given.limit)
    work: list[Work] = []
    for subject in subjects:
        tokenizer, asking = subject.tokenizer(given.tokenizer), _of(subject, prompting, given)
        pairs = encode_choices(tokenizer, asking, questions)
        check_pairs(subject.weights.config, pairs)
        work.append(partial(_choose, questions, pairs, given.rows))
    return work


def _choose(questions: list[Any], pairs: list[Any], rows: int, model: Decoder) -> list[Figures]:
    meter = Meter(sum(pair.length for pair in pairs))
    grade = choose(model, questions, pairs, rows, meter)
    return [
        {
            "questions": len(questions),
            "accuracy": grade.accuracy.value,
            "stderr": grade.accuracy.error,
            "accuracy_per_byte": grade.per_byte.value,
            "stderr_per_byte": grade.per_byte.error,
            "chance": grade.chance,
            "tokens_per_second": meter.speed(),
        }
    ]


def _answers(given: Given, subjects: list[Subject]) -> list[Work]:
    rule = Rule(given.extract)
    prompting = _prompting(given, _shots(given, given.answers, read_answers))
    problems = read_answers(given.answers, given.question_field, given.answer_field, given.limit)
    tokenizers = [subject.tokenizer(given.tokenizer) for subject in subjects]
    asked = [
        ask(tokenizer, problems, _of(subject, prompting, given), rule)
        for subject, tokenizer in zip(subjects, tokenizers, strict=True)
    ]
    most, rows, file = given.max_new_tokens, given.rows, given.generations
    for subject, questions in zip(subjects, asked, strict=True):
        check_prompts(subject.weights.config, [one.ids for one in questions], most)
    if file is not None:
        _write(file, "w", [])

    def work(name: str, tokenizer: Tokenizer, asked: list[Asked], model: Decoder) -> list[Figures]:
        meter, stops = Meter(len(asked) * most), prompting.stops(tokenizer)
        found = answer(model, tokenizer, asked, rule, most, rows, stops=stops, done=meter)
        if file is not None:
            _write(file, "a", [_line(name, one) for one in found])
        return [_answered(found, meter)]

    return [partial(work, *one) for one in zip(given.model, tokenizers, asked, strict=True)]


def _answered(found: list[Answered], meter: Meter) -> Figures:
    result = marks(found)
    return {
        "questions": len(found),
        "accuracy": result.accuracy.value,
        "stderr": result.accuracy.error,
        "no_result": result.without_result,
        "cut": result.cut,
        "new_tokens": sum(one.completion.tokens for one in found),
        "tokens_per_second": meter.speed(),
    }


def _line(model: str, one: Answered) -> str:
    line = {"model": model, **one.asked._asdict(), **one.completion._asdict()}
    line |= {"found": one.found, "right": one.right}
    del line["ids"]
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write(file: Path, mode: str, lines: list[str]) -> None:
    try:
        with file.open(mode, encoding="utf-8") as out:
            out.writelines(lines)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error


# --- lm-evaluation-harness -------------------------------------------------------------------


def _lm_eval(given: Given, subjects: list[Subject]) -> list[Work]:
    from sat_jax.evaluate.harness import Harness, find_tasks, run_tasks  # only with the extra

    manager = find_tasks(given.lm_eval, given.include_path)
    loaded = [(one.tokenizer(given.tokenizer), one.system(given.system)) for one in subjects]

    def work(tokenizer: Tokenizer, system: str | None, model: Decoder) -> list[Figures]:
        lm = Harness(model, tokenizer, given.rows, system)
        return run_tasks(lm, manager, given.lm_eval, given.shots, given.limit, given.chat)

    return [partial(work, *one) for one in loaded]


_WAYS: Mapping[str, Callable[[Given, list[Subject]], list[Work]]] = {
    "text": _text,
    "prepared": _prepared,
    "choices": _choices,
    "answers": _answers,
    "lm_eval": _lm_eval,
}
