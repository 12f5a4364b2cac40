"""Chat templates: the spans of the answers in a rendered conversation, and their tokens."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sat_jax.data.chat import Rendered, render_chat, render_with_answer_spans
from sat_jax.data.chat_templates import TEMPLATES
from sat_jax.data.conversations import chat_template, conversation_reader, training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.end_of_turn import end_of_turn
from sat_jax.data.sources import Document
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.interop.huggingface import write_directory
from sat_jax.models.build import initial_values
from sat_jax.models.presets import preset
from sat_jax.train.run_weights import exported

GOLDEN = Path(__file__).parent / "golden" / "chat"
CASES = [json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text().splitlines()]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a\n"}]
TWICE = [*ASKED, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def answers(template: str, messages: Sequence[Any], turns: Sequence[int]) -> tuple[str, list[str]]:
    text, spans = render_with_answer_spans(template, messages, SPECIAL, turns)
    return text, [text[first:last] for first, last in spans]


@pytest.mark.parametrize("variant", ["template", "marked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_ids_and_masks_are_those_of_transformers(case: Any, variant: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jinja"
    file.write_text(case[variant])
    tokenizer = load_tokenizer(str(GOLDEN))
    settings = DataFormat("messages", chat_template=str(file))
    turns = [(message["role"], message["content"]) for message in case["messages"]]
    (encoded,) = conversation_reader(settings, tokenizer, 500).encode(
        [Document(json.dumps(turns), "x")]
    )
    assert encoded.ids == case["ids"]
    assert encoded.answer_spans is not None
    mask = [any(a <= i < b for a, b in encoded.answer_spans) for i in range(len(encoded.ids))]
    assert mask == list(map(bool, case["mask"]))


def test_white_space_at_the_end_of_an_answer_is_part_of_it(tmp_path: Path) -> None:
    file = (
        tmp_path / "x.jinja"
    )  # no end of turn; the post-processor of this tokenizer trims white space off the offsets
    file.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(str(GOLDEN))
    reader = conversation_reader(DataFormat("messages", chat_template=str(file)), tokenizer, 500)
    (encoded,) = reader.encode([Document('[["user", "q"], ["assistant", " again\\n\\n"]]', "x")])
    assert tokenizer.decode(encoded.ids) == "q again\n\n"
    assert encoded.answer_spans == [(1, len(encoded.ids))]
    assert encoded.text_bytes == len(" again\n\n")
    (short,) = reader.encode([Document('[["user", ""], ["assistant", "xy"]]', "x")])
    assert short.answer_spans == [(1, 2)]  # the first token is never a target


@pytest.mark.parametrize(
    ("name", "text", "with_loss"),
    [
        (
            "chatml",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n a\n<|im_end|>\n"
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
            [" a\n<|im_end|>", "b<|im_end|>"],
        ),
        ("llama2", "<s>[INST] q [/INST] a </s><s>[INST] a [/INST] b </s>", [" a </s>", " b </s>"]),
        (
            "zephyr",
            "<s><|user|>\nq</s>\n<|assistant|>\n a\n</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>\n",
            [" a\n</s>", "b</s>"],
        ),
        (
            "alpaca",
            "<s>Below is an instruction that describes a task. Write a response that appropriately"
            " completes the request.\n\n### Instruction:\nq\n\n### Response:\n a\n</s>\n\n"
            "### Instruction:\na\n\n### Response:\nb</s>\n\n",
            [" a\n</s>", "b</s>"],
        ),
        ("plain", "<s>q\n a\n</s>a\nb</s>", [" a\n</s>", "b</s>"]),
        ("verbatim", "<s>q a\n</s>ab</s>", [" a\n</s>", "b</s>"]),
    ],
)
def test_built_in_templates(name: str, text: str, with_loss: list[str]) -> None:
    assert answers(TEMPLATES[name], TWICE, [1, 3]) == (text, with_loss)
    assert answers(TEMPLATES[name], TWICE, [3]) == (text, with_loss[1:])
    # The prompt for an answer is the text before it.
    assert text.startswith(render_chat(TEMPLATES[name], TWICE[:3], SPECIAL) + with_loss[1])
    system = [{"role": "system", "content": "S!"}, *ASKED]
    assert "S!" in answers(TEMPLATES[name], system, [2])[0]


def test_the_verbatim_template_does_not_repeat_the_eos() -> None:
    messages = [{"role": "user", "content": "q "}, {"role": "assistant", "content": "a</s>"}]
    assert answers(TEMPLATES["verbatim"], messages, [1]) == ("<s>q a</s>", ["a</s>"])


def test_text_that_a_template_adds_before_an_answer_has_a_loss() -> None:
    # As Qwen 3: only the last answer has a thinking block.
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think>"
        "{% endif %}{{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert answers(template, ASKED, [1])[1] == ["<think> a\n[end]"]
    assert answers(template, TWICE, [3])[1] == ["<think>b[end]"]
    with pytest.raises(
        UserError, match=r"answer 1, .* differently.*accepted: data\.loss_on='last'"
    ):
        answers(template, TWICE, [1, 3])


def test_a_prompt_that_opens_a_thinking_block() -> None:
    """As DeepSeek-R1: the thinking of an answer is omitted, and the prompt opens the next one."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    for messages, turns in ((ASKED, [1]), (TWICE, [3]), (TWICE, [1, 3])):
        with pytest.raises(UserError, match=r"answer \d with a prompt .* '<think>\\n'") as caught:
            answers(template, messages, turns)
        assert "loss_on" not in str(caught.value)  # would not help
        assert str(caught.value).endswith("one with {% generation %}")


def test_advice_that_would_not_help_is_not_given() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ '$' if loop.last and m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '!' if messages | length > 2 }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"answer 1, .* differently") as caught:
        answers(template, TWICE, [1, 3])
    assert "loss_on" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            "no generation prompt",
        ),
        ("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", "prompt|omits"),
        ("{% generation %}x{% endgeneration %}{{ messages[0].content }}", "marks 1 parts"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% generation %}", "chat template fails"),
    ],
)
def test_spans_that_cannot_be_determined_are_an_error(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        answers(template, TWICE, [1, 3])
    assert "\n" not in str(caught.value)


def test_marks_are_removed_from_prompts_and_refused_in_messages() -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert render_chat(template, ASKED, {}) == "q a\n"
    marked = [{"role": "user", "content": "\ufdd0"}, ASKED[1]]
    with pytest.raises(UserError, match=r"U\+FDD0"):
        answers(template, marked, [1])


def test_the_date_is_fixed_in_data_preparation() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert answers(template, ASKED, [1])[0].startswith("26 Jul 2024")


def test_template_names(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(GOLDEN))
    assert chat_template("chatml", tokenizer) == TEMPLATES["chatml"]
    assert "bos_token" not in chat_template("llama2", tokenizer)  # the tokenizer adds none
    adds_bos = replace(tokenizer, prefix=(0,))
    assert chat_template("llama2", adds_bos) == TEMPLATES["llama2"]
    plain = load_tokenizer("bytes")
    assert "bos_token" not in chat_template("zephyr", plain)
    assert render_chat(chat_template("plain", plain), ASKED[:1], plain.special_tokens) == "q\n"
    (tmp_path / "custom.jinja").write_text("custom")
    assert chat_template(str(tmp_path / "custom.jinja"), plain) == "custom"
    for name, problem in (
        ("model", "tokenizer bytes has no chat template; accepted: model, chatml"),
        ("chatml", "which is not a token of this tokenizer; accepted: llama2, zephyr"),
        ("chatlm", "No such file"),
    ):
        with pytest.raises(UserError, match=problem):
            chat_template(name, plain)
    with pytest.raises(UserError, match="needs a tokenizer with an eos token"):
        chat_template("plain", load_tokenizer("bytes", model_vocab_size=256))


def test_the_exported_tokenizer_has_the_template_of_the_training(tmp_path: Path) -> None:
    for name in (str(GOLDEN), "bytes"):
        tokenizer = load_tokenizer(name)
        assert training_tokenizer(tokenizer, DataFormat()) is tokenizer
        folder = tmp_path / Path(name).name
        folder.mkdir()
        training_tokenizer(tokenizer, DataFormat("alpaca", chat_template="zephyr")).save(folder)
        template = load_tokenizer(str(folder)).chat_template
        assert template == chat_template("zephyr", tokenizer)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATES["chatml"], [3]),
        (TEMPLATES["llama2"], [1]),  # after a space
        (TEMPLATES["zephyr"], [1]),
        ("{% for m in messages %}[{{ m.content }}]\n{% endfor %}", ["]"]),
        ("{% for m in messages %}{{ m.content }}\n##\n<|im_end|>{% endfor %}", ["\n##\n"]),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
            "{% endfor %}",
            [6],
        ),
        # Nothing follows the answer.
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", []),
        ("{{ messages[0].content }}<|im_end|>", []),
        ("{{ raise_exception('no') }}", []),
    ],
)
def test_end_of_turn(template: str, ends: list[int | str]) -> None:
    tokenizer = replace(load_tokenizer(str(GOLDEN)), chat_template=template)
    assert end_of_turn(tokenizer) == ends
    assert end_of_turn(replace(tokenizer, chat_template=None)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ends"), [("chatml", (7, 3)), ("zephyr", (7, 1))])
def test_the_exported_model_stops_at_the_end_of_turn(
    name: str, ends: tuple[int, ...], tmp_path: Path
) -> None:
    base = replace(preset("tiny"), vocab_size=320, eos_token_ids=(7,))
    data_format = DataFormat("messages", chat_template=name)
    tokenizer = training_tokenizer(load_tokenizer(str(GOLDEN)), data_format)
    assert exported(base, tokenizer, DataFormat()) == base
    model = exported(base, tokenizer, data_format)
    assert exported(model, tokenizer, data_format) == model
    params = initial_values(model, 0)
    write_directory(tmp_path / "out", model, params.__getitem__)
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / file).read_text())
        assert written["eos_token_id"] == list(ends)


def test_rendered_without_answers() -> None:
    assert render_with_answer_spans("{{ messages[0].content }}", ASKED, {}, []) == Rendered("q", [])
