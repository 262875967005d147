"""Trains, samples and evaluates: `python -m binlatent.main --config=configs/X.py --workdir=DIR`."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from binlatent import experiment, stages
from binlatent.data.masks import PRESETS
from binlatent.evaluation import pictures, quality, report
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.settings import with_options
from binlatent.runtime import command, png, processes, usage
from binlatent.runtime.usage import Flag, Mode

FLAGS = flags.FLAGS
log = logging.getLogger("binlatent")

_DRAWN = ("sample", "inpaint", "vary")
_SAMPLED = ("all", *_DRAWN, "evaluate")
_PROCESSES = ("coordinator", "num_processes", "process_id")
_OPTIONS = ("steps", "temperature", "guidance")  # of config.sample that have flags of their own

_int, _float, _str = flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_string
_FLAGS = {
    "workdir": Flag(_str, None, (), "Folder of checkpoints, metrics and pictures."),
    "mode": Flag(_str, "all", (), "What to do, of those below; default all."),
    "coordinator": Flag(_str, None, (), "HOST:PORT of process 0, if several train together."),
    "num_processes": Flag(_int, None, (), "How many processes train together."),
    "process_id": Flag(_int, None, (), "Which of them this is, from 0."),
    "num": Flag(_int, None, (*_SAMPLED, "reconstruct"), "Images, or results of each."),
    "steps": Flag(_int, None, _SAMPLED, "Reverse steps, 1 to T of training."),
    "temperature": Flag(_float, None, _SAMPLED, "tau > 0; less is less diverse."),
    "guidance": Flag(_float, None, _SAMPLED, "w >= 0, of classifier-free guidance."),
    "option": Flag(flags.DEFINE_multi_string, [], _SAMPLED, "NAME=VALUE of config.sample."),
    "seed": Flag(_int, 0, _SAMPLED, "Of the draw; default 0."),
    "label": Flag(_int, None, ("all", *_DRAWN), "The class of all; else a row a class."),
    "features": Flag(_str, None, _DRAWN, "A .npy file of a text's features."),
    "image": Flag(_str, None, ("inpaint", "vary"), "A file; else images of the test split."),
    "mask": Flag(_str, None, ("inpaint",), f"{', '.join(PRESETS)}, or a file; else each in turn."),
    "strength": Flag(_float, 0.5, ("vary",), "How far from the image, above 0 to 1; default 0.5."),
    "out": Flag(_str, None, (*_DRAWN, "reconstruct"), "The PNG file to write."),
    "metrics": Flag(flags.DEFINE_list, None, ("evaluate",), f"Of {','.join(quality.METRICS)}."),
    "keep": Flag(_str, "none", ("evaluate",), f"Samples: one of {', '.join(quality.KEEP)}."),
}
for _name, _flag in _FLAGS.items():
    _flag.define(_name, _flag.default, _flag.does)
config_flags.DEFINE_config_file("config", None, "A config file.", lock_config=True)


class Run:
    """What a mode works on: the workdir, the experiment of --config if any, options, a pipeline."""

    def __init__(self, workdir: Path, given: experiment.Experiment | None):
        """Takes the rest from the flags."""
        self.workdir, self.given = workdir, given
        self.options = pictures.parse_options(FLAGS.option)
        self.options |= {name: FLAGS[name].value for name in _OPTIONS if FLAGS[name].present}
        if given is not None:  # before any training
            with_options(given.prior.prior, given.sample.settings, self.options)

    @functools.cached_property
    def pipeline(self) -> BinaryLatentDiffusion:
        """The workdir's newest checkpoints."""
        return BinaryLatentDiffusion.from_workdir(self.workdir, self.given)


def _draw(name: str, draw: Callable) -> Callable[[Run], None]:
    """Returns a mode that writes a picture to --out, or to a file of the workdir."""

    def mode(run: Run) -> None:
        values = {field: FLAGS[field].value for field in pictures.Request._fields[1:]}
        picture = draw(run.pipeline, pictures.Request(run.options, **values))
        png.save_png(path := Path(FLAGS.out or run.workdir / name), picture)
        log.info("Wrote %s", path)

    return mode


def _evaluate(run: Run) -> None:
    if FLAGS.metrics is not None:
        draws = {"num": FLAGS.num, "seed": FLAGS.seed, "keep": FLAGS.keep}
        quality.run(run.pipeline, run.workdir, FLAGS.metrics, **draws, **run.options)
    elif jax.process_index() == 0:
        log.info("%s", json.dumps(report.report(run.pipeline, run.workdir), indent=2))


def _all(run: Run) -> None:
    stages.check_prior(run.given)  # before any training
    stages.train_autoencoder(run.given, run.workdir)
    stages.train_prior(run.given, run.workdir)
    if jax.process_index():
        return  # what is left is process 0's; the others wait for it as they exit
    for mode in ("evaluate", "sample", "reconstruct", "inpaint"):
        MODES[mode].run(run)
    if pictures.has_trajectory(run.pipeline):
        _draw("trajectory.png", pictures.draw_trajectory)(run)


def _with_config(function: Callable) -> Callable[[Run], None]:
    return lambda run: function(run.given, run.workdir)


MODES = {
    "all": Mode("Trains both stages, evaluates, draws pictures.", "", _all, True),
    "train_autoencoder": Mode("Trains stage 1.", "", _with_config(stages.train_autoencoder), True),
    "train_prior": Mode("Trains stage 2.", "", _with_config(stages.train_prior), True),
    "encode": Mode("Writes the training images' codes.", "", _with_config(stages.encode), True),
    "table4": Mode("Compares the bottlenecks.", "", _with_config(bottlenecks.run), True),
    "sample": Mode("Draws new images.", "--label=7", _draw("samples.png", pictures.draw_samples)),
    "reconstruct": Mode(
        "Draws test images above their reconstructions.",
        "--num=20",
        _draw("reconstructions.png", pictures.draw_reconstructions),
    ),
    "inpaint": Mode(
        "Draws hidden parts of images anew.",
        "--image=seven.png --mask=left",
        _draw("inpainting.png", pictures.draw_inpaintings),
    ),
    "vary": Mode(
        "Draws variations of images.",
        "--image=seven.png --strength=0.4",
        _draw("variations.png", pictures.draw_variations),
    ),
    "evaluate": Mode("Writes report.json, or measures --metrics.", "--metrics=fid,psnr", _evaluate),
}


def main(argv: list[str]) -> None:
    """Dispatches on --mode; a user's error is one sentence and exit code 1."""
    del argv
    command.prepare_jax()
    with processes.together(), command.reporting():
        processes.join(*(FLAGS[name].value for name in _PROCESSES))
        mode, config = MODES[FLAGS.mode], command.given_config()
        if mode.needs_config and jax.process_count() == 1:
            command.end_on_sigterm()  # of several processes, one that ends alone is seen to fail
        given = config and experiment.resolve(config)
        same = json.dumps([FLAGS.mode, given and given.config])
        processes.check_same("the config or --mode", same)
        mode.run(Run(Path(FLAGS.workdir), given))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; bad usage is one sentence and exit code 2."""
    unparsed = usage.parse_flags(argv, MODES, _FLAGS)
    if FLAGS.mode == "evaluate" and FLAGS.metrics is None:
        for name, flag in _FLAGS.items():
            if FLAGS[name].present and flag.modes:
                command.bad_usage(f"--{name} is for --mode=evaluate with --metrics")
    processes.check_flags(*(FLAGS[name].value for name in _PROCESSES))
    return unparsed


def run() -> None:
    """Entry point."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
