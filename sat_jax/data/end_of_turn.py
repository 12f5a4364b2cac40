"""Stop conditions of a chat model: what its chat template writes after an answer.

A base model that is trained with a chat template learns to emit this end of turn, which may differ
from its end-of-text token.
"""

from typing import TypeAlias

from sat_jax.data.chat import text_after_answer
from sat_jax.data.tokenizer import Tokenizer

Stop: TypeAlias = int | str  # a token id, or a text


def end_of_turn(tokenizer: Tokenizer) -> list[Stop]:
    """Return what ends an answer in the tokenizer's chat template; empty if nothing does.

    This is the id of the added token that the template writes after an answer, or the plain text
    that precedes that token.
    """
    if tokenizer.chat_template is None:
        return []
    end = text_after_answer(tokenizer.chat_template, tokenizer.special_tokens)
    ((ids, offsets),) = tokenizer.encode_with_offsets([end])
    added_tokens = tokenizer.backend.get_added_tokens_decoder()
    index = next((index for index, token in enumerate(ids) if token in added_tokens), None)
    text = end if index is None else end[: offsets[index][0]]
    if text.strip():
        return [text]
    return [] if index is None else [ids[index]]
