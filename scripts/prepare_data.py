"""Tokenize and pack text once, so that training only reads rows.

  python -m scripts.prepare_data --sources 'package:sympy/**/*.py' --tokenizer bytes
  python -m scripts.prepare_data --sources books/ notes.jsonl.gz --model-path DIRECTORY
  python -m scripts.prepare_data --sources chats.jsonl --format messages --model-path DIRECTORY

Training prepares its data itself; the options of this script are its settings data.*. Run this
script first so that a training job spends no time on it. Data that are already prepared are not
prepared again. Training reads only the cache, $SAT_JAX_CACHE (default ~/.cache/sat_jax); data in
--out are for scripts.evaluate --prepared and for other programs.
"""

from dataclasses import fields
from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.config import DataConfig
from sat_jax.errors import UserError

_TYPES = {  # of options that are no text
    "row_length": int,
    "held_out": float,
    "max_tokens": int,
    "min_document_tokens": int,
}


def parser() -> Parser:
    """Return the parser of the command line, with an option for every field of `data`."""
    options = Parser("prepare_data", __doc__)
    add = options.add_argument
    for field in fields(DataConfig):
        help_text = field.metadata["help"]
        if field.name == "sources":
            add("--sources", nargs="+", required=True, metavar="SOURCE", help=help_text)
            continue
        add(
            f"--{field.name.replace('_', '-')}",
            type=_TYPES.get(field.name, str),
            default=field.default,
            metavar="VALUE",
            help=help_text if field.default is None else f"{help_text}; default {field.default}",
        )
    add(
        "--model-path", metavar="PATH", help="a Hugging Face directory, .gguf file, or package:NAME"
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary of the model; a tokenizer with more tokens is refused",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the prepared data; default: the cache")
    return options


def main() -> None:
    """Prepare the data and print their sizes."""
    args = parser().parse_args()
    # Imported here, so that --help and errors in the options are fast.
    from sat_jax.data.data_format import DataFormat
    from sat_jax.data.prepare import prepare
    from sat_jax.data.sources import counted
    from sat_jax.data.tokenizer import load_tokenizer
    from sat_jax.interop import locate

    if args.vocab_size is not None and args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size}; accepted: 1 or more")
    model = locate(args.model_path) if args.model_path else None
    tokenizer = load_tokenizer(args.tokenizer, model, args.vocab_size)
    prepared = prepare(
        sources=args.sources,
        tokenizer=tokenizer,
        row_length=args.row_length,
        held_out=args.held_out,
        max_tokens=args.max_tokens,
        data_format=DataFormat.from_settings(args),
        root=args.out,
        log=print,
    )
    info = prepared.info
    columns = ("documents", "text_bytes", "tokens", "targets", "rows", "long_documents")
    print("".join(f"{name:>16}" for name in ("split", *columns, "useful_share")))
    for name, split in info.splits.items():
        counts = "".join(f"{getattr(split, column):>16,}" for column in columns)
        print(f"{name:>16}{counts}{split.useful_share:>16.1%}")
    shares = [
        f"{split.longest_share:.1%} ({name})"
        for name, split in info.splits.items()
        if split.longest_share is not None
    ]
    print(f"share of a row's tokens in its longest document: {', '.join(shares) or 'not counted'}")
    print(f"{info.files} files, {info.documents} documents; skipped: {counted(info.left_out)}")
    if info.form["format"] == "text":
        eos = "no eos" if tokenizer.eos_id is None else f"eos {tokenizer.eos_id}"
        bos = f"bos {tokenizer.bos_id}" if tokenizer.adds_bos else "no bos"
        print(f"tokenizer with {info.vocab_size} ids, adds {bos} and {eos} to each document")


if __name__ == "__main__":
    run(main)
