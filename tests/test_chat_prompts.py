"""A chat model is asked with the ids that it was trained with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.conversations import conversation_reader, training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.sources import Document
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from sat_jax.evaluate import generate as generation
from sat_jax.evaluate.completions import Completion
from sat_jax.evaluate.exact_match import ExtractionRule, prompt_question
from sat_jax.evaluate.multiple_choice import encode_choices
from sat_jax.evaluate.prompts import PromptFormat, QuestionAnswer
from sat_jax.evaluate.question_files import MultipleChoiceQuestion
from sat_jax.interop import save_model
from scripts import generate
from tests.golden_model import golden

# As TinyLlama-Chat: its tokenizer begins texts with a bos, and its template writes none.
WITHOUT_BOS = TEMPLATES["zephyr"].replace("{{ bos_token }}", "")
ANSWER = QuestionAnswer("Hi", "Yes 1")


@pytest.fixture
def bos_tokenizer() -> Tokenizer:
    """Bytes, of which 1 is the bos that begins texts, and 2 the eos."""
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes", None, 256).backend.to_str())
    bos, eos = (backend.id_to_token(token) for token in (1, 2))
    backend.add_special_tokens([bos, eos])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)]
    )
    return make_tokenizer("bytes with a bos", backend, {"bos_token": bos, "eos_token": eos})


@pytest.mark.parametrize(
    ("template", "begins_with_bos"), [(WITHOUT_BOS, False), (TEMPLATES["zephyr"], True)]
)
def test_prompts_have_the_ids_of_training(
    template: str,
    begins_with_bos: bool,
    bos_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    data_format = DataFormat("messages", chat_template=str(tmp_path / "chat.jinja"))
    turns = [["user", ANSWER.question], ["assistant", ANSWER.answer]]
    reader = conversation_reader(data_format, bos_tokenizer, 200)
    (encoded,) = reader.encode([Document(json.dumps(turns), "x")])
    assert encoded.answer_spans is not None
    expected = encoded.ids[: encoded.answer_spans[0][0]]
    assert (expected[0] == 1) == begins_with_bos
    tokenizer = training_tokenizer(bos_tokenizer, data_format)

    prompt_format = PromptFormat(chat=True)
    question = prompt_question(tokenizer, ANSWER, prompt_format, ExtractionRule("number"))
    assert question.ids == expected
    choices = MultipleChoiceQuestion(ANSWER.question, [ANSWER.answer, "No"], [1.0, 0.0])
    pairs = encode_choices(tokenizer, prompt_format, [choices])
    for pair, text in zip(pairs, choices.choices, strict=True):
        assert [*pair.context, *pair.continuation] == expected + list(text.encode())

    save_model(golden(), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    asked = []

    def record(*arguments: Any, **_: object) -> list[None]:
        asked.extend(arguments[1])
        return []

    monkeypatch.setattr(generation, "stream", record)
    arguments = ["--model", str(tmp_path / "model"), "--chat", "--prompt", ANSWER.question]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    generate.main()
    assert asked == [expected]


@pytest.mark.filterwarnings("ignore")  # of the harness
def test_tasks_of_the_harness_have_the_ids_of_training(
    bos_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from sat_jax.evaluate import harness

    object.__setattr__(bos_tokenizer, "chat_template", WITHOUT_BOS)
    model = harness.HarnessModel(golden(), bos_tokenizer)
    text = model.apply_chat_template([{"role": "user", "content": ANSWER.question}])
    expected = bos_tokenizer.encode_rendered([text])[0]
    calls: list[Any] = []

    def complete(*arguments: Any, **_: object) -> list[Completion]:
        calls.extend(arguments[2])
        return [Completion("", 0, False)]

    monkeypatch.setattr(harness, "complete", complete)
    model.generate_until([SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 4}))])
    assert calls.pop() == expected
    monkeypatch.setattr(harness, "likelihoods", lambda *arguments: calls.extend(arguments[1]))
    model.loglikelihood([SimpleNamespace(args=(text, "Yes"))])
    assert [*calls[0].context, *calls[0].continuation] == expected + list(b"Yes")
