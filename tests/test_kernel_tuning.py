"""Tuning: the search for the fastest tiles, and the choice between a kernel and XLA by its file."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import tune
from kernels.block_sparse_matmul import (
    BlockMask,
    Matrix,
    backends,
    column_matmul,
    explain,
    kept_rows,
    pallas_gpu,
    pallas_tpu,
    row_matmul,
    sampled_matmul,
    swiglu_mlp,
    tuned,
    xla,
)
from kernels.block_sparse_matmul.backends import BACKENDS, Measured
from kernels.block_sparse_matmul.tiled import Tiled
from kernels.block_sparse_matmul.tiles import DEFAULTS, GpuTiles, TpuTiles, UnsupportedTiles
from kernels.block_sparse_matmul.workloads import LLAMA_2, MODELS, Workload, operations

H200 = "NVIDIA H200"
KEPT = kept_rows(jnp.array([0, 2]), 128)
MASK = BlockMask.of(np.array([[1, 0, 1], [0, 1, 1]]), 128)


def row(pattern: str, operation: str, ratio: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """Return an entry of a tuning file: a kernel that takes `ratio` of the time of XLA."""
    return {
        "backend": "pallas_gpu",
        "pattern": pattern,
        "operation": operation,
        "dtype": "bfloat16",
        "block": 128,
        "tokens": 4096,
        "width": 4096,
        "neurons": 11_008,
        "density": 0.5,
        "tiles": dataclasses.asdict(GpuTiles()),
        "seconds": ratio,
        "xla_seconds": 1.0,
    } | more


def write(folder: Path, rows: list[dict[str, Any]], device: str = H200) -> Path:
    folder.mkdir(exist_ok=True)
    tuned.path(device, folder).write_text(json.dumps({"device": device, "entries": rows}))
    return folder


def reasons(
    folder: Path,
    tokens: int = 4096,
    matrix: Matrix = Matrix(4096, 11_008, 0.5),
    block: int = 128,
    kind: Any = "rows",
) -> dict[str, str]:
    """Return why XLA is chosen, by operation, on an H200 with this folder of measurements."""
    keywords: dict[str, Any] = {"device": H200, "folder": folder, "kind": kind}
    choices = explain(jnp.bfloat16, tokens, matrix, block, "gpu", **keywords)
    assert set(choices) == {operation for pattern, operation in tuned.OPERATIONS if pattern == kind}
    for choice in choices.values():
        assert choice.name == ("xla" if choice.reason else "pallas_gpu")
    return {operation: choice.reason for operation, choice in choices.items() if choice.reason}


def test_each_operation_is_chosen_by_its_own_timing(tmp_path: Path) -> None:
    assert tuned.path(H200, tmp_path).name == "nvidia-h200.json"
    slow = f"1.50x the time of XLA on {H200} (4096 tokens, 0.5 of 11008 x 4096)"
    fast = [row(*case, 0.1) for case in tuned.OPERATIONS[1:]]
    folder = write(tmp_path / "slow", [row("rows", "column", 1.5), *fast])
    assert reasons(folder) == {"column": slow}
    assert not reasons(folder, kind="mask")
    equal = write(tmp_path / "equal", [row("rows", "column", 1.0), *fast])
    assert not reasons(equal)
    untimed = "column of bfloat16 in blocks of {} is not timed on " + H200
    for number, rows in enumerate([fast, [row("rows", "column", block=64), *fast]]):
        (reason,) = reasons(write(tmp_path / str(number), rows)).items()
        assert reason == ("column", untimed.format(128) + "; `make tune` does that")
    assert set(reasons(tmp_path, kind="mask")) == {"column", "row", "sampled"}  # no file
    incomplete = row("rows", "column")
    del incomplete["tiles"]
    assert (
        untimed.format(128)
        in reasons(write(tmp_path / "incomplete", [incomplete, *fast]))["column"]
    )


def test_a_kernel_that_fails_is_not_chosen(tmp_path: Path) -> None:
    """A kernel that runs is chosen where XLA fails."""
    neither = row("mask", "row", None, tiles=None, xla_seconds=None)
    failed = row("mask", "sampled", None, tiles=None)
    kernel_only = row("mask", "column", xla_seconds=None)
    xla_reasons = reasons(write(tmp_path, [neither, failed, kernel_only]), kind="mask")
    text = f"does not run on {H200} (4096 tokens, 0.5 of 11008 x 4096)"
    assert xla_reasons == {"row": text, "sampled": text}


def test_the_nearest_timing_decides(tmp_path: Path) -> None:
    few, many = (row("rows", "row", ratio, tokens=n) for ratio, n in ((2.0, 1024), (0.5, 16_384)))
    thin = row("rows", "row", 3.0, tokens=16_384, density=0.125)
    tall = row("rows", "row", 4.0, tokens=16_384, width=5120, neurons=13_824)
    folder = write(tmp_path, [many, few, thin, tall])

    def choice(*shape: Any) -> str:
        return reasons(folder, *shape).get("row", "kernel").split("x")[0]

    for tokens, expected in ((64, "2.00"), (4096, "2.00"), (4097, "kernel"), (10**6, "kernel")):
        assert choice(tokens) == expected
    matrices = (Matrix(4096, 11_008, 0.2), Matrix(5120, 13_824, 0.4), Matrix(4096, 11_008, 0.3))
    assert [choice(16_384, matrix) for matrix in matrices] == ["3.00", "4.00", "kernel"]


def test_calls_follow_the_timing_of_their_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward by the kernel, backward partly by XLA, at the shapes of the call."""
    shape = {"tokens": 64, "width": 256, "neurons": 512, "backend": "pallas_tpu"}
    shape["tiles"] = dataclasses.asdict(TpuTiles())
    fast = {("rows", "swiglu"), ("rows", "row"), ("mask", "sampled")}
    rows = [row(*case, 0.5 if case in fast else 2.0, **shape) for case in tuned.OPERATIONS]
    far = [row(*case, 9.0, **shape | {"density": 0.0625}) for case in sorted(fast)]
    folder = write(tmp_path, [*far, *rows], tuned.device_kind())
    monkeypatch.setitem(BACKENDS, "measured", Measured(folder))
    monkeypatch.setitem(backends.PLATFORM_KERNELS, "cpu", "pallas_tpu")
    seen: list[str] = []

    class Spy(Tiled):
        def _tiles(self, operation: str, x: Any, pattern: Any) -> Any:
            seen.append(f"{pattern.kind} {operation}")
            return super()._tiles(operation, x, pattern)

    monkeypatch.setitem(backends.IMPLEMENTATIONS, "pallas_tpu", Spy(pallas_tpu))

    def traced(call: Any, *shapes: tuple[int, ...]) -> list[str]:
        seen.clear()
        operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        gradient = jax.grad(lambda *a: call(*a).sum().astype(float), range(len(operands)))
        jax.eval_shape(gradient, *operands)
        return seen

    x, h, w = (64, 256), (64, 256), (512, 256)
    mlp = traced(lambda x, g, u, d: swiglu_mlp(x, g, u, d, KEPT), x, w, w, w)
    assert mlp == ["rows swiglu", "rows row"]
    assert traced(lambda h, w: row_matmul(h, w, KEPT), h, w) == ["rows row"]
    mask = BlockMask.of(np.array([[1, 0], [0, 1], [1, 0], [0, 1]]), 128)
    blocks = (4, 128, 128)
    assert traced(lambda x, w: column_matmul(x, w, mask), x, blocks) == ["mask sampled"]
    assert traced(lambda a, c: sampled_matmul(a, c, mask), (64, 512), x) == ["mask sampled"]


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    invalid = [{"tiles": {}}, row("rows", "row", tiles={"wide": 1}), {"pattern": "rows"}]
    for number, entry in enumerate(invalid):
        with pytest.raises(ValueError, match=r"nvidia-h200.json: .*kernels.tune` writes such"):
            reasons(write(tmp_path / str(number), [entry]))


def test_tiles_come_from_the_file_of_the_device(tmp_path: Path) -> None:
    few, many = TpuTiles(token_bytes=64), TpuTiles(token_bytes=256)
    rows = [
        row("rows", "column", tiles=dataclasses.asdict(tiles), tokens=tokens, backend="pallas_tpu")
        for tiles, tokens in ((few, 16), (many, 4096))
    ]
    folder = write(tmp_path, rows, tuned.device_kind())
    seen = []

    def contract(product: Any, tiles: Any) -> Any:
        seen.append(tiles)
        return pallas_tpu.contract(product, tiles)

    kernels = SimpleNamespace(**{**vars(pallas_tpu), "contract": contract})
    for dtype, tokens in (("bfloat16", 250), ("bfloat16", 260), ("float32", 16)):
        x, w = (jax.ShapeDtypeStruct((n, 256), dtype) for n in (tokens, 512))
        for backend in (Tiled(kernels, folder=folder), Tiled(kernels)):
            jax.eval_shape(lambda x, w, backend=backend: backend.column(x, w, KEPT), x, w)
    default = TpuTiles()
    assert seen == [few, default, many, default, default, default]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    tune.main()


def test_tuning_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--model", "small", "--tokens", "64", "--repeat", "1", "--operation", "sampled"]
    few += ["--interpret", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="minutes are over"):
        call(monkeypatch, *few, "--minutes", "1e-9")
    call(monkeypatch, *few)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[5].split(":")[0] for line in lines[:4]] == [
        *("xla", "default", "sampled_bytes 2048", "sampled_bytes 8192")
    ]
    assert "x the time of XLA" in lines[1]
    assert lines[4] == "pallas_tpu: blocks of 64, accepted 128, 256 and 512"
    (file,) = tmp_path.iterdir()
    assert file.name == "cpu.json"
    (entry,) = json.loads(file.read_text())["entries"]
    xla_record, default, *others = entry["timed"]
    fastest = min((default, *others), key=lambda record: record["seconds"])
    assert entry["tiles"] == fastest["tiles"] and entry["seconds"] == fastest["seconds"]
    assert entry["xla_seconds"] == xla_record["seconds"]
    assert entry["jax"] == jax.__version__ and entry["neurons"] == 512
    (known,) = tuned.entries("cpu", tmp_path)
    assert known.tiles == TpuTiles(**fastest["tiles"])

    text = file.read_text().replace(jax.__version__, "0.1")
    file.write_text(text)
    call(monkeypatch, *few)
    assert file.read_text() == text
    del entry["tiles"], entry["timed"][3]
    file.write_text(json.dumps({"entries": [entry]}))
    capsys.readouterr()
    call(monkeypatch, *few)
    assert (
        len(capsys.readouterr().out.splitlines()) == 3
    )  # the missing record, the refusal of blocks of 64, and the end
    (again,) = json.loads(file.read_text())["entries"]
    assert again["timed"][:3] == [xla_record, default, others[0]] and len(again["timed"]) == 4


def test_each_round_varies_the_fastest_tiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here wide rows and few tokens are fastest, and XLA is in between."""
    seen: list[TpuTiles] = []

    def contract(product: Any, tiles: TpuTiles) -> Any:
        seen.append(tiles)
        return pallas_tpu.contract(product, tiles)

    def seconds(*_: Any) -> float:
        """Return made-up seconds of the program that was traced last."""
        result = seen[0].token_bytes / seen[0].row_bytes if seen else 0.05
        seen.clear()
        return result

    monkeypatch.setattr(tune.measure, "seconds", seconds)
    kernels = SimpleNamespace(**{**vars(pallas_tpu), "contract": contract})
    case = tuned.Case("pallas_tpu", "rows", "column", "bfloat16", 128, 1024)
    workload, file = Workload("wide", 10_240, 512, 1024), tune.TuningFile(tmp_path / "made-up.json")
    search = tune.Search(case, workload, kernels, 1, file)
    assert search.run(math.inf)
    (entry,) = tuned.entries("made up", tmp_path)
    best = TpuTiles(row_bytes=20_480, token_bytes=512)
    assert entry == tuned.Entry(case, Matrix(10_240, 512, 0.5), best, 0.025, 0.05)
    assert [len(record["tiles"] or ()) for record in search.entry["timed"]] == [*(0, 3, 3, 3, 3, 3)]


def test_a_program_is_timed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three stages of the default tiles fit shared memory, so more stages are the same program.

    An interrupted search also reuses the timing.
    """
    times = iter((0.4, 0.3, 0.2, 0.1))
    monkeypatch.setattr(tune.measure, "seconds", lambda *_: next(times))
    changes = [{"stages": 3}, {"stages": 6}, {"grid_tile_width": 4}, {"tile_k": 128}]
    monkeypatch.setattr(tune, "_rounds", lambda _: [changes[:1], changes[1:]])
    case = tuned.Case("pallas_gpu", "rows", "swiglu_gradients", "bfloat16", 128, 4096)
    search = tune.Search(case, LLAMA_2[0], pallas_gpu, 1, tune.TuningFile(tmp_path / "a.json"))
    assert search.run(math.inf)
    timed = [record.get("seconds") for record in search.entry["timed"]]
    assert timed == [0.4, 0.3, 0.3, 0.3, 0.2, None]
    out = capsys.readouterr().out
    assert "  stages 3: 300.000 ms, 0.75x the time of XLA (same program as default)\n" in out
    again = tune.Search(case, LLAMA_2[0], pallas_gpu, 1, tune.TuningFile(tmp_path / "a.json"))
    del again.entry["tiles"], again.entry["timed"][3]
    assert again.run(math.inf) and again.entry["timed"][5]["seconds"] == 0.3


def test_failing_tiles_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(a: Any, c: Any, mask: BlockMask, tiles: TpuTiles) -> Any:
        if tiles.sampled_bytes == 2_048:
            raise RuntimeError("no such instruction\nand more")
        if tiles.sampled_bytes == 8_192:
            raise UnsupportedTiles("too large")
        return pallas_tpu.sample(a, c, mask, tiles)

    kernels = SimpleNamespace(**{**vars(pallas_tpu), "sample": sample})
    case = tuned.Case("pallas_tpu", "mask", "sampled", "bfloat16", 128, 64)
    workload, file = MODELS["small"]._replace(tokens=64), tune.TuningFile(tmp_path / "cpu.json")
    search = tune.Search(case, workload, kernels, 1, file)
    assert search.run(math.inf)
    assert search.entry["tiles"] == dataclasses.asdict(TpuTiles())
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("sampled_bytes 2048: RuntimeError: no such instruction")
    assert second.endswith("sampled_bytes 8192: not supported: too large")

    def failing(*_: Any) -> Any:
        raise RuntimeError("never")

    kernels, file = (
        SimpleNamespace(NAME="pallas_tpu", sample=failing),
        tune.TuningFile(tmp_path / "b.json"),
    )
    search = tune.Search(case, workload, kernels, 1, file)
    assert search.run(math.inf)
    entry = search.entry
    assert entry["tiles"] is entry["seconds"] is None
    assert entry["xla_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are no kernels for cpu, accepted gpu and tpu"),
        (["--interpret"], "--interpret tests the search on a CPU, and needs --out"),
        (["--interpret", "--out", "{folder}"], "cpu.json: TypeError: list indices must be"),
    ],
)
def test_a_cpu_is_not_tuned(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned.path("cpu", tmp_path).write_text("[]")
    arguments = [text.format(folder=tmp_path) for text in arguments]
    few = ["--model", "small", "--tokens", "8", "--operation", "sampled"]
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments, *few)
    assert message in capsys.readouterr().err


def test_every_operation_is_tuned() -> None:
    assert set(operations(MODELS["small"], xla)) == set(tuned.OPERATIONS)
    for backend in DEFAULTS:
        for case in tuned.OPERATIONS:
            rounds = tune._rounds(tuned.Case(backend, *case, "bfloat16", 128, 64))
            for change in (change for changes in rounds for change in changes):
                assert dataclasses.replace(DEFAULTS[backend], **change) != DEFAULTS[backend]


def test_candidates_are_all_tiles_of_a_search() -> None:
    case = tuned.Case("pallas_tpu", "rows", "column", "bfloat16", 128, 64)
    assert list(tune.candidates(case)) == [
        TpuTiles(row_bytes=row, token_bytes=tokens)
        for row in (10_240, 5_120, 20_480)
        for tokens in (1_024, 512, 2_048)
    ]
    case = tuned.Case("pallas_gpu", "rows", "swiglu_gradients", "bfloat16", 64, 64)
    # tile_m 256 spills registers, according to `kernels.aot --candidates`.
    assert all(tiles.tile_m < 256 for tiles in tune.candidates(case))
