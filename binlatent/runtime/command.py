"""What the commands have in common: flags, JAX's settings, the log, how errors are reported."""

import argparse
import atexit
import logging
import os
import re
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
    """Says what is wrong with the command line, and exits with code 2."""
    _end(f"Bad usage: {message} (--help lists the flags, the config file the keys)", 2)


class _PathParser(flags.ArgumentParser):
    """Of the value of a flag."""

    def parse(self, argument: str) -> str:
        try:
            return paths.expand(argument)
        except UserError as error:
            raise ValueError(str(error)) from error


def define_path(name: str, default: str | None, about: str) -> None:
    """Defines one of absl's flags, with the home folder for `~`."""
    flags.DEFINE(_PathParser(), name, default, about)


def path_argument(text: str) -> Path:
    """Returns an argument of argparse as a path, with the home folder for `~`."""
    try:
        return Path(paths.expand(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def asks_for_help(argv: Sequence[str]) -> bool:
    """Tells whether one of absl's flags for help is given."""
    asked = {argument.lstrip("-") for argument in argv if argument.startswith("-")}
    return bool(asked & {"help", "h", "?", "helpshort", "helpfull", "helpxml"})


flags.disclaim_key_flags()  # --help lists a flag under the module that asks for it

# What Python and absl say of a flag's value, and what we do.
_PLAINER = (
    (r"invalid literal for int.*?: (['\"].*['\"])", r"\1 is not a whole number"),
    (r"could not convert string to float: (['\"].*['\"])", r"\1 is not a number"),
    (r"get_config\(\) takes 0 .*", "this config has no variants: leave out ':' and what follows"),
    (r"\('Non-boolean argument to boolean flag', ('.*')\)", r"\1 is neither true nor false"),
)


def parse_flags(argv: list[str]) -> list[str]:
    """Returns argv without absl's flags, which are parsed; what is wrong with them is bad usage."""
    try:
        return flags.FLAGS(argv)
    except SystemExit as end:  # by absl's --help with code 1, or by the config file
        sys.exit(0 if asks_for_help(argv) else end.code)
    except flags.Error as error:
        message = str(error).strip()
        if "Traceback" in message:  # of the config file; its last line says what is wrong
            last = message.splitlines()[-1]
            message = "--config: " + re.sub(r"^[\w.]*Error: ", "", last)
        for theirs, ours in _PLAINER:
            message = re.sub(theirs, ours, message)
    except (AttributeError, KeyError) as error:  # ml_collections', for an unknown key
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = " ".join(str(error.args[0]).split()) if error.args else ""
        message = f"--config has no key {text.replace(' Did you', '. Did you')}"
        if "'get_config'" in text:
            message = "--config is no config: a file with a function get_config() is wanted"
    except OSError as error:  # ml_collections', where there is an override for a missing file
        message = f"--config: {str(error).splitlines()[-1].strip()}"
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}," if error.filename else "the file"
        message = f"--config: {where} is not Python: {error.msg}"
    except Exception as error:  # whatever the config does
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        message = f"--config fails in {place.filename}, line {place.lineno}: {what}"
    bad_usage(message)


def given_config() -> ml_collections.ConfigDict | None:
    """Returns the config of --config, None without the flag."""
    flag = flags.FLAGS["config"]
    if not flag.present:
        return None
    filename = config_flags.get_config_filename(flag)
    if not Path(filename.split(":")[0]).is_file():
        raise UserError(f"There is no config file {filename}: check --config.")
    if not isinstance(flag.value, ml_collections.ConfigDict):
        raise UserError(f"{filename}: get_config() must return an ml_collections.ConfigDict.")
    return flag.value


# The flag by which XLA leaves work on CPUs to YNNPACK, in place of its own kernels and Eigen's, and
# what it is to leave: products of two matrices, of which YNNPACK takes a transposed second one as
# it is (docs/performance.md has the numbers). JAX 0.10 to 0.12 know both; one that does not would
# end the process.
_YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_YNN_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def prepare_jax() -> None:
    """Chooses kernels for CPUs, and makes JAX keep what it compiles for the next start.

    The cache is `binlatent/compiled` in XDG_CACHE_HOME or `~/.cache`, and may be deleted. What the
    user gave in XLA_FLAGS and JAX's own settings stays. Call it before JAX looks for devices.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    is_file = bool(given) and not given.startswith("-")  # XLA then reads its flags there
    known = (0, 10) <= jax.__version_info__ < (0, 13)
    if known and not is_file and _YNN_FUSIONS not in given:
        os.environ["XLA_FLAGS"] = f"--{_YNN_FUSIONS}={_YNN_PRODUCTS} {given}".strip()
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        folder = _cache_folder()
        if folder is None:
            return  # nobody's home, as in some containers: every start compiles
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # The many small programs before the first step take as long as the few large ones.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_folder() -> Path | None:
    """Returns a folder that can be written, or None."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # As XDG says, a relative path is as good as none.
        home = home if home.is_absolute() else Path.home() / ".cache"
        folder = home / "binlatent" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def deferring_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until what is inside has ended, for writing that must not be cut off."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
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
    """Makes SIGTERM end the process with code 0, for what goes on where it was.

    While there is something to save, training takes the signal itself.
    """

    def end(*_):
        logging.getLogger("binlatent").info("Terminated: the same command goes on from here.")
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)


def _unraisable(event: Any) -> None:
    """Python's own hook, without what the threads of a failed save still report."""
    if "Event loop is closed" not in str(event.exc_value):
        sys.__unraisablehook__(event)


def _end_if_set(interrupted: threading.Event) -> None:
    """Ends an interrupted process before Python takes JAX apart, where JAX 0.10 may crash."""
    if interrupted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def _missing_device(error: Exception) -> str | None:
    """Returns JAX's message if the error is that JAX_PLATFORMS has no device; otherwise None."""
    platforms = jax.config.jax_platforms
    if not platforms:
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as missing:
        if repr(missing) != repr(error):
            return None
        said = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        # Of CUDA without its plugin JAX 0.10 says nothing.
        return said or f"There is no device of JAX_PLATFORMS={platforms}"
    return None


# As XLA's errors begin; of other resources, as of a kernel's shared memory, a traceback says more.
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"


@contextmanager
def reporting() -> Iterator[None]:
    """Logs the package's progress, and reports errors that are raised inside in one line.

    A UserError, an error of the file system, too little memory and a missing device end the process
    with code 1, Ctrl-C with 130. Other errors pass.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("binlatent").setLevel(logging.INFO)
    # Orbax logs pages of what its threads meet, which is raised and reported as well.
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    interrupted = threading.Event()
    # Here already, to come after what is registered later, which has something to close.
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
    """Returns what is wrong and what to do, None of an error that only a traceback explains."""
    text = str(error)
    by_xla = isinstance(error, jax.errors.JaxRuntimeError)
    if isinstance(error, UserError | OSError):
        plain = re.match(r"[a-z]+[ ,:']", text)  # not a key or a path, as the user types it
        return text[:1].upper() + text[1:] if plain else text
    if isinstance(error, MemoryError) or (by_xla and text.startswith(_OUT_OF_MEMORY)):
        what = (text.strip() or "Out of memory").splitlines()[0].rstrip(".")
        return (
            f"{what.removeprefix('RESOURCE_EXHAUSTED: ')}: there is too little memory; take a "
            "smaller batch, or in training more parts of it (train.accumulate)."
        )
    if by_xla or not isinstance(error, AssertionError | RuntimeError):
        return None
    if missing := _missing_device(error):
        instead = 'install what JAX needs for it ("jax[cuda13]" for "cuda")'
        return f"{missing}: leave JAX_PLATFORMS out, or {instead}."
    return None
