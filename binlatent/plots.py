"""The paper's figures: `python -m binlatent.plots {schedules,temperature,steps,guidance}`."""

import argparse
import logging
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from binlatent import build, command, evaluate, figures, outputs
from binlatent.data.transforms import to_uint8
from binlatent.diffusion import schedules
from binlatent.errors import UserError
from binlatent.pipeline import BinaryLatentDiffusion

log = logging.getLogger("binlatent.plots")  # also as __main__

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
    num, labels = outputs.class_rows(pipeline.num_classes, columns=1)
    key = build.key(seed, name)
    rows = [
        to_uint8(pipeline.sample(num, key, labels, **fixed, **{name: value})) for value in values
    ]
    sheet = figures.grid(rows)
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
      for a prior with classes, `accuracy` and `frechet_distance` of `evaluate.Judge`.
    """
    T = pipeline.config.prior.num_timesteps
    steps = sorted({min(2**i, T) for i in range(2, 20)})
    images, labels = evaluate.test_images(pipeline.config, pipeline.config.evaluate.num_images)
    probs = pipeline.encode_probs(images)
    judge = evaluate.Judge(pipeline.config) if pipeline.num_classes else None
    results = []
    for count in steps:
        log.info("%d steps", count)
        result = evaluate.likelihood_metrics(pipeline, probs, labels, steps=count)
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


def main(argv: list[str] | None = None) -> None:
    """Draws one figure; a user's error is one sentence and exit code 1."""
    parser = argparse.ArgumentParser("binlatent.plots", description=__doc__)
    parser.add_argument("figure", choices=["schedules", *_OF_A_WORKDIR])
    parser.add_argument("--workdir", type=Path, help="of a trained prior; not for schedules")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", type=Path, help="PNG, PDF or SVG file; default WORKDIR/FIGURE.png")
    flags = parser.parse_args(argv)
    if flags.figure != "schedules" and flags.workdir is None:
        parser.error(f"{flags.figure} needs --workdir")
    plt.switch_backend("agg")  # files only, no window
    out = flags.out or (flags.workdir or Path()) / f"{flags.figure}.png"
    with command.reporting():
        if out.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--out must end in .png, .pdf or .svg, not {out}.")
        pipeline = None
        if flags.figure != "schedules":
            pipeline = BinaryLatentDiffusion.from_workdir(flags.workdir)
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, if it fails
        if pipeline is None:
            figure = schedules_figure()
        else:
            figure = _OF_A_WORKDIR[flags.figure](pipeline, flags.seed)
        figure.savefig(out, dpi=150)
        log.info("Wrote %s", out)


if __name__ == "__main__":
    main()
