"""What every script shares: bad input is one line on stderr and exit code 2, never a traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from sat_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """The command line of a script, whose module's text is `doc`; it complains by `UserError`."""

    def __init__(self, name: str, doc: str | None):
        head, _, rest = (doc or "").partition("\n")
        super().__init__(
            f"python -m scripts.{name}",
            description=head,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what is accepted")


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a `UserError` becomes one line and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
