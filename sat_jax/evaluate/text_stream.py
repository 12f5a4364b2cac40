"""Streaming of generated text from token ids."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"


class TextStream:
    """Decoder of a stream of token ids that returns text as soon as it is final.

    `decode` converts ids to text. A character may consist of several tokens, and the space before a
    word may depend on the preceding token. Therefore every part is decoded together with the
    previous part, which is initially `context`, the ids of the prompt. The text `stop` and
    everything after it are not returned; `ended` says whether it has occurred.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = (), stop: str = ""
    ):
        self.ended = False
        self._stop = stop
        self._held = ""  # text that may be the beginning of the stop
        self._decode = decode
        self._previous = list(context)  # ids whose text has been returned
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Add `ids` and return the text that has become final."""
        self._pending += ids
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._before_stop(self._release(text))

    def close(self) -> str:
        """Return the remaining text; bytes of an incomplete character become U+FFFD."""
        text = self._before_stop(self._release(self._text())) + self._held
        self._held = ""
        return text

    def _text(self) -> str:
        before = self._decode(self._previous)
        text = self._decode(self._previous + self._pending)
        if text.startswith(before):
            return text[len(before) :]
        # Tokens of bytes are decoded together: new ones that are not UTF-8 change the text of those
        # before them.
        return self._decode(self._pending)

    def _release(self, text: str) -> str:
        if text:
            self._previous, self._pending = self._pending, []
        return text

    def _before_stop(self, text: str) -> str:
        if not self._stop or self.ended:
            return "" if self.ended else text
        text, stop, _ = (self._held + text).partition(self._stop)
        self.ended = bool(stop)
        sizes = range(0 if stop else len(self._stop) - 1, 0, -1)
        held = next((size for size in sizes if text.endswith(self._stop[:size])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
