"""Speed and memory of the networks: `python -m binlatent.benchmark NAME --config=configs/X.py`.

`train_autoencoder`, `train_prior`, `sample`, `decode`, `encode` and `network` (one call of the
prior's) time the compiled programs with random weights, no data and no workdir
(docs/performance.md). As no data is opened, give a prior's number of classes, for example
--config.data.num_classes=10. `paper` measures the paper's sizes, without those that --out has
already. `data` reads the config's training images as training does, and prints images per second.
`memory` compiles the autoencoder's training step and its decoder, without running them, and prints
the memory that they ask for. With --topology they are compiled for TPUs that need not be there
(`pip install libtpu`).
"""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from binlatent import experiment as experiments
from binlatent.benchmark import loading, memory, paper_sizes, rows, speed, workloads
from binlatent.benchmark.rows import Row
from binlatent.experiment import Experiment
from binlatent.priors.settings import with_options
from binlatent.runtime import command, usage
from binlatent.runtime.errors import UserError
from binlatent.runtime.strict_json import to_json

FLAGS = flags.FLAGS
log = logging.getLogger("binlatent.benchmark")  # also as __main__


def measure_speeds(
    name: str, experiment: Experiment, batch_sizes: list[int], steps: list[int], **options: Any
) -> Iterator[Row]:
    """Yields a row for each batch size and number of steps, of `sample`; first checks all."""
    for num in steps:
        with_options(experiment.prior.prior, experiment.sample.settings, {"steps": num})
    variants = [experiment.change({"sample.steps": num}) for num in steps] or [experiment]
    workloads.check_measurable(name, experiment)
    for batch_size, variant in itertools.product(batch_sizes, variants):
        log.info("Measuring %s", speed.caption(name, variant, batch_size))
        yield speed.measure_speed(name, variant, batch_size, **options)


def define_flags() -> None:
    """Defines the command's flags; not on import, as `binlatent.main` has a --config too."""
    about = "Config file; its keys are flags, as --config.dtype and --config.sample.guidance."
    config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    flags.DEFINE_multi_integer("batch_size", [1], "Images a device; may be repeated.")
    flags.DEFINE_multi_integer("steps", [], "Sampling steps of sample; may be repeated.")
    about = "Measurements of a program, of which the median counts; not of data and memory."
    flags.DEFINE_integer("repeats", 10, about)
    about = "What the device can reach, in place of what is known of it."
    flags.DEFINE_float("peak_tflops", None, about)
    about = "TPUs to compile for, such as v5p:2x2x1; JAX's own device if not given."
    flags.DEFINE_string("topology", None, about)
    flags.DEFINE_bool("json", False, "One line of JSON a row in place of a table.")
    command.define_path("out", None, "File to append the lines of JSON to.")


def main(argv: list[str]) -> None:
    """Prints a table, each row as it is measured; a user's error is one sentence, exit code 1."""
    command.prepare_jax()
    with command.reporting():
        *names, last = ["memory", "data", "paper", *workloads.PROGRAMS]
        if len(argv) != 2 or argv[1] not in (*names, last):
            which = f"{', '.join(names)} or {last}, not {' '.join(argv[1:])!r}"
            raise UserError(f"Name what to measure: {which}.")
        name, config = argv[1], command.given_config()
        if name == "paper" and config is not None:
            raise UserError("The word paper has configs of its own: leave out --config.")
        if name != "paper" and config is None:
            raise UserError("Name a config, for example --config=configs/churches256.py.")
        experiment = None if config is None else experiments.resolve(config)
        _check_numbers(name, experiment)
        if FLAGS.out:
            _append(FLAGS.out, "")  # not to find out after the measurement
        columns = {"data": loading.COLUMNS, "memory": memory.COLUMNS}.get(name, speed.COLUMNS)
        for number, row in enumerate(_measured(name, experiment)):
            if not FLAGS.json and not number:
                print(rows.table_head(columns, row))
            print(to_json(row) if FLAGS.json else rows.table_line(columns, row), flush=True)


def _measured(name: str, experiment: Experiment | None) -> Iterable[Row]:
    """Returns the rows of a command; those that are new also go into --out."""
    sizes = FLAGS.batch_size
    if name == "data":
        data, seed = experiment.data, experiment.seed
        return _kept(loading.measure_loading(data, seed, size) for size in sizes)
    if name == "memory":
        device = memory.device_to_compile_for(FLAGS.topology)
        return _kept(memory.measure_memory(experiment, sizes, device))
    # What was compiled by an earlier run would not say how long it takes.
    jax.config.update("jax_enable_compilation_cache", False)
    options = {"repeats": FLAGS.repeats, "peak": FLAGS.peak_tflops and 1e12 * FLAGS.peak_tflops}
    if name != "paper":
        return _kept(measure_speeds(name, experiment, sizes, FLAGS.steps, **options))
    subjects = paper_sizes.paper_subjects()
    there = paper_sizes.known_rows(FLAGS.out, subjects) if FLAGS.out else {}
    if there:
        log.info("%d of %d rows are there already", len(there), len(subjects))
    left = [subject for number, subject in enumerate(subjects) if number not in there]
    new = paper_sizes.measure_subjects(left, **options)
    return itertools.chain(there.values(), _kept(new))


def _kept(measured: Iterable[Row]) -> Iterator[Row]:
    for row in measured:
        if FLAGS.out:
            _append(FLAGS.out, to_json(row) + "\n")
        yield row


def _append(path: str, text: str) -> None:
    try:
        with Path(path).open("a") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"Cannot write --out={path} ({error.strerror}): name a file in a folder that is there."
        ) from error


def _check_numbers(name: str, experiment: Experiment | None) -> None:
    """Refuses numbers on the command line that cannot be, before anything is compiled."""
    timed = [*workloads.PROGRAMS, "paper"]
    programs_of = {
        "steps": ["sample"],
        "topology": ["memory"],
        "repeats": timed,
        "peak_tflops": timed,
        "batch_size": ["memory", "data", *workloads.PROGRAMS],
    }
    for flag, programs in programs_of.items():
        if FLAGS[flag].present and name not in programs:
            raise UserError(f"--{flag} is not for {name} but for {', '.join(programs)}.")
    stages = {"memory": "autoencoder", "train_autoencoder": "autoencoder", "train_prior": "prior"}
    stage = stages.get(name)
    parts = max(getattr(experiment, stage).train.accumulate, 1) if stage else 1
    for size in FLAGS.batch_size:
        if size < 1 or size % parts:
            key = f"--config.{stage}.train.accumulate"
            multiple = f" and a multiple of {key}, {parts}" if parts > 1 else ""
            raise UserError(f"--batch_size must be at least 1{multiple}, not {size}.")
    if FLAGS.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {FLAGS.repeats}.")
    if FLAGS.peak_tflops is not None and not 0 < FLAGS.peak_tflops < float("inf"):
        raise UserError(f"--peak_tflops must be above 0 and finite, not {FLAGS.peak_tflops}.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=lambda argv: command.parse_flags(usage.with_config_paths(argv)))
