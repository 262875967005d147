"""Priors of several configs on one autoencoder, a folder each, and the numbers measured of them.

What is trained or measured already is not done again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from binlatent import stages
from binlatent.experiment import Experiment, of_checkpoint
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.kinds import KINDS
from binlatent.runtime.errors import UserError
from binlatent.runtime.files import atomic
from binlatent.runtime.strict_json import to_json
from binlatent.training.checkpoint import Checkpoints, exists

Measured = dict[tuple[str, str, int], dict[str, Any]]  # by variant, what was measured, and seed

# A number's title, and how it is shown.
_COLUMNS = {
    "bits_per_dim": ("bits per dimension", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "frechet_distance": ("Frechet distance", "{:.2f}"),
}


def budget_folder(experiment: Experiment, workdir: Path) -> Path:
    """Returns the folder of all runs of a budget, so that no two budgets are mixed up."""
    return workdir / f"{experiment.prior.train.num_steps}_steps"


def check_budget(row: Experiment, workdir: Path, stage: str) -> None:
    """Refuses a workdir whose stage was trained in another way than the rows beside it will be."""
    if not exists(workdir, stage):
        return
    with Checkpoints.open(workdir, stage) as checkpoints:
        meta = checkpoints.newest(Checkpoints.meta)
    here, trained = row.without_paths, of_checkpoint(meta, workdir).without_paths
    # The classes are filled in by training; sections of other kinds of prior mean nothing.
    ignored = {"num_classes", *KINDS} - {row.prior.kind}
    for section in ("data", stage):
        for key, value in here[section].items():
            before = trained[section].get(key)
            if value != before and key not in ignored:
                raise UserError(
                    f"The {stage} in {workdir} was trained with config.{section}.{key} = "
                    f"{before}, not {value}, so the rows would not be comparable: "
                    "use the same config, or another --workdir."
                )


def train_prior_in(own: Experiment, workdir: Path, folder: Path) -> BinaryLatentDiffusion:
    """Trains a prior on the workdir's autoencoder and codes, in a folder below the workdir.

    Args:
      own: of the prior.
      workdir: with a trained autoencoder; it gets the codes if the prior learns from cached ones.
      folder: of the prior, a workdir itself, whose autoencoder and codes are links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (workdir / "codes").mkdir(exist_ok=True)
    for shared in ("autoencoder", "codes"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(os.path.relpath(workdir / shared, folder))
    stages.train_prior(own, folder)
    return BinaryLatentDiffusion.from_workdir(folder, own)


def read_rows(path: Path) -> Measured:
    """Returns the numbers by row in a file of `write_rows`, {} without one."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = map(json.loads, lines)
    return {tuple(entry["row"]): entry["values"] for entry in entries}


def write_rows(path: Path, measured: Measured) -> None:
    """Writes numbers by row, a line of JSON each, which an interrupted run goes on from."""
    lines = [to_json({"row": row, "values": values}) for row, values in measured.items()]
    with atomic(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines))


def titles_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the titles of the numbers, by name, that all of these have."""
    return {
        name: title
        for name, (title, _) in _COLUMNS.items()
        if measured and all(name in numbers for numbers in measured)
    }


def spread_cell(measured: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns mean and standard deviation of a number over seeds; of one seed the number."""
    values, form = [numbers[name] for numbers in measured], _COLUMNS[name][1]
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}"
