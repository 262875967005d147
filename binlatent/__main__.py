"""`python -m binlatent`: the same as `python -m binlatent.main` and the command `binlatent`."""

from binlatent.main import run

if __name__ == "__main__":
    run()
