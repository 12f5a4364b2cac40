"""From token ids to what a person reads, as it comes."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"


class TextStream:
    """Text of ids that come one after the other, handed out as soon as it cannot change any more.

    `decode` turns ids into text. A character may take several tokens, in byte fallback as in
    byte-level BPE, and the space in front of a word may hang on what stands before it; so every
    part is decoded together with the part before it, at first with `context`, the prompt's ids.
    The text `stop`, and what comes after it, is not handed out; `ended` says that it has come.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = (), stop: str = ""
    ):
        self.ended = False
        self._stop, self._held = stop, ""  # held: what may be the stop's beginning
        self._decode = decode
        self._before = list(context)  # already handed out
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that is complete with `ids`."""
        self._pending += ids
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._before_stop(self._hand_out(text))

    def close(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        text = self._before_stop(self._hand_out(self._text())) + self._held
        self._held = ""
        return text

    def _text(self) -> str:
        whole = self._decode(self._before + self._pending)
        return whole.removeprefix(self._decode(self._before))

    def _hand_out(self, text: str) -> str:
        if text:
            self._before, self._pending = self._pending, []
        return text

    def _before_stop(self, text: str) -> str:
        if not self._stop or self.ended:
            return "" if self.ended else text
        text, found, _ = (self._held + text).partition(self._stop)
        self.ended = bool(found)
        sizes = range(0 if found else len(self._stop) - 1, 0, -1)
        held = next((size for size in sizes if text.endswith(self._stop[:size])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
