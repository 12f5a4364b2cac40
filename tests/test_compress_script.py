"""scripts/compress.py: a pruned model directory with its report, dry runs, and misuse."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sat_jax import cli
from sat_jax.compress import load_factored, merge_factors
from sat_jax.compress.costs import costs
from sat_jax.compress.layers import matrices
from sat_jax.data.prepare import load_prepared
from sat_jax.errors import UserError
from sat_jax.evaluate.perplexity import perplexity, prepared_data
from sat_jax.interop import load_model, open_weights, save_model
from sat_jax.models.build import layout_of
from sat_jax.models.decoder_config import DecoderConfig
from sat_jax.nn.layout import make_layout
from sat_jax.nn.loss import perplexity_of
from sat_jax.results.compression import compression_tables
from sat_jax.results.rows import read
from sat_jax.sparsity.flops import forward_flops
from scripts.compress import main
from tests.golden_model import GOLDEN
from tests.tolerances import assert_close

MODEL = GOLDEN / "llama_gqa"
_READ = ("attention/key", "attention/query", "mlp/up")
Compress = Callable[..., str]


@pytest.fixture
def compress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Compress:
    """Return a function that runs the script on the golden model and returns its output; options
    are keyword arguments, and None leaves one out."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall.\n" for n in range(99)))
    defaults = {
        "model": MODEL,
        "method": "magnitude",
        "tokenizer": "bytes",
        "calibration": text,
        "context": 16,
        "calibration_rows": 8,
        "rows": 8,
        "out": tmp_path / "out",
    }

    def run(**options: Any) -> str:
        arguments = []
        for name, value in (defaults | options).items():
            if value is not None:
                values = value if isinstance(value, list) else [value] * (value is not True)
                arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        main()
        return capsys.readouterr().out

    return run


def test_a_model_and_its_report(compress: Compress, tmp_path: Path, cache: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    printed = compress(sparsity=0.25, record=rows)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    (row,), (table,) = read(rows), compression_tables(read(rows))
    assert row["model"] == f"{MODEL.name}#{row['model'][-6:]}" and "layers" not in row
    assert row["calibration"]["sources"] == ["text.txt"] and row["bytes"] == report["bytes"]
    assert table.rows[0][:2] == ("magnitude", f"{report['perplexity']['after']:.3f}")
    assert printed.endswith("model in float32, with its tokenizer and report.json\n")
    assert not list(tmp_path.glob(".*"))
    # Of each output row a quarter is 0: here of the rows of q, and of the columns of o.
    original, written = open_weights(MODEL), open_weights(out)
    for path, axes in (("query", -1), ("output", (1, 2, 3))):
        zeros = np.sum(written.read(f"layers/attention/{path}") == 0, axis=axes)
        assert (zeros == 16).all()
    for path in ("embed", "lm_head", "layers/mlp_norm"):
        assert_close(written.read(path), original.read(path), "float32", "exact")
    count = sum(int((written.read(path) == 0).sum()) for path in written.paths)
    assert report["weights"] == {"all": 165_312, "in_matrices": 132_096, "removed": count}
    by_layer = [sum(layer["removed"].values()) for layer in report["layers"]]
    assert by_layer == [count / 3] * 3 == [132_096 / 4 / 3] * 3
    assert all(0 < layer["error"] < 1 for layer in report["layers"])
    settings = {"method": "magnitude", "sparsity": 0.25, "pattern": None, "block": 128}
    assert report["method"] == settings
    calibration = report["calibration"]
    assert {"rows": 8, "context": 16, "adds_bos": False}.items() <= calibration.items()
    prepared = load_prepared(cache / "data" / calibration["fingerprint"])
    for name, directory in (("before", MODEL), ("after", out)):
        model = load_model(directory)
        nll, tokens = perplexity(
            model, prepared_data(prepared.path, "held_out", model.config, 8)[0]
        )
        assert report["perplexity"][name] == perplexity_of(nll / tokens)
        assert report["perplexity"]["held_out_tokens"] == tokens
    assert report["seconds"].keys() == {"evaluate_before", "compress", "evaluate_after"}
    with pytest.raises(UserError, match="out: exists already; accepted: a new directory"):
        compress()


def test_a_model_of_low_rank(compress: Compress, tmp_path: Path) -> None:
    """The written model has the products of the factors, which a file beside it has."""
    printed = compress(method="svd-llm", ratio=0.5)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert printed.endswith("with its tokenizer, factors.safetensors and report.json\n")
    assert report["method"] == {"method": "svd-llm", "ratio": 0.5}
    # ⌊n · m / 2 / (n + m)⌋ for key (16 × 64), query (64 × 64) and up (176 × 64)
    ranks = [report["ranks"][f"layers/{name}"] for name in _READ]
    assert ranks == [[6] * 3, [16] * 3, [23] * 3]
    removed = [report["layers"][0]["removed"][f"layers/{name}"] for name in _READ]
    assert removed == [1024 - 6 * 80, 4096 - 16 * 128, 11264 - 23 * 240]
    assert report["bytes"]["after"] == report["bytes"]["before"] == 4 * 165_312
    merged, factored = load_model(out), load_factored(out)
    layout = make_layout(factored)
    assert report["bytes"]["with_factors"] == 4 * sum(
        int(np.prod(shape.shape)) for shape in layout.shapes.values()
    )
    flops = forward_flops(layout, 16).total
    assert report["flops_per_token"]["with_factors"] == flops
    assert flops < report["flops_per_token"]["after"]
    tokens = np.arange(12)[None]
    assert_close(factored(tokens), merged(tokens), "float32", "forward")
    save_model(merge_factors(factored), tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert_close(again(tokens), merged(tokens), "float32", "forward")


def test_a_structured_model(compress: Compress, tmp_path: Path) -> None:
    """Half of the KV groups, channels and width, and one of three layers, with their config."""
    shares = ["kv_group=0.5", "channel=0.5", "embed=0.5", "layer=0.3"]
    settings: dict[str, Any] = {"method": "structured", "remove": shares}
    planned = compress(**settings, dry_run=True, calibration=None, out=None).splitlines()
    assert planned[1].split() == ["kv_group", "2", "1", "50.00%"]
    printed = compress(**settings)
    assert planned[-1] in printed
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    config = load_model(out).config
    assert (config.d_model, config.n_heads, config.n_kv_heads, config.head_dim) == (32, 4, 1, 8)
    assert (config.d_ff, config.n_layers) == (88, 2)
    # Of each layer: q and o of 4 heads, k and v of one, three matrices of 88 channels, two norms.
    count = 2 * (32 * (8 * (4 + 4 + 1 + 1) + 3 * 88) + 2 * 32) + 2 * 256 * 32 + 32
    assert report["weights"] == {"all": 165_312, "removed": 165_312 - count}
    assert report["bytes"] == {"before": 4 * 165_312, "after": 4 * count}
    flops = report["flops_per_token"]
    assert flops["after"] == forward_flops(layout_of(config), 16).total < flops["before"]
    assert report["method"]["importance"] == "output"
    removed = report["removed"]
    assert {axis: (x["of"], x["kept"]) for axis, x in removed.items()} == {
        "kv_group": (2, 1),
        "channel": (176, 88),
        "embed": (64, 32),
        "layer": (3, 2),
    }
    assert [len(x["layers"]) for x in removed.values()] == [3, 3, 1, 1]
    assert all(0 < x["share_of_scores"] < 0.5 for x in removed["channel"]["layers"])
    (layer,) = removed["layer"]["layers"]
    assert layer["highest_removed"] < layer["lowest_kept"]
    assert report["perplexity"]["after"] != report["perplexity"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stored"), [("rtn", "int4"), ("nf4", "nf4")])
def test_a_quantized_model(
    method: str, stored: str, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # not compiled here
    monkeypatch.setattr("scripts.compression.held_out_perplexity", lambda *_: 7.0)
    printed = compress(method=method, bits=4, group=16, dtype="bfloat16")
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    ending = f"in {stored} and bfloat16, with its tokenizer and report.json\n"
    assert printed.endswith(ending)
    assert report["method"] == {"method": method, "bits": 4, "group": 16}
    # 4 bits, and 32 for 16 weights
    assert report["bits_per_weight"]["in_matrices"] == 6
    size = 132_096 * 6 // 8 + 2 * (165_312 - 132_096)
    assert report["bytes"] == {"before": 2 * 165_312, "after": size}
    tensors = load_file(out / "quantized.safetensors")
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    assert [layer.keys() for layer in report["layers"]] == [{"layer", "error"}] * 3
    with pytest.raises(
        UserError, match=rf"out: .* quantized already \({stored}\); accepted: those"
    ):
        compress(model=out, out=tmp_path / "again")


def test_a_dry_run_of_quantization(compress: Compress) -> None:
    """4 bits, 32 for 64 weights, and 32 for an input: 64 of query, key, value, output, gate and up,
    and 176 of down."""
    printed = compress(method="awq", dry_run=True, group=16, dtype="float16")
    size = 132_096 * 6 // 8 + 3 * 4 * (6 * 64 + 176) + 2 * (165_312 - 132_096)
    bits = 6 + 32 * 3 * (6 * 64 + 176) / 132_096
    assert printed == (
        f"{bits:.4g} bits a weight for 132,096 weights in matrices, of 165,312 in the model\n"
        f"written model: {size:,} bytes, before: {2 * 165_312:,} bytes\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "factors.safetensors: no such file; accepted: a directory that scripts.compress"),
        (b"no", "factors.safetensors: cannot be read as safetensors"),
        ({"layers/mlp/up/0/left": (176, 2)}, "factors.safetensors: no tensor 'layers/mlp/up/0/ri"),
        ({"layers/mlp/up/left": (176, 2)}, "factors.safetensors: layers/mlp/up has no layer"),
        (
            {"layers/mlp/up/0/left": (170, 2), "layers/mlp/up/0/right": (2, 64)},
            "factors.safetensors: layers/mlp/up of layer 0 is no matrix of the model",
        ),
        (
            {"layers/mlp/up/3/left": (176, 2), "layers/mlp/up/3/right": (2, 64)},
            "factors.safetensors: layers/mlp/up of layer 3 is no matrix of the model",
        ),
        (
            {"layers/mlp/up/1/left": (176, 2), "layers/mlp/up/1/right": (4, 64)},
            "factors.safetensors: layers/mlp/up of layer 1 is no matrix of the model",
        ),
        (
            {"up/0/left": (2,), "up/0/right": (2,)},
            "factors.safetensors: up of layer 0 is no matrix of the model",
        ),
    ],
)
def test_factors_that_cannot_be_loaded(tmp_path: Path, content: Any, message: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    if isinstance(content, dict):
        content = save({name: np.ones(shape, np.float32) for name, shape in content.items()})
    if content is not None:
        (directory / "factors.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_factored(directory)


def test_a_dry_run(compress: Compress, tmp_path: Path) -> None:
    printed = compress(dry_run=True, calibration=None, pattern="2:4", method="wanda", out=None)
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1] == ["attention/key", "16", "×", "64", "3", "1,536", "50.00%"]
    assert lines[5] == ["mlp/down", "64", "×", "176", "3", "16,896", "50.00%"]
    assert printed.count("66,048 of 132,096 weights") == 1
    preset = compress(model="llama-2-7b", dry_run=True)
    assert "3,238,002,688 of 6,476,005,376 weights in matrices" in preset
    assert not (tmp_path / "out").exists()


def sensitive_first_layer(config: DecoderConfig, *_: Any) -> dict[str, np.ndarray]:
    """Return increases of the loss that are 1,000 times as large in the first layer."""
    layers = np.asarray([1.0] + [0.001] * (config.n_layers - 1))
    shares = np.asarray([0.001, 0.01, 0.1, 1.0])
    return {matrix.path: np.outer(layers, shares) for matrix in matrices(layout_of(config))}


def test_a_target_size(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitive layers keep more, the total is the target, and a killed command measures once."""
    monkeypatch.setattr("scripts.matrices.loss_increases", sensitive_first_layer)
    monkeypatch.setattr("scripts.compression.held_out_perplexity", lambda *_: 7.0)
    options: dict[str, Any] = {"target_size": 0.6, "record": tmp_path / "rows.jsonl"}
    with monkeypatch.context() as patched:
        patched.setattr("scripts.matrices._compress", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(**options)
    with monkeypatch.context() as patched:
        patched.setattr("scripts.matrices.loss_increases", lambda *_: 1 / 0)
        compress(**options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    settings = {"method": "magnitude", "pattern": None, "block": 128, "target_size": 0.6}
    assert report["method"] == settings
    allocation = report["allocation"]
    assert allocation["setting"] == "sparsity"
    for path, values in allocation["values"].items():
        assert (values[0] or 0) < values[1], path
    assert allocation["estimated_increase"] < allocation["estimated_increase_uniform"]
    sizes = report["bytes"]
    assert 0.59 < sizes["without_zeros"] / sizes["before"] <= 0.6
    weights = open_weights(tmp_path / "out").read("layers/mlp/up")
    shares = [round(float((layer == 0).mean()), 1) for layer in weights]
    assert shares == [round(value or 0, 1) for value in allocation["values"]["layers/mlp/up"]]
    (row,) = read(tmp_path / "rows.jsonl")
    assert row["method"] == settings and "allocation" not in row


def test_a_dry_run_of_a_target(compress: Compress) -> None:
    nothing: dict[str, Any] = {"dry_run": True, "calibration": None, "out": None}
    printed = compress(**nothing, method="svd-llm", target_flops=0.8)
    assert "21 matrices get their own ratio: 0.2, 0.22," in printed and "0.9, none" in printed
    assert "target flops 0.8 of the model; svd-llm reaches 0." in printed
    assert 0.2 < float(printed.split()[-1]) < 0.8  # the uniform ratio


def test_costs_by_hand() -> None:
    """Of the golden model on rows of one token: 2 operations a weight in matrices and head, and 4 a
    column of the heads for the scores and the mix of values."""
    zeros = {"layers/mlp/up": 100, "layers/attention/key": 10}
    layout = layout_of(open_weights(MODEL).config)
    found = costs(layout, zeros, 1, 2, "without_zeros")
    dense = 2 * (132_096 + 256 * 64) + 3 * 4 * 64
    assert found["flops_per_token"] == {
        "before": dense,
        "after": dense,
        "without_zeros": dense - 220,
    }
    assert found["weights"] == {"all": 165_312, "in_matrices": 3 * 192 * 64, "removed": 110}
    sizes = {"before": 330_624, "after": 330_624, "without_zeros": 330_404}
    assert found["bytes"] == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparce"}, "method 'sparce'; accepted: magnitude, .*, svd, asvd, svd-llm, rtn"),
        ({"pattern": "2-4"}, "pattern '2-4'; accepted: no pattern, N:M"),
        ({"pattern": "3:6", "dry_run": True}, "attention/key has 64 columns; accepted: multiples"),
        ({"pattern": "16:32"}, "mlp/down has 176 columns; accepted: multiples of 32"),
        ({"ratio": 0.5}, "ratio has no effect with method magnitude; accepted: sparsity, pattern"),
        ({"method": "svd", "sparsity": 0.5}, "sparsity has no effect with method svd; accepted: r"),
        ({"method": "asvd", "ratio": 1}, "ratio 1; accepted: a share between 0 and 1"),
        ({"remove": ["channel=.5"]}, "remove has no effect with method magnitude; accepted: sp"),
        ({"method": "structured"}, "needs shares to remove, such as channel=0.25"),
        ({"remove": ["channel"]}, "--remove channel; accepted: AXIS=SHARE, such as channel=0.25"),
        ({"remove": ["channel=.5"] * 2}, "--remove has channel twice; accepted: one share of"),
        ({"remove": ["channel=.1,.2"]}, "config.json cannot express layers of different sizes"),
        (
            {"remove": ["embed=.5", "layer=.5"], "importance": "taylor"},
            "--importance has no effect on embed and layer; accepted: none",
        ),
        (
            {"method": "structured", "remove": ["head=.5"]},
            "remove head: llama has no such units; accepted: kv_group, query_head, channel, embed",
        ),
        (
            {"method": "rtn", "ratio": 0.5},
            "ratio has no effect with method rtn; accepted: bits, gr",
        ),
        ({"method": "gptq"}, "group 128: layers/attention/key has 64 columns; accepted: divisors"),
        (
            {"target_size": 0.6, "target_flops": 0.6},
            "--target-size and --target-flops; accepted: one of them",
        ),
        ({"target_size": 0.6, "sparsity": 0.5}, "--sparsity has no effect with --target-size"),
        ({"target_size": 0.1}, r"target size 0.1: magnitude reaches 0.\d+ to 1.000 of the model"),
        ({"target_flops": 1.5}, "target flops 1.5; accepted: a share between 0 and 1"),
        ({"target_size": 0.6, "pattern": "2:4"}, "target size 0.6 with pattern 2:4, which has one"),
        (
            {"target_flops": 0.6, "method": "rtn", "group": 16},
            "target flops 0.6 with method rtn: weights are dequantized .* accepted: a target size",
        ),
        (
            {"target_size": 0.6, "method": "structured", "remove": ["channel=.5"]},
            "--target-size with method structured: config.json cannot express layers of different",
        ),
        ({"block": 64}, "--block has no effect without --method sparsegpt or a block pattern"),
        ({"calibration": None}, "--calibration is missing; only --dry-run does without"),
        ({"out": None}, "--out is missing"),
        ({"calibration_rows": 0}, "--calibration-rows 0; accepted: 1 or more"),
        ({"held_out": 0.6}, "--held-out 0.6; accepted: a share above 0, at most 0.5"),
        ({"context": 256}, "--context 256 exceeds the model's 128 positions"),
        ({"model": "tiny"}, "tiny: no such path"),
        ({"calibration_rows": 500}, "too short for calibration: .* needed: 8,000 .500 rows of 16"),
    ],
)
def test_misuse_is_a_user_error(
    compress: Compress, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compress(**options)
    assert not (tmp_path / "out").exists()


def test_misuse_is_one_line(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: compress(sparsity=2))
    assert capsys.readouterr().err == "error: sparsity 2; accepted: a share between 0 and 1\n"
