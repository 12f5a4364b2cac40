"""What every script shares: bad input is one line on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable

from sat_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a `UserError` becomes one line and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
