"""Sources of text, and the stream of documents they contain.

A source is a file, a folder, a glob, an installed Python package or a prepared TFDS dataset.
Everything is read as a stream, in a fixed order. Input that cannot be read raises a `UserError`
that names the file and the line or byte (counted after decompression).
"""

import csv
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn, cast

import tensorflow_datasets as tfds
import zstandard

from sat_jax.data.record import Record, json_type
from sat_jax.errors import UserError

# Suffixes that are read in a folder, each also followed by .gz or .zst. A file that is named or
# matched by a glob may have any suffix: it is text unless its suffix is in `_KINDS`.
TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".py", ".pyi", ".c", ".h"),
    *(".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".jl", ".lean", ".r"),
)
JSON_LINES = (".jsonl", ".ndjson")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_KINDS: Mapping[str, Literal["json_lines", "csv"]] = {
    **dict.fromkeys((*JSON_LINES, ".json"), "json_lines"),
    **dict.fromkeys(_DELIMITERS, "csv"),
}
COMPRESSED = (".gz", ".zst")
ACCEPTED = "a file, a folder, a glob, package:NAME[/path or glob], tfds:FOLDER[:split]"
_IRREGULAR = "not regular files"
EMPTY = "empty"  # reason for skipping a text; a key of `left_out` in info.json
CHUNK = 1 << 16  # bytes
_LINE_FORMAT = (
    "accepted: one JSON object per line, not an array and not an object over several lines"
)


class Document(NamedTuple):
    """A text and its location. The caller counts what is skipped or not used."""

    text: str  # "" for a document that is skipped
    origin: str
    skip_reason: str = ""
    unused_fields: tuple[str, ...] = ()  # names of fields with a value that are not read


@dataclass(frozen=True)
class Source:
    """One file of documents, or one split of a prepared TFDS dataset."""

    path: Path
    kind: Literal["text", "json_lines", "csv", "tfds"]
    named: bool  # given by its own name: an empty source is then an error
    split: str = ""  # of a TFDS dataset

    def __str__(self) -> str:
        return f"{self.path}:{self.split}" if self.split else str(self.path)

    def files(self) -> list[Path]:
        """Return the files that store it, sorted."""
        if self.kind != "tfds":
            return [self.path]
        return sorted(file for file in self.path.iterdir() if file.is_file())

    def content_hash(self) -> str:
        """Return the sha256 of the kind and the stored bytes, independent of the path."""
        digest = hashlib.sha256(f"{self.kind} {self.split}".encode())
        for file in self.files():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def counted(reasons: Mapping[str, int]) -> str:
    """Return the numbers of skipped documents with their reasons as text."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none"


def resolve_sources(
    sources: str | Sequence[str], log: Callable[[str], None] | None = None
) -> list[Source]:
    """Return the files that `sources` names, in order, sorted within each, without duplicates.

    `sources` is a list, or one string with commas between its parts. A part is a file, a folder
    (searched recursively for files with known suffixes, without hidden entries and links to
    folders), a glob (`**` for any depth), `package:NAME[/path or glob]`, or `tfds:FOLDER[:split]`
    (default split: `train`). `log` receives a line for each part of which something is left out.
    """
    parts = sources.split(",") if isinstance(sources, str) else sources
    resolved: dict[tuple[Path, str], Source] = {}
    for part in filter(None, (part.strip() for part in parts)):
        for source in _resolve(part, log):
            resolved.setdefault((source.path.resolve(), source.split), source)
    if not resolved:
        raise UserError(f"no sources; accepted: {ACCEPTED}, several separated by commas")
    return list(resolved.values())


def package_path(spec: str) -> Path:
    """Return the path of `package:NAME[/path]` without importing the package."""
    name, _, subpath = spec.removeprefix("package:").partition("/")
    # find_spec would import the parents of a dotted name; dotted names are therefore refused.
    module = importlib.util.find_spec(name) if name.isidentifier() else None
    if module is None:
        raise UserError(f"{spec}: no package {name!r} is installed; accepted: package:NAME[/path]")
    if not module.submodule_search_locations:
        raise UserError(f"{spec}: {name!r} is a single module, not a folder of files")
    return Path(next(iter(module.submodule_search_locations))) / subpath


def read_documents(source: Source, text_field: str) -> Iterator[Document]:
    """Yield the documents of a source: a text file, a line of JSON or a TFDS example is one."""
    documents: Iterable[Document]
    match source.kind:
        case "text":
            documents = [Document(read_text_file(source.path), str(source.path))]
        case "tfds":
            documents = _read_tfds(source, text_field)
        case _:
            documents = (_document(record, text_field) for record in read_records(source.path))
    empty = True
    for document in documents:
        # A document of white space is empty too.
        is_empty = not document.text.strip()
        empty = empty and is_empty
        yield Document("", document.origin, EMPTY) if is_empty else document
    if empty and source.named:
        raise UserError(f"{source}: contains no text")


def _document(record: Record, text_field: str) -> Document:
    text = "" if record.value(text_field) is None else record.text(text_field)
    unused = tuple(record.fields_besides((text_field,)))
    return Document(text, record.origin, unused_fields=unused)


def _resolve(part: str, log: Callable[[str], None] | None) -> list[Source]:
    if part.startswith("tfds:"):
        return [_resolve_tfds(part.removeprefix("tfds:"))]
    is_package = part.startswith("package:")
    path = package_path(part) if is_package else Path(os.path.expanduser(part))
    left_out: dict[str, list[str]] = defaultdict(list)  # names by kind
    if path.is_file():
        return [_file(path, named=True)]
    if path.is_dir():
        files = sorted(_walk(path, left_out))
        reason = f"no file has one of the suffixes {' '.join((*TEXT, *JSON_LINES))}"
    elif glob.has_magic(part):
        files = list(_matching(str(path), left_out))
        reason = "no file matches"
    elif path.exists():
        raise UserError(
            f"{part}: not a file or folder but a pipe or device, which can be read only once;"
            " accepted: a file with its content"
        )
    else:
        raise UserError(f"{part}: no such file or folder; accepted: {ACCEPTED}")
    kinds = ", ".join(
        f"{kind}: {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for kind, names in sorted(left_out.items())
    )
    if not files:
        reason += f"; left out: {kinds}" if kinds else ""
        raise UserError(f"{part}: no documents: {reason}")
    if kinds and log is not None:
        log(f"{part}: reads {len(files)} files; leaves out {kinds}; to read one of these, name it")
    return [_file(file, named=False) for file in files]


def _resolve_tfds(part: str) -> Source:
    path, split = Path(part).expanduser(), "train"
    if not path.is_dir() and ":" in part:
        folder, _, split = part.rpartition(":")
        path = Path(folder).expanduser()
    if not (path / "dataset_info.json").is_file():
        raise UserError(
            f"tfds:{part}: no prepared dataset (dataset_info.json) in {path};"
            " accepted: tfds:FOLDER[:split]"
        )
    return Source(path, "tfds", named=True, split=split)


def _walk(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Yield the files that are read in a folder; add the other entries to `left_out`, by kind."""
    for parent, names, files in os.walk(folder, onerror=_unreadable):
        for name in [*names, *files]:
            path = Path(parent, name)
            if name.startswith("."):
                left_out["hidden"].append(name)
            elif path.is_dir():
                if path.is_symlink():  # os.walk does not follow it
                    left_out["links to folders"].append(name)
            elif not path.is_file():
                left_out[_IRREGULAR].append(name)
            elif _suffix(name) in (*TEXT, *JSON_LINES):
                yield path
            else:
                left_out[_suffix(name) or "no suffix"].append(name)
        names[:] = [name for name in names if not name.startswith(".")]


def _matching(pattern: str, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Yield the files that match; add other matches to `left_out`, unless files in them match."""
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    parents = {parent for match in matches for parent in match.parents}
    for path in matches:
        if path.is_file():
            yield path
        elif path not in parents:
            left_out["folders" if path.is_dir() else _IRREGULAR].append(path.name)


def _suffix(name: str | Path) -> str:
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _file(path: Path, named: bool) -> Source:
    return Source(path, _KINDS.get(_suffix(path), "text"), named)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for decompressed reading; errors in the block become a `UserError` with place."""
    try:
        with _open(path) as stream:
            try:
                yield stream
            except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
                compression = path.suffix.lower().removeprefix(".")
                raise UserError(
                    f"{path}: invalid {compression} after byte {stream.tell()} of the content:"
                    f" {error}"
                ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            return io.BufferedReader(_Zstandard(path), CHUNK)
        case _:
            return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Decompressed zstd frames; the reader of the library accepts a truncated frame as the end."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            chunk = self._input or self._file.read(CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._output = memoryview(self._frame.decompress(chunk))
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        self._position += size
        return size


def _decode(data: bytes, origin: str | Path, start: int) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin}: not UTF-8 at byte {start + error.start}"
            f" (0x{data[error.start]:02x}): {error.reason}"
        ) from error


def read_text_file(path: Path) -> str:
    """Return the decompressed text of a file."""
    with _reading(path) as stream:
        data = stream.read()
    return _decode(data, path, 0)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file, or the rows of a CSV or TSV file with a header."""
    return _read_csv(path) if _suffix(path) in _DELIMITERS else _read_json_lines(path)


def _lines(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the lines of a file, each with its location and first byte."""
    start = 0
    with _reading(path) as stream:
        for number, data in enumerate(stream, 1):
            origin = f"{path}, line {number}"
            yield _decode(data, origin, start), origin, start
            start += len(data)


def _read_json_lines(path: Path) -> Iterator[Record]:
    for line, origin, start in _lines(path):
        if line.strip():
            yield _record(line, f"{origin} (byte {start})")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # default: 128 KiB
    delimiter = _DELIMITERS[_suffix(path)]
    rows = csv.reader((line for line, _, _ in _lines(path)), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        if len(set(columns)) < len(columns):
            raise UserError(f"{path}, line 1: two columns have the same name")
        for row in filter(None, rows):
            origin = f"{path}, line {rows.line_num}"
            if len(row) != len(columns):
                raise UserError(
                    f"{origin}: {len(row)} values, but {len(columns)} columns in the first line"
                )
            yield Record(dict(zip(columns, row, strict=True)), origin)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: invalid CSV: {error}") from error


def _record(line: str, origin: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not JSON at character {error.pos}: {error.msg}; {_LINE_FORMAT}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: JSON that cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{origin}: {json_type(fields)}, not an object; {_LINE_FORMAT}")
    return Record(fields, origin)


def _read_tfds(source: Source, field: str) -> Iterator[Document]:
    """Yield the texts of a TFDS dataset."""
    # TFDS and array_record raise exceptions of many types.
    try:
        builder = tfds.builder_from_directory(str(source.path))
        records = builder.as_data_source(source.split)
        size = len(records)
    except Exception as error:
        cause = " ".join(str(error).split())
        raise UserError(f"{source}: TFDS cannot open it: {cause}") from error
    for index in range(size):
        origin = f"{source}, example {index}"
        try:
            record = Record(records[index], origin)
        except Exception as error:
            raise UserError(f"{origin}: damaged: {error}") from error
        text = record.value(field)
        if not isinstance(text, bytes):
            raise UserError(f"{origin}: field {field!r} is not text")
        unused = tuple(record.fields_besides((field,)))
        yield Document(_decode(text, origin, 0), origin, unused_fields=unused)
