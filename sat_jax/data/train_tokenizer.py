"""Training of byte-level BPE tokenizers, as of GPT-2 (Sennrich et al., arXiv:1508.07909)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sat_jax.data.sources import counted, read_documents, resolve_sources
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST = len(_BYTES) + 1  # every byte, and the end of a document


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    text_field: str = "text",
    log: Callable[[str], None] | None = None,
) -> Tokenizer:
    """Return a tokenizer with at most `vocab_size` tokens, trained on all documents of `sources`.

    Sources are those of `resolve_sources`. Any text can be encoded and decoded again. Documents end
    with `<|endoftext|>`, and have no bos. A text without enough pairs of tokens that occur twice
    gives fewer tokens, which `log` receives as a line. Raises `UserError` for a `vocab_size` below
    `SMALLEST` and for sources without text.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocabulary of {vocab_size} tokens; accepted: {SMALLEST} or more ({len(_BYTES)} bytes"
            f" and {END_OF_TEXT})"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_BYTES,
        show_progress=False,
    )
    skipped: Counter[str] = Counter()

    def texts() -> Iterator[str]:
        for source in resolve_sources(sources, log):
            for document in read_documents(source, text_field):
                skipped.update(filter(None, [document.skip_reason]))
                yield document.text

    backend.train_from_iterator(texts(), trainer)
    size = backend.get_vocab_size()
    if log and skipped:
        log(f"skipped documents: {counted(skipped)}")
    if log and size < vocab_size:
        log(f"{size} tokens instead of {vocab_size}: no other pair of tokens occurs twice")
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    end = backend.token_to_id(END_OF_TEXT)
    return Tokenizer("trained", backend, size, names, end, end, prefix=())
