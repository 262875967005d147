"""Figures of the paper: noise schedules, and samples by temperature, guidance and steps."""

import logging
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from binlatent.data.transforms import to_uint8
from binlatent.evaluation import pictures, report
from binlatent.evaluation.judge import Judge
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors import schedules
from binlatent.runtime import png
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for

log = logging.getLogger(__name__)

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # of Figure 4
GUIDANCES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_MOST_STEPS = 64  # for priors that take any number of steps

# Numbers of `steps_figure` -> titles of axes.
_CAPTIONS = {
    "bits_per_dim": "bits per dimension (upper bound)",
    "accuracy": "accuracy",
    "frechet_distance": "Frechet distance",
}


def schedules_figure(num_timesteps: int = 64) -> plt.Figure:
    """Draws how q(z_t = 1) of bits that are 1 (blue) and 0 (red) tends to 1/2 (Figure A)."""
    names = schedules.NAMES
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
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
    """Draws a row of samples per value of a sampling option, with the same noise in all rows."""
    num, labels = pictures.class_rows(pipeline.num_classes, columns=1)
    given = num, key_for(seed, name), labels
    rows = [pipeline.sample(*given, **fixed, **{name: value}) for value in values]
    sheet = png.grid([to_uint8(row) for row in rows])
    height, width, _ = sheet.shape
    figure, axis = plt.subplots(figsize=(8, 8 * height / width), layout="constrained")
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    centres = (np.arange(len(values)) + 0.5) * height / len(values)
    axis.set(xticks=[], yticks=centres, yticklabels=[f"{value:g}" for value in values])
    settings = pipeline.settings({})
    others = [f"{settings.steps} steps"] if hasattr(settings, "steps") else []
    others += [f"{other} {value:g}" for other, value in fixed.items()]
    axis.set_title(", ".join(others))
    axis.set_ylabel({"temperature": "temperature", "guidance": "guidance $w$"}[name])
    return figure


def temperature_figure(pipeline: BinaryLatentDiffusion, seed: int = 0) -> plt.Figure:
    """Draws samples by temperature, without guidance, with the same noise (paper, Figure 4)."""
    return _rows(pipeline, seed, "temperature", TEMPERATURES, {"guidance": 0.0})


def guidance_figure(pipeline: BinaryLatentDiffusion, seed: int = 0) -> plt.Figure:
    """Draws samples by guidance, at temperature 1, with the same noise (supplement, Figure M)."""
    if not pipeline.num_classes:
        raise UserError("This prior is unconditional, so it has no guidance.")
    return _rows(pipeline, seed, "guidance", GUIDANCES, {"temperature": 1.0})


def steps_figure(pipeline: BinaryLatentDiffusion, workdir: Path, seed: int = 0) -> plt.Figure:
    """Draws the quality of samples by number of steps: 4, 8, ..., T (paper, Figure 7).

    It shows the bound for each number of steps and, for a prior with classes, the accuracy and
    distance of `Judge.sample_quality`, at temperature 1 and without guidance, as in the paper.
    Dashed lines are the distances of real images and of reconstructions.

    Args:
      pipeline: with a prior. If it takes any number of steps, 64 is the largest.
      workdir: with the classifier that judges samples.
      seed: of the samples.
    """
    most = pipeline.experiment.prior.prior.max_steps or _MOST_STEPS
    pipeline.settings({"steps": most})  # refuses a prior without steps, before any work
    steps = sorted({min(2**i, most) for i in range(2, 20)})
    test = report.HeldOut.read(pipeline)
    judge = Judge(pipeline.experiment, workdir) if pipeline.num_classes else None
    measured = []
    for count in steps:
        log.info("%d steps", count)
        quality = report.likelihood_metrics(pipeline, test.probs, test.labels, steps=count)
        if judge is not None:
            options = {"steps": count, "temperature": 1.0, "guidance": 0.0}
            quality |= judge.sample_quality(pipeline, key_for(seed, "report"), **options)
        measured.append(quality)
    names = [name for name in _CAPTIONS if name in measured[0]]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.5 * len(names), 3), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot(steps, [quality[name] for quality in measured], "o-")
        axis.set_xscale("log", base=2)
        axis.set(xticks=steps, xticklabels=steps, xlabel="steps", title=_CAPTIONS[name])
        if name == "frechet_distance":
            distances = judge.floors(pipeline)
            for floor, colour in zip(distances, ("tab:green", "tab:orange"), strict=False):
                label = {"real": "real images"}.get(floor, floor)
                style = {"color": colour, "linestyle": "--", "label": label}
                axis.axhline(distances[floor], **style)
            if distances:
                axis.legend()
    return figure
