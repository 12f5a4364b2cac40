"""Train a tokenizer on text: byte-level BPE, in the files that transformers loads.

  python -m scripts.train_tokenizer 'package:sympy/**/*.py' --vocab-size 4096 --out runs/tokenizer
  python -m scripts.train --config=FILE --config.data.tokenizer=runs/tokenizer ...

Sources are those of `data.sources`: files, folders, globs, package:NAME, tfds:FOLDER. Every byte is
a token, so that any text can be encoded. Documents end with <|endoftext|>.
"""

import sys
from functools import partial
from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError, folder_error


def parser() -> Parser:
    """Return the parser of the command line."""
    result = Parser("train_tokenizer", __doc__)
    add = result.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="text to train on")
    add("--vocab-size", type=int, required=True, metavar="N", help="number of tokens")
    add("--text-field", default="text", metavar="NAME", help="field of JSON lines; default text")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    return result


def main() -> None:
    """Train and write the tokenizer, and print its size."""
    args = parser().parse_args()
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out}: exists and is not an empty folder; accepted: a new one")
    from sat_jax.data.train_tokenizer import train_tokenizer

    log = partial(print, file=sys.stderr)
    tokenizer = train_tokenizer(args.sources, args.vocab_size, args.text_field, log)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(args.out)
    except OSError as error:
        raise UserError(f"{args.out}: {folder_error(error)}") from error
    print(f"{args.out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:12]}")


if __name__ == "__main__":
    run(main)
