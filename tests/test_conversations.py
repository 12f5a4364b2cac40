"""Examples, prepared: exact tokens and masks, one segment each, never cut; every key matters."""

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
from sat_jax.data.batches import BLANK, Row, batches, in_order, open_split, unpack
from sat_jax.data.form import Form
from sat_jax.data.prepare import Prepared, prepare
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate import subject as subject_module
from sat_jax.evaluate.perplexity import perplexity, prepared_data
from sat_jax.evaluate.subject import open_subject
from sat_jax.interop import open_weights
from sat_jax.results.record import dense_baseline
from sat_jax.results.rows import read
from sat_jax.train.loop import Run, train
from sat_jax.train.metrics import read_metrics
from sat_jax.train.setup import controller_of, set_up
from sat_jax.train.summary import Clock
from sat_jax.train.trained import starting_point
from sat_jax.train.workdir import WorkDir
from scripts import evaluate
from scripts import prepare_data as script
from tests.conftest import ROOT
from tests.small_models import CONFIGS
from tests.tolerances import assert_close

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


def made(file: Path, form: Form | None = None, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {"row_length": 64, "held_out": 0.2, "root": file.parent / "made"}
    form = form or Form("prompt_completion", chat_template="plain")
    return prepare(sources=str(file), tokenizer=BYTES, form=form, **(settings | changes))


def segments(prepared: Prepared, split: str) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of every segment, and which of them are learnt."""
    for batch in in_order(open_split(prepared, split), 3):
        assert not batch.loss_mask[batch.segment_ids == 0].any()
        for tokens, targets, numbers, positions, mask in zip(*batch, strict=True):
            for number in range(1, numbers.max() + 1):
                inside = numbers == number
                assert positions[inside].tolist() == list(range(inside.sum()))
                yield [tokens[inside][0], *targets[inside]], [False, *mask[inside]]


def everything(prepared: Prepared) -> list[tuple[list[int], list[bool]]]:
    return [one for split in prepared.info.splits for one in segments(prepared, split)]


def shown(ids: list[int], mask: list[bool]) -> str:
    """The text, "<" where something learnt begins and "/" for the eos."""
    text = b""
    for token, on, before in zip(ids, mask, [False, *mask[:-1]], strict=True):
        text += b"<" if on and not before else b""
        text += b"/" if token == EOS else bytes([token])
    return text.decode(errors="replace")


def reason(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokens_and_mask_of_an_example(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", " c\n")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = write(tmp_path, [messages, {"messages": [*messages["messages"][:1], *_answer("x")]}])
    prepared = made(file, Form("messages", chat_template="plain"))
    assert sorted(shown(*one) for one in everything(prepared)) == ["q\n<ab/r\n< c\n/", "q\n<x/"]
    long = next(one for one in everything(prepared) if len(one[0]) > 9)
    assert long[0] == [113, 10, 97, 98, 256, 114, 10, 32, 99, 10, 256]
    assert np.flatnonzero(long[1]).tolist() == [2, 3, 4, 7, 8, 9, 10]
    splits = prepared.info.splits.values()
    assert sum(split.targets for split in splits) == 9
    assert sum(split.tokens for split in splits) == 15
    assert sum(split.text_bytes for split in splits) == 6  # "ab", " c\n" and "x"


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_examples_are_packed_whole(tmp_path: Path) -> None:
    examples = lines(80)
    prepared = made(write(tmp_path, examples))
    expected = [f"{line['prompt']}\n<{line['completion']}/" for line in examples]
    assert sorted(shown(*one) for one in everything(prepared)) == sorted(expected)
    assert prepared.info.documents == 80
    for split, info in prepared.info.splits.items():
        found = list(segments(prepared, split))
        assert (info.documents, info.long_documents) == (len(found), 0)
        assert info.targets == sum(sum(mask) for _, mask in found)
        assert info.tokens == sum(len(ids) for ids, _ in found)
        assert info.useful_share == pytest.approx((info.tokens - len(found)) / (info.rows * 64))
        assert info.text_bytes == info.targets - len(found)  # without the eos of each
        assert info.rows < len(found)  # they share rows
    lines_of_log: list[str] = []
    made(tmp_path / "x.jsonl", log=lines_of_log.append)
    assert lines_of_log[0].startswith("data: 64 train examples, loss on ")
    assert lines_of_log[0].endswith("; none left out")


def test_batches_of_a_step_depend_on_the_step_alone(tmp_path: Path) -> None:
    prepared = made(write(tmp_path, lines(80)))
    run, again = (batches(open_split(prepared, "train"), 4, seed=1) for _ in range(2))
    first = [run(step) for step in range(4)]
    for step in (3, 0, 2):
        assert all(map(np.array_equal, again(step), first[step]))


def test_the_same_conversation_has_the_same_key_in_every_form(tmp_path: Path) -> None:
    examples = lines(40)
    others: dict[str, list[Any]] = {
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
    held_out = sorted(segments(made(write(tmp_path, examples)), "held_out"))
    assert len(held_out) == 8
    for name, written in others.items():
        form = Form(name, chat_template="plain")  # type: ignore[arg-type]
        prepared = made(write(tmp_path / name, written), form)
        assert sorted(segments(prepared, "held_out")) == held_out


@pytest.mark.parametrize(("too_long", "documents"), [("drop", 9), ("cut_end", 11)])
def test_longer_than_a_row(tmp_path: Path, too_long: Any, documents: int) -> None:
    # 12 bytes fit with the prompt, the newline and the eos: 16 tokens make 15 pairs.
    examples = [{"prompt": "p", "completion": f"{n:013}"} for n in range(9)]
    over = [{"prompt": "p", "completion": "x" * size} for size in (14, 40)]
    no_room = [{"prompt": "p" * 30, "completion": "y"}]
    file = write(tmp_path, [*examples, *over, *no_room])
    form = Form("prompt_completion", chat_template="plain", too_long=too_long)
    lines_of_log: list[str] = []
    prepared = made(file, form, row_length=15, log=lines_of_log.append)
    found = sorted(shown(*one) for one in everything(prepared))
    whole = sorted(f"p\n<{n:013}/" for n in range(9))
    assert found == whole + ["p\n<" + "x" * 14] * (documents - 9)
    splits = prepared.info.splits.values()
    assert sum(split.documents for split in splits) == documents
    assert sum(split.long_documents for split in splits) == 3
    assert sum(split.text_bytes for split in splits) == 9 * 13 + 14 * (documents - 9)
    # Of those that are cut, one has no room for an answer.
    done = {"drop": "dropped", "cut_end": "cut short, or dropped where no answer is left"}
    assert lines_of_log[0].endswith(f"not as they were: 3 longer than a row ({done[too_long]})")
    refused = Form("prompt_completion", chat_template="plain", too_long="refuse")
    message = reason(lambda: made(file, refused, row_length=15))
    assert message.startswith(f"{file}, line 10 (byte ")
    assert "17 tokens, but a row of data.row_length 15 holds 16" in message
    assert "all 12 examples are longer" in reason(lambda: made(file, row_length=2))


def test_a_cap_takes_whole_examples(tmp_path: Path) -> None:
    file = write(tmp_path, lines(200))
    full = {tuple(ids) for ids, _ in everything(made(file))}
    capped = made(file, max_tokens=1000)
    assert {tuple(ids) for ids, _ in everything(capped)} < full
    tokens = [split.tokens for split in capped.info.splits.values()]
    assert 900 < sum(tokens) <= 1000 and tokens[0] <= 800
    assert "no example of the train split fits" in reason(lambda: made(file, max_tokens=10))


def test_left_out_and_too_few(tmp_path: Path) -> None:
    file = write(tmp_path, [*lines(20), {"prompt": "q", "completion": " "}])
    prepared = made(file)
    assert (prepared.info.documents, prepared.info.left_out) == (20, {"without an answer": 1})
    one = write(tmp_path / "one", lines(1))  # whole, so that no end of it is held out
    assert reason(lambda: made(one)).endswith("leaves none of 1 documents to train on")


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
        ({"too_long": "cut_end", "row_length": 20}, "q0\n<a/r\n<" + "b" * 14),
    ],
)
def test_every_key_of_a_form_changes_the_rows(
    tmp_path: Path, changes: dict[str, Any], first: str | None
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}A:{% else %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    values = {"chat_template": "plain", "format": "messages"} | changes
    values["chat_template"] = values["chat_template"].format(path=path)
    data = from_config_dict({"data": values}).data
    file = write(tmp_path, CHATS)
    prepared = made(
        file, Form.of(data), row_length=data.row_length if changes.get("row_length") else 128
    )
    found = sorted(shown(*one) for one in everything(prepared))
    assert len(found) == 8
    assert first is None or found[0] == first
    if changes:
        plain = made(file, Form("messages", chat_template="plain"), row_length=128)
        assert prepared.info.fingerprint != plain.info.fingerprint


def test_the_config_refuses_what_says_nothing() -> None:
    with pytest.raises(UserError, match=r"data\.completion_field 'a' says nothing to data\.format"):
        from_config_dict({"data": {"completion_field": "a"}})
    with pytest.raises(UserError, match=r"data\.prompt_field 'a' says nothing to"):
        from_config_dict({"data": {"prompt_field": "a", "format": "alpaca"}})


def test_rows_of_text_pay_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    text = made(tmp_path / "a.txt", Form())
    assert set(open_split(text, "train")._source[0]) == {"tokens", "lengths"}
    examples = made(write(tmp_path, lines(20)))
    assert set(open_split(examples, "train")._source[0]) == {"tokens", "lengths", "answers"}


def test_unpacking_answers() -> None:
    row = Row(np.arange(9, dtype=np.int32), np.array([3, 4]), np.array([1, 3, 3, 4, 6, 7]))
    batch = unpack([row, BLANK], 8)
    assert batch.targets[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 0]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 1, 0], [0] * 8]


def test_evaluation_counts_answers(tmp_path: Path) -> None:
    prepared = made(write(tmp_path, lines(40)))
    wide = replace(CONFIGS["mha"], vocab_size=257, max_positions=64)
    data = prepared_data(prepared.path, "held_out", wide, 2)
    info = prepared.info.splits["held_out"]
    assert data.tokens == info.targets == sum(int(b.loss_mask.sum()) for b in data.batches)
    assert data.text_bytes == info.text_bytes


def test_the_script_has_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [{"q": f"{n}", "a": "x"} for n in range(9)]
    file = write(tmp_path, [*examples, {"q": "none", "a": ""}])
    options = ["--format", "prompt_completion", "--prompt-field", "q", "--completion-field", "a"]
    options += ["--chat-template", "plain", "--system", "S", "--tokenizer", "bytes"]
    given = ["prepare_data", "--sources", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*given, *options])
    script.main()
    out = capsys.readouterr().out
    assert out.startswith("data: ")
    assert out.endswith("1 files, 9 examples; left out: 1 without an answer\n")
    monkeypatch.setattr("sys.argv", [*given, "--tokenizer", "bytes", "--system", "S"])
    assert "data.system 'S' says nothing to data.format 'text'" in reason(script.main)


@pytest.mark.parametrize("system", ["Be brief.", None])
def test_a_run_is_asked_with_the_tokens_that_it_was_trained_on(
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
    monkeypatch.setattr(subject_module, "is_run", lambda _: True)
    monkeypatch.setattr(subject_module, "open_run", lambda _: trained)

    def prompts(*more: str) -> list[list[int]]:
        out = tmp_path / "out.jsonl"
        fields = ("--question-field", "prompt", "--answer-field", "completion", "--extract", "text")
        line = ["evaluate", "--model", "x", "--answers", str(file), *fields, "--chat", *more]
        generated = ("--max-new-tokens", "1", "--generations", str(out))
        generated += ("--record", str(tmp_path / "rows.jsonl"))
        monkeypatch.setattr("sys.argv", [*line, *generated])
        evaluate.main()
        texts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
        return sorted(BYTES.encode_batch(texts))

    for option in ((), ("--system", "Be long."), ("--system", "")):
        form = replace(Form.of(data), system=option[1] or None) if option else Form.of(data)
        rows = everything(made(file, form, row_length=128))
        assert prompts(*option) == sorted(ids[: mask.index(True)] for ids, mask in rows)
    row, *_ = recorded = read(tmp_path / "rows.jsonl")
    assert len(recorded) == 3 and str(tmp_path) not in json.dumps(recorded)
    assert (row["measure"], row["model"], row["data"]) == ("answers", "x", "x.jsonl")
    assert {"accuracy", "stderr", "versions", "device", "commit", "date"} <= row.keys()
    assert (row["run"]["seed"], row["run"]["twin"]) == (3, dense_baseline(trained[1]))
    assert row["run"]["settings"]["data.format"] == "prompt_completion"


def answering(file: Path) -> Config:
    """A run on examples whose answers use all channels."""
    settings = {
        "data.sources": file,
        "data.format": "prompt_completion",
        "data.row_length": 128,
        "data.chat_template": "zephyr",
        "data.held_out": 0.1,
        "train.steps": 6,
        "sparsity.dense_tokens": True,
    }
    return load(str(ROOT / "experiments/tiny.py"), [f"{k}={v}" for k, v in settings.items()])


def test_a_dense_token_without_a_slot_is_an_error(tmp_path: Path) -> None:
    config = answering(write(tmp_path, lines(150, longest=40)))
    info = set_up(config, print).data.path / "info.json"
    content = json.loads(info.read_text())
    assert content["splits"]["train"]["row_targets"] > 64
    content["splits"]["train"]["row_targets"] = 1  # slots are whole sixty-fours
    info.write_text(json.dumps(content))
    task, workdir = set_up(config, print), WorkDir(tmp_path / "run")
    with (
        Run(task, workdir, Clock(), print) as run,
        pytest.raises(UserError, match="a row has more tokens that bear loss than the 64 its"),
    ):
        list(run._batches(0))


@pytest.mark.slow
def test_a_run_learns_the_answers(tmp_path: Path) -> None:
    config = answering(write(tmp_path, lines(200, longest=40)))
    summary = train(config, tmp_path / "run", lambda _: None)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 0.5 * last["tokens"] < last["loss_tokens"] < 0.9 * last["tokens"]
    assert (summary["tokens"], summary["loss_tokens"]) == (last["tokens"], last["loss_tokens"])
    assert summary["kept"] == controller_of(config, starting_point(config)[0]).kept
    assert summary["prepared"]["splits"]["train"]["documents"] == 180
    subject = open_subject(str(tmp_path / "run"))
    data = prepared_data(cache_dir("data") / summary["data"], "held_out", subject.weights.config, 2)
    score = perplexity(subject.model("float32"), data.batches)
    assert_close(score.nll / score.tokens, summary["eval_loss"], "float32", "forward")
    exported = load_tokenizer(summary["export"]).chat_template
    assert exported is not None
    assert exported == subject.tokenizer().chat_template
    assert EOS in open_weights(summary["export"]).config.eos_token_ids
