"""Adapter for lm-evaluation-harness: requests, and a local task without a network."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.harness import HarnessModel
from sat_jax.evaluate.likelihood import Pair, encode_pairs, likelihoods
from sat_jax.evaluate.multiple_choice import encode_choices, evaluate_choices
from sat_jax.evaluate.prompts import PromptFormat
from sat_jax.evaluate.question_files import read_choices
from tests.golden_model import golden, run_evaluate
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the harness

BYTES = load_tokenizer("bytes")  # its eos 256 replaces an empty context


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def test_likelihoods() -> None:
    harness = HarnessModel(golden(), load_tokenizer("bytes", None, 256), rows=2)
    texts = [("Once upon", " a time"), ("x" * 200 + "once upon", "yz")]
    short, long = harness.loglikelihood(requests(*texts))
    pairs = encode_pairs(
        BYTES, [texts[0], (("x" * 200 + "once upon")[-127:], "yz")]
    )  # 128 positions
    for result, expected in zip((short, long), likelihoods(golden(), pairs, 2), strict=True):
        assert_close(result[0], expected.log_p, "float32", "forward")
        assert result[1] == expected.greedy
    with pytest.raises(UserError, match="a continuation of 129 tokens"):
        harness.loglikelihood(requests(("x", "y" * 129)))


def test_rolling_predicts_every_token_once() -> None:
    tokenizer = load_tokenizer("bytes", None, 256)
    object.__setattr__(tokenizer, "eos_id", 0)
    ids = list(b"it is a truth " * 20)  # 280: windows of 128 and 128, and the last 24
    ends = [(0, 0, 128), (127, 128, 256), (151, 256, 280)]
    (log_p,) = HarnessModel(golden(), tokenizer).loglikelihood_rolling(
        requests((bytes(ids).decode(),))
    )
    pairs = [
        ([0, *ids[start:first]] if not start else ids[start:first], ids[first:last])
        for start, first, last in ends
    ]
    expected = sum(
        result.log_p for result in likelihoods(golden(), [Pair(*pair) for pair in pairs], 1)
    )
    assert_close(log_p, expected, "float32", "forward")


def test_generate_until() -> None:
    harness = HarnessModel(golden(), load_tokenizer("bytes", None, 256), rows=2)
    prompts = [list(b"Once"), list(b"x" * 60 + b"Once")]
    full, after = complete(golden(), BYTES, prompts, 64, 2)
    stop = full.text[5:7]
    arguments = [
        ("Once", {"until": [], "max_gen_toks": 64}),
        ("Once", {"until": [stop], "max_gen_toks": 64, "do_sample": False}),
        # Truncated to the 64 tokens for which the model has positions.
        ("x" * 300 + "Once", {"until": [], "max_gen_toks": 64, "temperature": 0.0}),
    ]
    first, second, third = harness.generate_until(requests(*arguments))
    assert (first, third) == (full.text, after.text)
    assert second == first[: first.index(stop)]
    with pytest.raises(UserError, match="generates with num_beams"):
        harness.generate_until(requests(("x", {"num_beams": 3})))
    with pytest.raises(UserError, match="leaves no positions for a"):
        harness.generate_until(requests(("x", {"max_gen_toks": 128})))


def test_chat_templates() -> None:
    tokenizer = load_tokenizer("bytes", None, 256)
    object.__setattr__(tokenizer, "chat_template", "{{ messages[0].content }}!")
    harness = HarnessModel(golden(), tokenizer)
    assert harness.apply_chat_template([{"role": "user", "content": "x"}]) == "x!"
    with_system = HarnessModel(golden(), tokenizer, system="S")
    assert with_system.apply_chat_template([{"role": "user", "content": "x"}]) == "S!"
    assert with_system.apply_chat_template([{"role": "system", "content": "T"}]) == "T!"
    assert harness.chat_template(True) == tokenizer.chat_template
    assert harness.tokenizer_name.startswith("bytes-")
    with pytest.raises(UserError, match="begins the model's turn"):
        harness.apply_chat_template([], add_generation_prompt=False)


def test_a_chat_answer_ends_at_the_end_of_turn() -> None:
    tokenizer = load_tokenizer("bytes", None, 256)
    chat_requests = requests(("Once", {"until": [], "max_gen_toks": 32}))
    harness = HarnessModel(golden(), tokenizer)
    (full,) = harness.generate_until(chat_requests)
    template = (
        "{% for m in messages %}{{ m.content }}{{ 'END' if m.role == 'assistant' }}{% endfor %}"
    )
    object.__setattr__(tokenizer, "chat_template", template.replace("END", full[5:7]))
    assert harness.generate_until(chat_requests) == [full]  # no chat
    assert harness.apply_chat_template([{"role": "user", "content": "Once"}]) == "Once"
    assert harness.generate_until(chat_requests) == [full[: full.index(full[5:7])]]


TASK = """
task: small
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_bytes
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    records = [
        {"question": f"{n} + 1?", "choices": ["one", str(n + 1), "eleven"], "answer": n % 3}
        for n in range(6)
    ]
    data = tmp_path / "q.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "small.yaml").write_text(TASK.replace("DATA", str(data)))
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    run_evaluate(monkeypatch, "--tokenizer", "bytes", *arguments)


def test_a_task_gives_our_own_results(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    command(
        monkeypatch,
        *("--lm-eval", "small", "--include-path", folder, "--json", folder / "out.json"),
    )
    results = json.loads((folder / "out.json").read_text())["models"]
    questions = read_choices(str(folder / "q.jsonl"), None, None)
    pairs = encode_choices(load_tokenizer("bytes", None, 256), PromptFormat(), questions)
    score = evaluate_choices(questions, pairs, 4, golden())
    expected = {
        "acc": (score["accuracy"], score["stderr"]),
        "acc_bytes": (score["accuracy_per_byte"], score["stderr_per_byte"]),
    }
    assert {result["metric"] for result in results} >= set(expected)
    for result in results:
        if result["metric"] in expected:
            mean, stderr = expected[result["metric"]]
            assert result["task"] == "small"
            assert result["value"] == mean
            assert math.isclose(result["stderr"], stderr)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("q.jsonl", "gone.jsonl", "FileNotFoundError: .*gone.jsonl"),
        ("path: json", "path: ./nowhere", "nowhere"),
        ("multiple_choice", "guess", "guess"),
        ("doc_to_text", "doc_to_texts", "TypeError: .*doc_to_texts"),
    ],
)
def test_a_task_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str, cause: str
) -> None:
    file = folder / "small.yaml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"^task small: cannot be loaded: .*{cause}") as caught:
        command(monkeypatch, "--lm-eval", "small", "--include-path", folder)
    assert "\n" not in str(caught.value)


def test_unknown_tasks_folders_and_options(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    # Indexing the thousands of task files of the harness takes seconds.
    from lm_eval.tasks import TaskManager

    without_defaults = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("sat_jax.evaluate.harness.TaskManager", without_defaults)
    for arguments, message in [
        (["other", "--include-path", str(folder)], "no task other in lm-evaluation-harness or in"),
        (["small", "--include-path", "nowhere"], "nowhere: no such folder"),
        (["small", "--prompt", "x"], "--prompt has no effect with --lm-eval"),
    ]:
        with pytest.raises(UserError, match=message):
            command(monkeypatch, "--lm-eval", *arguments)
