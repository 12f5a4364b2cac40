"""Tokenize and pack text once, so that training only reads rows.

  python -m scripts.prepare_data --sources 'package:sympy/**/*.py' --tokenizer bytes
  python -m scripts.prepare_data --sources books/ notes.jsonl.gz --model-path DIRECTORY
  python -m scripts.prepare_data --sources chats.jsonl --format messages --model-path DIRECTORY

Training prepares its data itself, with these settings under the names data.*. Run this script first
if the machine that trains should not spend time on it. Data that are already prepared are not
prepared again. Training reads only the cache, $SAT_JAX_CACHE (default ~/.cache/sat_jax); data in
--out are for scripts.evaluate --prepared and for other programs.
"""

from pathlib import Path

from sat_jax.cli import SOURCES_HELP, Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """Return the parser of the command line."""
    options = Parser("prepare_data", __doc__)
    add = options.add_argument
    add(
        "--sources",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help=SOURCES_HELP,
    )
    add(
        "--tokenizer",
        default="model",
        help="model (that of --model-path), bytes, or the path of a tokenizer.json or its folder;"
        " default model",
    )
    add(
        "--model-path",
        metavar="PATH",
        help="a Hugging Face directory, a GGUF file, or package:NAME",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size of the model; a tokenizer with more ids is refused",
    )
    add("--row-length", type=int, default=1024, metavar="N", help="tokens per row; default 1024")
    add(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="held-out set: a share of the documents (of the tokens if there is one document), or"
        " their number if 1 or more; default 0.05",
    )
    add(
        "--max-tokens", type=int, metavar="N", help="maximum number of tokens, both splits together"
    )
    add(
        "--format",
        default="text",
        help="text (default), or conversations with a loss on the answers: messages, sharegpt,"
        " alpaca, prompt_completion",
    )
    add("--text-field", default="text", metavar="NAME", help="field of JSON lines; default text")
    add(
        "--prompt-field",
        default="prompt",
        metavar="NAME",
        help="field of the prompt in prompt_completion; default prompt",
    )
    add(
        "--completion-field",
        default="completion",
        metavar="NAME",
        help="field of the answer in prompt_completion; default completion",
    )
    add(
        "--chat-template",
        default="model",
        metavar="NAME",
        help="chat template of conversations: model (default), chatml, llama2, zephyr, alpaca,"
        " plain, or the path of a .jinja file",
    )
    add("--system", metavar="TEXT", help="system prompt of conversations that have none")
    add("--loss-on", default="all", metavar="ANSWERS", help="all answers (default), or the last")
    add(
        "--too-long",
        default="drop",
        metavar="ACTION",
        help="for a conversation longer than a row: drop (default), cut_end or refuse",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the prepared data; default the cache, which training reads",
    )
    return options


def main() -> None:
    """Prepare the data and print their sizes."""
    args = parser().parse_args()
    # Imported here, so that --help and errors in the options are fast.
    from sat_jax.data.data_format import DataFormat
    from sat_jax.data.prepare import prepare
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
    if info.form["format"] != "text":
        skipped = ", ".join(f"{count} {reason}" for reason, count in info.left_out.items())
        print(f"{info.files} files, {info.documents} examples; skipped: {skipped or 'none'}")
        return
    empty = sum(info.left_out.values())
    eos = "no eos" if tokenizer.eos_id is None else f"eos {tokenizer.eos_id}"
    bos = f"bos {tokenizer.bos_id}" if tokenizer.adds_bos else "no bos"
    print(
        f"{info.files} files, {info.documents} documents with text, {empty} empty;"
        f" tokenizer with {info.vocab_size} ids, adds {bos} and {eos} to each document"
    )


if __name__ == "__main__":
    run(main)
