"""Decoding with RoPE that depends on the length: equality with a pass over each prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sat_jax.errors import UserError
from sat_jax.evaluate.generate import check_prompts
from sat_jax.nn.context import Cache
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.rope import RopeConfig
from tests.cached_decoding import cached_logits, changed, extend, golden, left_padded, prompts_of
from tests.conftest import slow_after
from tests.golden_model import logits_of
from tests.tolerances import assert_close

DYNAMIC = RopeConfig(type="dynamic", factor=2.0, original_max_positions=8)
LONGROPE = RopeConfig(
    type="longrope",
    original_max_positions=8,
    attention_factor=1.2,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.0, 1.5, 2.5, 4.0),
)
BY_LENGTH = {
    "dynamic": DYNAMIC,
    "dynamic_yarn": RopeConfig(type="dynamic_yarn", factor=1.5, original_max_positions=8),
    "longrope": LONGROPE,
}


@pytest.mark.parametrize(
    ("kind", "step"),
    slow_after(1, ("longrope", 1), ("dynamic", 1), ("dynamic_yarn", 1), ("dynamic", 3)),
)
def test_every_decoded_token_equals_a_forward_pass_over_its_prefix(kind: str, step: int) -> None:
    """RoPE that depends on the length: from below the original length of 8 to above it, in a batch
    of unequal lengths, and back to a short row."""
    model = changed(golden("llama_gqa"), rope=BY_LENGTH[kind])
    prompts = prompts_of(model, 18, 12, 6)
    for rows in (prompts, [prompts[2]]):
        tokens, padding = left_padded(rows, 0)
        logits = cached_logits(model, tokens, padding, step)
        for row, prompt in enumerate(rows):
            for end in range(step, tokens.shape[1] + 1, step):
                length = end - padding[row]
                if length > 0:
                    expected = logits_of(prompt[:length], 18, model)[-1]
                    assert_close(logits[row, end - 1], expected, "float32", "forward")


def test_longrope_changes_its_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are computed again at the first long token; with `dynamic` at each of them."""
    again: list[int] = []
    compute_again = Decoder._compute_again

    def counted(self: Decoder, cache: Cache, count: int) -> object:
        jax.debug.callback(lambda used: again.append(int(used) + 1), cache.used)
        return compute_again(self, cache, count)

    monkeypatch.setattr(Decoder, "_compute_again", counted)
    for rope, times in ((LONGROPE, [9]), (DYNAMIC, [9, 10, 11])):
        model = changed(golden("llama_gqa"), rope=rope)
        extend.clear_cache()
        cached_logits(model, *left_padded(prompts_of(model, 11), 0), step=1)
        jax.effects_barrier()
        assert again == times
        again.clear()
    extend.clear_cache()


def test_the_length_of_a_row_counts_its_tokens_alone() -> None:
    """Not padding, whatever its positions, and not the slots after the first `slots`."""
    arrays = [jnp.asarray([row, row]) for row in ([7] * 5, [0, 1, 1, 1, 0], [90, 0, 1, 2, 91])]
    cache = Cache({}, *arrays, used=jnp.zeros((), jnp.int32))
    assert [cache.row_lengths(slots).tolist() for slots in (1, 3, 5)] == [[0, 0], [2, 2], [3, 3]]


@pytest.mark.parametrize("kind", ["yarn", "yarn_paper", "ntk_by_parts_paper", "ntk_by_parts_code"])
def test_a_length_beyond_the_scaling_warns(kind: str) -> None:
    """The model has 128 positions, and its RoPE is scaled to 4 times 8 tokens."""
    rope = RopeConfig(type=kind, factor=4.0, original_max_positions=8)
    model = changed(golden("llama_gqa"), rope=rope)
    text = f"new tokens: the length 33: rope type '{kind}' with factor 4 .* is defined to 32 tokens"
    with pytest.warns(UserWarning, match=text):
        check_prompts(model.config, [[1] * 31], 2)
    check_prompts(model.config, [[1] * 30], 2)


def test_lengths_without_a_limit_of_the_scaling() -> None:
    """`dynamic` types have none; the others end at the positions of the model."""
    config = golden("llama_gqa").config
    for kind in ("dynamic", "dynamic_yarn"):
        rope = RopeConfig(type=kind, original_max_positions=8)
        dataclasses.replace(config, rope=rope).check_length("a row of", 10_000)
    for rope in (RopeConfig(type="llama3", factor=2.0, original_max_positions=8), LONGROPE):
        limited = dataclasses.replace(config, rope=rope)
        limited.check_length("a row of", 128)
        with pytest.raises(UserError, match="a row of 129 exceeds the model's 128 positions"):
            limited.check_length("a row of", 129)
