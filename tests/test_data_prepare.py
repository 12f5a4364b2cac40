"""Data preparation: complete or absent, deterministic, and done once."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_jax.data import corpus
from sat_jax.data import prepare as prepare_module
from sat_jax.data.batches import in_order, open_split
from sat_jax.data.data_format import DataFormat
from sat_jax.data.prepare import Prepared, load_prepared, prepare
from sat_jax.data.splits import split_budget
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import ROOT
from tests.user_errors import user_error

BYTES = load_tokenizer("bytes")
EOS = 256


def write(folder: Path, documents: list[str], name: str = "a.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in documents]
    (folder / name).write_text("\n".join(lines))
    return folder


def random_texts(count: int, length: int = 30) -> list[str]:
    rng = np.random.default_rng(count)
    letters = [rng.choice(list("abc é"), int(rng.integers(1, length))) for _ in range(count)]
    return [f"{number} {''.join(text)}" for number, text in enumerate(letters)]


def data_of(folder: Path, **changes: object) -> Prepared:
    settings = {
        "sources": str(folder),
        "tokenizer": BYTES,
        "row_length": 16,
        "held_out": 0.2,
        "root": folder.parent / "prepared",
    }
    return prepare(**(settings | changes))  # type: ignore[arg-type]


def documents_in(prepared: Prepared, split: str) -> list[str]:
    """Return the documents of a split whose documents are not longer than a row.

    A document that was truncated by `max_tokens` has no eos.
    """
    documents = []
    for batch in in_order(open_split(prepared, split), 4):
        for tokens, targets, segments, _, mask in zip(*batch, strict=True):
            for segment in range(1, segments.max() + 1):
                inside = (segments == segment) & mask
                ids = [*tokens[inside], targets[inside][-1]]
                text = bytes(ids[: -1 if ids[-1] == EOS else None])
                documents.append(text.decode(errors="ignore"))
    return documents


def test_every_document_is_in_one_split(tmp_path: Path) -> None:
    documents = random_texts(60)
    with_empty = [text for pair in zip(documents, [" ", ""] * 30, strict=True) for text in pair]
    prepared = data_of(write(tmp_path / "in", with_empty), row_length=80)
    assert (prepared.info.documents, prepared.info.left_out) == (60, {"empty": 60})
    train, held_out = (documents_in(prepared, split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(documents)
    assert len(held_out) == 12
    for split, texts in (("train", train), ("held_out", held_out)):
        info = prepared.info.splits[split]
        size = sum(len(text.encode()) for text in texts)
        assert (info.documents, info.text_bytes) == (len(texts), size)
        assert (info.tokens, info.targets) == (size + len(texts), size)
        assert info.rows == len(open_split(prepared, split))
        assert info.useful_share == pytest.approx(size / (info.rows * 80))
        assert info.long_documents == 0
    assert load_prepared(prepared.path) == prepared
    info = json.loads((prepared.path / "info.json").read_text())
    for split in info["splits"].values():
        split["row_targets"] = 80  # as earlier versions wrote it
    (prepared.path / "info.json").write_text(json.dumps(info))
    assert load_prepared(prepared.path) == prepared


def test_long_documents_are_counted_and_keep_all_targets(tmp_path: Path) -> None:
    documents = ["x" * 16, "y" * 17, "z" * 40, "short", "long enough to be split in two"]
    prepared = data_of(write(tmp_path / "in", documents), held_out=1)
    splits = prepared.info.splits.values()
    assert sum(split.long_documents for split in splits) == 3
    targets = [
        int(batch.loss_mask.sum())
        for split in prepared.info.splits
        for batch in in_order(open_split(prepared, split), 2)
    ]
    assert sum(targets) == sum(len(text) for text in documents)


def test_the_split_depends_only_on_the_content(tmp_path: Path) -> None:
    documents = random_texts(40)
    first = data_of(write(tmp_path / "a", documents), row_length=80)
    shuffled = [documents[i] for i in np.random.default_rng(0).permutation(40)]
    folder = write(tmp_path / "b", shuffled[:11], "z.jsonl")
    other = data_of(write(folder, shuffled[11:], "y.jsonl"), row_length=80)
    for split in ("train", "held_out"):
        assert sorted(documents_in(first, split)) == sorted(documents_in(other, split))
    assert first.info.fingerprint != other.info.fingerprint  # the rows may differ
    # All copies of a held-out document are held out.
    copied = data_of(write(tmp_path / "c", documents * 3), row_length=80)
    assert sorted(documents_in(copied, "held_out")) == sorted(documents_in(first, "held_out") * 3)


def test_held_out_by_count_and_its_limits(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", random_texts(10))
    assert data_of(folder, held_out=3).info.splits["held_out"].documents == 3
    assert data_of(folder, held_out=1e-9).info.splits["held_out"].documents == 1
    assert data_of(folder, held_out=9).info.splits["train"].documents == 1
    for value in (10, 0.99):
        assert "leaves none of 10 documents" in user_error(
            lambda v=value: data_of(folder, held_out=v)
        )
    for value in (0, -0.1, 1.5, float("nan"), float("inf")):
        assert f"held-out {value};" in user_error(lambda v=value: data_of(folder, held_out=v))
    same = write(tmp_path / "same", ["same"] * 5)
    assert "all documents are copies of one text" in user_error(lambda: data_of(same))


def test_max_tokens_selects_from_all_sources_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_texts(2000)
    for part in range(4):
        write(tmp_path / "in", documents[part::4], f"{part}.jsonl")
    full = data_of(tmp_path / "in", row_length=80)
    original, tokenized = Tokenizer.encode_documents, []

    def counted(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        tokenized.append(sum(len(text.encode()) for text in texts))
        return original(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_documents", counted)
    capped = data_of(tmp_path / "in", row_length=80, max_tokens=3000)
    size = {name: split.tokens for name, split in capped.info.splits.items()}
    assert size == {"train": 2400, "held_out": 600}
    assert sum(tokenized) < 6 * 3000 < full.info.splits["train"].text_bytes
    for split, info in capped.info.splits.items():
        texts = documents_in(capped, split)
        all_texts = set(documents_in(full, split))
        (cut,) = [text for text in texts if text not in all_texts] or [""]
        assert any(text.startswith(cut) for text in all_texts)
        assert {int(text.split()[0]) % 4 for text in texts if text != cut} == {0, 1, 2, 3}
        assert len(texts) == info.documents
        # Bytes that were cut off do not count; at most one character was cut in the middle.
        assert 0 <= info.text_bytes - sum(len(text.encode()) for text in texts) <= 3


def test_max_tokens_does_not_depend_on_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "in", random_texts(300))
    expected = data_of(folder, max_tokens=1500)
    monkeypatch.setattr(corpus, "_BYTES_PER_TOKEN", 0.01)  # many rounds
    monkeypatch.setattr(corpus, "_BATCH", 50)
    again = data_of(folder, max_tokens=1500, root=tmp_path / "other")
    assert again.info == expected.info
    for split in ("train", "held_out"):
        assert rows_of(again, split) == rows_of(expected, split)


def test_max_tokens_above_the_corpus_size_has_no_effect(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", random_texts(50))
    assert data_of(folder, max_tokens=10**6).info.splits == data_of(folder).info.splits


def test_max_tokens_below_one_document(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", ["x" * 100, "y" * 100])
    splits = data_of(folder, max_tokens=9).info.splits.values()
    assert sorted(split.tokens for split in splits) == [4, 5]
    assert "max tokens 3" in user_error(lambda: data_of(folder, max_tokens=3))
    assert "row length 1;" in user_error(lambda: data_of(folder, row_length=1))


@pytest.mark.parametrize(
    ("max_tokens", "cut"), [(None, (84, 84, 105)), (50, (40, 84, 94)), (10**6, (84, 84, 105))]
)
def test_the_end_of_a_single_document_is_held_out(
    tmp_path: Path, max_tokens: int | None, cut: tuple[int, int, int]
) -> None:
    text = "".join(map(str, range(100)))[:104]  # 105 tokens with the eos
    (tmp_path / "one.txt").write_text(text)
    lines: list[str] = []
    prepared = data_of(
        tmp_path / "one.txt", row_length=128, max_tokens=max_tokens, log=lines.append
    )
    train_end, start, end = cut
    (trained,), (held_out,) = (documents_in(prepared, name) for name in ("train", "held_out"))
    assert (trained, held_out) == (text[:train_end], text[start:end])
    splits = prepared.info.splits
    assert splits["train"].text_bytes == len(trained)
    assert splits["held_out"].text_bytes == len(held_out)
    assert prepared.info.documents == 1
    assert lines[0] == f"data: one document; its last 20.0% ({end - start} tokens) are held out"


def rows_of(prepared: Prepared, split: str) -> list[bytes]:
    rows = open_split(prepared, split)
    return [b"".join(array.tobytes() for array in rows.batch([row])) for row in range(len(rows))]


def test_the_same_input_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    lines: list[str] = []
    first = data_of(folder, log=lines.append)
    monkeypatch.setattr(prepare_module, "read_index", None)  # the sources are not read again
    assert data_of(folder, log=lines.append) == first
    assert len(lines) == 2
    assert lines[0].startswith("data: prepared, ")
    assert lines[1] == lines[0].replace("data: prepared", "data: already prepared")
    (tmp_path / "moved").mkdir()
    (folder / "a.jsonl").rename(tmp_path / "moved" / "b.jsonl")
    assert data_of(tmp_path / "moved", sources=str(tmp_path / "moved")) == first


def test_every_setting_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": text, "body": text}) for text in random_texts(30)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    small = load_tokenizer("bytes", model_vocab_size=256)
    changes: list[dict[str, object]] = [
        *({}, {"row_length": 17}, {"held_out": 0.3}, {"max_tokens": 100}),
        *({"data_format": DataFormat(text_field="body")}, {"tokenizer": small}),
    ]
    names = {data_of(folder, **change).info.fingerprint for change in changes}
    assert len(names) == len(changes)


def test_content_is_hashed_once_and_changes_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    file, content = folder / "a.jsonl", (folder / "a.jsonl").read_text()
    os.utime(file, (1, 1))
    fingerprints = set()
    # A file that was just written may change with the same time stamp: its hash is not cached.
    for settled_seconds in (-1, 2):
        monkeypatch.setattr(prepare_module, "_SETTLED_SECONDS", settled_seconds)
        fingerprints.add(data_of(folder).info.fingerprint)
    monkeypatch.setattr(prepare_module, "_SETTLED_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.Source, "content_hash", None)
        assert data_of(folder).info.fingerprint in fingerprints
    # Changed with the same size and modification time, in place and by another file.
    file.write_text(content.replace("a", "A", 1))
    os.utime(file, (1, 1))
    fingerprints.add(data_of(folder).info.fingerprint)
    (folder / "other").write_text(content.replace("a", "B", 1))
    os.utime(folder / "other", (1, 1))
    (folder / "other").rename(file)
    fingerprints.add(data_of(folder).info.fingerprint)
    assert len(fingerprints) == 3


@pytest.mark.slow
def test_a_killed_preparation_is_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    code = f"""
import sys, time
from pathlib import Path
from sat_jax.data import prepare
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
write = prepare.write_tfds
def stop(*arguments, **more):
    write(*arguments, **more)
    print("written", flush=True)
    time.sleep(100)
prepare.write_tfds = stop
prepare.prepare(sources={str(folder)!r}, tokenizer=load_tokenizer("bytes"), row_length=16,
                held_out=0.2, root=Path({str(tmp_path / "prepared")!r}))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    names = [path.name for path in (tmp_path / "prepared").iterdir()]
    assert any(name.endswith(".unfinished") for name in names)
    lines: list[str] = []
    prepared = data_of(folder, log=lines.append)
    assert lines[0].startswith("data: prepared, ")
    assert len(documents_in(data_of(folder, row_length=80), "train")) == 24
    assert not list((tmp_path / "prepared").glob("*.unfinished"))
    assert prepared.path.name in {name.partition(".")[0] for name in names}


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    with (folder / "a.jsonl").open("a") as file:
        file.write("\n{")
    assert "line 31" in user_error(lambda: data_of(folder))
    assert [file.suffix for file in (tmp_path / "prepared").iterdir()] == [".lock"]


def test_two_processes_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    written: list[Path] = []
    started, go_on = threading.Event(), threading.Event()
    original = prepare_module._write

    def slow(folder: Path, *arguments: Any, **settings: Any) -> object:
        written.append(folder)
        started.set()
        assert go_on.wait(30)
        return original(folder, *arguments, **settings)

    def log(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            go_on.set()

    lines: list[str] = []
    monkeypatch.setattr(prepare_module, "_write", slow)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(data_of, folder)
        assert started.wait(30)
        second = threads.submit(data_of, folder, log=log)
        assert first.result() == second.result()
    assert len(written) == 1
    assert [line.split(",")[0].split(";")[0] for line in lines] == [
        "data: another process is preparing the same data",
        "data: already prepared",
    ]


def test_a_corpus_without_targets_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", ["", " "])
    (tmp_path / "in" / "a.txt").write_text("")
    assert "no document of the sources can be used: 3 empty" in user_error(
        lambda: data_of(tmp_path / "in")
    )
    (tmp_path / "in" / "b.txt").write_text("b")
    assert "no document of the train split has two" in user_error(lambda: data_of(tmp_path / "in"))
    assert "leaves none of 1 doc" in user_error(lambda: data_of(tmp_path / "in", held_out=1))
    (tmp_path / "in" / "c.txt").write_text("c")
    info = data_of(tmp_path / "in").info
    assert (info.documents, info.left_out, info.files) == (2, {"empty": 3}, 4)
    without_eos = load_tokenizer("bytes", model_vocab_size=256)
    message = user_error(lambda: data_of(tmp_path / "in", tokenizer=without_eos))
    assert "no document of the train split has two tokens" in message


@pytest.mark.parametrize("changed", [random_texts(29), [text.upper() for text in random_texts(30)]])
def test_a_source_that_changes_during_reading_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str]
) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    original = prepare_module.read_index

    def then_change(*arguments: object) -> object:
        index = original(*arguments)  # type: ignore[arg-type]
        write(folder, changed)
        return index

    monkeypatch.setattr(prepare_module, "read_index", then_change)
    assert user_error(lambda: data_of(folder)).endswith("a.jsonl: changed while it was being read")


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "in", random_texts(30))
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", "/proc/x", "~no_such_user/x"):
        monkeypatch.setenv("SAT_JAX_CACHE", str(cache))
        message = user_error(lambda: data_of(folder, root=None))
        assert message.startswith(f"cache folder {cache}: cannot be used: ")
        assert message.endswith("set $SAT_JAX_CACHE to another one")
    message = user_error(lambda: data_of(folder, root=tmp_path / "file"))
    assert message == f"{tmp_path / 'file'}: is a file, not a folder"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "fewer", "info"])
def test_damage_is_detected(tmp_path: Path, damage: str) -> None:
    prepared = data_of(write(tmp_path / "in", random_texts(400, 200)), row_length=64)
    (file,) = prepared.path.glob("**/*-train.array_record*")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[1000:1016] = bytes(byte ^ 255 for byte in data[1000:1016])
        file.write_bytes(data)
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        file.unlink()
    elif damage == "fewer":
        info = json.loads((prepared.path / "info.json").read_text())
        info["splits"]["train"]["rows"] += 1
        (prepared.path / "info.json").write_text(json.dumps(info))
    else:
        (prepared.path / "info.json").write_text("{}")

    def read_all() -> None:
        rows = open_split(load_prepared(prepared.path), "train")
        rows.batch(range(len(rows)))

    message = user_error(read_all)
    assert message.startswith(str(prepared.path)) and "delete" in message


def test_split_budget() -> None:
    assert split_budget(0.05, 1000) == {"train": 950, "held_out": 50}
    assert split_budget(0.05, 10) == {"train": 8, "held_out": 2}
