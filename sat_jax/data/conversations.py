"""Tokenization of conversations: each is one packed segment, with a loss on answers only."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jinja2
import numpy as np

from sat_jax.data.chat import Rendered, render_with_answer_spans
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.corpus import Encoded, Reader
from sat_jax.data.data_format import DataFormat
from sat_jax.data.examples import (
    NO_ANSWER_TOKEN,
    READER_VERSION,
    decode_turns,
    read_examples,
    turns_with_loss,
)
from sat_jax.data.sources import Document
from sat_jax.data.tokenizer import Offsets, Tokenizer
from sat_jax.errors import UserError

_ACCEPTED = f"accepted: model, {', '.join(TEMPLATES)}, or the path of a .jinja file"
_CHATML_END_OF_TURN = "<|im_end|>"


def conversation_reader(data_format: DataFormat, tokenizer: Tokenizer, row_length: int) -> Reader:
    """Return the reader of conversations. Token ids are the same as with transformers.

    An example with more than `row_length` input-target pairs is dropped, truncated or refused, as
    `data_format.too_long` says; it is never split. A truncated example without an answer is
    dropped. An example that the template rejects by `raise_exception` is skipped. Encoding raises
    `UserError` if the template fails otherwise.
    """
    template = chat_template(data_format.chat_template, tokenizer)
    apart = ("chat_template", "min_document_tokens")  # a file's content matters; of texts alone
    settings = {name: v for name, v in vars(data_format).items() if name not in apart}
    settings |= {"template": template, "special": tokenizer.special_tokens}
    settings |= {"reader": READER_VERSION}

    def encode(examples: Sequence[Document]) -> list[Encoded]:
        rendered = [_render(example, data_format, template, tokenizer) for example in examples]
        texts = [part.text for part in rendered if isinstance(part, Rendered)]
        encodings = iter(tokenizer.encode_with_offsets(texts))
        return [
            Encoded([], [], 0, 0, part)
            if isinstance(part, str)
            else _encode(example, part, *next(encodings), data_format, tokenizer, row_length + 1)
            for example, part in zip(examples, rendered, strict=True)
        ]

    read = partial(read_examples, data_format=data_format)
    return Reader(settings, read, encode, keeps_whole=True)


def _render(
    example: Document, data_format: DataFormat, template: str, tokenizer: Tokenizer
) -> Rendered | str:
    """Return the text of an example, or the reason why the template rejects it."""
    turns = decode_turns(example.text)
    with_loss = turns_with_loss(turns, data_format)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    if data_format.system is not None and turns[0].role != "system":
        messages.insert(0, {"role": "system", "content": data_format.system})
        with_loss = [index + 1 for index in with_loss]
    try:
        return render_with_answer_spans(template, messages, tokenizer.special_tokens, with_loss)
    except UserError as error:
        if type(error.__cause__) is jinja2.TemplateError:  # that of `raise_exception`
            return f"that the chat template rejects ({error.__cause__})"
        raise UserError(f"{example.origin}: {error}") from error


def _encode(
    example: Document,
    rendered: Rendered,
    ids: list[int],
    offsets: Offsets,
    data_format: DataFormat,
    tokenizer: Tokenizer,
    limit: int,
) -> Encoded:
    """Return at most `limit` tokens of an example; no tokens if it is dropped."""
    size = len(ids)
    if size > limit and data_format.too_long == "refuse":
        raise UserError(
            f"{example.origin}: {size} tokens, but a row of data.row_length {limit - 1} holds"
            f" at most {limit}; accepted: a larger data.row_length, or data.too_long 'drop' or"
            " 'cut_end'"
        )
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    spans, answer_bytes = [], 0
    for first_character, end in rendered.answer_spans:
        # Every token with a character of the answer. A row's first token is never a target.
        first = max(1, int(np.searchsorted(ends, first_character, "right")))
        last = min(int(np.searchsorted(starts, end)), limit)
        if first >= last:
            continue
        spans.append((first, last))
        while first < last and ids[last - 1] in tokenizer.special_ids:
            last -= 1  # the tokens that end an answer are not part of its text
        if first < last:
            answer_bytes += len(rendered.text[starts[first] : ends[last - 1]].encode())
    if size > limit and (not spans or data_format.too_long == "drop"):
        return Encoded([], [], 0, size)
    if not spans:
        return Encoded([], [], 0, 0, NO_ANSWER_TOKEN)
    return Encoded(ids[:limit], spans, answer_bytes, size)


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
    if name not in TEMPLATES:
        try:
            return Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template {name!r}: {error}; {_ACCEPTED}") from error
    template = TEMPLATES[name]
    if "eos_token" in template:
        if tokenizer.eos_id is None:
            raise UserError(f"data.chat_template {name!r} needs a tokenizer with an eos token")
    elif tokenizer.backend.token_to_id(_CHATML_END_OF_TURN) is None:
        accepted = ", ".join(template for template in TEMPLATES if template != name)
        raise UserError(
            f"data.chat_template {name!r} ends a turn with {_CHATML_END_OF_TURN}, which is not a"
            f" token of this tokenizer; accepted: {accepted}"
        )
    return template if tokenizer.adds_bos else template.replace("bos_token", "''")
