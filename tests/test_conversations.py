"""Preparation of conversations: exact tokens and loss masks, one segment each, never split."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_jax.cache import cache_dir
from sat_jax.config import Config, DataConfig
from sat_jax.config_values import from_config_dict, load
from sat_jax.data.batches import EMPTY_ROW, Row, batches, in_order, open_split, unpack
from sat_jax.data.conversations import training_tokenizer
from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate import eval_model as module
from sat_jax.evaluate.eval_model import open_eval_model
from sat_jax.evaluate.perplexity import perplexity, prepared_data
from sat_jax.interop import open_weights
from sat_jax.results.record import dense_baseline
from sat_jax.results.rows import read
from sat_jax.train.inputs import write_model
from sat_jax.train.loop import train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.workdir import WorkDir
from scripts import evaluate
from scripts import prepare_data as script
from tests.conftest import ROOT
from tests.small_models import CONFIGS
from tests.tolerances import assert_close
from tests.user_errors import user_error

GOLDEN = ROOT / "tests/golden"
BYTES = load_tokenizer("bytes")
EOS = 256


def lines(count: int, longest: int = 20) -> list[dict[str, str]]:
    rng = np.random.default_rng(count)
    sizes = rng.integers(1, longest, count)
    return [{"prompt": f"{n}?", "completion": "é" * int(size)} for n, size in enumerate(sizes)]


def write(folder: Path, examples: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "x.jsonl"
    file.write_text("\n".join(json.dumps(example) for example in examples))
    return file


def data_of(file: Path, data_format: DataFormat | None = None, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"row_length": 64, "held_out": 0.2, "tokenizer": BYTES}
    settings["root"] = file.parent / "prepared"
    data_format = data_format or DataFormat("prompt_completion", chat_template="plain")
    settings |= {"data_format": data_format, **changes}
    return prepare(sources=str(file), **settings)


def segments(prepared: Prepared, split: str) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the tokens of every segment and which of them have a loss."""
    for batch in in_order(open_split(prepared, split), 3):
        assert not batch.loss_mask[batch.segment_ids == 0].any()
        for tokens, targets, segment_ids, positions, mask in zip(*batch, strict=True):
            for segment in range(1, segment_ids.max() + 1):
                inside = segment_ids == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                yield [tokens[inside][0], *targets[inside]], [False, *mask[inside]]


def all_segments(prepared: Prepared) -> list[tuple[list[int], list[bool]]]:
    return [s for split in prepared.info.splits for s in segments(prepared, split)]


def as_text(ids: list[int], mask: list[bool]) -> str:
    """Return the text with "<" where a span with a loss begins and "/" for the eos."""
    text = b""
    for token, has_loss, previous in zip(ids, mask, [False, *mask[:-1]], strict=True):
        text += b"<" if has_loss and not previous else b""
        text += b"/" if token == EOS else bytes([token])
    return text.decode(errors="replace")


def test_tokens_and_mask_of_an_example(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", " c\n")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = write(tmp_path, [messages, {"messages": [*messages["messages"][:1], *_answer("x")]}])
    prepared = data_of(file, DataFormat("messages", chat_template="plain"))
    assert sorted(as_text(*segment) for segment in all_segments(prepared)) == [
        "q\n<ab/r\n< c\n/",
        "q\n<x/",
    ]
    long = next(s for s in all_segments(prepared) if len(s[0]) > 9)
    assert long[0] == [113, 10, 97, 98, 256, 114, 10, 32, 99, 10, 256]
    assert np.flatnonzero(long[1]).tolist() == [2, 3, 4, 7, 8, 9, 10]
    splits = prepared.info.splits.values()
    assert sum(split.targets for split in splits) == 9
    assert sum(split.tokens for split in splits) == 15
    assert sum(split.text_bytes for split in splits) == 6  # "ab", " c\n" and "x"


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_examples_are_packed_without_splitting(tmp_path: Path) -> None:
    examples = lines(80)
    prepared = data_of(write(tmp_path, examples))
    expected = [f"{line['prompt']}\n<{line['completion']}/" for line in examples]
    assert sorted(as_text(*segment) for segment in all_segments(prepared)) == sorted(expected)
    assert prepared.info.documents == 80
    for split, info in prepared.info.splits.items():
        pieces = list(segments(prepared, split))
        count = len(pieces)
        assert (info.documents, info.long_documents) == (count, 0)
        assert info.targets == sum(sum(mask) for _, mask in pieces)
        assert info.tokens == sum(len(ids) for ids, _ in pieces)
        assert info.useful_share == pytest.approx((info.tokens - count) / (info.rows * 64))
        assert info.text_bytes == info.targets - count  # without the eos of each
        assert info.rows < count  # they share rows
    lines_of_log: list[str] = []
    data_of(tmp_path / "x.jsonl", log=lines_of_log.append)
    assert lines_of_log[0].startswith("data: 64 train examples, loss on ")
    assert lines_of_log[0].endswith("; skipped or truncated: none")


def test_an_example_whose_answers_have_no_token_is_counted(tmp_path: Path) -> None:
    template = tmp_path / "x.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content.strip('-') }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    data_format = DataFormat("prompt_completion", chat_template=str(template))
    examples = lines(10)
    examples[3]["completion"] = examples[8]["completion"] = "---"
    prepared = data_of(write(tmp_path / "a", examples), data_format)
    assert prepared.info.left_out == {"with answers that give no token": 2}
    assert sum(split.documents for split in prepared.info.splits.values()) == 8
    for example in examples:
        example["completion"] = "-"
    message = user_error(lambda: data_of(write(tmp_path / "b", examples), data_format))
    assert message == "no example can be used: 10 with answers that give no token"


def test_batches_depend_only_on_the_step(tmp_path: Path) -> None:
    prepared = data_of(write(tmp_path, lines(80)))
    run, again = (batches(open_split(prepared, "train"), 4, seed=1) for _ in range(2))
    first = [run(step) for step in range(4)]
    for step in (3, 0, 2):
        assert all(map(np.array_equal, again(step), first[step]))


def test_the_same_conversation_has_the_same_hash_in_every_format(tmp_path: Path) -> None:
    examples = lines(40)
    by_format: dict[str, list[Any]] = {
        "messages": [
            {"messages": [{"role": "user", "content": e["prompt"]}, *_answer(e["completion"])]}
            for e in examples
        ],
        "alpaca": [{"instruction": e["prompt"], "output": e["completion"]} for e in examples],
        "sharegpt": [
            {
                "conversations": [
                    {"from": "human", "value": e["prompt"]},
                    {"from": "gpt", "value": e["completion"]},
                ]
            }
            for e in examples
        ],
    }
    held_out = sorted(segments(data_of(write(tmp_path, examples)), "held_out"))
    assert len(held_out) == 8
    for name, written in by_format.items():
        data_format = DataFormat(name, chat_template="plain")  # type: ignore[arg-type]
        prepared = data_of(write(tmp_path / name, written), data_format)
        assert sorted(segments(prepared, "held_out")) == held_out


@pytest.mark.parametrize(("too_long", "documents"), [("drop", 9), ("cut_end", 11)])
def test_longer_than_a_row(tmp_path: Path, too_long: Any, documents: int) -> None:
    # 12 bytes fit with the prompt, the newline and the eos: 16 tokens make 15 pairs.
    examples = [{"prompt": "p", "completion": f"{n:013}"} for n in range(9)]
    over = [{"prompt": "p", "completion": "x" * size} for size in (14, 40)]
    no_room = [{"prompt": "p" * 30, "completion": "y"}]
    file = write(tmp_path, [*examples, *over, *no_room])
    data_format = DataFormat("prompt_completion", chat_template="plain", too_long=too_long)
    lines_of_log: list[str] = []
    prepared = data_of(file, data_format, row_length=15, log=lines_of_log.append)
    texts = sorted(as_text(*segment) for segment in all_segments(prepared))
    complete = sorted(f"p\n<{n:013}/" for n in range(9))
    assert texts == complete + ["p\n<" + "x" * 14] * (documents - 9)
    splits = prepared.info.splits.values()
    assert sum(split.documents for split in splits) == documents
    assert sum(split.long_documents for split in splits) == 3
    assert sum(split.text_bytes for split in splits) == 9 * 13 + 14 * (documents - 9)
    # One of the truncated examples has no answer left.
    action = {"drop": "dropped", "cut_end": "truncated, or dropped if no answer remains"}
    assert lines_of_log[0].endswith(
        f"skipped or truncated: 3 longer than a row ({action[too_long]})"
    )
    refused = DataFormat("prompt_completion", chat_template="plain", too_long="refuse")
    message = user_error(lambda: data_of(file, refused, row_length=15))
    assert message.startswith(f"{file}, line 10 (byte ")
    assert "17 tokens, but a row of data.row_length 15 holds at most 16" in message
    assert "used: 12 longer than a row (use" in user_error(lambda: data_of(file, row_length=2))


def test_max_tokens_truncates_no_example(tmp_path: Path) -> None:
    file = write(tmp_path, lines(200))
    full = {tuple(ids) for ids, _ in all_segments(data_of(file))}
    capped = data_of(file, max_tokens=1000)
    assert {tuple(ids) for ids, _ in all_segments(capped)} < full
    tokens = [split.tokens for split in capped.info.splits.values()]
    assert 900 < sum(tokens) <= 1000 and tokens[0] <= 800
    assert "no example of the train split has tokens" in user_error(
        lambda: data_of(file, max_tokens=10)
    )


def test_skipped_and_too_few_examples(tmp_path: Path) -> None:
    file = write(tmp_path, [*lines(20), {"prompt": "q", "completion": " "}])
    prepared = data_of(file)
    assert (prepared.info.documents, prepared.info.left_out) == (20, {"without an answer": 1})
    single = write(tmp_path / "single", lines(1))  # never split, so that its end is not held out
    assert "leaves none of 1 documents to train on" in user_error(lambda: data_of(single))


CHATS = [
    {
        "messages": [
            *({"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}),
            *({"role": "user", "content": "r"}, {"role": "assistant", "content": "b" * 40}),
        ]
    }
    for n in range(8)
]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "q0\n<a/r\n<" + "b" * 40 + "/"),
        ({"loss_on": "last"}, "q0\na/r\n<" + "b" * 40 + "/"),
        ({"system": "S"}, "S\nq0\n<a/r\n<" + "b" * 40 + "/"),
        ({"chat_template": "{path}"}, "Q:q0A:<a/Q:rA:<" + "b" * 40 + "/"),
        ({"chat_template": "zephyr"}, None),
        ({"chat_template": "verbatim"}, "q0<a/r<" + "b" * 40 + "/"),
        ({"too_long": "cut_end", "row_length": 20}, "q0\n<a/r\n<" + "b" * 14),
    ],
)
def test_every_setting_of_the_format_changes_the_rows(
    tmp_path: Path, changes: dict[str, Any], first: str | None
) -> None:
    path = tmp_path / "custom.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}A:{% else %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    values = {"chat_template": "plain", "format": "messages"} | changes
    values["chat_template"] = values["chat_template"].format(path=path)
    data = from_config_dict({"data": values}).data
    file = write(tmp_path, CHATS)
    row_length = data.row_length if changes.get("row_length") else 128
    prepared = data_of(file, DataFormat.from_settings(data), row_length=row_length)
    texts = sorted(as_text(*segment) for segment in all_segments(prepared))
    assert len(texts) == 8
    assert first is None or texts[0] == first
    if changes:
        plain = data_of(file, DataFormat("messages", chat_template="plain"), row_length=128)
        assert prepared.info.fingerprint != plain.info.fingerprint


def test_the_config_refuses_settings_without_an_effect() -> None:
    with pytest.raises(
        UserError, match=r"data\.completion_field 'a' has no effect with data\.format"
    ):
        from_config_dict({"data": {"completion_field": "a"}})
    with pytest.raises(UserError, match=r"data\.prompt_field 'a' has no effect"):
        from_config_dict({"data": {"prompt_field": "a", "format": "alpaca"}})


def test_rows_of_text_store_no_answer_spans(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    text = data_of(tmp_path / "a.txt", DataFormat())
    assert set(open_split(text, "train")._source[0]) == {"tokens", "lengths"}
    examples = data_of(write(tmp_path, lines(20)))
    assert set(open_split(examples, "train")._source[0]) == {"tokens", "lengths", "answers"}


def test_unpacking_of_answer_spans() -> None:
    row = Row(np.arange(9, dtype=np.int32), np.array([3, 4]), np.array([1, 3, 3, 4, 6, 7]))
    batch = unpack([row, EMPTY_ROW], 8)
    assert batch.targets[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 0]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 1, 0], [0] * 8]


def test_evaluation_counts_answers(tmp_path: Path) -> None:
    prepared = data_of(write(tmp_path, lines(40)))
    wide = replace(CONFIGS["mha"], vocab_size=257, max_positions=64)
    data = prepared_data(prepared.path, "held_out", wide, 2)
    info = prepared.info.splits["held_out"]
    assert data.tokens == info.targets == sum(int(b.loss_mask.sum()) for b in data.batches)
    assert data.text_bytes == info.text_bytes


def test_the_script_accepts_the_settings_of_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [{"q": f"{n}", "a": "x"} for n in range(9)]
    file = write(tmp_path, [*examples, {"q": "none", "a": ""}])
    options = ["--format", "prompt_completion", "--prompt-field", "q", "--completion-field", "a"]
    options += ["--chat-template", "plain", "--system", "S", "--tokenizer", "bytes"]
    arguments = ["prepare_data", "--sources", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, *options])
    script.main()
    out = capsys.readouterr().out
    assert out.startswith("data: ")
    assert out.endswith("1 files, 9 documents; skipped: 1 without an answer\n")
    monkeypatch.setattr("sys.argv", [*arguments, "--tokenizer", "bytes", "--system", "S"])
    assert "data.system 'S' has no effect with data.format 'text'" in user_error(script.main)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["Be brief.", None])
def test_evaluation_prompts_a_run_with_the_tokens_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str | None
) -> None:
    file, template = write(tmp_path, lines(4)), tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = DataConfig(
        sources=str(file), tokenizer="bytes", format="prompt_completion",
        chat_template=str(template), system=system,
    )  # fmt: skip
    trained = open_weights(GOLDEN / "llama_gqa"), Config(data=data, seed=3)
    workdir = WorkDir(tmp_path / "run")
    workdir.path.mkdir()
    model = trained[0].config
    tokenizer = load_tokenizer("bytes", None, model.vocab_size)
    write_model(workdir, model, training_tokenizer(tokenizer, DataFormat.from_settings(data)))
    monkeypatch.setattr(module, "is_run", lambda _: True)
    monkeypatch.setattr(module, "open_run", lambda *_: trained)

    def prompts(*more: str) -> list[list[int]]:
        out = tmp_path / "out.jsonl"
        fields = ("--question-field", "prompt", "--answer-field", "completion", "--extract", "text")
        line = ["evaluate", "--model", str(workdir.path), "--answers", str(file), *fields]
        line += ["--chat", *more]
        generated = ("--max-new-tokens", "1", "--generations", str(out))
        generated += ("--record", str(tmp_path / "rows.jsonl"))
        monkeypatch.setattr("sys.argv", [*line, *generated])
        evaluate.main()
        texts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
        return sorted(BYTES.encode_batch(texts))

    for option in ((), ("--system", "Be long."), ("--system", "")):
        data_format = DataFormat.from_settings(data)
        if option:
            data_format = replace(data_format, system=option[1] or None)
        rows = all_segments(data_of(file, data_format, row_length=128))
        assert prompts(*option) == sorted(ids[: mask.index(True)] for ids, mask in rows)
    row, *_ = recorded = read(tmp_path / "rows.jsonl")
    assert len(recorded) == 3 and str(tmp_path) not in json.dumps(recorded)
    assert (row["measure"], row["model"][:4], row["data"]) == ("answers", "run#", "x.jsonl")
    assert {"accuracy", "stderr", "versions", "device", "commit", "date"} <= row.keys()
    assert (row["run"]["seed"], row["run"]["twin"]) == (3, dense_baseline(trained[1]))
    assert row["run"]["settings"]["data.format"] == "prompt_completion"


def answering(file: Path) -> Config:
    """A run on examples."""
    settings = {
        "data.sources": file,
        "data.format": "prompt_completion",
        "data.row_length": 128,
        "data.chat_template": "zephyr",
        "data.held_out": 0.1,
        "train.steps": 6,
        "sparsity.rate": 0.0,
    }
    return load(str(ROOT / "experiments/tiny.py"), [f"{k}={v}" for k, v in settings.items()])


@pytest.mark.slow
def test_a_run_trains_on_the_answers(tmp_path: Path) -> None:
    config = answering(write(tmp_path, lines(200, longest=40)))
    summary = train(config, tmp_path / "run", lambda _: None)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0.5 * last["tokens"] < last["loss_tokens"] < 0.9 * last["tokens"]
    assert (summary["tokens"], summary["loss_tokens"]) == (last["tokens"], last["loss_tokens"])
    assert summary["prepared"]["splits"]["train"]["documents"] == 180
    eval_model = open_eval_model(str(tmp_path / "run"))
    data = prepared_data(
        cache_dir("data") / summary["data"], "held_out", eval_model.weights.config, 2
    )
    score = perplexity(eval_model.model("float32"), data.batches)
    assert_close(score.nll / score.tokens, summary["eval_loss"], "float32", "forward")
    exported = load_tokenizer(summary["export"]).chat_template
    assert exported is not None
    assert exported == eval_model.tokenizer().chat_template
    assert EOS in open_weights(summary["export"]).config.eos_token_ids
