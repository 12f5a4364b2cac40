"""The modes of `evaluate` for long contexts: perplexity against length, and passkey retrieval."""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np

from sat_jax.data.tokenizer import Tokenizer
from sat_jax.errors import UserError
from sat_jax.evaluate.completions import complete
from sat_jax.evaluate.eval_model import EvalModel
from sat_jax.evaluate.long_context import long_documents, score_context
from sat_jax.evaluate.passkey import (
    ANSWER_TOKENS,
    PasskeyPrompt,
    PasskeyTask,
    passkey_figures,
    passkey_prompts,
)
from sat_jax.evaluate.perplexity import read_text
from sat_jax.nn.decoder import Decoder
from sat_jax.nn.loss import perplexity_of
from scripts.evaluation_meter import Args, Evaluation, Figures, Meter, measured

_STRIDE = 256  # default, as in the evaluation published with YaRN
_POSITIONS = 16  # parts of a window, in which perplexities by position are averaged


def context_evaluations(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    """Return the evaluation of each model on a text, with a line for each context length."""
    texts = read_text(args.text, args.text_field, args.max_bytes, partial(print, file=sys.stderr))
    stride = _STRIDE if args.stride is None else args.stride
    result = []
    for eval_model in models:
        for context in args.context:
            eval_model.weights.config.check_length("--context", context)
            if not 1 <= stride <= context:
                raise UserError(
                    f"--context {context} and --stride {stride}; accepted: 1 to {context}"
                )
        documents = eval_model.tokenizer(args.tokenizer).encode_batch(texts)
        # The same documents for all contexts, so that their perplexities can be compared.
        used = long_documents(documents, max(args.context))
        if len(used) < len(documents):
            shorter = f"{len(documents) - len(used)} of {len(documents)} documents"
            print(f"left out: {shorter}, of {max(args.context)} tokens or less", file=sys.stderr)
        tokens = sum(len(document) - 1 for document in used)
        runs = [
            measured(tokens, partial(_context_figures, used, context, stride, args.rows))
            for context in args.context
        ]
        result.append(partial(_all_lines, runs))
    return result


def _context_figures(
    documents: list[list[int]], context: int, stride: int, rows: int, model: Decoder, meter: Meter
) -> Figures:
    score = score_context(model, documents, context, stride, rows, meter)
    parts = np.array_split(score.position_nll, min(_POSITIONS, context))
    return {
        "context": context,
        "stride": stride,
        "documents": len(documents),
        "tokens": score.tokens,
        "nll": score.nll,
        "perplexity": perplexity_of(score.nll / score.tokens),
        "windows": score.windows,
        "window_perplexity": perplexity_of(score.window_nll),
        "full_windows": score.full_windows,
        "position_perplexity": [perplexity_of(float(part.mean())) for part in parts],
    }


def passkey_evaluations(args: Args, models: list[EvalModel]) -> list[Evaluation]:
    """Return the passkey retrieval of each model, with a line for each length."""
    result = []
    for eval_model in models:
        tokenizer = eval_model.tokenizer(args.tokenizer)
        runs = []
        for length in args.passkey:
            eval_model.weights.config.check_length("--passkey", length)
            task = PasskeyTask(length, args.depths, args.trials, args.keys, args.seed)
            prompts = passkey_prompts(task, tokenizer)
            evaluate = partial(_retrieve, task, prompts, tokenizer, args.rows)
            runs.append(measured(len(prompts) * ANSWER_TOKENS, evaluate))
        result.append(partial(_all_lines, runs))
    return result


def _retrieve(
    task: PasskeyTask,
    prompts: list[PasskeyPrompt],
    tokenizer: Tokenizer,
    rows: int,
    model: Decoder,
    meter: Meter,
) -> Figures:
    def answer(ids: list[list[int]]) -> list[str]:
        completions = complete(model, tokenizer, ids, ANSWER_TOKENS, rows, on_batch=meter)
        return [completion.text for completion in completions]

    return passkey_figures(task, prompts, answer)


def _all_lines(runs: list[Evaluation], model: Decoder) -> Iterator[Figures]:
    for run in runs:
        yield from run(model)
