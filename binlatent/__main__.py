"""`python -m binlatent`, and the command `binlatent`: the same as `python -m binlatent.main`."""

import runpy


def run() -> None:
    """Runs `binlatent.main` as a program, so that absl's --help lists its flags."""
    runpy.run_module("binlatent.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
