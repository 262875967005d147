"""Error messages and progress of commands, and their JAX settings."""

import logging
import os
import signal
import subprocess
import sys

import jax
import pytest
from jax.errors import JaxRuntimeError

from binlatent.runtime import command
from binlatent.runtime.errors import UserError

SMALLER = (
    "there is too little memory; take a smaller batch, or, in training, split it into more parts "
    "(train.accumulate).\n"
)


@pytest.mark.parametrize(
    "error, line, code",
    [
        (UserError("what is wrong: do this."), "Error: What is wrong: do this.\n", 1),
        (UserError("config.seed is wrong."), "Error: config.seed is wrong.\n", 1),
        (UserError("runs/x is wrong."), "Error: runs/x is wrong.\n", 1),
        (PermissionError(13, "Denied", "x.png"), "Error: [Errno 13] Denied: 'x.png'\n", 1),
        (MemoryError(), f"Error: Out of memory: {SMALLER}", 1),
        (MemoryError("Unable to allocate 3 TiB"), f"Error: Unable to allocate 3 TiB: {SMALLER}", 1),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nMore."),
            f"Error: Out of memory allocating 8 bytes: {SMALLER}",
            1,
        ),
    ],
)
def test_an_error_is_one_line(capsys, error, line, code):
    with pytest.raises(SystemExit) as exit_, command.reporting():
        raise error
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", line)


def test_a_lost_process_is_one_line(capsys, monkeypatch):
    error = JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.2]")
    with pytest.raises(JaxRuntimeError), command.reporting():  # there is no other process
        raise error
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit) as exit_, command.reporting():
        raise error
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (
        "Error: Another process was lost, or the connection to it: start all of them again to "
        "resume from the last checkpoint.\n"
    )


def test_only_the_package_logs_and_other_errors_propagate(capsys):
    with command.reporting():
        logging.getLogger("binlatent.x").info("progress")
        logging.getLogger("other").info("noise")
    assert capsys.readouterr().err == "progress\n"
    others = ["INTERNAL: of XLA", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded"]
    for error in (ZeroDivisionError(), *map(JaxRuntimeError, others)):
        with pytest.raises(type(error)), command.reporting():
            raise error


def test_ctrl_c_waits_for_a_write():
    # A background process may be started with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = []
    with pytest.raises(KeyboardInterrupt), command.deferring_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("written")
    assert steps == ["written"]
    with pytest.raises(KeyboardInterrupt):  # afterwards, it works at once again
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, previous)


_INTERRUPTED = """
import atexit, os, signal, threading
import jax, jax.numpy as jnp
from binlatent.runtime import command

signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have it ignored

def chain(x):
    for i in range(400):
        x = jnp.sin(x @ x + i)
    return x

with command.reporting():
    atexit.register(print, "closed")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        jax.jit(chain).lower(jnp.ones((50, 50))).compile()
"""


def test_ctrl_c_while_jax_compiles_prints_one_word():
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # compilation that takes long
    command_line = [sys.executable, "-c", _INTERRUPTED]
    result = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "closed\n")
    assert result.stderr == "Interrupted.\n"


def _reported(line, **environment):
    """Runs a line inside `reporting`, in a process with its own environment."""
    script = f"import jax\nfrom binlatent.runtime import command\nwith command.reporting(): {line}"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    command_line = [sys.executable, "-c", script]
    return subprocess.run(command_line, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "platform, said",
    [
        ("cuda", ("There is no device of JAX_PLATFORMS=cuda", "Unable to init")),  # with its plugin
        (
            "none_such",
            ("Unable to initialize backend 'none_such': Backend 'none_such' is not in ",),
        ),
    ],
)
def test_a_missing_device_is_a_one_line_error(platform, said):
    result = _reported("jax.devices()", JAX_PLATFORMS=platform)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.removeprefix("Error: ").startswith(said)
    assert ": unset JAX_PLATFORMS, or install JAX with support for it" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_another_error_is_not_reported_as_a_missing_device():
    result = _reported("raise RuntimeError('of its own')", JAX_PLATFORMS="none_such")
    assert result.returncode == 1
    assert result.stderr.endswith("\nRuntimeError: of its own\n")


def _prepared(script, before="", **environment):
    """Runs lines after `prepare_jax`, and some before, in a process with its own environment."""
    start = f"from binlatent.runtime import command\n{before}\n"
    return _python(f"{start}command.prepare_jax()\n{script}", **environment).stdout.split()


def _python(script, **environment):
    """Runs lines after `import jax` in a process without the settings of the tests."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    command_line = [sys.executable, "-W", "error", "-c", f"import jax\n{script}"]
    result = subprocess.run(command_line, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


_COMPILE = "jax.jit(lambda x: x + 1)(1)"


def test_compiled_programs_are_cached_for_the_next_start(tmp_path):
    hits = """
import jax.monitoring
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: x + 1)(1)
print(found.count("/jax/compilation_cache/cache_hits"))
"""
    assert _prepared(hits, XDG_CACHE_HOME=str(tmp_path)) == ["0"]
    files = list((tmp_path / "binlatent" / "compiled").glob("*-cache"))
    assert files
    assert int(_prepared(hits, XDG_CACHE_HOME=str(tmp_path))[0]) == len(files)


def test_the_users_settings_take_precedence(tmp_path):
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    assert _prepared(f"{_COMPILE}; print(jax.device_count())", **own) == ["3"]
    assert list((tmp_path / "own").glob("*-cache"))
    assert not (tmp_path / "binlatent").exists()
    del own["JAX_COMPILATION_CACHE_DIR"]
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "7.0"
    name = "jax.config.jax_persistent_cache_min_compile_time_secs"
    assert _prepared(f"print({name})", **own) == ["7.0"]


def test_the_users_kernels_and_file_of_flags_stay(tmp_path):
    show = "import os; print(os.environ['XLA_FLAGS'])"
    flag = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
    assert _prepared(show, XLA_FLAGS=flag, XDG_CACHE_HOME=str(tmp_path)) == [flag]
    name = flag.split("=")[0]
    ours = f"{name}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    assert _prepared(show, XDG_CACHE_HOME=str(tmp_path)) == [ours]
    assert _prepared(show, XLA_FLAGS="flags.txt", XDG_CACHE_HOME=str(tmp_path)) == ["flags.txt"]


@pytest.mark.parametrize("version, known", [("0.9.9", False), ("0.12.0", True), ("9.0.0", False)])
def test_a_jax_that_may_not_know_the_flag_does_not_get_it(tmp_path, version, known):
    before = f"jax.__version_info__ = {tuple(map(int, version.split('.')))}"
    show = "import os; print('ynn_fusion' in os.environ.get('XLA_FLAGS', ''))"
    assert _prepared(show, before, XDG_CACHE_HOME=str(tmp_path)) == [str(known)]


def test_a_script_gets_them_with_its_first_workdir(tmp_path):
    load = """
import os
from binlatent import BinaryLatentDiffusion
for _ in range(2):
    try:
        BinaryLatentDiffusion.from_workdir("none")
    except ValueError as error:
        print(str(error).count("There is no workdir none"))
print("ynn_fusion" in os.environ.get("XLA_FLAGS", ""), jax.config.jax_compilation_cache_dir)
"""
    own = {"XDG_CACHE_HOME": str(tmp_path)}
    found = _python(load, **own)
    assert found.stdout.split() == ["1", "1", "True", f"{tmp_path}/binlatent/compiled"]
    assert not found.stderr
    # Too late: one warning.
    found = _python(f"jax.random.key(0)\n{load}", **own)
    assert found.stdout.split() == ["1", "1", "False", "None"]
    assert "JAX was in use before binlatent" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_config_file_may_use_jax(tmp_path):
    config = "import jax, ml_collections\njax.devices()\nget_config = ml_collections.ConfigDict\n"
    (tmp_path / "config.py").write_text(config)
    parse = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of ml_collections, as it imports the file
from ml_collections import config_flags
from binlatent.runtime import command
config_flags.DEFINE_config_file("config")
command.parse_flags(["binlatent", "--config={tmp_path}/config.py"])
command.prepare_jax()
print(jax.config.jax_compilation_cache_dir)
"""
    found = _python(parse, XDG_CACHE_HOME=str(tmp_path))
    assert (found.stdout, found.stderr) == (f"{tmp_path}/binlatent/compiled\n", "")


def test_the_config_of_a_workdir_is_read_without_jax(untrained_workdir):
    # `jax.distributed.initialize` comes after the flags, and must be JAX's first use.
    read = f"""
from binlatent.configs import workdir
from binlatent.runtime import command
print(workdir.get_config({str(untrained_workdir)!r}).data.name, command._jax_has_started())
"""
    assert _python(read).stdout.split() == ["digits", "False"]


def test_without_a_cache_no_folder_is_made(tmp_path):
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path)}
    assert _prepared(f"print({_COMPILE})", **off) == ["2"]
    assert not list(tmp_path.iterdir())


_NO_HOME = """
import pathlib
def home():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home
"""


@pytest.mark.parametrize(
    "home, before",
    [("file", ""), ("folder", "import os; os.access = lambda *_: False"), ("", _NO_HOME)],
    ids=["file", "read only", "none"],
)
def test_a_read_only_home_is_not_an_error(tmp_path, home, before):
    (tmp_path / "file").write_text("no folder")
    home = str(tmp_path / home) if home else "relative"
    shown = f"print({_COMPILE}, jax.config.jax_compilation_cache_dir)"
    assert _prepared(shown, before, XDG_CACHE_HOME=home) == ["2", "None"]
