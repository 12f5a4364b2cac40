"""Tables of evaluations, in documents and in reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_jax.config_values import name_of
from sat_jax.errors import UserError
from sat_jax.results.context_figures import context_figures
from sat_jax.results.documents import fill
from sat_jax.results.evaluations import evaluation_tables
from sat_jax.results.finished import collect
from sat_jax.results.page import write_report
from tests.result_runs import study

DEVICE = {"platform": "cpu", "kind": "a CPU", "count": 1, "host_cpus": 2}


def test_evaluations_stand_beside_each_other_where_the_same_was_asked(tmp_path: Path) -> None:
    asked = {"measure": "answers", "data": "q.jsonl", "device": DEVICE, "questions": 50}
    figures = {"accuracy": 0.1, "stderr": 0.0424, "no_result": 0.5, "cut": 0.25}
    base = asked | figures | {"model": "m", "run": None, "options": {"chat": True, "limit": None}}
    base["date"] = "2026-01-02T00:00:00+00:00"

    def run(**settings: Any) -> dict[str, Any]:
        settings = {f"sparsity.{key}": value for key, value in settings.items()}
        settings |= {"data.sources": ["a.jsonl"], "optimizer.learning_rate": 0.1}
        return base | {"run": {"seed": 1, "twin": "abcdef012", "settings": settings}}

    trained = run(rate_mlp=0.4, dense_layers=[0, 1])
    older = trained | {"date": "2026-01-01T00:00:00+00:00"}  # further down in the file
    rows = [base, trained, trained | {"accuracy": 0.2}, older, base | {"options": {"chat": False}}]
    rows += [run(metric="wanda"), run(rate=0.4, metric="wanda"), run(metric="svd")]
    choices = base | {"measure": "choices", "accuracy_per_byte": 0.3, "stderr_per_byte": 0.01}
    rows.append(choices | {"chance": 0.25})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    text = "<!-- table: rows.answers -->\n<!-- /table -->\n"
    first, note, second, _ = fill(text, tmp_path, "x.md", []).split("\n\n")[1:5]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    assert cells[2:] == [
        ["m", "10.0 % ± 4.2 %", "50 %", "25 %"],
        [
            "a.jsonl: r = 0, rate mlp 0.4, dense layers 0,1, seed 1",
            *("20.0 % ± 4.2 %", "50 %", "25 %"),
        ],
        [f"a.jsonl: dense, seed 1 ({name_of(rows[5]['run'])[:6]})", *cells[2][1:]],
        ["a.jsonl: r = 0.4, metric wanda, seed 1", *cells[2][1:]],
        [f"a.jsonl: dense, seed 1 ({name_of(rows[7]['run'])[:6]})", *cells[2][1:]],
    ]
    assert note.startswith("q.jsonl, 50 questions; chat True; a CPU, 2 cores; ± is the")
    assert len(second.splitlines()) == 3
    picked = fill(text.replace("answers", "choices"), tmp_path, "x.md", [])
    assert "| 10.0 % ± 4.2 % |     30.0 % ± 1.0 % |         25 % |" in picked
    alone = base | {"questions": 1, "stderr": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(alone) + "\n")
    assert "| m     |      10.0 % |" in fill(text, tmp_path, "x.md", [])
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows for answers; there are rows for: none"):
        fill(text, tmp_path, "x.md", [])


def test_texts_and_tasks_of_the_harness_have_tables() -> None:
    base = {"model": "m", "run": None, "device": DEVICE, "options": {"dtype": "float32"}}
    base |= {"date": "2026-01-02T00:00:00+00:00", "commit": "c" * 40, "versions": {"jax": "0.1"}}
    windows = {"length": 512, "stride": 256}
    text = base | windows | {"measure": "text", "data": ["a.txt", "b.txt"], "options": windows}
    text |= {"tokens": 1200, "perplexity": 8.0, "byte_perplexity": 2.0, "bits_per_byte": 1.0}
    broken = text | {"model": "n", "perplexity": None, "byte_perplexity": None}
    broken["device"] = DEVICE | {"kind": "another"}
    task = base | {"measure": "lm_eval", "data": ["gk"], "task": "gk", "metric": "acc"}
    task |= {"value": 0.5, "stderr": 0.125}
    rows = [text, broken | {"bits_per_byte": None}, task, task | {"metric": "f1", "stderr": None}]
    perplexity, harness = evaluation_tables(rows)
    assert perplexity.rows == (
        ("m", "1,200", "8.000", "2.000", "1.000"),
        ("n", "1,200", "not finite", "not finite", "not finite"),
    )
    assert perplexity.caption == (
        "a.txt, b.txt, windows of 512 with a stride of 256; a CPU, 2 cores and another, 2 cores"
    )
    assert harness.header == ("model", "task", "metric", "value")
    assert harness.rows == (("m", "gk", "acc", "0.500 ± 0.125"), ("m", "gk", "f1", "0.500"))


def test_a_report_has_them_beside_runs_and_alone(tmp_path: Path) -> None:
    task = {"measure": "lm_eval", "model": "m", "run": None, "device": DEVICE, "data": ["gk"]}
    task |= {"options": {}, "task": "gk", "metric": "acc", "value": 0.5, "stderr": 0.125}
    task |= {"date": "2026-01-02T00:00:00+00:00", "commit": "c" * 40, "versions": {"jax": "0.1"}}
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(task) + "\n")
    study(tmp_path)
    both = [tmp_path / "rows.jsonl", alone]
    for files, count in ((both, 6), ([alone], 1)):
        page, _ = write_report(*collect(files, print), tmp_path / "out")
        text = page.read_text()
        assert f"Sparsity-Accelerated Training: {count} results</h1>" in text
        assert "0.500 ± 0.125" in text and "cccccccccc" in text


def test_contexts_and_passkeys_have_tables_and_figures(tmp_path: Path) -> None:
    base = {"model": "m", "run": None, "device": DEVICE, "options": {"context": [8, 32]}}
    base |= {"date": "2026-01-02T00:00:00+00:00", "commit": "c" * 40, "versions": {"jax": "0.1"}}
    text = base | {"measure": "context", "data": ["a.txt"], "documents": 2, "tokens": 1200}
    text |= {"stride": 8, "context": 32, "perplexity": 4.0, "window_perplexity": 4.5}
    text |= {"position_perplexity": [6.0, None, 3.0, 2.0]}
    short = text | {"context": 8, "perplexity": None, "options": {"context": [8]}}
    newer = text | {"perplexity": 3.0, "date": "2026-01-03T00:00:00+00:00"}
    passkey = base | {"measure": "passkey", "data": "passkey retrieval", "context": 64}
    passkey |= {"options": {"keys": 2}, "prompts": 20, "accuracy": 0.25, "stderr": 0.1}
    rows = [text, short, newer, short | {"model": "n", "perplexity": 8.0}, passkey]
    rows.append(passkey | {"context": 128, "accuracy": 1.0, "stderr": 0.0})
    perplexities, retrieval = evaluation_tables(rows)
    assert perplexities.header == (
        *("model", "context", "documents", "tokens", "per token", "mean over windows"),
    )
    assert perplexities.rows == (
        ("m", "32", "2", "1,200", "3.000", "4.500"),
        ("m", "8", "2", "1,200", "not finite", "4.500"),
        ("n", "8", "2", "1,200", "8.000", "4.500"),
    )
    assert perplexities.caption == "a.txt, windows that advance by 8 tokens; a CPU, 2 cores"
    assert retrieval.rows == (
        ("m", "64", "20", "25.0 % ± 10.0 %"),
        ("m", "128", "20", "100.0 % ± 0.0 %"),
    )
    assert retrieval.caption.startswith("passkey retrieval; keys 2; a CPU")

    (caption, contexts), (_, passkeys) = context_figures(rows)
    assert caption.startswith("a.txt, windows that advance by 8 tokens. Left: mean over tokens")
    left, right = contexts.axes
    points = [line[0].get_xydata().tolist() for line in left.containers]
    assert points[0][1] == [32, 3] and np.isnan(points[0][0][1]) and points[1] == [[8, 8]]
    (line,) = right.lines  # only m was evaluated at the longest context
    assert line.get_xdata().tolist() == [4, 12, 20, 28]
    assert line.get_ydata()[[0, 2, 3]].tolist() == [6, 3, 2]
    (bars,) = passkeys.axes[0].containers
    assert bars[0].get_xydata().tolist() == [[64, 0.25], [128, 1]]
    page, _ = write_report(rows, [], tmp_path)
    assert page.read_text().count("<img ") == 2
