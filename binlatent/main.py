"""Trains, samples and evaluates: `python -m binlatent.main --config=configs/X.py --workdir=DIR`."""

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from binlatent import build, checks, stages
from binlatent.data import masks
from binlatent.data.sources import read_image
from binlatent.data.transforms import to_float
from binlatent.evaluation import comparison, pictures, quality, report
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import command, png, processes
from binlatent.runtime.errors import UserError
from binlatent.training import loop

_TRAINING = ("all", "train_autoencoder", "train_prior", "table4")

FLAGS = flags.FLAGS
log = logging.getLogger("binlatent")

config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file. Needed for training; other modes otherwise use the one of the workdir.",
    lock_config=True,
)
flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and pictures.", required=True)
flags.DEFINE_enum(
    "mode",
    "all",
    [*_TRAINING, "encode", "sample", "reconstruct", "inpaint", "vary", "evaluate"],
    "What to do; `all` trains what is not trained yet, evaluates it and draws its pictures; "
    "`table4` trains an autoencoder with each bottleneck and compares them; `encode` writes the "
    "training images' codes, for the prior to learn from.",
)
flags.DEFINE_integer(
    "num",
    None,
    "sample, reconstruct: how many images. inpaint, vary: how many results of each. evaluate with "
    "--metrics: how many samples; default config.evaluate.num_samples.",
)
flags.DEFINE_integer("steps", None, "sample, inpaint, vary: reverse steps, 1 to T of training.")
flags.DEFINE_float("temperature", None, "sample, inpaint, vary: tau > 0; less is less diverse.")
flags.DEFINE_float("guidance", None, "sample, inpaint, vary: w >= 0, of classifier-free guidance.")
flags.DEFINE_integer(
    "label", None, "sample, inpaint, vary: the class of all; otherwise a row a class, or none."
)
flags.DEFINE_string(
    "features",
    None,
    "sample, inpaint, vary: a .npy file of a text's features, for a prior of texts.",
)
flags.DEFINE_string("image", None, "inpaint, vary: a file; without it, images of the test split.")
flags.DEFINE_string(
    "mask",
    None,
    f"inpaint: {', '.join(masks.PRESETS)}, by the part to be drawn anew, or a file of the image's "
    "size, white where it is to be drawn anew. Without it, every preset in turn.",
)
flags.DEFINE_multi_string(
    "option",
    [],
    "sample, inpaint, vary: another value of config.sample, for example --option=known=noised; "
    "may be repeated.",
)
flags.DEFINE_float("strength", None, "vary: how far from the image, above 0 to 1. Default 0.5.")
flags.DEFINE_integer("seed", 0, "sample, inpaint, vary: of the draw.")
flags.DEFINE_string("out", None, "sample, reconstruct, inpaint, vary: the PNG file to write.")
flags.DEFINE_list(
    "metrics",
    None,
    f"evaluate: of {','.join(quality.METRICS)}, as docs/evaluation.md says; without it, what "
    "report.json holds.",
)
flags.DEFINE_enum(
    "keep",
    "none",
    quality.KEEP,
    "evaluate with --metrics: keep the samples, as PNG files or in one .npz file as ADM's "
    "evaluator reads.",
)
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where several processes train together, with --num_processes and "
    "--process_id; the tasks of a Slurm step and the hosts of a TPU need none of them.",
)
flags.DEFINE_integer("num_processes", None, "How many processes train together.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_PROCESSES = ("coordinator", "num_processes", "process_id")

_OPTIONS = ("steps", "temperature", "guidance")  # of config.sample that have flags of their own

# The modes that a flag means something to.
_DRAWN = ("all", "sample", "inpaint", "vary", "evaluate")
_MEANT_FOR = {
    **dict.fromkeys(("steps", "temperature", "guidance", "seed", "option"), _DRAWN),
    "label": ("all", "sample", "inpaint", "vary"),
    "features": ("sample", "inpaint", "vary"),
    "num": (*_DRAWN, "reconstruct"),
    **dict.fromkeys(("metrics", "keep"), ("evaluate",)),
    "image": ("inpaint", "vary"),
    "mask": ("inpaint",),
    "strength": ("vary",),
}


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; bad usage is one sentence and exit code 2."""
    unparsed = command.parse_flags(argv)
    mode = FLAGS.mode
    if len(unparsed) > 1:
        command.bad_usage(f"Unexpected argument {unparsed[1]!r}: flags start with --")
    if mode in (*_TRAINING, "encode") and not FLAGS["config"].present:
        command.bad_usage(f"--mode={mode} needs --config, for example configs/digits.py")
    for name, modes in _MEANT_FOR.items():
        if FLAGS[name].present and mode not in modes:
            command.bad_usage(f"--{name} is for --mode={' or '.join(modes)}")
    if mode == "evaluate" and FLAGS.metrics is None:
        for name in ("num", "keep", "seed", *_OPTIONS, "option"):
            if FLAGS[name].present:
                command.bad_usage(f"--{name} is for --mode=evaluate with --metrics")
    given = [FLAGS[name].present for name in _PROCESSES]
    if any(given):
        if not all(given):
            command.bad_usage(f"--{', --'.join(_PROCESSES)} go together")
        if not re.fullmatch(r".+:\d+", FLAGS.coordinator):
            command.bad_usage(f"--coordinator={FLAGS.coordinator} must be HOST:PORT")
        if not 0 <= FLAGS.process_id < FLAGS.num_processes:
            command.bad_usage("--process_id must be at least 0 and less than --num_processes")
    return unparsed


def _write(default: Path, picture: np.ndarray) -> None:
    path = Path(FLAGS.out) if FLAGS.out else default
    png.save_png(path, picture)
    log.info("Wrote %s", path)


def _label() -> Any:
    """Returns the label of --label, or the features of --features; None without either."""
    if FLAGS.features is None:
        return FLAGS.label
    if FLAGS.label is not None:
        raise UserError("Give --label for a class or --features for a text, not both.")
    try:
        return np.load(FLAGS.features, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # by where the damage is
        raise UserError(f"{FLAGS.features} is no .npy file of numbers: {error}") from error


def _subjects(pipeline: BinaryLatentDiffusion, num: int) -> tuple[np.ndarray, Any]:
    """Returns the images to inpaint or vary, and their labels: the user's one, or test images."""
    if FLAGS.image:
        data = pipeline.config.data
        image = read_image(FLAGS.image, repr(FLAGS.image), data.image_size, data.channels)
        return to_float(image[None]), _label()
    images, labels = report.test_images(pipeline.config, num)
    if (label := _label()) is not None:
        return images, label
    return images, labels


def _masks(pipeline: BinaryLatentDiffusion, num: int) -> np.ndarray:
    """Returns the pixels to keep of `num` images, bool (num, height, width)."""
    height, width, _ = build.image_shape(pipeline.config)
    if FLAGS.mask is None or FLAGS.mask in masks.PRESETS:
        names = masks.PRESETS if FLAGS.mask is None and not FLAGS.image else (FLAGS.mask,)
        if FLAGS.image and FLAGS.mask is None:
            raise UserError(f"--image needs --mask: a file, or one of {', '.join(masks.PRESETS)}.")
        return np.stack(
            [masks.preset(names[i % len(names)], height, width, FLAGS.seed + i) for i in range(num)]
        )
    if not FLAGS.image:
        raise UserError(
            f"--mask={FLAGS.mask} is none of {', '.join(masks.PRESETS)}; a file needs --image."
        )
    return masks.read_mask(FLAGS.mask, FLAGS.image, height)[None]


def _options() -> dict[str, Any]:
    """Returns what the flags put in place of `config.sample`."""
    options = {name: FLAGS[name].value for name in _OPTIONS}
    for option in FLAGS.option:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--option={option} must be --option=NAME=VALUE.")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value  # a word
    return options


def _dispatch(config: ml_collections.ConfigDict | None, workdir: Path) -> None:
    mode = FLAGS.mode
    if FLAGS.num is not None and FLAGS.num < 1:
        raise UserError(f"--num must be at least 1, not {FLAGS.num}.")
    if FLAGS.out and (
        mode in ("all", "evaluate", "table4") or Path(FLAGS.out).suffix.lower() != ".png"
    ):
        raise UserError("--out must be a file that ends in .png, for one picture's mode.")
    options = _options()
    if config is not None:
        checks.sample_settings(config, options)  # before any training
    if mode in ("all", "train_prior"):
        checks.check_bits(config)  # before any training
        stages.check_batch(config, "prior")
    if mode == "table4":
        log.info("%s", bottlenecks.run(config, workdir))
        return
    if mode == "encode":
        folder = stages.encode(config, workdir)
        log.info("The codes are in %s", folder)
        return
    if mode in ("all", "train_autoencoder"):
        loop.train_autoencoder(config, workdir)
    if mode in ("all", "train_prior"):
        loop.train_prior(config, workdir)
    if mode in ("train_autoencoder", "train_prior"):
        return
    if FLAGS.metrics is not None:
        _evaluate(workdir, config, options)
        return
    if jax.process_index():
        return  # what is left is process 0's; the others wait for it as they exit
    pipeline = BinaryLatentDiffusion.from_workdir(workdir, config)
    if mode in ("all", "evaluate"):
        log.info("%s", json.dumps(report.report(pipeline, workdir), indent=2))
    if mode in ("all", "sample"):
        key = build.key(FLAGS.seed, "sample")
        picture = pictures.samples(pipeline, key, FLAGS.num, _label(), **options)
        _write(workdir / "samples.png", picture)
    if mode in ("all", "reconstruct"):
        images, _ = report.test_images(pipeline.config, FLAGS.num or 20)
        _write(workdir / "reconstructions.png", pictures.reconstructions(pipeline, images))
    if mode in ("all", "inpaint"):
        images, label = _subjects(pipeline, len(masks.PRESETS) if FLAGS.mask is None else 8)
        keep = _masks(pipeline, len(images))
        key = build.key(FLAGS.seed, "inpaint")
        num = FLAGS.num or 6
        _write(
            workdir / "inpainting.png",
            pictures.inpaintings(pipeline, images, keep, label, key, num, **options),
        )
    if mode == "vary":
        images, label = _subjects(pipeline, 8)
        key = build.key(FLAGS.seed, "vary")
        strength = 0.5 if FLAGS.strength is None else FLAGS.strength
        picture = pictures.variations(
            pipeline, images, label, key, FLAGS.num or 6, strength=strength, **options
        )
        _write(workdir / "variations.png", picture)
    if mode == "all":
        key = build.key(FLAGS.seed, "trajectory")
        _write(workdir / "trajectory.png", pictures.trajectory(pipeline, key))


def _evaluate(
    workdir: Path, config: ml_collections.ConfigDict | None, options: dict[str, Any]
) -> None:
    pipeline = BinaryLatentDiffusion.from_workdir(workdir, config)
    values, protocol = quality.run(
        *(pipeline, workdir, FLAGS.metrics),
        num=FLAGS.num,
        seed=FLAGS.seed,
        keep=FLAGS.keep,
        **options,
    )
    if values:
        log.info("%s\n\n%s", comparison.table(values), comparison.describe(protocol))


def main(argv: list[str]) -> None:
    """Dispatches on --mode; a user's error is one sentence and exit code 1."""
    del argv
    command.prepare_jax()
    with processes.together(), command.reporting():
        processes.join(*(FLAGS[name].value for name in _PROCESSES))
        # Of several processes, one that ends alone is better seen to fail.
        if FLAGS.mode in (*_TRAINING, "encode") and jax.process_count() == 1:
            command.end_on_sigterm()
        config = command.given_config()
        content = None if config is None else config.to_dict()
        processes.check_same("the config or --mode", json.dumps([FLAGS.mode, content]))
        _dispatch(config, Path(FLAGS.workdir))


def run() -> None:
    """Entry point."""
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
