"""Command lines of all scripts: bad input is one line on stderr and exit code 2, no traceback."""

import argparse
import sys
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
    "model (that of the model), bytes, or the path of a tokenizer.json or its folder; default:"
    " model, or the tokenizer of the run"
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


def run(main: Callable[[], object]) -> None:
    """Call `main`; a `UserError` becomes one line and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
