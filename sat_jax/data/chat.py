"""Rendering of conversations with a model's Jinja chat template, and the spans of the answers."""

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sat_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]

# Marks around what `{% generation %}` renders: code points that Unicode reserves as noncharacters.
_BEGIN, _END = "\ufdd0", "\ufdd1"
# The date seen by templates in data preparation, so that prepared data do not depend on the day.
_FIXED_DATE = datetime.datetime(2024, 7, 26)
# An answer that no template contains as its own text.
_PLACEHOLDER = "4x7z9"
_OTHER_TEMPLATES = "a built-in data.chat_template, or one with {% generation %}"


class Rendered(NamedTuple):
    """A conversation as text, and the character spans that have a loss, in order."""

    text: str
    answer_spans: list[tuple[int, int]]


def render_chat(template: str, messages: Messages, special_tokens: Mapping[str, str]) -> str:
    """Return the prompt that asks a chat model for its answer to `messages`.

    Each message has `role` and `content`. `special_tokens` has `bos_token` and `eos_token`. The
    template is untrusted: it runs in a sandbox, with the functions that transformers provides.
    Raises `UserError` if the template fails or rejects the messages.
    """
    return _without_marks(
        _render(template, messages, special_tokens, True, datetime.datetime.now())
    )


def text_after_answer(template: str, special_tokens: Mapping[str, str]) -> str:
    """Return what the template writes after the last answer, without trailing white space.

    Returns "" if the template writes nothing there, rejects a question with an answer, or omits the
    answer.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PLACEHOLDER}]
    try:
        text = _without_marks(_render(template, messages, special_tokens, False, _FIXED_DATE))
    except UserError:
        return ""
    _, separator, after = text.rpartition(_PLACEHOLDER)
    return after.rstrip() if separator else ""


def render_with_answer_spans(
    template: str,
    messages: Messages,
    special_tokens: Mapping[str, str],
    turns: Sequence[int],
) -> Rendered:
    """Render a conversation and locate the answers in `turns`, given by message index.

    A span includes what ends the turn, but not what precedes the answer and no trailing white
    space. If the template has `{% generation %}` blocks, the spans are those blocks, as in
    transformers. Otherwise a span is what the answer adds to the prompt that asks for it. Raises
    `UserError` as `render_chat` does, and if the spans cannot be determined.
    """
    if any(mark in message["content"] for message in messages for mark in (_BEGIN, _END)):
        raise UserError("contains U+FDD0 or U+FDD1, which are not characters")
    render = functools.partial(_render, template, special_tokens=special_tokens, now=_FIXED_DATE)
    text = render(messages, prompt=False)
    if _BEGIN in text:
        return _spans_between_marks(text, messages, turns)
    spans = []
    for turn in turns:
        try:
            spans.append(_span_after_prompt(render, text, messages, turn))
        except _ChangesLater as error:
            accepted = _OTHER_TEMPLATES
            with contextlib.suppress(UserError):
                _span_after_prompt(render, text, messages, turns[-1])
                accepted = f"data.loss_on='last', {accepted}"
            raise UserError(f"{error}; accepted: {accepted}") from error
    return Rendered(text, spans)


def _without_marks(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _spans_between_marks(text: str, messages: Messages, turns: Sequence[int]) -> Rendered:
    """Return the text without the marks, and the marked spans of `turns`."""
    plain, spans = "", []
    for part in re.split(f"({_BEGIN}.*?{_END})", text, flags=re.DOTALL):
        content = part.strip(_BEGIN + _END)
        if content != part:
            spans.append((len(plain), len(plain) + len(content)))
        plain += content
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise UserError(
            f"the chat template marks {len(spans)} parts with {{% generation %}}, but there are"
            f" {len(answers)} answers"
        )
    return Rendered(plain, [s for s, turn in zip(spans, answers, strict=True) if turn in turns])


class _ChangesLater(UserError):
    """An answer is rendered differently when more turns follow."""


def _span_after_prompt(
    render: Callable[..., str], text: str, messages: Messages, turn: int
) -> tuple[int, int]:
    """Return the span of message `turn` and its end of turn in `text`."""
    prompt = render(messages[:turn], prompt=True)
    with_answer = render(messages[: turn + 1], prompt=False)
    number = sum(message["role"] == "assistant" for message in messages[: turn + 1])
    if not with_answer.startswith(prompt):
        pairs = zip(prompt, with_answer, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise UserError(
            f"the chat template asks for answer {number} with a prompt that ends in"
            f" {prompt[common:][-40:]!r}, which conversations do not have, so that"
            f" the model would not be asked as it is trained; accepted: {_OTHER_TEMPLATES}"
        )
    if not text.startswith(with_answer):
        raise _ChangesLater(
            f"the chat template renders answer {number}, or the text before it, differently when"
            " more turns follow, so that the answer cannot be located by its prefix"
        )
    answer = with_answer[len(prompt) :].rstrip()
    starts_with_content = answer.lstrip().startswith(messages[turn]["content"].strip())
    if not starts_with_content and prompt == render(messages[:turn], prompt=False):
        raise UserError(
            "the chat template has no generation prompt (add_generation_prompt), so that what it"
            " writes before an answer cannot be separated from the answer; accepted:"
            f" {_OTHER_TEMPLATES}"
        )
    if not answer:
        raise UserError(f"the chat template omits answer {number}")
    return len(prompt), len(prompt) + len(answer)


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
    except Exception as error:  # the code in a template may raise exceptions of any type
        kind = type(error).__name__
        raise UserError(f"the chat template fails: {kind}: {error}") from error


class _Generation(Extension):
    """The tag `{% generation %}` of transformers, which encloses an answer of the assistant."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body of the tag between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    # The filter of jinja2 escapes HTML; that of transformers does not.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
