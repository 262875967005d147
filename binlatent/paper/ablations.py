"""Measures choices of the prior on digits; writes tables such as those of docs/results.md.

python -m binlatent.paper.ablations --workdir=runs/ablations

Trains one autoencoder, and a prior for each variant and seed, in separate folders. Priors that are
trained and numbers that are measured are kept, so the command can be repeated.
"""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from binlatent import stages
from binlatent.configs import digits
from binlatent.evaluation import floors, report
from binlatent.evaluation.judge import Judge
from binlatent.experiment import Experiment, resolve
from binlatent.paper.runs import (
    Measured,
    budget_folder,
    read_rows,
    spread_cell,
    titles_of,
    train_prior_in,
    write_rows,
)
from binlatent.paper.tables import markdown
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import command
from binlatent.runtime.keys import key_for

log = logging.getLogger("binlatent.paper.ablations")  # also as __main__

_EVIDENCE = {"target": "flip", "evidence": True, "vlb_weight": 0.1}
_FLIP = {**_EVIDENCE, "evidence": False}

# Name of a variant -> values of `config.prior.bernoulli`; "steps" is a share of the training steps.
VARIANTS = {
    "z_s": {**_FLIP, "target": "z_s"},
    "z_0": {**_FLIP, "target": "z_0"},
    "flip": _FLIP,
    "z_0, evidence": {**_EVIDENCE, "target": "z_0"},
    "flip, evidence": _EVIDENCE,
    "flip, quarter": {**_FLIP, "steps": 0.25},
    "flip, evidence, quarter": {**_EVIDENCE, "steps": 0.25},
    "balanced": {**_FLIP, "pair": "balanced_plugin"},
    "lambda 0": {**_EVIDENCE, "vlb_weight": 0.0},
    "lambda 0.01": {**_EVIDENCE, "vlb_weight": 0.01},
    "lambda 1": {**_EVIDENCE, "vlb_weight": 1.0},
}

# Options of samples, unless a row has others: the model without changes.
_PLAIN = {"temperature": 1.0, "guidance": 0.0, "steps": 16}

# Name of a row -> options in `config.sample`.
SAMPLERS = {
    **{f"{steps} steps": {"steps": steps} for steps in (4, 8, 16, 32, 64)},
    "8 steps, 1 corrector": {"steps": 8, "corrector_steps": 1},
    "16 steps, 1 corrector": {"corrector_steps": 1},
    "16 steps, 1 corrector of 0.3": {"corrector_steps": 1, "corrector_size": 0.3},
    "16 steps, 3 correctors": {"corrector_steps": 3},
    "32 steps, 1 corrector": {"steps": 32, "corrector_steps": 1},
    "last thresholded": {"threshold_last": True},
    "tau 0.8": {"temperature": 0.8},
    "tau 0.8, plug-in": {"temperature": 0.8, "pair": "balanced_plugin"},
    "tau 0.8, w 1": {"temperature": 0.8, "guidance": 1.0},
}

# The same, for completions of half digits.
INPAINTERS = {
    "kept": {},
    "noised": {"known": "noised"},
    "kept, 1 corrector": {"corrector_steps": 1},
    "noised, 1 corrector": {"known": "noised", "corrector_steps": 1},
}

_FLOORS = "floors", "", 0  # the row of `Judge.floors`, which hold for all

_SAMPLED = "z_0, evidence"  # the variant whose samplers are compared

# Caption of a table -> its rows (label, variant, sampler).
TABLES = {
    "Target": [
        ("z_s (L_vlb alone)", "z_s", ""),
        ("z_0", "z_0", ""),
        ("flip", "flip", ""),
        ("z_0, evidence form", "z_0, evidence", ""),
        ("flip, evidence form", "flip, evidence", ""),
    ],
    "Evidence form after a quarter of the steps": [
        ("flip", "flip, quarter", ""),
        ("flip, evidence form", "flip, evidence, quarter", ""),
    ],
    "Lambda": [
        ("0", "lambda 0", ""),
        ("0.01", "lambda 0.01", ""),
        ("0.1", "flip, evidence", ""),
        ("1", "lambda 1", ""),
    ],
    "Pair": [
        ("plain BCE, mixture", "flip", ""),
        ("balanced BCE, plug-in", "balanced", ""),
        ("plain BCE in the evidence form, mixture", "flip, evidence", ""),
    ],
    "Steps": [(f"{steps}", _SAMPLED, f"{steps} steps") for steps in (4, 8, 16, 32, 64)],
    "Corrector": [
        ("8 steps (8 network calls)", _SAMPLED, "8 steps"),
        ("8 steps, 1 corrector of 0.1 (15)", _SAMPLED, "8 steps, 1 corrector"),
        ("16 steps (16)", _SAMPLED, "16 steps"),
        ("16 steps, 1 corrector of 0.1 (31)", _SAMPLED, "16 steps, 1 corrector"),
        ("16 steps, 1 corrector of 0.3 (31)", _SAMPLED, "16 steps, 1 corrector of 0.3"),
        ("32 steps (32)", _SAMPLED, "32 steps"),
        ("16 steps, 3 correctors of 0.1 (61)", _SAMPLED, "16 steps, 3 correctors"),
        ("32 steps, 1 corrector of 0.1 (63)", _SAMPLED, "32 steps, 1 corrector"),
        ("64 steps (64)", _SAMPLED, "64 steps"),
    ],
    "Temperature, last step and guidance": [
        ("tau 1, last step drawn", _SAMPLED, ""),
        ("tau 1, last step thresholded", _SAMPLED, "last thresholded"),
        ("tau 0.8 on the whole logit (mixture)", _SAMPLED, "tau 0.8"),
        ("tau 0.8 on the bare output (plug-in)", _SAMPLED, "tau 0.8, plug-in"),
        ("tau 0.8, guidance 1", _SAMPLED, "tau 0.8, w 1"),
    ],
    "Known bits of inpainting, halves of test digits": [
        (name, _SAMPLED, name) for name in INPAINTERS
    ],
}


def variant_of(experiment: Experiment, variant: str, seed: int) -> Experiment:
    """Returns the experiment of a variant and seed."""
    changes = dict(VARIANTS[variant])
    num_steps = max(round(changes.pop("steps", 1) * experiment.prior.train.num_steps), 1)
    values = {f"prior.bernoulli.{name}": value for name, value in changes.items()}
    return experiment.change({"seed": seed, "prior.train.num_steps": num_steps, **values})


def train_variant(
    experiment: Experiment, workdir: Path, variant: str, seed: int
) -> BinaryLatentDiffusion:
    """Trains the prior of a variant on the workdir's autoencoder, in its own workdir."""
    name = f"{variant.replace(', ', '_').replace(' ', '_')}_{seed}"
    log.info("Training %s, seed %d", variant, seed)
    own = variant_of(experiment, variant, seed)
    return train_prior_in(own, workdir, budget_folder(experiment, workdir) / name)


def measure_rows(
    experiment: Experiment, workdir: Path, seeds: int, variants: Sequence[str]
) -> Measured:
    """Trains and measures the rows of the tables for `variants`, and adds them to the file.

    Args:
      experiment: that the variants change.
      workdir: of the autoencoder, and the folder of all runs.
      seeds: number of priors per variant.
      variants: names in `VARIANTS`.
    """
    path = budget_folder(experiment, workdir) / "results.jsonl"
    measured, judge = read_rows(path), None
    asked = sorted({row[1:] for table in TABLES.values() for row in table})
    for seed, variant in itertools.product(range(seeds), variants):
        samplers = [sampler for of, sampler in asked if of == variant]
        missing = [name for name in samplers if (variant, name, seed) not in measured]
        if not missing:
            continue
        pipeline = train_variant(experiment, workdir, variant, seed)
        judge = judge or Judge(experiment, workdir)  # one judge for all
        if _FLOORS not in measured:
            measured[_FLOORS] = judge.floors(pipeline)
        test = report.HeldOut.read(pipeline)
        for sampler in missing:
            changes = SAMPLERS.get(sampler, INPAINTERS.get(sampler, {}))
            judged = judge.inpainting_quality if sampler in INPAINTERS else judge.sample_quality
            quality = judged(pipeline, key_for(seed, "ablation"), **_PLAIN | changes)
            if not set(changes) - {"steps"} and sampler not in INPAINTERS:
                # The bound for the steps of the row, or for all T steps.
                quality |= report.likelihood_metrics(pipeline, test.probs, test.labels, **changes)
            row = variant, sampler, seed
            measured[row] = quality
            write_rows(path, measured)
            log.info("%s, %s, seed %d: %s", *row, quality)
    return measured


def markdown_tables(measured: Measured, seeds: int) -> str:
    """Returns the tables in Markdown: means over seeds and standard deviations.

    A table has the columns that all of its rows have. Rows that were not measured are left out, and
    tables without a row.
    """
    text = ""
    for caption, rows in TABLES.items():
        found = {
            label: [measured[key] for seed in range(seeds) if (key := (*row, seed)) in measured]
            for label, *row in rows
        }
        found = {label: values for label, values in found.items() if values}
        if not found:
            continue
        every = [numbers for values in found.values() for numbers in values]
        titles = titles_of(every)
        lines = [[label, *(spread_cell(found[label], name) for name in titles)] for label in found]
        table = markdown(["", *titles.values()], lines)
        text += f"### {caption}\n\n{table}\n"
    told = floors.in_words(measured.get(_FLOORS, {}))
    return f"{text}{told.strip()}\n" if told else text


def main(argv: list[str] | None = None) -> None:
    """Runs the command; an error that the user caused prints one line, and the exit code is 1."""
    parser = argparse.ArgumentParser("binlatent.paper.ablations", description=__doc__)
    parser.add_argument(
        "--workdir", type=command.path_argument, required=True, help="folder of all runs"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of priors per variant. Default: 3"
    )
    parser.add_argument(
        "--num_steps", type=int, help="training steps per prior. Default: the config's"
    )
    data = ("--data", "--config.data.path")
    parser.add_argument(*data, default="", help="TFDS's data_dir")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    flags = parser.parse_args(argv)
    if flags.seeds < 1:
        parser.error("--seeds must be at least 1")
    command.prepare_jax()
    with command.reporting():
        experiment = resolve(digits.get_config()).change({"data.path": flags.data})
        if flags.num_steps:
            experiment = experiment.change({"prior.train.num_steps": flags.num_steps})
        with stages.alone_in(flags.workdir):
            stages.train_autoencoder(experiment, flags.workdir)
            measured = measure_rows(experiment, flags.workdir, flags.seeds, flags.variants)
        text = markdown_tables(measured, flags.seeds)
        (budget_folder(experiment, flags.workdir) / "ablations.md").write_text(text)
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
