"""Command lines of all scripts: bad input is one line on stderr and exit code 2, no traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from sat_jax.errors import UserError


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


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` becomes one line and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
