"""Generation: agreement of cached decoding with full forward passes; stops and sampling."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_jax.config import Config, DataConfig
from sat_jax.data.chat import render_chat
from sat_jax.data.tokenizer import load_tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate import eval_model
from sat_jax.evaluate import generate as module
from sat_jax.evaluate.generate import GREEDY, Sampling, generate, stream
from sat_jax.evaluate.text_stream import TextStream
from sat_jax.interop import open_weights
from sat_jax.models.build import layout_of
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.rope import RopeConfig
from sat_jax.train.inputs import write_model
from sat_jax.train.workdir import WorkDir
from scripts import generate as script
from tests.cached_decoding import cached_logits, changed, golden, left_padded, prompts_of
from tests.conftest import slow_after
from tests.golden_model import GOLDEN, logits_of, tokenizer_with
from tests.tolerances import assert_close

YARN = RopeConfig(type="yarn", factor=4.0, original_max_positions=8)
DYNAMIC = RopeConfig(type="dynamic", factor=2.0, original_max_positions=8)


def greedy_without_cache(
    model: Decoder, prompt: Sequence[int], count: int, length: int
) -> list[int]:
    """Return greedy tokens, each from a forward pass over all tokens before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(tokens, length, model)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", slow_after(1, "llama_gqa", "llama_mha", "llama_tied"))
def test_greedy_ids_of_the_reference(name: str) -> None:
    reference = np.load(GOLDEN / name / "reference.npz")
    ids = generate(golden(name), reference["greedy_prompt"].tolist(), 12, stop_ids=())
    assert ids == reference["greedy_ids"].tolist()


@pytest.mark.parametrize(
    ("name", "dtype", "rope"),
    slow_after(
        2,
        ("mistral", "float32", None),
        ("qwen3", "bfloat16", None),
        ("llama_gqa", "float32", None),
        ("llama_tied", "float32", YARN),
        ("qwen2", "float32", None),
        ("qwen3", "float32", None),
    ),
)
def test_cache_gives_the_logits_of_a_forward_pass(
    name: str, dtype: str, rope: RopeConfig | None
) -> None:
    model = golden(name, dtype)
    if rope is not None:
        model = changed(model, rope=rope)
    prompts = prompts_of(model, 14, 5)
    logits = cached_logits(model, *left_padded(prompts, 0))
    for row, prompt in enumerate(prompts):
        expected = logits_of(prompt, 14, model)
        assert_close(logits[row, 14 - len(prompt) :], expected, dtype, "forward")


def test_padding_is_never_attended_to() -> None:
    model = golden("llama_gqa")
    prompts = prompts_of(model, 14, 5)
    zeros, nonzeros = (cached_logits(model, *left_padded(prompts, fill))[1] for fill in (0, 200))
    assert_close(zeros[9:], nonzeros[9:], "float32", "exact")
    assert (zeros[:9] != nonzeros[:9]).any()


@pytest.mark.slow
def test_prompts_of_several_lengths_and_chunks() -> None:
    # Beyond the trained length, each row has angles for its own length.
    model = changed(golden("llama_gqa"), rope=DYNAMIC, max_positions=8)
    prompts = prompts_of(model, 700, 3)
    expected = [greedy_without_cache(model, prompt, 2, 702) for prompt in prompts]
    assert generate(model, prompts, 2, stop_ids=()) == expected


def test_rows_end_at_their_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden("llama_gqa")
    prompts = prompts_of(model, 9, 5)
    first, second = unstopped = generate(model, prompts, 12, stop_ids=())
    steps: list[int] = []
    decode = module._decode

    def counted(*arguments: object) -> tuple:
        result = decode(*arguments)
        steps.append(int(result[2]))
        return result

    monkeypatch.setattr(module, "_decode", counted)
    for stop in ({first[2], second[5]}, {first[0], second[7]}, {first[0], second[0]}):
        ends = [next((i for i, token in enumerate(row) if token in stop), 12) for row in unstopped]
        assert min(ends) < max(ends) or ends == [0, 0]
        steps.clear()
        rows = generate(model, prompts, 12, stop_ids=stop)
        assert rows == [row[:end] for row, end in zip(unstopped, ends, strict=True)]
        # The last token that is generated is the stop token of the last row.
        assert sum(steps) == min(max(ends) + 1, 12)


def test_end_of_text_token_of_the_model_ends_a_row() -> None:
    prompts = prompts_of(golden("llama_gqa"), 9, 5)
    row = generate(golden("llama_gqa"), prompts, 12, stop_ids=())[0]
    model = changed(golden("llama_gqa"), eos_token_ids=(256, row[4]))
    assert generate(model, prompts, 12)[0] == row[: row.index(row[4])]


def test_stream_is_generate_in_parts() -> None:
    model = golden("llama_gqa")
    prompts = prompts_of(model, 4, 6)
    full = generate(model, prompts, 70, stop_ids=())
    assert [len(row) for row in full] == [70, 70]
    parts = list(stream(model, prompts, 70, stop_ids=(), every=8))
    assert [len(part[0]) for part in parts] == [8] * 8 + [6]
    large_parts = stream(model, prompts, 70, stop_ids=(), every=100)
    assert [part[0] for part in large_parts] == [full[0][:64], full[0][64:]]
    assert [[t for part in parts for t in part[row]] for row in (0, 1)] == full
    assert generate(model, prompts, 1, stop_ids=()) == [row[:1] for row in full]


def test_samples_depend_on_the_seed_and_not_on_other_rows() -> None:
    model = golden("llama_gqa")
    prompts = prompts_of(model, 4, 6)
    draw = functools.partial(generate, model, sampling=Sampling(1.0), stop_ids=())
    both = draw(prompts, 10, seed=1)
    assert both == draw(prompts, 10, seed=1)
    assert both[0] != draw(prompts, 10, seed=2)[0]
    assert draw(prompts[:1], 10, seed=1) == both[:1]
    assert draw([prompts[0]] * 2, 10, seed=1)[0] != draw([prompts[0]] * 2, 10, seed=1)[1]
    # Also in another row, if that has the same number.
    (part,) = stream(
        model, [prompts[1]], 10, sampling=Sampling(1.0), seed=1, stop_ids=(), every=10, numbers=[1]
    )
    assert part[0] == both[1]
    assert len(set(both[0])) > 5, "each step has its own key"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    slow_after(
        2,
        (GREEDY, [0, 0, 1, 0]),
        (Sampling(1.0), [0.15, 0.3, 0.5, 0.05]),
        (Sampling(0.5), [0.0225, 0.09, 0.25, 0.0025]),
        (Sampling(1e-6), [0, 0, 1, 0]),
        (Sampling(1.0, top_k=2), [0, 0.3, 0.5, 0]),
        (Sampling(1.0, top_p=0.75), [0, 0.3, 0.5, 0]),
        (Sampling(1.0, top_p=0.85), [0.15, 0.3, 0.5, 0]),
        # top_p applies after top_k: the first of the two tokens then has 0.625.
        (Sampling(1.0, top_k=2, top_p=0.6), [0, 0, 1, 0]),
        (Sampling(1.0, top_k=9, top_p=1.0), [0.15, 0.3, 0.5, 0.05]),
    ),
)
def test_sampling_distribution(sampling: Sampling, expected: list[float]) -> None:
    draws = 8_000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.15, 0.3, 0.5, 0.05])) + 3, (draws, 4))
    tokens = module._sample(
        logits, sampling, jax.random.key(0), jnp.int32(5), jnp.arange(draws, dtype=jnp.uint32)
    )
    share = np.bincount(np.asarray(tokens), minlength=4) / draws
    expected = np.array(expected) / np.sum(expected)
    assert (share[expected == 0] == 0).all()
    assert np.abs(share - expected).max() < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, [], 1), "no prompt"),
        (lambda m: generate(m, [[1], []], 1), "prompt 1 has no tokens"),
        (lambda m: generate(m, [[1, 256]], 1), "prompt 0 has the id 256; accepted: 0 to 255"),
        (lambda m: generate(m, [[-1]], 1), "has the id -1"),
        (lambda m: generate(m, [[1]], 0), "0 new tokens"),
        (
            lambda m: generate(m, [[1] * 100], 29),
            "100 tokens and 29 new tokens: the length 129 exceeds the model's 128 positions",
        ),
        (lambda m: generate(m, [[1]], 1, seed=-1), "seed -1"),
        (lambda _: Sampling(-1.0), "temperature -1"),
        (lambda _: Sampling(float("nan")), "temperature nan"),
        (lambda _: Sampling(1e-7), "temperature 1e-07"),
        (lambda _: Sampling(1.0, top_k=0), "top-k 0"),
        (lambda _: Sampling(1.0, top_p=0.0), "top-p 0"),
        (lambda _: Sampling(top_k=4), "need a temperature"),
    ],
)
def test_bad_input_is_refused(call: Callable[[Decoder], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(golden("llama_gqa"))


@pytest.mark.parametrize("form", ["masks", "segments"])
def test_a_model_with_omitted_units_is_refused(form: str) -> None:
    layout, values = layout_of(golden("llama_gqa").config), flat_values(golden("llama_gqa"))
    if form == "masks":
        shape = (layout.layers, layout.units["channel"].size)
        model = layout.bind(values, {"channel": jnp.ones(shape)})
    else:
        model = layout.bind(
            {p: (v[:2], v[2:]) if layout.leaves[p].in_layers else v for p, v in values.items()}
        )
    with pytest.raises(ValueError, match="expand it first"):
        generate(model, [[1]], 1)


# --- Text ------------------------------------------------------------------------------------


@given(st.text(max_size=12), st.lists(st.integers(1, 4), max_size=40))
def test_streamed_text_has_complete_characters(text: str, sizes: list[int]) -> None:
    tokenizer = load_tokenizer("bytes", None, 256)
    ids = list(text.encode())
    out, parts = TextStream(tokenizer.decode, list(b"before")), []
    for size in sizes:
        parts.append(out.push(ids[:size]))
        ids = ids[size:]
        assert "\ufffd" in text or "\ufffd" not in parts[-1]
    parts.append(out.push(ids))
    assert "".join(parts) + out.close() == text


def test_text_is_returned_as_soon_as_it_is_final() -> None:
    out = TextStream(load_tokenizer("bytes", None, 256).decode)
    pushed = [out.push([byte]) for byte in "aé€".encode()]
    assert pushed == ["a", "", "é", "", "", "€"]
    assert out.push(b"\xe2\x82") == ""
    assert out.close() == "\ufffd"
    assert out.close() == ""


def test_leading_space_is_kept() -> None:
    words = ["<s>", "▁Once", "▁upon", "▁a", "▁time"]

    def decode(ids: Sequence[int]) -> str:  # SentencePiece removes the leading space
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    out = TextStream(decode, [1, 2])
    assert [out.push([3]), out.push([4])] == [" a", " time"]


def test_text_ends_before_a_stop() -> None:
    decode = load_tokenizer("bytes", None, 256).decode
    out = TextStream(decode, stop="\n##")
    pushed = [out.push([byte]) for byte in b"a\n#b\n\n##c"]
    assert pushed == ["a", "", "", "\n#b", "", "\n", "", "", ""]
    assert out.ended and out.close() == ""
    out = TextStream(decode, stop="\n##")
    assert out.push(b"a\n#") == "a"
    assert (out.close(), out.close(), out.ended) == ("\n#", "", False)


def test_chat_templates() -> None:
    template = (
        "{%- for message in messages %}\n"
        "  {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ bos_token }}[{{ message.role }}] {{ message | tojson }}\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt and tools is none %}[assistant] {% endif %}"
    )
    messages = [{"role": "user", "content": "a <b> 'é'"}]
    expected = '<s>[user] {"role": "user", "content": "a <b> \'é\'"}[assistant] '
    assert render_chat(template, messages, {"bos_token": "<s>"}) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "chat template fails"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError"),
    ],
)
def test_a_template_fails_in_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_chat(template, [{"role": "user", "content": "x"}], {})


# --- The script ------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    script.main()


def test_script_prints_the_tokens_of_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = generate(golden("llama_gqa"), [list(b"Once")], 20)[0]
    command(
        monkeypatch,
        *("--model", GOLDEN / "llama_gqa", "--tokenizer", "bytes", "--prompt", "Once"),
        *("--max-new-tokens", "20"),
    )
    printed = capsys.readouterr()
    assert printed.out == load_tokenizer("bytes", None, 256).decode(ids) + "\n"
    assert f"[prompt 4 tokens, {len(ids)} new tokens; the first after" in printed.err
    assert "tokens/s" in printed.err


@pytest.mark.parametrize("end", ["=", "=5", "5Q"])  # a token, and two texts
def test_script_ends_at_the_end_of_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, end: str
) -> None:
    ids = generate(golden("llama_gqa"), [list(b"Once")], 20)[0]
    template = (
        "{% for m in messages %}{{ m.content }}{{ 'END' if m.role == 'assistant' }}{% endfor %}"
    )
    chatty = tokenizer_with(tmp_path / "chatty", template.replace("END", end), "=")
    arguments = ("--model", GOLDEN / "llama_gqa", "--tokenizer", chatty, "--prompt", "Once")
    text = load_tokenizer("bytes", None, 256).decode(ids)
    for chat, expected in (((), text), (("--chat",), text.partition(end)[0])):
        command(monkeypatch, *arguments, "--max-new-tokens", "20", *chat)
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a\udcffb"], "--prompt is not UTF-8 at character 1"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--system", "S"], "--system has no effect without --chat"),
        (["--prompt", "x", "--max-new-tokens", "many"], "--help lists what is accepted"),
        (["--prompt", "x", "--max-new", "3"], "unrecognized arguments"),
    ],
)
def test_script_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--model", GOLDEN / "llama_gqa", "--tokenizer", "bytes", *arguments)


def test_a_run_is_opened_at_its_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = Config(data=DataConfig(tokenizer="bytes"))
    trained = open_weights(GOLDEN / "llama_gqa"), config
    tokenizer = load_tokenizer("bytes", None, 256)
    write_model(WorkDir(tmp_path), trained[0].config, tokenizer)
    monkeypatch.setattr(eval_model, "is_run", lambda path: path == tmp_path)
    monkeypatch.setattr(
        eval_model, "open_run", lambda path, step: {(tmp_path, None): trained}[path, step]
    )
    command(monkeypatch, "--model", tmp_path, "--prompt", "Once", "--max-new-tokens", 20)
    ids = generate(golden("llama_gqa"), [list(b"Once")], 20)[0]
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
