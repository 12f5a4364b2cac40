"""Between token ids and what a person reads: conversations in, text out as it comes."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sat_jax.errors import UserError

_UNFINISHED = "\ufffd"


class TextStream:
    """Text of ids that come one after the other, handed out as soon as it cannot change any more.

    `decode` turns ids into text. A character may take several tokens, in byte fallback as in
    byte-level BPE, and the space in front of a word may hang on what stands before it; so every
    part is decoded together with the part before it, at first with `context`, the prompt's ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()):
        self._decode = decode
        self._before = list(context)  # already handed out
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that is complete with `ids`."""
        self._pending += ids
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._hand_out(text)

    def close(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._hand_out(self._text())

    def _text(self) -> str:
        whole = self._decode(self._before + self._pending)
        return whole.removeprefix(self._decode(self._before))

    def _hand_out(self, text: str) -> str:
        if text:
            self._before, self._pending = self._pending, []
        return text


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
) -> str:
    """The prompt that asks a chat model for its answer to `messages` (each `role` and `content`).

    `template` is a model's Jinja template and no friend of ours: it runs in a sandbox, with the
    functions that transformers gives it. `special_tokens`: `bos_token` and `eos_token`. Raises
    `UserError` where the template fails or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template fails: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"the model's chat template fails: {kind}: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
