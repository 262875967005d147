"""The paper's figures and tables, a file each: `python -m binlatent.paper FIGURE --workdir=DIR`."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from binlatent import build
from binlatent.data.transforms import to_uint8
from binlatent.evaluation import comparison, pictures, report
from binlatent.paper import neighbours, tables
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.bernoulli import schedules
from binlatent.runtime import command, png
from binlatent.runtime.errors import UserError

log = logging.getLogger("binlatent.paper")  # also as __main__

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # of Figure 4
GUIDANCES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def schedules_figure(num_timesteps: int = 64) -> plt.Figure:
    """Draws how bits that are 1 (blue) and 0 (red) reach 1/2 (supplement, Figure A)."""
    figure, axes = plt.subplots(
        1, len(schedules.NAMES), figsize=(10, 3), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, schedules.NAMES, strict=True):
        keep = schedules.keep_schedule(name, num_timesteps)
        t = np.arange(num_timesteps + 1)
        axis.plot(t, (1 + keep) / 2, "tab:blue", label="$z_0 = 1$")
        axis.plot(t, (1 - keep) / 2, "tab:red", label="$z_0 = 0$")
        axis.set(title=name, xlabel="$t$", ylim=(0, 1))
    axes[0].set_ylabel("$q(z_t = 1 | z_0)$")
    axes[0].legend()
    return figure


def _rows(
    pipeline: BinaryLatentDiffusion,
    seed: int,
    name: str,
    values: tuple[float, ...],
    fixed: dict[str, float],
) -> plt.Figure:
    """Draws a row of samples a value of a sampling option, the same noise in every row."""
    num, labels = pictures.class_rows(pipeline.num_classes, columns=1)
    key = build.key(seed, name)
    rows = [
        to_uint8(pipeline.sample(num, key, labels, **fixed, **{name: value})) for value in values
    ]
    sheet = png.grid(rows)
    height, width, _ = sheet.shape
    figure, axis = plt.subplots(figsize=(8, 8 * height / width), layout="constrained")
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    centres = (np.arange(len(values)) + 0.5) * height / len(values)
    axis.set(xticks=[], yticks=centres, yticklabels=[f"{value:g}" for value in values])
    others = ", ".join(f"{other} {value:g}" for other, value in fixed.items())
    axis.set_title(f"{pipeline.config.sample.steps} steps, {others}")
    axis.set_ylabel({"temperature": "temperature", "guidance": "guidance $w$"}[name])
    return figure


def temperature_figure(pipeline: BinaryLatentDiffusion, seed: int = 0) -> plt.Figure:
    """Draws samples at rising temperature, without guidance, same noise (paper, Figure 4)."""
    return _rows(pipeline, seed, "temperature", TEMPERATURES, {"guidance": 0.0})


def guidance_figure(pipeline: BinaryLatentDiffusion, seed: int = 0) -> plt.Figure:
    """Draws samples at rising guidance, at temperature 1, same noise (supplement, Figure M).

    Raises:
      UserError: if the prior has no classes.
    """
    if not pipeline.num_classes:
        raise UserError("This prior is unconditional, so there is nothing to guide.")
    return _rows(pipeline, seed, "guidance", GUIDANCES, {"temperature": 1.0})


def quality_by_steps(pipeline: BinaryLatentDiffusion, seed: int = 0) -> dict[str, np.ndarray]:
    """Measures samples of one checkpoint at 4 steps, 8, ... to T (paper, Figure 7).

    At temperature 1 and without guidance, as in the paper.

    Returns:
      `steps`, and for each of them `bits_per_dim`, the bound for a sampler of these steps, and,
      for a prior with classes, `accuracy` and `frechet_distance` of `report.Judge`.
    """
    T = pipeline.config.prior.bernoulli.num_timesteps
    steps = sorted({min(2**i, T) for i in range(2, 20)})
    images, labels = report.test_images(pipeline.config, pipeline.config.evaluate.num_images)
    probs = pipeline.encode_probs(images)
    judge = report.Judge(pipeline.config) if pipeline.num_classes else None
    results = []
    for count in steps:
        log.info("%d steps", count)
        result = report.likelihood_metrics(pipeline, probs, labels, steps=count)
        if judge is not None:
            options = {"steps": count, "temperature": 1.0, "guidance": 0.0}
            result |= judge.sample_quality(pipeline, build.key(seed, "report"), **options)
        results.append(result)
    names = [name for name in results[0] if name != "bits_per_image"]
    return {
        "steps": np.array(steps),
        **{name: np.array([result[name] for result in results]) for name in names},
    }


def steps_figure(pipeline: BinaryLatentDiffusion, seed: int = 0) -> plt.Figure:
    """Draws what `quality_by_steps` measures."""
    quality = quality_by_steps(pipeline, seed)
    steps = quality.pop("steps")
    captions = {
        "bits_per_dim": "bits a dimension, at most",
        "accuracy": "accuracy",
        "frechet_distance": "Frechet distance",
    }
    figure, axes = plt.subplots(
        1, len(quality), figsize=(3.5 * len(quality), 3), squeeze=False, layout="constrained"
    )
    for axis, (name, values) in zip(axes[0], quality.items(), strict=True):
        axis.plot(steps, values, "o-")
        axis.set_xscale("log", base=2)
        axis.set(xticks=steps, xticklabels=steps, xlabel="steps", title=captions[name])
    return figure


_OF_A_WORKDIR = {
    "temperature": temperature_figure,
    "steps": steps_figure,
    "guidance": guidance_figure,
}
_TABLES = {"table1": tables.table1, "table4": tables.table4_row, "table6": tables.table6}
# The flags that a figure or table takes beside --workdir and --out.
_FLAGS = {
    **dict.fromkeys(("schedules", "table1", "table4"), ()),
    **dict.fromkeys(_OF_A_WORKDIR, ("seed",)),
    "neighbours": ("seed", "num", "by"),
    "table6": ("seed", "num", "steps"),
}


def _whole_number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _whole_numbers(text: str) -> list[int]:
    return list(map(_whole_number, text.split(",")))


def _write(what: str, workdir: Path | None, out: Path, options: dict[str, Any]) -> None:
    pipeline = None
    if what != "schedules":
        pipeline = BinaryLatentDiffusion.from_workdir(workdir, prior=what != "table4")
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work, if it fails
    if what in _TABLES:
        text, rows = _TABLES[what](pipeline, workdir, **options)
        tables.write(out, text, rows)
        sys.stdout.write(text)
        return
    if what == "neighbours":
        found = neighbours.find(pipeline, workdir, **options)
        comparison.write(out.with_suffix(".json"), found.metrics, found.protocol)
        figure = neighbours.figure(found)
    elif pipeline is None:
        figure = schedules_figure()
    else:
        figure = _OF_A_WORKDIR[what](pipeline, **options)
    figure.savefig(out, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Draws one figure or writes one table; a user's error is one sentence and exit code 1."""
    parser = argparse.ArgumentParser("binlatent.paper", description=__doc__)
    flag = parser.add_argument
    flag("figure", choices=_FLAGS)
    flag("--workdir", type=Path, help="of a trained prior; not for schedules")
    flag("--out", type=Path, help="PNG, PDF or SVG file, .md of a table; default in WORKDIR")
    flag("--seed", type=int, help="of the samples; default 0")
    flag("--num", type=_whole_number, help="of samples; neighbours shows 8, table6 times 100")
    flag("--by", choices=neighbours.BY, help="what neighbours are nearest by; default features")
    flag("--steps", type=_whole_numbers, help="of the sampler, for table6; default 16,64")
    flags = parser.parse_args(argv)
    what = flags.figure
    given = {name: getattr(flags, name) for name in ("seed", "num", "by", "steps")}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in _FLAGS[what]:
            takers = [taker for taker, names in _FLAGS.items() if name in names]
            parser.error(f"--{name} is for {', '.join(takers)}, not for {what}")
    if what != "schedules" and flags.workdir is None:
        parser.error(f"{what} needs --workdir")
    plt.switch_backend("agg")  # files only, no window
    suffixes = (".md",) if what in _TABLES else (".png", ".pdf", ".svg")
    out = flags.out or (flags.workdir or Path()) / f"{what}{suffixes[0]}"
    command.prepare_jax()
    with command.reporting():
        if out.suffix.lower() not in suffixes:
            endings = " or ".join(", ".join(suffixes).rsplit(", ", 1))
            raise UserError(f"--out must end in {endings}, not {out}.")
        _write(what, flags.workdir, out, options)
        log.info("Wrote %s", out)


if __name__ == "__main__":
    main()
