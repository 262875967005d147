"""Trains priors of several configs on one autoencoder, and keeps the numbers measured from them.

Each prior has its own folder. Trained priors and measured numbers are kept.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent import stages
from binlatent.configs import default
from binlatent.evaluation import pictures, report
from binlatent.evaluation.judge import Judge
from binlatent.evaluation.samples import labelling
from binlatent.experiment import Experiment, of_checkpoint, resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.kinds import KINDS
from binlatent.runtime.errors import UserError
from binlatent.runtime.files import atomic
from binlatent.runtime.keys import key_for
from binlatent.runtime.strict_json import to_json
from binlatent.runtime.weights import digest
from binlatent.training.checkpoint import Checkpoints, exists

log = logging.getLogger(__name__)

Options = dict[str, Any]  # of the sampler, by name

# Keyed by variant, what was measured, and seed.
Measured = dict[tuple[str, str, int], dict[str, Any]]

# Name of a number -> its title and format.
_COLUMNS = {
    "bits_per_dim": ("bits per dimension", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "frechet_distance": ("Frechet distance", "{:.2f}"),
    "seconds": ("seconds of training", "{:,.1f}"),
}


def base_experiment(trained: Experiment, overrides: Sequence[str]) -> Experiment:
    """Returns the experiment that all variants change.

    Args:
      trained: of the autoencoder. Keys that its config lacks are taken from the default config.
      overrides: changes of the config, as KEY=VALUE.
    """
    config = default.get_config()
    with config.unlocked():
        config.update(trained.config)
    for name, value in pictures.parse_options(overrides, {}).items():
        try:
            config.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"The config has no key {name}, or {value!r} does not have the type of its value."
            ) from error
    return resolve(config)


def of_changes(
    experiment: Experiment, changes: Mapping[str, Any], seed: int, steps: int
) -> Experiment:
    """Returns the experiment of a variant and seed, which trains on cached codes.

    Args:
      experiment: from `base_experiment`.
      changes: values of `config.prior` by key.
      seed: of the prior.
      steps: of the sampler; those of the config may be too many for a variant.
    """
    values = {f"prior.{key}": value for key, value in changes.items()}
    values |= {"prior.cache_codes": True, "sample.steps": steps}
    return experiment.change({"seed": seed, **values})


def described(options: Options) -> str:
    """Returns a description of options of the sampler."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def budget_folder(experiment: Experiment, workdir: Path) -> Path:
    """Returns the folder of all runs of a budget; each number of steps has its own."""
    return workdir / f"{experiment.prior.train.num_steps}_steps"


def check_budget(row: Experiment, workdir: Path, stage: str) -> None:
    """Refuses a workdir whose stage was trained with another config than the other rows."""
    if not exists(workdir, stage):
        return
    with Checkpoints.open(workdir, stage) as checkpoints:
        meta = checkpoints.newest(Checkpoints.meta)
    here, trained = row.without_paths, of_checkpoint(meta, workdir).without_paths
    # Training sets the first two; sections of other kinds of prior are not used.
    ignored = {"num_classes", "text_width", *KINDS} - {row.prior.kind}
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
      own: the experiment of the prior.
      workdir: with a trained autoencoder; cached codes are written there.
      folder: the workdir of the prior; see `link_shared`.
    """
    link_shared(own, workdir, folder)
    stages.train_prior(own, folder)
    return BinaryLatentDiffusion.from_workdir(folder, own)


def link_shared(own: Experiment, workdir: Path, folder: Path) -> None:
    """Makes the folder of a prior, with links to the parts of the workdir that all priors share.

    These are the autoencoder and the codes and, with captions, the text features and the encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made, files = ["codes"], ["autoencoder"]
    if own.texts.encoder:
        made, files = [*made, "texts"], [*files, f"{own.texts.encoder}.npz"]
    for name in made:
        (workdir / name).mkdir(exist_ok=True)
    for shared in (*made, *files):
        if (workdir / shared).exists() and not (folder / shared).exists():
            (folder / shared).symlink_to(os.path.relpath(workdir / shared, folder))


class Numbers:
    """Numbers measured from variants; each is measured once and written to a file at once."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        folder: Path,
        variant: Callable[[str, int], Experiment],
        num: int,
        *,
        title: str,
        named: bool = False,
    ):
        """Reads the numbers measured so far.

        Args:
          experiment: from `base_experiment`; also that of the judge.
          workdir: of the autoencoder.
          folder: of the budget; it holds the folders of priors, and the file of numbers.
          variant: returns the experiment of a variant and seed.
          num: number of samples.
          title: of the table; it seeds the noise of samples.
          named: whether `evaluate.network` judges, as in `Judge`, and a prior of texts gets the
            texts of training images.
        """
        self.experiment, self.folder, self.variant = experiment, folder, variant
        self._workdir, self._num, self._title, self._named = workdir, num, title, named
        # Settings on which samples and test images depend, in addition to the row.
        how = {name: experiment.content[name] for name in ("dtype", "sample", "evaluate")}
        self._path = folder / f"results_{digest(how)}.jsonl"
        self._measured = read_rows(self._path)
        self.trained = functools.lru_cache(maxsize=1)(self._train)
        self._texts = functools.lru_cache(maxsize=1)(self._texts_of)
        self._judge = functools.cache(lambda split: Judge(experiment, workdir, split, named=named))

    def of(self, name: str, seed: int) -> Path:
        """Returns the folder of a prior."""
        return self.folder / f"{name}_{seed}"

    def check(self, name: str, seed: int) -> None:
        """Refuses a variant that cannot be trained, or was trained with another config."""
        own = self.variant(name, seed)
        stages.check_prior(own)
        check_budget(own, self.of(name, seed), "prior")

    def _train(self, name: str, seed: int) -> BinaryLatentDiffusion:
        # Without this the programs of a dozen priors use up the memory maps of a process.
        jax.clear_caches()
        log.info("Training %s, seed %d", name, seed)
        return train_prior_in(self.variant(name, seed), self._workdir, self.of(name, seed))

    def once(
        self, name: str, what: str, seed: int, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Returns the result of `measure`, or the stored one of this variant, `what` and seed."""
        row = name, what, seed
        if row not in self._measured:
            self._measured[row] = measure()
            write_rows(self._path, self._measured)
            log.info("%s, seed %d, %s: %s", name, seed, what, self._measured[row])
        return self._measured[row]

    def bits(self, name: str, seed: int) -> dict[str, float]:
        """Returns the mean length of test codes; for a bound, the tightest."""

        def measure() -> dict[str, float]:
            pipeline = self.trained(name, seed)
            test = report.HeldOut.read(pipeline)
            return report.likelihood_metrics(pipeline, test.probs, test.labels)

        return self.once(name, "test codes", seed, measure)

    def _texts_of(self, name: str, seed: int) -> np.ndarray | None:
        pipeline = self.trained(name, seed)
        if not self._named or not pipeline.experiment.prior.conditioning.of_texts:
            return None
        return labelling(pipeline, seed)[1](np.arange(self._num))

    def quality(
        self, name: str, seed: int, split: str, num: int, options: Options
    ) -> dict[str, float]:
        """Returns `Judge.sample_quality` of `num` samples compared with images of a split."""

        def measure() -> dict[str, float]:
            pipeline, texts = self.trained(name, seed), self._texts(name, seed)
            key = key_for(seed, f"{self._title}, {split}")
            return self._judge(split).sample_quality(pipeline, key, num, texts, **options)

        what = f"{num} samples, {split} images: {described(options)}"
        return self.once(name, what, seed, measure)

    def floors(self, split: str, num: int) -> dict[str, float]:
        """Returns the floors of the distances of `num` samples to the images of a split."""

        def measure() -> dict[str, float]:
            pipeline = BinaryLatentDiffusion.from_workdir(
                self._workdir, self.experiment, prior=False
            )
            return self._judge(split).floors(pipeline, num)

        return self.once("floors", f"{num} images, {split} images", 0, measure)


def read_rows(path: Path) -> Measured:
    """Returns the numbers by row from a file of `write_rows`; {} if it is missing."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = map(json.loads, lines)
    return {tuple(entry["row"]): entry["values"] for entry in entries}


def write_rows(path: Path, measured: Measured) -> None:
    """Writes numbers by row as lines of JSON, from which an interrupted run continues."""
    lines = [to_json({"row": row, "values": values}) for row, values in measured.items()]
    with atomic(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines))


def titles_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the titles, by name, of the numbers that all of these have."""
    return {
        name: title
        for name, (title, _) in _COLUMNS.items()
        if measured and all(name in numbers for numbers in measured)
    }


def spread_cell(measured: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns mean ± standard deviation of a number over seeds, or the number of one seed."""
    values, form = [numbers[name] for numbers in measured], _COLUMNS[name][1]
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}"
