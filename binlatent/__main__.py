"""`python -m binlatent`, the same as `python -m binlatent.main` and the command `binlatent`."""

from binlatent.runtime import interrupt


def run() -> None:
    """Runs the main command; imports it late, because the import takes seconds."""
    interrupt.end_at_once()
    from binlatent import main

    main.run()


if __name__ == "__main__":
    run()
