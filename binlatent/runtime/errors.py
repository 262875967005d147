"""The error for mistakes of users."""


class UserError(ValueError):
    """A one-line message: what is wrong and what to do. Commands print it and exit with code 1."""
