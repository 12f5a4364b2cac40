"""Preparation of conversations: every example that is left out is counted, with the reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from sat_jax.data.data_format import DataFormat
from tests.test_conversations import BYTES, all_segments, as_text, data_of, write
from tests.user_errors import user_error

QUESTION = {"role": "user", "content": "q"}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_weights_change_the_loss_and_other_fields_are_reported(tmp_path: Path) -> None:
    examples = [
        {
            "messages": [
                {"role": "user", "content": f"{n}"},
                answer("a") | {"weight": 0},
                answer("b"),
            ]
        }
        for n in range(4)
    ]
    file = write(tmp_path, [*(line | {"id": 7} for line in examples), examples[0] | {"tools": [1]}])
    lines_of_log: list[str] = []
    data_format = DataFormat("messages", chat_template="plain")
    prepared = data_of(file, data_format, log=lines_of_log.append)
    texts = sorted(as_text(*segment) for segment in all_segments(prepared))
    assert texts == [f"{n}\na/<b/" for n in range(4)]
    assert prepared.info.left_out == {"with the field 'tools'": 1}
    assert prepared.info.unused_fields == {"id": 4}
    assert lines_of_log[0].endswith("; skipped or truncated: 1 with the field 'tools'")
    assert lines_of_log[1].endswith("not used, with the number of documents: 'id' (4)")


def test_answers_without_a_token_are_counted(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    backend.normalizer = tokenizers.normalizers.Replace("\u200b", "")  # zero-width space
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}:{% endif %}{% endfor %}"
    )
    settings: dict[str, Any] = {
        "data_format": DataFormat("prompt_completion", chat_template=str(template)),
        "tokenizer": replace(BYTES, backend=backend),
    }
    empty = [{"prompt": f"{n}", "completion": "\u200b"} for n in range(3)]
    used = [{"prompt": f"{n}", "completion": "é"} for n in range(9)]
    lines_of_log: list[str] = []
    prepared = data_of(write(tmp_path, [*empty, *used]), log=lines_of_log.append, **settings)
    assert prepared.info.left_out == {"with answers that give no token": 3}
    assert prepared.info.documents == len(all_segments(prepared)) == 9
    assert lines_of_log[0].endswith("truncated: 3 with answers that give no token")
    file = write(tmp_path / "all", empty)
    message = user_error(lambda: data_of(file, **settings))
    assert message.endswith("no example can be used: 3 with answers that give no token")


def test_examples_that_the_template_rejects_are_counted(tmp_path: Path) -> None:
    twice = {"messages": [QUESTION, QUESTION, answer("a")]}
    used = [{"messages": [QUESTION, answer(f"{n}")]} for n in range(9)]
    template = tmp_path / "alternating.jinja"
    template.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    data_format = DataFormat("messages", chat_template=str(template))
    prepared = data_of(write(tmp_path, [twice, *used, twice]), data_format)
    assert prepared.info.left_out == {"that the chat template rejects (roles must alternate)": 2}
    assert sorted(as_text(*s) for s in all_segments(prepared)) == [f"q<{n}" for n in range(9)]
    rejected = [{"messages": [QUESTION, QUESTION, answer(f"{n}")]} for n in range(3)]
    message = user_error(lambda: data_of(write(tmp_path / "all", rejected), data_format))
    assert message.endswith("3 that the chat template rejects (roles must alternate)")
    template.write_text("{{ messages[0].nothing.there }}")
    message = user_error(lambda: data_of(tmp_path / "x.jsonl", data_format))
    assert "line 1 (byte 0): the chat template fails: UndefinedError" in message
