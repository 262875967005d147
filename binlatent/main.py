"""Trains, samples and evaluates: `python -m binlatent.main --config=configs/X.py --workdir=DIR`."""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from binlatent import experiment, stages
from binlatent.data.masks import PRESETS
from binlatent.evaluation import pictures, quality, report
from binlatent.evaluation.results import describe, table
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.pipeline.checks import check_guided
from binlatent.priors.settings import with_options
from binlatent.runtime import command, png, processes, usage
from binlatent.runtime.strict_json import to_json
from binlatent.runtime.usage import Flag, Mode

FLAGS = flags.FLAGS
log = logging.getLogger("binlatent")

_DRAWN = ("sample", "inpaint", "vary")
_SAMPLED = ("all", *_DRAWN, "evaluate")

_int, _float, _str = flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_string
_path, _multi = command.define_path, flags.DEFINE_multi_string
_FLAGS = {
    "workdir": Flag(_path, None, (), "Folder for checkpoints, metrics and pictures."),
    "mode": Flag(_str, "all", (), "What to do: one of the modes below. Default: all."),
    "coordinator": Flag(_str, None, (), "HOST:PORT of process 0, if several processes train."),
    "num_processes": Flag(_int, None, (), "Number of processes that train together."),
    "process_id": Flag(_int, None, (), "Index of this process, from 0."),
    "num": Flag(
        *(_int, None, (*_SAMPLED, "reconstruct")),
        "Number of images: in all, per prompt, or (inpaint, vary) per given image. A single sample "
        "is written as it is, others as a sheet.",
    ),
    "steps": Flag(_int, None, _SAMPLED, "Sampling steps, at most T or the number of units."),
    "temperature": Flag(_float, None, _SAMPLED, "Temperature tau > 0; lower is less diverse."),
    "guidance": Flag(_float, None, _SAMPLED, "Weight w >= 0 of classifier-free guidance."),
    "option": Flag(_multi, [], _SAMPLED, "NAME=VALUE, in place of config.sample.NAME."),
    "seed": Flag(_int, 0, _SAMPLED, "Random seed. Default: 0."),
    "label": Flag(
        *(_str, None, ("all", *_DRAWN)),
        "A class by name or number. Default: a row per class, or the class of each test image; "
        "none for --image.",
    ),
    "prompt": Flag(_multi, [], _DRAWN, "A text; may be repeated in sample, for a row each."),
    "prompts": Flag(_path, None, _DRAWN, "A text file with one prompt per line."),
    "negative_prompt": Flag(_str, None, _DRAWN, "A text that guidance leads away from."),
    "features": Flag(_path, None, _DRAWN, "A .npy file with the features of a text."),
    "image": Flag(
        *(_path, None, ("reconstruct", "inpaint", "vary")), "An image file. Default: test images."
    ),
    "mask": Flag(
        *(_path, None, ("inpaint",)),
        f"{', '.join(PRESETS)}, or an image file. Default: each preset in turn.",
    ),
    "strength": Flag(_float, 0.5, ("vary",), "Distance from the image, in (0, 1]. Default: 0.5."),
    "out": Flag(_path, None, (*_DRAWN, "reconstruct"), "PNG file. Default: one in the workdir."),
    "metrics": Flag(
        flags.DEFINE_list, None, ("evaluate",), f"Some of {','.join(quality.METRICS)}."
    ),
    "keep": Flag(_str, "none", ("evaluate",), f"How to keep samples: {', '.join(quality.KEEP)}."),
}
for _name, _flag in _FLAGS.items():
    _flag.define(_name, _flag.default, _flag.does)
config_flags.DEFINE_config_file("config", None, "A config file.", lock_config=True)


class _Run:
    """The input of a mode: the workdir, the experiment of --config, sampling options, pipeline."""

    def __init__(self, workdir: Path, given: experiment.Experiment | None):
        self.workdir, self.given = workdir, given
        own = {name: FLAGS[name].value for name in ("steps", "temperature", "guidance")}
        self.options = pictures.parse_options(FLAGS.option, own)
        if given is not None:  # refuses wrong options before training
            with_options(given.prior.prior, given.sample.settings, self.options)
            check_guided(given.prior.conditioning.kind, self.options)

    @functools.cached_property
    def pipeline(self) -> BinaryLatentDiffusion:
        """The workdir's newest checkpoints."""
        return BinaryLatentDiffusion.from_workdir(self.workdir, self.given)


def _given(function: Callable) -> Callable[[_Run], None]:
    return lambda run: function(run.given, run.workdir)


def _draw(name: str) -> Callable[[_Run], None]:
    file_name, draw = pictures.PICTURES[name]

    def mode(run: _Run) -> None:
        values = {field: FLAGS[field].value for field in pictures.Request._fields[1:]}
        picture = draw(run.pipeline, pictures.Request(run.options, **values))
        # A picture of the user's image must not replace one of `all`.
        own = f"_{Path(FLAGS.image).stem}" if FLAGS.image else ""
        path = Path(FLAGS.out or run.workdir / f"{file_name}{own}.png")
        side = run.pipeline.experiment.data.image_size
        single = picture.shape[:2] == (side, side)  # may be the --image of another command
        png.save_png(path, picture, min_side=1 if single else png.MIN_SIDE)
        log.info("Wrote %s", path)

    return mode


def _evaluate(run: _Run) -> None:
    if FLAGS.metrics is not None:
        asked = {name: FLAGS[name].value for name in ("num", "seed", "keep")} | run.options
        values, protocol = quality.measure(run.pipeline, run.workdir, FLAGS.metrics, **asked)
        if values:
            log.info("%s\n\n%s", table(values, quality.METRICS), describe(protocol))
    elif jax.process_index() == 0:
        log.info("%s", to_json(report.report(run.pipeline, run.workdir), indent=2))


def _all(run: _Run) -> None:
    stages.check_all(run.given, run.workdir)  # before any training
    with stages.alone_in(run.workdir):
        stages.train_autoencoder(run.given, run.workdir)
        stages.train_prior(run.given, run.workdir)
    if jax.process_index() == 0:  # the other processes wait for this one when they exit
        failed = []
        for mode in (_evaluate, *map(_draw, pictures.of_all(run.pipeline))):
            try:
                mode(run)
            except Exception as error:  # the remaining modes still run
                log.error("%s", error)
                failed.append(error)
        for error in failed:
            raise error


MODES = {
    "all": Mode("Trains both stages, evaluates and draws pictures.", "", _all, True),
    "train_autoencoder": Mode("Trains stage 1.", "", _given(stages.train_autoencoder), True),
    "train_prior": Mode("Trains stage 2.", "", _given(stages.train_prior), True),
    "encode": Mode("Writes the training images' codes.", "", _given(stages.write_codes), True),
    "table4": Mode("Compares the bottlenecks.", "", _given(bottlenecks.compare_bottlenecks), True),
    "sample": Mode("Draws new images.", "--label=7 --num=20", _draw("sample")),
    "reconstruct": Mode("Draws test images and reconstructions.", "--num=9", _draw("reconstruct")),
    "inpaint": Mode("Fills masked parts of images.", "--image=a.png --mask=left", _draw("inpaint")),
    "vary": Mode("Draws variations of images.", "--image=a.png --strength=0.4", _draw("vary")),
    "evaluate": Mode("Writes report.json, or measures --metrics.", "--metrics=fid,psnr", _evaluate),
}


def main(_: list[str]) -> None:
    """Runs --mode; an error that the user caused prints one line, and the exit code is 1."""
    with processes.together(), command.reporting():
        processes.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        mode, config = MODES[FLAGS.mode], command.given_config()
        if mode.needs_config and jax.process_count() == 1:
            command.end_on_sigterm()  # a process that ends among several must fail visibly
        given = config and experiment.resolve(config)
        processes.check_same(
            "the config or --mode", f"{FLAGS.mode} {given and given.without_paths}"
        )
        mode.run(_Run(Path(FLAGS.workdir), given))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; wrong usage prints one line, and the exit code is 2."""
    unparsed = usage.parse_flags(argv, MODES, _FLAGS)
    given = [name for name, flag in _FLAGS.items() if FLAGS[name].present and flag.modes]
    if given and FLAGS.mode == "evaluate" and FLAGS.metrics is None:
        command.bad_usage(f"--{given[0]} needs --metrics with --mode=evaluate")
    if FLAGS.mode == "reconstruct" and FLAGS.image and FLAGS.num:
        command.bad_usage("--num counts test images: leave it out with --image")
    if FLAGS.keep not in quality.KEEP:
        command.bad_usage(f"--keep={FLAGS.keep} is not one of {', '.join(quality.KEEP)}")
    return unparsed


def run() -> None:
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
