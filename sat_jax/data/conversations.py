"""Examples, each one segment: a conversation's tokens, of which the answers alone bear loss."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sat_jax.data.chat import Rendered, render_answers
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.corpus import Encoded
from sat_jax.data.examples import learnt, read_examples, turns_of
from sat_jax.data.form import Form
from sat_jax.data.sources import Document, Source
from sat_jax.data.tokenizer import Offsets, Tokenizer
from sat_jax.errors import UserError

_ACCEPTED = f"accepted: model, {', '.join(TEMPLATES)}, or the path of a .jinja file"
_END_OF_TURN = "<|im_end|>"  # chatml's


class Conversations:
    """What a corpus of examples is read with. The ids are those of transformers' chat template.

    An example longer than a row, `row_length` pairs, is dropped, loses its end, or is refused, as
    `form.too_long` says; it is never split. One that loses all its answers is dropped, too.
    """

    whole = True

    def __init__(self, form: Form, tokenizer: Tokenizer, row_length: int):
        self._form, self._tokenizer, self._limit = form, tokenizer, row_length + 1
        self.template = chat_template(form.chat_template, tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which tokens an example gets, but for the tokenizer's ids."""
        form = {name: value for name, value in vars(self._form).items() if name != "chat_template"}
        made = {**form, "template": self.template, "special": self._tokenizer.special_tokens}
        # Messages of tools were once kept: what was prepared then is not what is prepared now.
        return {**made, "tools": "left out"} if self._form.format == "messages" else made

    def read(self, source: Source) -> Iterator[Document]:
        """The examples of one source."""
        return read_examples(source, self._form)

    def encode(self, examples: Sequence[Document]) -> list[Encoded]:
        """The tokens of examples, none for one that is dropped. Raises `UserError` for one that the
        template refuses."""
        rendered = [self._render(example) for example in examples]
        coded = self._tokenizer.encode_with_offsets([text for text, _ in rendered])
        return [
            self._fit(example, text, ids, offsets)
            for example, text, (ids, offsets) in zip(examples, rendered, coded, strict=True)
        ]

    def _render(self, example: Document) -> Rendered:
        turns = turns_of(example.text)
        chosen = learnt(turns, self._form)
        messages = [turn._asdict() for turn in turns]
        if self._form.system is not None and turns[0].role != "system":
            messages.insert(0, {"role": "system", "content": self._form.system})
            chosen = [number + 1 for number in chosen]
        try:
            special = self._tokenizer.special_tokens
            return render_answers(self.template, messages, special, chosen)
        except UserError as error:
            raise UserError(f"{example.origin}: {error}") from error

    def _fit(
        self, example: Document, rendered: Rendered, ids: list[int], offsets: Offsets
    ) -> Encoded:
        size, limit = len(ids), self._limit
        if size > limit and self._form.too_long == "refuse":
            raise UserError(
                f"{example.origin}: {size} tokens, but a row of data.row_length {limit - 1} holds"
                f" {limit} at most; data.too_long 'drop' or 'cut_end' goes on"
            )
        ends = np.array([end for _, end in offsets])
        starts = np.array([start for start, _ in offsets])
        # Every token that has a character of an answer. Nothing predicts a row's first token.
        runs = [
            (max(1, int(np.searchsorted(ends, first, "right"))), int(np.searchsorted(starts, last)))
            for first, last in rendered.answers
        ]
        runs = [(first, min(last, limit)) for first, last in runs]
        runs = [(first, last) for first, last in runs if first < last]
        if not runs or (size > limit and self._form.too_long == "drop"):
            return Encoded([], [], 0, size)
        return Encoded(ids[:limit], runs, self._bytes(rendered.text, ids, offsets, runs), size)

    def _bytes(
        self, text: str, ids: list[int], offsets: Offsets, runs: list[tuple[int, int]]
    ) -> int:
        """UTF-8 of the answers, without the special tokens that end them."""
        special, total = self._special, 0
        for first, last in runs:
            answer = range(first, last)
            while answer and ids[answer[-1]] in special:
                answer = answer[:-1]
            if answer:
                total += len(text[offsets[answer[0]][0] : offsets[answer[-1]][1]].encode())
        return total

    @cached_property
    def _special(self) -> set[int]:
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return {number for number, token in added.items() if token.special}


def trained_with(tokenizer: Tokenizer, form: Form) -> Tokenizer:
    """`tokenizer` with the chat template that a model learns from data of this form."""
    if form.text:
        return tokenizer
    return replace(tokenizer, chat_template=chat_template(form.chat_template, tokenizer))


def chat_template(name: str, tokenizer: Tokenizer) -> str:
    """The Jinja template that `data.chat_template` names: `model` is the tokenizer's own.

    Raises `UserError` where there is none, or none that this tokenizer has the tokens for.
    """
    if name == "model":
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer.name} has no chat template; {_ACCEPTED}")
        return tokenizer.chat_template
    if name in TEMPLATES:
        return _built_in(name, tokenizer)
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template {name!r}: {error}; {_ACCEPTED}") from error


def _built_in(name: str, tokenizer: Tokenizer) -> str:
    template = TEMPLATES[name]
    needs_eos = "eos_token" in template
    if needs_eos and tokenizer.eos_id is None:
        raise UserError(f"data.chat_template {name!r} needs an eos, which this tokenizer has not")
    if not needs_eos and tokenizer.backend.token_to_id(_END_OF_TURN) is None:
        others = ", ".join(other for other in TEMPLATES if other != name)
        raise UserError(
            f"data.chat_template {name!r} ends a turn with {_END_OF_TURN}, which is no token of"
            f" this tokenizer; accepted: {others}"
        )
    return template if tokenizer.adds_bos else template.replace("bos_token", "''")
