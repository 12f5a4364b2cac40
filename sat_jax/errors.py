"""The one exception for everything a user can put right."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what is accepted.

    Scripts print it on stderr and exit with code 2 (`sat_jax.cli.run`). It never hides a bug.
    """
