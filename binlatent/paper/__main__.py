"""Draws the paper's figures and tables: `python -m binlatent.paper FIGURE --workdir=DIR`."""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from binlatent.configs import workdir as workdir_config
from binlatent.experiment import PATHS, resolve
from binlatent.paper import bottlenecks, figures, neighbours, networks, runs, table5, tables
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import command, keys, strict_json
from binlatent.runtime.errors import UserError

log = logging.getLogger("binlatent.paper")  # also as __main__


class Item(NamedTuple):
    """A figure or a table.

    Fields:
      make: maps a pipeline, its workdir and flags to a figure; or to a figure or the text of a
        table, and the content of a JSON file beside it.
      flags: the flags that it takes, in addition to --workdir and --out.
      reads: the last stage whose checkpoint it needs, "" for none.
      suffixes: allowed suffixes of the file.
    """

    make: Callable[..., plt.Figure | tuple[plt.Figure | str, Any]]
    flags: tuple[str, ...] = ()
    reads: str = "prior"
    suffixes: tuple[str, ...] = (".png", ".pdf", ".svg")


def _of_pipeline(make: Callable) -> Callable:
    return lambda pipeline, workdir, **options: make(pipeline, **options)


ITEMS = {
    "schedules": Item(lambda *_: figures.schedules_figure(), reads=""),
    "table1": Item(tables.table1, suffixes=(".md",)),
    "table4": Item(bottlenecks.table4_row, reads="autoencoder", suffixes=(".md",)),
    "table5": Item(
        table5.table5, ("num", "kinds", "seeds", "config"), reads="autoencoder", suffixes=(".md",)
    ),
    "networks": Item(
        networks.networks,
        ("num", "rows", "seeds", "seconds", "config"),
        reads="autoencoder",
        suffixes=(".md",),
    ),
    "temperature": Item(_of_pipeline(figures.temperature_figure), ("seed",)),
    "steps": Item(figures.steps_figure, ("seed",)),
    "guidance": Item(_of_pipeline(figures.guidance_figure), ("seed",)),
    "neighbours": Item(neighbours.draw_neighbours, ("seed", "num", "by")),
    "table6": Item(_of_pipeline(tables.table6), ("seed", "num", "steps"), suffixes=(".md",)),
}


def _whole_number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or keys.seed_problem(int(text)):
        raise argparse.ArgumentTypeError(f"must be between 0 and {keys.MAX_SEED}, not {text!r}")
    return int(text)


def _whole_numbers(text: str) -> list[int]:
    return list(map(_whole_number, text.split(",")))


def _seeds(text: str) -> list[int]:
    seeds = list(map(_seed, text.split(",")))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} has equal seeds")
    return seeds


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names_in(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return names_in


_FOR_ALL = ("figure", "workdir", "out", "keys")


def _joined_keys(argv: list[str]) -> list[str]:
    """Replaces --config.NAME=VALUE by --config.KEY=NAME=VALUE, which argparse can parse."""
    joined = []
    for argument in argv:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        is_key = argument.startswith("--config.") and equals
        joined.append(f"--config.KEY={name}={value}" if is_key else argument)
    return joined


def _open(
    workdir: Path, changes: list[str], moved: dict[str, str], *, prior: bool
) -> BinaryLatentDiffusion:
    """Opens a workdir with changes of its config, as KEY=VALUE, and with other paths by key."""
    experiment = None
    if changes:
        trained = resolve(workdir_config.get_config(str(workdir)))
        experiment = runs.base_experiment(trained, changes)
    pipeline = BinaryLatentDiffusion.from_workdir(workdir, experiment, prior=prior)
    if moved:
        pipeline.experiment = pipeline.experiment.change(moved)
    return pipeline


def _write(
    item: Item,
    workdir: Path | None,
    out: Path,
    options: dict[str, Any],
    **config: Any,
) -> None:
    pipeline = _open(workdir, **config, prior=item.reads == "prior") if item.reads else None
    if item.reads == "prior":
        _ = pipeline.prior_params  # raises without a prior, before any work
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work, in case it fails
    made = item.make(pipeline, workdir, **options)
    if isinstance(made, tuple):
        made, content = made
        strict_json.write_json(out.with_suffix(".json"), content)
    if isinstance(made, str):
        out.write_text(made)
        sys.stdout.write(made)
    else:
        made.savefig(out, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; an error that the user caused prints one line, and the exit code is 1."""
    parser = argparse.ArgumentParser("binlatent.paper", description=__doc__)
    flag, path = parser.add_argument, command.path_argument
    flag("figure", choices=ITEMS)
    flag("--workdir", type=path, help="workdir of a trained prior; not needed for schedules")
    flag("--out", type=path, help="PNG, PDF or SVG file, or .md for a table. Default: in WORKDIR")
    flag("--seed", type=_seed, help="seed of the samples. Default: 0")
    about = "number of samples. Default: 8 shown for neighbours, 100 timed for table6, "
    about += "evaluate.num_samples judged for table5 and networks"
    flag("--num", type=_whole_number, help=about)
    flag("--by", choices=neighbours.BY, help="distance of neighbours. Default: features")
    flag("--steps", type=_whole_numbers, help="sampling steps, for table6. Default: 16,64")
    for option, figure, known in (
        ("--kinds", "table5", table5.VARIANTS),
        ("--rows", "networks", networks.ROWS),
    ):
        flag(option, type=_some_of(known), help=f"for {figure}, some of {','.join(known)}")
    flag("--seeds", type=_seeds, help="seeds of the priors of table5 and networks. Default: 0")
    about = "seconds of training per prior of networks, in place of prior.train.num_steps"
    flag("--seconds", type=_whole_number, help=about)
    about = "replaces a value of the workdir's config, such as --config.evaluate.network=classifier"
    flag("--config.KEY", dest="keys", metavar="VALUE", action="append", default=[], help=about)
    flags = parser.parse_args(_joined_keys(sys.argv[1:] if argv is None else argv))
    name, item = flags.figure, ITEMS[flags.figure]
    given = {name: value for name, value in vars(flags).items() if name not in _FOR_ALL}
    options = {option: value for option, value in given.items() if value is not None}
    keys_given = dict(entry.split("=", 1) for entry in flags.keys)
    moved = {key: value for key, value in keys_given.items() if key in PATHS}
    changes = [f"{key}={value}" for key, value in keys_given.items() if key not in PATHS]
    if changes and not item.reads:
        parser.error(f"{name} reads no config: leave out config.{changes[0]}")
    if changes and "config" in item.flags:  # its variants are checked, not the workdir's model
        options["config"], changes = changes, []
    for option in options:
        if option not in item.flags:
            takers = [taker for taker, other in ITEMS.items() if option in other.flags]
            parser.error(f"--{option} is for {', '.join(takers)}, not for {name}")
    if item.reads and flags.workdir is None:
        parser.error(f"{name} needs --workdir")
    plt.switch_backend("agg")  # files only, no window
    out = flags.out or (flags.workdir or Path()) / f"{name}{item.suffixes[0]}"
    command.prepare_jax()
    with command.reporting():
        if out.suffix.lower() not in item.suffixes:
            endings = " or ".join(", ".join(item.suffixes).rsplit(", ", 1))
            raise UserError(f"--out must end in {endings}, not {out}.")
        _write(item, flags.workdir, out, options, changes=changes, moved=moved)
        log.info("Wrote %s", out)


if __name__ == "__main__":
    main()
