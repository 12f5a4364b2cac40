"""Prompts for questions: plain text from a template, or a conversation in a chat template."""

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


class QuestionAnswer(NamedTuple):
    """A question and its answer: a problem to solve, or a few-shot example."""

    question: str
    answer: str


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts.

    Plain: `template` with the question in it, after the few-shot examples in the same format, each
    followed by an empty line. A space separates a prompt from its answer. With `chat`, an example
    is a turn of the user and one of the assistant, the question is the last turn, and the answer
    follows without a separator; `system` is the first turn. `template` None is `PLAIN` or `CHAT`.
    """

    template: str | None = None
    chat: bool = False
    shots: Sequence[QuestionAnswer] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and QUESTION not in self.template:
            raise UserError(f"prompt {self.template!r}: does not contain {QUESTION}")

    @property
    def question_template(self) -> str:
        """The template in use: `template` or its default."""
        return self.template or (CHAT if self.chat else PLAIN)

    @property
    def separator(self) -> str:
        """The text between a prompt and its answer."""
        return "" if self.chat else " "

    def stops(self, tokenizer: Tokenizer) -> list[Stop]:
        """Return what ends an answer: the end of turn of a chat, or the start of a next question.

        A plain template that begins with the question has no such start.
        """
        if self.chat:
            return end_of_turn(tokenizer)
        start = self.question_template.partition(QUESTION)[0].strip()
        return [f"\n{start}"] if start else []

    def prompt(self, tokenizer: Tokenizer, question: str) -> str:
        """Return the prompt for `question`."""
        shots = [(self._fill(shot.question), shot.answer) for shot in self.shots]
        if not self.chat:
            examples = [f"{prompt}{self.separator}{answer}\n\n" for prompt, answer in shots]
            return "".join(examples) + self._fill(question)
        messages = []
        for prompt, answer in shots:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self._fill(question)})
        return chat_prompt(tokenizer, messages, self.system)

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that begin with a prompt."""
        return (tokenizer.encode_rendered if self.chat else tokenizer.encode_batch)(texts)

    def _fill(self, question: str) -> str:
        return self.question_template.replace(QUESTION, question)


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], system: str | None = None
) -> str:
    """Return `messages` in the model's chat template, after `system` if they have no system turn.

    The ids of this text are those of `Tokenizer.encode_rendered`, as in training. Raises
    `UserError` if the model has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name}: no chat template; accepted: plain prompts without chat"
        )
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return render_chat(tokenizer.chat_template, messages, tokenizer.special_tokens)
