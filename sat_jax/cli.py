"""Command lines of all scripts: bad input is one line on stderr and exit code 2, no traceback."""

import argparse
import errno
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from sat_jax.errors import UserError

# Help texts of options that several scripts have.
MODEL_HELP = (
    "a Hugging Face directory, a .gguf file, package:NAME for a model in an installed package, or"
    " the work directory of a run (its newest checkpoint)"
)
SOURCES_HELP = (
    "files, folders or globs of text, Markdown, JSON lines or CSV, also .gz or .zst;"
    " package:NAME[/path or glob] for the files of an installed Python package;"
    " tfds:FOLDER[:split] for a prepared TFDS dataset in array_record"
)
SYSTEM_HELP = "for --chat: the system prompt, '' for none; default: that of the run's training"
TOKENIZER_HELP = (
    "model (that of the model, or of the training of the run), bytes, or the path of a"
    " tokenizer.json or its folder; default: model"
)


def add_sampling(options: argparse.ArgumentParser) -> None:
    """Add the options of generation: length, temperature, top-k, top-p, seed and dtype."""
    add = options.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of new tokens; default 256",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: greedy (default); above 0: random sampling, 1 with the model's probabilities",
    )
    add("--top-k", type=int, metavar="K", help="sample only from the K most likely tokens")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample only from the most likely tokens with this total probability; default 1",
    )
    add("--seed", type=int, default=0, help="random seed of the sampling; default 0")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the computation; default float32",
    )


class Parser(argparse.ArgumentParser):
    """Argument parser of script `name` with the help text `doc`; it raises `UserError`."""

    def __init__(self, name: str, doc: str | None):
        summary, _, details = (doc or "").partition("\n")
        super().__init__(
            f"python -m scripts.{name}",
            description=summary,
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what is accepted")


# A file cannot be written: no space on the device, in the quota, or below the limit of file sizes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[], object]) -> None:
    """Call `main`; a `UserError` becomes one line and exit code 2, an interrupt exit code 130.

    A file that cannot be written because the disk is full is an error of the user too. A closed
    pipe ends the script quietly, with the exit code 141 as in other programs. Characters that the
    encoding of the output does not have are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    threading.excepthook = _report_in_thread
    try:
        code = _exit_code(main)
    finally:
        _discard_unwritten()
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], object]) -> int:
    try:
        try:
            main()
            sys.stdout.flush()
        except UserError as error:
            return _fail(str(error), error)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            place = error.filename or "output"
            return _fail(f"{place}: cannot be written: {error.strerror}", error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    except BrokenPipeError:
        return 141
    return 0


def _fail(message: str, error: BaseException | None) -> int:
    """Print a message. If the cause is a full disk, end the process: whatever runs when the
    interpreter exits would try to write the same files, and print tracebacks."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            _discard_unwritten()
            os._exit(2)
        error = error.__cause__ or error.__context__
    return 2


def _discard_unwritten() -> None:
    """Discard output that cannot be written, so that the interpreter does not try it again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report_in_thread(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, unless it met a full disk, which the main thread reports."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in _FULL):
        threading.__excepthook__(args)
