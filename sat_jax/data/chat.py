"""Conversations as text: a model's Jinja template, rendered, and where in it the answers stand."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sat_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]

# Around what `{% generation %}` renders. Unicode will never make characters of these.
_BEGIN, _END = "\ufdd0", "\ufdd1"
# The day of every template that writes the date: what is prepared must not depend on when.
_DAY = datetime.datetime(2024, 7, 26)
# What the code in a template may raise, besides jinja2's own.
_RAISED = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
# An answer that no template writes itself.
_ANSWER = "4x7z9"


class Rendered(NamedTuple):
    """A conversation as text, and the runs of characters that are learnt, in order."""

    text: str
    answers: list[tuple[int, int]]


def render_chat(template: str, messages: Messages, special_tokens: Mapping[str, str]) -> str:
    """The prompt that asks a chat model for its answer to `messages` (each `role` and `content`).

    `template` is a model's Jinja template and no friend of ours: it runs in a sandbox, with the
    functions that transformers gives it. `special_tokens`: `bos_token` and `eos_token`. Raises
    `UserError` where the template fails or refuses the messages.
    """
    return _plain(_render(template, messages, special_tokens, True, datetime.datetime.now()))


def text_behind_answer(template: str, special_tokens: Mapping[str, str]) -> str:
    """What the template writes behind the last answer, without white space at its end: "" where
    that is nothing, or where it refuses a question and an answer or leaves the answer out."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _plain(_render(template, messages, special_tokens, False, _DAY))
    except UserError:
        return ""
    _, found, behind = text.rpartition(_ANSWER)
    return behind.rstrip() if found else ""


def render_answers(
    template: str,
    messages: Messages,
    special_tokens: Mapping[str, str],
    learnt: Sequence[int],
) -> Rendered:
    """A whole conversation, and what a model has to learn of it: the answers numbered in `learnt`,
    each with what ends its turn, but neither what stands before it nor white space behind it.

    What the template marks with `{% generation %}` is taken, as by transformers. For other
    templates it is what the answer adds to the prompt that asks for it. Raises `UserError` as
    `render_chat` does, and where that cannot be told.
    """
    if any(mark in message["content"] for message in messages for mark in (_BEGIN, _END)):
        raise UserError("holds U+FDD0 or U+FDD1, which are no characters")
    render = functools.partial(_render, template, special_tokens=special_tokens, now=_DAY)
    text = render(messages, prompt=False)
    if _BEGIN in text:
        return _marked(text, messages, learnt)
    return Rendered(text, [_answer(render, text, messages, number) for number in learnt])


def _plain(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _marked(text: str, messages: Messages, learnt: Sequence[int]) -> Rendered:
    """What stands between the marks, and the text without them."""
    plain, runs = "", []
    for part in re.split(f"({_BEGIN}.*?{_END})", text, flags=re.DOTALL):
        inside = part.strip(_BEGIN + _END)
        if inside != part:
            runs.append((len(plain), len(plain) + len(inside)))
        plain += inside
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if len(runs) != len(answers):
        raise UserError(
            f"the chat template marks {len(runs)} parts with {{% generation %}}, but there are"
            f" {len(answers)} answers"
        )
    return Rendered(plain, [run for run, n in zip(runs, answers, strict=True) if n in learnt])


def _answer(
    render: Callable[..., str], text: str, messages: Messages, number: int
) -> tuple[int, int]:
    """Where message `number` and the end of its turn stand in `text`."""
    before = render(messages[:number], prompt=True)
    after = render(messages[: number + 1], prompt=False)
    if not (text.startswith(after) and after.startswith(before)):
        raise UserError(
            f"the chat template writes what comes before answer {number + 1} in another way once"
            " more turns follow, so that no prefix tells the answers apart; accepted:"
            " data.loss_on='last', a built-in data.chat_template, or one with {% generation %}"
        )
    answer = after[len(before) :].rstrip()
    starts_there = answer.lstrip().startswith(messages[number]["content"].strip())
    if not starts_there and before == render(messages[:number], prompt=False):
        raise UserError(
            "the chat template has no generation prompt (add_generation_prompt), so that what it"
            " writes in front of an answer cannot be told from the answer; accepted: a built-in"
            " data.chat_template, or one with {% generation %}"
        )
    if not answer:
        raise UserError(f"the chat template leaves out answer {number + 1}")
    return len(before), len(before) + len(answer)


def _render(
    template: str,
    messages: Messages,
    special_tokens: Mapping[str, str],
    prompt: bool,
    now: datetime.datetime,
) -> str:
    try:
        return _compiled(template).render(
            messages=messages,
            add_generation_prompt=prompt,
            tools=None,
            documents=None,
            strftime_now=now.strftime,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template fails: {error}") from error
    except _RAISED as error:
        kind = type(error).__name__
        raise UserError(f"the model's chat template fails: {kind}: {error}") from error


class _Generation(Extension):
    """`{% generation %}`: transformers' tag for what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Its body, between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
        return nodes.Scope([next(marks), *body, next(marks)]).set_lineno(line)


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
