"""Where a chat model's turn is over: at what its template writes behind an answer.

A base model that is trained with a template learns that end, which need not be its end of text.
"""

from typing import TypeAlias

from sat_jax.data.chat import text_behind_answer
from sat_jax.data.tokenizer import Tokenizer

Stop: TypeAlias = int | str  # a token, or a text


def end_of_turn(tokenizer: Tokenizer) -> list[Stop]:
    """What ends an answer in the tokenizer's chat template, if anything does: the id of the added
    token that it writes there, or where it writes plain text first, that text."""
    if tokenizer.chat_template is None:
        return []
    end = text_behind_answer(tokenizer.chat_template, tokenizer.special_tokens)
    ((ids, offsets),) = tokenizer.encode_with_offsets([end])
    added = tokenizer.backend.get_added_tokens_decoder()
    place = next((place for place, number in enumerate(ids) if number in added), None)
    text = end if place is None else end[: offsets[place][0]]
    if text.strip():
        return [text]
    return [] if place is None else [ids[place]]
