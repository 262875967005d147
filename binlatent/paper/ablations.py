"""What each choice of the prior is worth on digits: the tables of docs/ablations.md.

python -m binlatent.paper.ablations --workdir=runs/ablations

One autoencoder, and a prior for each variant and seed, in folders of their own; what is trained
or measured already is not done again.
"""

import argparse
import copy
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from binlatent import build
from binlatent.data.transforms import to_float
from binlatent.evaluation import report
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import command
from binlatent.training import loop

log = logging.getLogger("binlatent.paper.ablations")  # also as __main__

Config = ml_collections.ConfigDict

_EVIDENCE = {"target": "flip", "evidence": True, "vlb_weight": 0.1}
_FLIP = {**_EVIDENCE, "evidence": False}

# A variant's name and what it sets in `config.prior`; the number of steps is a share.
VARIANTS = {
    "z_s": {**_FLIP, "target": "z_s"},
    "z_0": {**_FLIP, "target": "z_0"},
    "flip": _FLIP,
    "z_0, evidence": {**_EVIDENCE, "target": "z_0"},
    "flip, evidence": _EVIDENCE,
    "flip, quarter": {**_FLIP, "train.num_steps": 0.25},
    "flip, evidence, quarter": {**_EVIDENCE, "train.num_steps": 0.25},
    "balanced": {**_FLIP, "pair": "balanced_plugin"},
    "lambda 0": {**_EVIDENCE, "vlb_weight": 0.0},
    "lambda 0.01": {**_EVIDENCE, "vlb_weight": 0.01},
    "lambda 1": {**_EVIDENCE, "vlb_weight": 1.0},
}

# What samples are drawn with, unless a row says otherwise: the model as it is.
_PLAIN = {"temperature": 1.0, "guidance": 0.0, "steps": 16}

# A row's name, and what it changes in `config.sample`.
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

# The same for completions of half digits.
INPAINTERS = {
    "kept": {},
    "noised": {"known": "noised"},
    "kept, 1 corrector": {"corrector_steps": 1},
    "noised, 1 corrector": {"known": "noised", "corrector_steps": 1},
}

_SAMPLED = "z_0, evidence"  # whose samplers are compared

# Each table: its caption, and its rows (label, variant, sampler).
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


def variant_config(config: Config, variant: str, seed: int) -> Config:
    """Returns the config of a variant and seed."""
    config = copy.deepcopy(config)
    config.seed = seed
    changes = dict(VARIANTS[variant])
    if "train.num_steps" in changes:
        share = changes["train.num_steps"]
        changes["train.num_steps"] = max(round(share * config.prior.train.num_steps), 1)
    config.prior.update_from_flattened_dict(changes)
    return config


def budget_folder(config: Config, workdir: Path) -> Path:
    """Returns the folder of all runs of a budget, so that no two budgets are mixed up."""
    return workdir / f"{config.prior.train.num_steps}_steps"


def train_variant(config: Config, workdir: Path, variant: str, seed: int) -> Path:
    """Trains the prior of a variant on the workdir's autoencoder; returns its own workdir."""
    name = f"{variant.replace(', ', '_').replace(' ', '_')}_{seed}"
    folder = budget_folder(config, workdir) / name
    folder.mkdir(parents=True, exist_ok=True)
    (workdir / "codes").mkdir(exist_ok=True)
    for shared in ("autoencoder", "codes"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to(Path("..") / ".." / shared)
    log.info("Training %s, seed %d", variant, seed)
    loop.train_prior(variant_config(config, variant, seed), folder)
    return folder


class Results:
    """Measured numbers by row, in a file that an interrupted run goes on from."""

    def __init__(self, path: Path):
        """Reads what is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        self._values = {tuple(entry["row"]): entry["values"] for entry in entries}

    def __contains__(self, row: tuple[str, str, int]) -> bool:
        return row in self._values

    def __getitem__(self, row: tuple[str, str, int]) -> dict[str, float]:
        return self._values[row]

    def add(self, row: tuple[str, str, int], values: dict[str, float]) -> None:
        """Keeps the values of (variant, sampler, seed)."""
        self._values[row] = values
        with self._path.open("a") as file:
            file.write(json.dumps({"row": row, "values": values}) + "\n")


def _samplers(variant: str) -> list[str]:
    """Returns the samplers that the tables ask of a variant."""
    rows = [row for table in TABLES.values() for row in table]
    return sorted({sampler for _, of, sampler in rows if of == variant})


def measure(config: Config, workdir: Path, seeds: int, variants: Sequence[str]) -> Results:
    """Trains and measures the rows of the tables that are about `variants`."""
    results = Results(budget_folder(config, workdir) / "results.jsonl")
    judge = None
    for seed, variant in itertools.product(range(seeds), variants):
        missing = [name for name in _samplers(variant) if (variant, name, seed) not in results]
        if not missing:
            continue
        folder = train_variant(config, workdir, variant, seed)
        pipeline = BinaryLatentDiffusion.from_workdir(folder, variant_config(config, variant, seed))
        if judge is None:  # the same one for all, whatever was measured before
            judge_config = copy.deepcopy(pipeline.config)
            judge_config.seed = config.seed
            judge = report.Judge(judge_config)
        probs = pipeline.encode_probs(to_float(judge.images))
        for sampler in missing:
            key = build.key(seed, "ablation")
            changes = SAMPLERS.get(sampler, INPAINTERS.get(sampler, {}))
            options = {**_PLAIN, **changes}
            judged = judge.inpainting_quality if sampler in INPAINTERS else judge.sample_quality
            quality = judged(pipeline, key, **options)
            if not set(changes) - {"steps"} and sampler not in INPAINTERS:
                # Of the steps that the row is about, or of all.
                steps = changes.get("steps")
                quality |= report.likelihood_metrics(pipeline, probs, judge.labels, steps)
            results.add((variant, sampler, seed), quality)
            log.info("%s, %s, seed %d: %s", variant, sampler, seed, quality)
    return results


_COLUMNS = {
    "bits_per_dim": ("bits a dimension", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "frechet_distance": ("Frechet distance", "{:.2f}"),
}


def _cell(values: list[float], form: str) -> str:
    """Returns mean and standard deviation over seeds."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values, ddof=1))}"


def tables(results: Results, seeds: int) -> str:
    """Returns the tables in Markdown: means over seeds and standard deviations.

    A table has the columns that all of its rows have, and no row that was not measured.
    """
    lines = []
    for caption, rows in TABLES.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for label, variant, sampler in rows:
            keys = [(variant, sampler, seed) for seed in range(seeds)]
            found[label] = [results[key] for key in keys if key in results]
        found = {label: values for label, values in found.items() if values}
        everything = [value for values in found.values() for value in values]
        columns = [
            (name, *column)
            for name, column in _COLUMNS.items()
            if everything and all(name in value for value in everything)
        ]
        lines += [f"### {caption}", "", "| | " + " | ".join(c for _, c, _ in columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        for label, values in found.items():
            cells = [_cell([value[name] for value in values], form) for name, _, form in columns]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and prints the tables; a user's error is one sentence and exit code 1."""
    from binlatent.configs import digits

    parser = argparse.ArgumentParser("binlatent.paper.ablations", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3, help="priors a variant")
    parser.add_argument("--num_steps", type=int, help="of a prior's training; the config's if not")
    parser.add_argument("--data", default="", help="TFDS's data_dir")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    flags = parser.parse_args(argv)
    if flags.seeds < 1:
        parser.error("--seeds must be at least 1")
    config = digits.get_config()
    config.data.path = flags.data
    config.prior.train.num_steps = flags.num_steps or config.prior.train.num_steps
    command.prepare_jax()
    with command.reporting():
        loop.train_autoencoder(config, flags.workdir)
        results = measure(config, flags.workdir, flags.seeds, flags.variants)
    text = tables(results, flags.seeds)
    (budget_folder(config, flags.workdir) / "ablations.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
