"""The main command's --help, its flags, and configs by name."""

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import flags as absl_flags

from binlatent import configs
from binlatent.runtime import command, keys, paths, processes
from binlatent.runtime.errors import UserError
from binlatent.runtime.version import VERSION


class Mode(NamedTuple):
    """A row of a table of modes."""

    does: str  # one sentence for --help
    example: str  # further flags of the example in --help
    run: Callable[[Any], Any]
    needs_config: bool = False  # whether it trains or reads data, which needs --config


class Flag(NamedTuple):
    """A row of a table of flags."""

    define: Callable[..., Any]  # one of absl's DEFINE functions
    default: Any
    modes: tuple[str, ...]  # the modes that use it; () for all
    does: str  # one sentence for --help


def config_names() -> list[str]:
    """Returns the names of the configs that come with the package."""
    files = (path for folder in configs.__path__ for path in Path(folder).glob("[a-z]*.py"))
    return sorted(path.stem for path in files)


def with_config_paths(argv: Iterable[str]) -> list[str]:
    """Replaces a name in --config=NAME by its file: `digits`, `ffhq256:released`."""
    arguments, is_config = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=") if not is_config else ("", "", argument)
        if is_config or (equals and flag.lstrip("-") == "config"):
            name, colon, variant = value.partition(":")
            if name in (names := config_names()):
                path = Path(next(iter(configs.__path__))) / f"{name}.py"
                argument = f"{flag}{equals}{path}{colon}{variant}"
            elif not {".", "/"} & set(value):
                known = ", ".join(names)
                command.bad_usage(f"--config={name} is neither a file nor one of {known}")
            else:
                try:
                    path = paths.expand(value if paths.is_address(value) else name)
                except UserError as error:
                    command.bad_usage(f"--config: {error}")
                argument = f"{flag}{equals}{path}{colon}{variant}"
        is_config = argument in ("--config", "-config")
        arguments.append(argument)
    return arguments


_NO_WORKDIR = "--workdir=DIR is required: the folder for checkpoints and pictures"


def _without_config(what: str, workdir: str) -> NoReturn:
    """Refuses a flag that needs --config, and says which one continues a workdir."""
    own = shlex.quote(f"--config=workdir:{workdir}")
    trained = (Path(workdir).expanduser() / "autoencoder").is_dir()
    known = f"{own} for the config of this workdir, or" if trained else "--config=digits, or"
    command.bad_usage(f"{what} needs --config: {known} a file or another name")


def with_config_of_workdir(argv: Sequence[str], modes: Mapping[str, Mode]) -> list[str]:
    """Adds --config=workdir:DIR to arguments that set config keys but give no config.

    Modes that need a config are refused instead.
    """
    names = [argument.lstrip("-").partition("=")[0] for argument in argv]
    keys = [name for name in names if name.startswith("config.")]
    values = dict.fromkeys(("workdir", "mode"), "")
    for name in values:
        for i, argument in enumerate(argv):
            if names[i] == name and argument.startswith("-"):
                _, equals, value = argument.partition("=")
                values[name] = value if equals else "".join(argv[i + 1 : i + 2])
    if not keys or "config" in names:
        return list(argv)
    if not values["workdir"]:
        command.bad_usage(_NO_WORKDIR)
    mode = values["mode"] or "all"
    if mode in modes and modes[mode].needs_config:
        _without_config(f"--{keys[0]}", values["workdir"])
    return [argv[0], f"--config=workdir:{values['workdir']}", *argv[1:]]


def show_help(argv: Sequence[str], modes: Mapping[str, Mode], flags: Mapping[str, Flag]) -> None:
    """Prints the text of --help or --version and exits with code 0, if one of them is given."""
    if {"--version", "-version"} & set(argv):
        sys.stdout.write(f"binlatent {VERSION}\n")
        sys.exit(0)
    if not command.asks_for_help(argv):
        return

    def lines(names: Iterable[str]) -> list[str]:
        return [f"    --{name}: {flags[name].does}" for name in names]

    text = ["usage: python -m binlatent.main [--config=CONFIG] --workdir=DIR [--mode=MODE] [FLAGS]"]
    text += ["", "For every mode:", *lines(name for name in flags if not flags[name].modes)]
    text += [
        f"    --config: A config file, or one of {', '.join(config_names())}.",
        "    --config.KEY=VALUE: any key of the config, which configs/default.py lists, such as",
        "      --config.prior.train.num_steps=5000 --config.dtype=bfloat16",
    ]
    for name, mode in modes.items():
        example = f"--config=digits {'' if name == 'all' else f'--mode={name}'}".strip()
        example = example if mode.needs_config else f"--mode={name} {mode.example}"
        text += ["", f"--mode={name}: {mode.does}"]
        text += [f"    Example: python -m binlatent.main --workdir=runs/digits {example}"]
        text += lines(flag for flag in flags if name in flags[flag].modes)
    sys.stdout.write("\n".join(text) + "\n")
    sys.exit(0)


def parse_flags(argv: list[str], modes: Mapping[str, Mode], flags: Mapping[str, Flag]) -> list[str]:
    """Parses and checks the flags; prints what is wrong and exits with code 2."""
    show_help(argv[1:], modes, flags)
    argv = with_config_paths(with_config_of_workdir(argv, modes))
    unparsed, values = command.parse_flags(argv), absl_flags.FLAGS
    mode = values.mode
    if len(unparsed) > 1:
        command.bad_usage(f"Unexpected argument {unparsed[1]!r}: flags start with --")
    if mode not in modes:
        command.bad_usage(f"--mode={mode} is not one of {', '.join(modes)}")
    if values.workdir is None:
        command.bad_usage(_NO_WORKDIR)
    if modes[mode].needs_config and not values["config"].present:
        _without_config(f"--mode={mode}", values.workdir)
    for name, flag in flags.items():
        if values[name].present and flag.modes and mode not in flag.modes:
            command.bad_usage(f"--{name} is for --mode={' or '.join(flag.modes)}")
    if values.num is not None and not 1 <= values.num < 2**31:
        limit = "at least 1" if values.num < 1 else f"less than {2**31}"
        command.bad_usage(f"--num must be {limit}, not {values.num}")
    if (problem := keys.seed_problem(values.seed)) is not None:
        command.bad_usage(f"--seed {problem}")
    if values.out and not values.out.lower().endswith(".png"):
        command.bad_usage("--out must be a file that ends in .png")
    processes.check_flags(values.coordinator, values.num_processes, values.process_id)
    return unparsed
