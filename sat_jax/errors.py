"""The one exception for everything a user can put right."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what is accepted.

    Scripts print it on stderr and exit with code 2 (`sat_jax.cli.run`). It never hides a bug.
    """


def why_no_folder(error: OSError) -> str:
    """Why a folder cannot be made or written: of a file in its place the system says "exists"."""
    exists = isinstance(error, FileExistsError)
    return "is a file, not a folder" if exists else str(error.strerror or error)
