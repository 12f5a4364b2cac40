"""Tokenizes and packs text once, so that training only reads rows. The same input is done once.

  python -m scripts.prepare_data --sources 'package:sympy/**/*.py' --tokenizer bytes
  python -m scripts.prepare_data --sources books/ notes.jsonl.gz --model-path DIRECTORY
  python -m scripts.prepare_data --sources chats.jsonl --format messages --model-path DIRECTORY

Training prepares what it needs by itself, with these settings as `data.*`; to run this first is
useful where the machine that trains should not spend its time on it. Training looks only in the
cache, $SAT_JAX_CACHE (default ~/.cache/sat_jax): what --out puts elsewhere is for evaluate and you.
"""

from pathlib import Path

from sat_jax.cli import Parser, run
from sat_jax.errors import UserError


def parser() -> Parser:
    """What the command line takes."""
    made = Parser("prepare_data", __doc__)
    add = made.add_argument
    add(
        "--sources",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files, folders or globs of text, Markdown or JSON-lines, also .gz or .zst; "
        "package:NAME[/path or glob] for the files of an installed Python package; "
        "tfds:FOLDER[:split] for a prepared TFDS dataset in array_record",
    )
    add(
        "--tokenizer",
        default="model",
        help="model (the one of --model-path), bytes, or a tokenizer.json or its folder;"
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
        help="the model's; a tokenizer with more ids is refused",
    )
    add("--row-length", type=int, default=1024, metavar="N", help="tokens a row; default 1024")
    add(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the documents to evaluate on (of a single one: its end), or from 1 on how"
        " many; default 0.05",
    )
    add("--max-tokens", type=int, metavar="N", help="cap on the tokens of both splits together")
    add(
        "--format",
        default="text",
        help="text (default), or examples whose answers are learnt: messages, sharegpt, alpaca,"
        " prompt_completion",
    )
    add("--text-field", default="text", metavar="NAME", help="of JSON lines; default text")
    add("--prompt-field", default="prompt", metavar="NAME", help="of prompt_completion")
    add("--completion-field", default="completion", metavar="NAME", help="of prompt_completion")
    add(
        "--chat-template",
        default="model",
        metavar="NAME",
        help="of examples: model (default) or chatml, llama2, zephyr, alpaca, plain, a .jinja",
    )
    add("--system", metavar="TEXT", help="the system prompt of examples that have none")
    add("--loss-on", default="all", metavar="WHICH", help="all answers (default), or the last")
    add(
        "--too-long",
        default="drop",
        metavar="WAY",
        help="an example longer than a row: drop (default), cut_end or refuse",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to put it; default the cache, which train looks in",
    )
    return made


def main() -> None:
    """Prepares, then prints what there is now."""
    given = parser().parse_args()
    # Only now: --help and a misspelt option answer at once.
    from sat_jax.data.form import Form
    from sat_jax.data.prepare import prepare
    from sat_jax.data.tokenizer import load_tokenizer
    from sat_jax.interop import locate

    if given.vocab_size is not None and given.vocab_size < 1:
        raise UserError(f"--vocab-size {given.vocab_size}; accepted: 1 or more")
    model = locate(given.model_path) if given.model_path else None
    tokenizer = load_tokenizer(given.tokenizer, model, given.vocab_size)
    prepared = prepare(
        sources=given.sources,
        tokenizer=tokenizer,
        row_length=given.row_length,
        held_out=given.held_out,
        max_tokens=given.max_tokens,
        form=Form.of(given),
        root=given.out,
        log=print,
    )
    info = prepared.info
    columns = ("documents", "text_bytes", "tokens", "targets", "rows", "long_documents")
    print("".join(f"{name:>16}" for name in ("split", *columns, "useful_share")))
    for name, split in info.splits.items():
        counts = "".join(f"{getattr(split, column):>16,}" for column in columns)
        print(f"{name:>16}{counts}{split.useful_share:>16.1%}")
    if info.form["format"] != "text":
        why = ", ".join(f"{count} {why}" for why, count in info.left_out.items()) or "none"
        print(f"{info.files} files, {info.documents} examples; left out: {why}")
        return
    left_out = sum(info.left_out.values())
    eos = "no" if tokenizer.eos_id is None else f"eos {tokenizer.eos_id}"
    bos = f"bos {tokenizer.bos_id}" if tokenizer.adds_bos else "no bos"
    print(
        f"{info.files} files, {info.documents} documents with text, {left_out} empty;"
        f" tokenizer of {info.vocab_size} ids, {bos} and {eos} to each document"
    )


if __name__ == "__main__":
    run(main)
