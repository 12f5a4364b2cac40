"""From a question to the text that a model continues: by a template, or as a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sat_jax.data.chat import render_chat
from sat_jax.data.end_of_turn import Stop, end_of_turn
from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError

QUESTION = "{question}"
PLAIN = f"Question: {QUESTION}\nAnswer:"
CHAT = QUESTION


class Shot(NamedTuple):
    """An example that is shown in front of the question."""

    question: str
    answer: str


@dataclass(frozen=True)
class Prompting:
    """How questions are put.

    Plain: `template` with the question in it, the shots and their answers in front of it, an empty
    line between each; a space and then the answer follow. With `chat`, every shot is a turn of the
    user and one of the assistant, the question is the last turn, and the answer follows directly;
    `system` is the turn before all others. `template` None is `PLAIN`, or `CHAT`.
    """

    template: str | None = None
    chat: bool = False
    shots: Sequence[Shot] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and QUESTION not in self.template:
            raise UserError(f"prompt {self.template!r}: {QUESTION} is not in it")

    @property
    def joint(self) -> str:
        """What stands between a prompt and an answer to it."""
        return "" if self.chat else " "

    def stops(self, tokenizer: Tokenizer) -> list[Stop]:
        """Where an answer is over though the text is not: a turn at what ends it in the chat
        template, plain at the next question.

        Not where a template begins with the question itself.
        """
        if self.chat:
            return end_of_turn(tokenizer)
        start = self.asks.partition(QUESTION)[0].strip()
        return [f"\n{start}"] if start else []

    def prompt(self, tokenizer: Tokenizer, question: str) -> str:
        """The text that asks `question`."""
        shots = [(self._ask(shot.question), shot.answer) for shot in self.shots]
        if not self.chat:
            shown = [f"{asked}{self.joint}{answer}\n\n" for asked, answer in shots]
            return "".join(shown) + self._ask(question)
        messages = []
        for asked, answer in shots:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self._ask(question)})
        return chat_prompt(tokenizer, messages, self.system)

    @property
    def asks(self) -> str:
        """The template that is used."""
        return self.template or (CHAT if self.chat else PLAIN)

    def _ask(self, question: str) -> str:
        return self.asks.replace(QUESTION, question)


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], system: str | None = None
) -> str:
    """`messages` in the chat template of the model, behind `system` where they have no system turn
    of their own. Raises `UserError` where it has no template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name}: no chat template; without chat the text is continued"
        )
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return render_chat(tokenizer.chat_template, messages, tokenizer.special_tokens)
