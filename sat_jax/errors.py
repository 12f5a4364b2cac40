"""The exception for every problem that a user can fix."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what is accepted.

    Scripts print it on stderr and exit with code 2 (`sat_jax.cli.run`). Bugs raise other errors.
    """


def folder_error(error: OSError) -> str:
    """Return why a folder cannot be created or written; "File exists" becomes a clearer text."""
    exists = isinstance(error, FileExistsError)
    return "is a file, not a folder" if exists else str(error.strerror or error)
