"""Tokenization of conversations: each is one segment, with a loss on the answers only."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sat_jax.data.chat import Rendered, render_with_answer_spans
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.corpus import Encoded
from sat_jax.data.data_format import DataFormat
from sat_jax.data.examples import decode_turns, read_examples, turns_with_loss
from sat_jax.data.sources import Document, Source
from sat_jax.data.tokenizer import Offsets, Tokenizer
from sat_jax.errors import UserError

_ACCEPTED = f"accepted: model, {', '.join(TEMPLATES)}, or the path of a .jinja file"
_CHATML_END_OF_TURN = "<|im_end|>"


class ConversationReader:
    """Reader of conversations; token ids are those of the chat template in transformers.

    An example with more than `row_length` input-target pairs is dropped, truncated or refused, as
    `data_format.too_long` says; it is never split. A truncated example without an answer is
    dropped.
    """

    keeps_whole = True

    def __init__(self, data_format: DataFormat, tokenizer: Tokenizer, row_length: int):
        self._format, self._tokenizer = data_format, tokenizer
        self._max_tokens = row_length + 1
        self.template = chat_template(data_format.chat_template, tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the tokens of an example, except the tokenizer."""
        settings = {name: v for name, v in vars(self._format).items() if name != "chat_template"}
        settings |= {"template": self.template, "special": self._tokenizer.special_tokens}
        # Earlier versions kept tool messages; this key separates their prepared data from ours.
        return {**settings, "tools": "left out"} if self._format.format == "messages" else settings

    def read(self, source: Source) -> Iterator[Document]:
        """Yield the examples of one source."""
        return read_examples(source, self._format)

    def encode(self, examples: Sequence[Document]) -> list[Encoded]:
        """Return the tokens of each example; none for an example that is dropped.

        Raises `UserError` for an example that the template rejects.
        """
        rendered = [self._render(example) for example in examples]
        encodings = self._tokenizer.encode_with_offsets([text for text, _ in rendered])
        return [
            self._encode(example, text, ids, offsets)
            for example, text, (ids, offsets) in zip(examples, rendered, encodings, strict=True)
        ]

    def _render(self, example: Document) -> Rendered:
        turns = decode_turns(example.text)
        with_loss = turns_with_loss(turns, self._format)
        messages = [turn._asdict() for turn in turns]
        if self._format.system is not None and turns[0].role != "system":
            messages.insert(0, {"role": "system", "content": self._format.system})
            with_loss = [index + 1 for index in with_loss]
        try:
            special_tokens = self._tokenizer.special_tokens
            return render_with_answer_spans(self.template, messages, special_tokens, with_loss)
        except UserError as error:
            raise UserError(f"{example.origin}: {error}") from error

    def _encode(
        self, example: Document, rendered: Rendered, ids: list[int], offsets: Offsets
    ) -> Encoded:
        size, limit = len(ids), self._max_tokens
        if size > limit and self._format.too_long == "refuse":
            raise UserError(
                f"{example.origin}: {size} tokens, but a row of data.row_length {limit - 1} holds"
                f" at most {limit}; accepted: a larger data.row_length, or data.too_long 'drop' or"
                " 'cut_end'"
            )
        ends = np.array([end for _, end in offsets])
        starts = np.array([start for start, _ in offsets])
        # Every token that contains a character of an answer. A row's first token is never a target.
        spans = [
            (max(1, int(np.searchsorted(ends, first, "right"))), int(np.searchsorted(starts, last)))
            for first, last in rendered.answer_spans
        ]
        spans = [(first, min(last, limit)) for first, last in spans]
        spans = [(first, last) for first, last in spans if first < last]
        if not spans or (size > limit and self._format.too_long == "drop"):
            return Encoded([], [], 0, size)
        answer_bytes = self._answer_bytes(rendered.text, ids, offsets, spans)
        return Encoded(ids[:limit], spans, answer_bytes, size)

    def _answer_bytes(
        self, text: str, ids: list[int], offsets: Offsets, spans: list[tuple[int, int]]
    ) -> int:
        """Return the UTF-8 bytes of the answers, without the special tokens that end them."""
        total = 0
        for first, last in spans:
            while first < last and ids[last - 1] in self._special_ids:
                last -= 1
            if first < last:
                total += len(text[offsets[first][0] : offsets[last - 1][1]].encode())
        return total

    @cached_property
    def _special_ids(self) -> set[int]:
        added_tokens = self._tokenizer.backend.get_added_tokens_decoder()
        return {index for index, token in added_tokens.items() if token.special}


def training_tokenizer(tokenizer: Tokenizer, data_format: DataFormat) -> Tokenizer:
    """Return `tokenizer` with the chat template that training on `data_format` uses."""
    if data_format.is_text:
        return tokenizer
    return replace(tokenizer, chat_template=chat_template(data_format.chat_template, tokenizer))


def chat_template(name: str, tokenizer: Tokenizer) -> str:
    """Return the Jinja template that `data.chat_template` names; `model` is the tokenizer's own.

    Raises `UserError` if it does not exist or needs tokens that the tokenizer does not have.
    """
    if name == "model":
        if tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer.name} has no chat template; {_ACCEPTED}")
        return tokenizer.chat_template
    if name in TEMPLATES:
        return _built_in_template(name, tokenizer)
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template {name!r}: {error}; {_ACCEPTED}") from error


def _built_in_template(name: str, tokenizer: Tokenizer) -> str:
    template = TEMPLATES[name]
    needs_eos = "eos_token" in template
    if needs_eos and tokenizer.eos_id is None:
        raise UserError(
            f"data.chat_template {name!r} needs an eos token, which this tokenizer does not have"
        )
    if not needs_eos and tokenizer.backend.token_to_id(_CHATML_END_OF_TURN) is None:
        accepted = ", ".join(template for template in TEMPLATES if template != name)
        raise UserError(
            f"data.chat_template {name!r} ends a turn with {_CHATML_END_OF_TURN}, which is not a"
            f" token of this tokenizer; accepted: {accepted}"
        )
    return template if tokenizer.adds_bos else template.replace("bos_token", "''")
