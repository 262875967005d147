"""What users can get wrong."""


class UserError(ValueError):
    """One sentence that says what is wrong and what to do; `main` prints it and exits with 1."""
