"""Sources of text: all file formats, and errors that name the file and the place."""

import gzip
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from sat_jax.data.sources import (
    EMPTY,
    Document,
    Source,
    package_path,
    read_documents,
    resolve_sources,
)
from sat_jax.errors import UserError
from tests.user_errors import user_error


def read(*sources: str | Path, field: str = "text") -> list[Document]:
    resolved = resolve_sources([str(source) for source in sources])
    return [document for source in resolved for document in read_documents(source, field)]


def texts(*sources: str | Path, field: str = "text") -> list[str]:
    return [document.text for document in read(*sources, field=field)]


def error(*sources: str | Path, field: str = "text") -> str:
    return user_error(lambda: read(*sources, field=field))


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if suffix == ".zst" else data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_json_lines_with_and_without_compression(tmp_path: Path, suffix: str) -> None:
    text = "\ufeffline\r\nünïcode 日本\n"
    (tmp_path / f"a.md{suffix}").write_bytes(compressed(text.encode(), suffix))
    lines = b'{"text": "one\\nline", "id": 1}\n\n{"text": "zwei"}'
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compressed(lines, suffix))
    a, b, c = read(tmp_path)
    assert a == Document("line\r\nünïcode 日本\n", str(tmp_path / f"a.md{suffix}"))
    assert (b.text, c.text) == ("one\nline", "zwei")
    assert c.origin == f"{tmp_path / f'b.jsonl{suffix}'}, line 3 (byte 32)"


def test_several_large_zstandard_frames(tmp_path: Path) -> None:
    # Larger than a chunk and compressible, so that one input chunk gives many output chunks.
    parts = ["x" * 3_000_000 + "é", "second"]
    data = b"".join(compressed(part.encode(), ".zst") for part in parts)
    (tmp_path / "a.txt.zst").write_bytes(data)
    assert texts(tmp_path / "a.txt.zst") == ["".join(parts)]


def test_folders_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/c.rst", ".hidden.txt", ".git/x.txt", "image.png", "x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/c.rst", "a/z.py", "b.txt"]
    assert texts(f"{tmp_path}/**/*.py") == ["a/z.py"]
    assert texts(f"{tmp_path}/*.p?g") == ["image.png"]  # a glob accepts any suffix
    # A file that is named twice is read once, at its first position.
    assert texts(tmp_path / "b.txt", tmp_path) == ["b.txt", "a/c.rst", "a/z.py"]
    one_string = resolve_sources(f"{tmp_path}/b.txt, {tmp_path}/a")
    assert [source.path.name for source in one_string] == ["b.txt", "c.rst", "z.py"]


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for name in ("in/a.txt", "in/b.json", "in/sub/c.csv", "in/.d.txt", "elsewhere/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(elsewhere / "e.txt")
    os.mkfifo(folder / "pipe.txt")

    def read_with_log(source: str) -> tuple[list[str], list[str]]:
        lines: list[str] = []
        return [s.path.name for s in resolve_sources([source], lines.append)], lines

    to_read = "; to read one of these, name it"
    assert read_with_log(str(folder)) == (
        ["a.txt", "file.txt"],
        [
            f"{folder}: reads 2 files; leaves out .csv: 1 (c.csv), .json: 1 (b.json), hidden: 1"
            f" (.d.txt), links to folders: 1 (linked), not regular files: 1 (pipe.txt){to_read}"
        ],
    )
    assert read_with_log(f"{folder}/*")[1] == [
        f"{folder}/*: reads 3 files; leaves out folders: 2 (linked, ...), not regular files: 1"
        f" (pipe.txt){to_read}"
    ]
    assert read_with_log(f"{folder}/sub/**") == (["c.csv"], [])
    assert read_with_log(str(elsewhere)) == (["e.txt"], [])
    (elsewhere / "e.txt").unlink()
    (elsewhere / "e.json").write_text("{}")
    assert error(elsewhere).endswith("; left out: .json: 1 (e.json)")


def test_a_pipe_is_refused_as_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        assert error(path).startswith(f"{path}: not a file or folder but a pipe or device,")


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_tables_are_read_by_column(tmp_path: Path, suffix: str, delimiter: str) -> None:
    long = "x" * 200_000
    rows = [("id", "text"), ("1", "one, é"), ("2", 'two\r\n""lines""'), ("", long), ("3", " ")]
    content = "\ufeff" + "\r\n".join(f'{a}{delimiter}"{b}"' for a, b in rows) + "\n\n"
    file = tmp_path / f"a{suffix}"
    file.write_bytes(compressed(content.encode(), file.suffix))
    documents = read(file)
    assert [document.text for document in documents] == ["one, é", 'two\r\n"lines"', long, ""]
    assert documents[0].origin == f"{file}, line 2"
    assert [document.unused_fields for document in documents] == [("id",), ("id",), (), ()]
    assert error(file, field="body") == f"{file}, line 2: no field 'body' (it has id, text)"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("text,id\na,1\nb\n", ", line 3: 1 values, but 2 columns in the first line"),
        ("text,id\na,b,1\n", ", line 2: 3 values, but 2 columns in the first line"),
        ("text,text\na,b\n", ", line 1: two columns have the same name"),
        ('text\n"a\n', ", line 2: invalid CSV: unexpected end of data"),
        ('text\n"a"b\n', ", line 2: invalid CSV: ',' expected after '\"'"),
        ("text\n\xff", ", line 2: not UTF-8 at byte 5 (0xff)"),
        ("text\n", ": contains no text"),
        ("", ": contains no text"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(content, encoding="latin-1")
    assert error(file).startswith(f"{file}{problem}")


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sat_jax_test_package"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "sub" / "a.py").write_text("a = 1")
    (package / "notes.md").write_text("notes")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert len(texts("package:sat_jax_test_package")) == 3
    assert texts("package:sat_jax_test_package/sub") == ["a = 1"]
    assert texts("package:sat_jax_test_package/notes.md") == ["notes"]
    assert texts("package:sat_jax_test_package/**/a.py") == ["a = 1"]
    assert package_path("package:sat_jax_test_package/sub/a.py") == package / "sub" / "a.py"
    assert "sat_jax_test_package" not in sys.modules
    assert "no package 'sat_jax_no_such'" in error("package:sat_jax_no_such/a")
    assert "no package" in error("package:os.path")
    assert "single module" in error("package:contextlib")
    assert "no such file" in error("package:sat_jax_test_package/none")


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in error(tmp_path / "none")
    assert error(f"{tmp_path}/*.txt").endswith("no documents: no file matches")
    assert "no documents: no file has one of the suffixes" in error(tmp_path)
    with pytest.raises(UserError, match="no sources; accepted: a file"):
        resolve_sources(" , ")
    unreadable = tmp_path / "loop.txt"
    unreadable.symlink_to(unreadable)
    assert "loop.txt" in error(unreadable)


@pytest.mark.parametrize("content", ["", "  \n\t"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_an_error_only_if_it_is_named(
    tmp_path: Path, content: str, name: str
) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "b.txt").write_text("b")
    assert [text for text in texts(tmp_path) if text] == ["b"]
    assert error(tmp_path / name) == f"{tmp_path / name}: contains no text"


def test_empty_and_null_fields_are_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": "b"}\n{"text": null}')
    documents = read(tmp_path / "a.jsonl")
    assert [(d.text, d.skip_reason) for d in documents] == [("", EMPTY), ("b", ""), ("", EMPTY)]


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    lines = [
        '{"text": "a", "id": 0, "tags": [], "url": "", "date": null}',
        '{"x": [1], "text": "b"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [d.unused_fields for d in read(tmp_path / "a.jsonl")] == [("id",), ("x",)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_invalid_utf8_names_the_byte(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compressed("é ok ".encode() + b"\xff", suffix))
    assert error(file).startswith(f"{file}: not UTF-8 at byte 6 (0xff)")
    file = tmp_path / f"a.jsonl{suffix}"
    first = '{"text": "é"}\n'.encode()
    file.write_bytes(compressed(first + b'{"text": "\xc3"}', suffix))
    assert error(file).startswith(f"{file}, line 2: not UTF-8 at byte {len(first) + 10} (0xc3)")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not at all"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_compression_names_the_place(
    tmp_path: Path, suffix: str, damage: str, name: str
) -> None:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": rng.bytes(40).hex()}) for _ in range(6_000)]
    data = bytearray(compressed("\n".join(lines).encode(), suffix))
    if damage == "truncated":
        del data[-len(data) // 3 :]
    elif damage == "flipped":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    else:
        data = bytearray(b"plain text, and more of it than a header")
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(data)
    message = error(file)
    assert message.startswith(f"{file}: invalid {suffix[1:]} after byte ")
    place = int(message.split("after byte ")[1].split()[0])
    assert place == 0 if damage == "not at all" else name == "a.txt" or place > 100_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON at character 12"),
        (
            "{",
            "accepted: one JSON object per line, not an array and not an object over several lines",
        ),
        ("[1]", "an array, not an object; accepted: one JSON object per line"),
        ('{"id": 1, "body": "b"}', "no field 'text' (it has id, body)"),
        ("{}", "no field 'text' (it has no fields)"),
        ('{"text": 1.5}', "field 'text' is a number, not a string"),
        ('{"text": true}', "field 'text' is a boolean, not a string"),
        ('{"text": ["a"]}', "field 'text' is an array, not a string"),
        ('{"text": "a\\ud800"}', "lone surrogate at character 1"),
        ("[" * 100_000, "JSON that cannot be read"),
        ("1" * 5_000, "JSON that cannot be read"),
    ],
)
def test_a_bad_line_names_its_number_and_byte(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    good = '{"text": "ü"}\n'
    file.write_text(good + line)
    message = error(file)
    assert message.startswith(f"{file}, line 2 (byte {len(good.encode())}): ")
    assert reason in message


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"body": "b", "text": "t"}\n')
    assert texts(tmp_path / "a.json", field="body") == ["b"]


def test_the_content_hash_depends_on_content_and_kind(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    a, b, c = (source.content_hash() for source in resolve_sources(str(tmp_path)))
    assert a == b != c  # the same bytes, but another kind
    (tmp_path / "a.txt").write_text("other")
    assert resolve_sources(str(tmp_path / "a.txt"))[0].content_hash() != a


class SatJaxTestTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "n": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, object]:
        del dl_manager
        return {"train": self._generate_examples("t"), "test": self._generate_examples("e")}

    def _generate_examples(self, letter: str):  # type: ignore[no-untyped-def]
        for index in range(3):
            yield index, {"text": f"{letter}{index} é" if index else "", "n": index}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    builder = SatJaxTestTexts(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_a_prepared_tfds_dataset(dataset: Path) -> None:
    assert sorted(texts(f"tfds:{dataset}")) == ["", "t1 é", "t2 é"]
    assert sorted(texts(f"tfds:{dataset}:test")) == ["", "e1 é", "e2 é"]
    assert {d.unused_fields for d in read(f"tfds:{dataset}") if d.text} == {("n",)}
    train, test = resolve_sources([f"tfds:{dataset}", f"tfds:{dataset}:test"])
    assert train.content_hash() != test.content_hash()
    assert "TFDS cannot open it: Unknown split 'dev'" in error(f"tfds:{dataset}:dev")
    assert "no field 'body' (it has n, text)" in error(f"tfds:{dataset}", field="body")
    assert "field 'n' is not text" in error(f"tfds:{dataset}", field="n")
    assert "no prepared dataset" in error(f"tfds:{dataset.parent}")


def test_a_damaged_tfds_dataset(dataset: Path, tmp_path: Path) -> None:
    for file in dataset.iterdir():
        data = file.read_bytes()
        if "train.array_record" in file.name:
            data = data[: len(data) // 2] + os.urandom(64) + data[len(data) // 2 + 64 :]
            data = bytes(64) + data[64:]
        (tmp_path / file.name).write_bytes(data)
    assert str(tmp_path) in error(f"tfds:{tmp_path}")
    (tmp_path / "dataset_info.json").write_text("{")
    assert "TFDS cannot open it" in error(f"tfds:{tmp_path}")


def test_another_tfds_file_format_is_refused(dataset: Path, tmp_path: Path) -> None:
    for file in dataset.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert "array_record" in error(f"tfds:{tmp_path}")


def test_a_source_as_text() -> None:
    assert str(Source(Path("a"), "text", named=True)) == "a"
    assert str(Source(Path("a"), "tfds", named=True, split="test")) == "a:test"
