"""Shared by all commands: flags, JAX settings, logging, error reporting."""

import argparse
import atexit
import functools
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from binlatent.runtime import interrupt, paths
from binlatent.runtime.errors import UserError


def _end(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def bad_usage(message: str) -> NoReturn:
    """Prints what is wrong with the command line and exits with code 2."""
    _end(f"Bad usage: {message} (--help lists the flags, the config file the keys)", 2)


class _PathParser(flags.ArgumentParser):
    """Parses a flag whose value is a path."""

    def parse(self, argument: str) -> str:
        try:
            return paths.expand(argument)
        except UserError as error:
            raise ValueError(str(error)) from error


def define_path(name: str, default: str | None, about: str) -> None:
    """Defines an absl flag whose value is a path; `~` becomes the home folder."""
    flags.DEFINE(_PathParser(), name, default, about)


def path_argument(text: str) -> Path:
    """Parses an argparse argument as a path; `~` becomes the home folder."""
    try:
        return Path(paths.expand(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def asks_for_help(argv: Sequence[str]) -> bool:
    """Returns whether the arguments contain one of absl's help flags."""
    asked = {argument.lstrip("-") for argument in argv if argument.startswith("-")}
    return bool(asked & {"help", "h", "?", "helpshort", "helpfull", "helpxml"})


flags.disclaim_key_flags()  # --help lists a flag under the module that defines it

# Messages of Python and absl about a flag's value, and plainer ones to print instead.
_PLAINER = (
    (r"invalid literal for int.*?: (['\"].*['\"])", r"\1 is not a whole number"),
    (r"could not convert string to float: (['\"].*['\"])", r"\1 is not a number"),
    (r"get_config\(\) takes 0 .*", "this config has no variants: leave out ':' and what follows"),
    (r"\('Non-boolean argument to boolean flag', ('.*')\)", r"\1 is neither true nor false"),
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl's flags and returns the other arguments; an error ends with `bad_usage`.

    It calls `prepare_jax` first, because the config file may use JAX.
    """
    prepare_jax()
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:  # absl's --help exits with code 1; a config file may exit too
        sys.exit(0 if asks_for_help(argv) else end.code)
    except flags.Error as error:
        message = str(error).strip()
        if "Traceback" in message:  # raised in the config file; the last line holds the error
            last = message.splitlines()[-1]
            message = "--config: " + re.sub(r"^[\w.]*Error: ", "", last)
        for theirs, ours in _PLAINER:
            message = re.sub(theirs, ours, message)
    except (AttributeError, KeyError) as error:  # from ml_collections, for an unknown key
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = " ".join(str(error.args[0]).split()) if error.args else ""
        message = f"--config has no key {text.replace(' Did you', '. Did you')}"
        if "'get_config'" in text:
            message = "--config is not a config file: it must define a function get_config()"
    except OSError as error:  # from ml_collections: --config.KEY=VALUE without the config file
        message = f"--config: {str(error).splitlines()[-1].strip()}"
        of_workdir = [x.partition("=")[2] or x for x in argv if "workdir.py:" in x]
        message += "".join(f": {_instead(filename)}" for filename in of_workdir)
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}," if error.filename else "the file"
        message = f"--config: {where} is not valid Python: {error.msg}"
    except Exception as error:  # the config file may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        message = f"--config fails in {place.filename}, line {place.lineno}: {what}"
    bad_usage(message)


def _instead(filename: str) -> str:
    """Returns what to do about a config file that does not exist."""
    name, _, variant = filename.partition(":")
    workdir = variant if Path(name).name == "workdir.py" else ""
    return f"write {shlex.quote(f'--config=workdir:{workdir}')}" if workdir else "check --config"


def given_config() -> ml_collections.ConfigDict | None:
    """Returns the config that --config names, or None without the flag."""
    flag = flags.FLAGS["config"]
    if not flag.present:
        return None
    filename = config_flags.get_config_filename(flag)
    if not Path(filename.split(":")[0]).is_file():
        raise UserError(f"There is no config file {filename}: {_instead(filename)}.")
    if not isinstance(flag.value, ml_collections.ConfigDict):
        raise UserError(f"{filename}: get_config() must return an ml_collections.ConfigDict.")
    return flag.value


# This XLA flag selects the CPU operations that run in YNNPACK, not in XLA's own kernels or Eigen's.
# The value selects matrix products: YNNPACK multiplies by a transposed matrix without copying it.
# JAX 0.10 to 0.12 know the flag and the value. A version that does not would end the process.
_YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_YNN_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def prepare_jax() -> None:
    """Selects faster CPU kernels and turns on JAX's persistent compilation cache.

    The cache is `binlatent/compiled` in XDG_CACHE_HOME or `~/.cache`, and may be deleted. XLA_FLAGS
    and JAX settings of the user take precedence. After JAX has initialised its devices it is too
    late: then this only warns, once.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    is_file = bool(given) and not given.startswith("-")  # XLA then reads its flags from that file
    known = (0, 10) <= jax.__version_info__ < (0, 13)
    kernels = known and not is_file and _YNN_FUSIONS not in given
    cache = jax.config.jax_compilation_cache_dir is None
    cache = cache and jax.config.jax_enable_compilation_cache
    if (kernels or cache) and _jax_has_started():
        if cache or jax.default_backend() == "cpu":
            _warn_too_late()
        return
    if kernels:
        os.environ["XLA_FLAGS"] = f"--{_YNN_FUSIONS}={_YNN_PRODUCTS} {given}".strip()
    if cache:
        folder = _cache_folder()
        if folder is None:
            return  # no writable home, as in some containers: every start compiles again
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # Compiling the many small programs takes as long as compiling the few large ones.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _jax_has_started() -> bool:
    """Returns whether JAX has initialised its devices; afterwards it refuses to change this key."""
    before = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", max(before, 0) + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


@functools.cache
def _warn_too_late() -> None:
    logging.getLogger("binlatent").warning(
        "JAX was in use before binlatent, so binlatent's faster CPU kernels and its cache of "
        "compiled programs are off: load the workdir first, or call "
        "binlatent.runtime.command.prepare_jax() before the first use of JAX."
    )


def _cache_folder() -> Path | None:
    """Returns a writable folder for compiled programs, or None."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The XDG specification: a relative path is to be ignored.
        home = home if home.is_absolute() else Path.home() / ".cache"
        folder = home / "binlatent" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def deferring_interrupt() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, for writes that must not be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


def end_on_sigterm() -> None:
    """Makes SIGTERM end the process with code 143, for commands that resume when run again.

    Training installs its own handler while there is a state to save.
    """

    def end(*_):
        logging.getLogger("binlatent").info("Terminated: run the same command again to resume.")
        raise interrupt.Stopped(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def _unraisable(event: Any) -> None:
    """Calls Python's own hook, except for errors from the threads of a failed save."""
    if "Event loop is closed" not in str(event.exc_value):
        sys.__unraisablehook__(event)


def _end_if_set(interrupted: threading.Event) -> None:
    """Ends an interrupted process at once: JAX 0.10 may crash while Python unloads it."""
    if interrupted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def _missing_device(error: Exception) -> str | None:
    """Returns JAX's message if JAX_PLATFORMS names a platform without a device; else None."""
    platforms = jax.config.jax_platforms
    if not platforms:
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as missing:
        if repr(missing) != repr(error):
            return None
        said = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        # The message is empty for CUDA without its plugin (JAX 0.10).
        return said or f"There is no device of JAX_PLATFORMS={platforms}"
    return None


# How XLA's out-of-memory errors begin. Errors about other resources, such as a kernel's shared
# memory, keep their traceback.
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"


@contextmanager
def reporting() -> Iterator[None]:
    """Turns on the package's log, and prints expected errors in one line.

    Exits with code 1 on a UserError, a file system error, too little memory, a missing device or a
    lost process, and with code 130 on Ctrl-C. Other errors propagate.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("binlatent").setLevel(logging.INFO)
    # Orbax logs long messages about errors that are also raised, and so reported here.
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    interrupted = threading.Event()
    # Registered first to run last: handlers registered later may have files to close.
    atexit.register(_end_if_set, interrupted)
    try:
        with interrupt.raising():
            yield
    except KeyboardInterrupt:
        interrupted.set()
        _end("Interrupted.", 130)
    except Exception as error:
        message = _sentence(error)
        if message is None:
            raise
        _end(f"Error: {message}", 1)


def _sentence(error: Exception) -> str | None:
    """Returns the message for an expected error, or None for one that needs its traceback."""
    text = str(error)
    by_xla = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, UserError | OSError):
        plain = re.match(r"[a-z]+[ ,:']", text)  # config keys and paths keep their case
        return text[:1].upper() + text[1:] if plain else text
    if isinstance(error, MemoryError) or (by_xla and text.startswith(_OUT_OF_MEMORY)):
        what = (text.strip() or "Out of memory").splitlines()[0].rstrip(".")
        return (
            f"{what.removeprefix('RESOURCE_EXHAUSTED: ')}: there is too little memory; take a "
            "smaller batch, or, in training, split it into more parts (train.accumulate)."
        )
    if by_xla and re.search("gloo|nccl", text, re.IGNORECASE) and jax.process_count() > 1:
        return (
            "Another process was lost, or the connection to it: start all of them again to resume "
            "from the last checkpoint."
        )
    if by_xla or not isinstance(error, AssertionError | RuntimeError):
        return None
    if missing := _missing_device(error):
        instead = 'install JAX with support for it ("jax[cuda13]" for "cuda")'
        return f"{missing}: unset JAX_PLATFORMS, or {instead}."
    return None
