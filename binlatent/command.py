"""What the commands have in common: their log, and how they report what went wrong."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from binlatent.errors import UserError


@contextmanager
def reporting() -> Iterator[None]:
    """Logs the package's progress; a user's error, raised inside, is one sentence and exit code 1.

    So is an error of the file system; Ctrl-C is one word and exit code 130.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("binlatent").setLevel(logging.INFO)
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error)
        if not message.startswith("config"):  # a key's name, as the user types it
            message = message[:1].upper() + message[1:]
        sys.stderr.write(f"Error: {message}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
