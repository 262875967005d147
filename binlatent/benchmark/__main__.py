"""Speed and memory of the networks: `python -m binlatent.benchmark NAME --config=configs/X.py`.

NAME is one of
- `train_autoencoder`, `train_prior`, `sample`, `decode`, `encode`, `network` (one call of the
  prior's network): times the compiled program, with random weights and without data or a workdir
  (docs/performance.md). For a prior give the number of classes, as --config.data.num_classes=10.
- `paper`: measures the sizes of the paper, except for rows that --out already has.
- `data`: reads the training images as training does, and prints images per second.
- `memory`: compiles the autoencoder's training step and its decoder without running them, and
  prints the memory they need. With --topology it compiles for TPUs that are not present
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
    """Checks all variants, then yields a row for each batch size and number of sampling steps."""
    for num in steps:
        with_options(experiment.prior.prior, experiment.sample.settings, {"steps": num})
    variants = [experiment.change({"sample.steps": num}) for num in steps] or [experiment]
    workloads.check_measurable(name, experiment)
    for batch_size, variant in itertools.product(batch_sizes, variants):
        log.info("Measuring %s", speed.caption(name, variant, batch_size))
        yield speed.measure_speed(name, variant, batch_size, **options)


def define_flags() -> None:
    """Defines the command's flags; not on import, because `binlatent.main` has a --config too."""
    about = "Config file; its keys are flags, such as --config.dtype=bfloat16."
    config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    flags.DEFINE_multi_integer("batch_size", [1], "Images per device; may be repeated.")
    flags.DEFINE_multi_integer("steps", [], "Sampling steps, for sample; may be repeated.")
    about = "Measurements per program, of which the median is shown; not for data and memory."
    flags.DEFINE_integer("repeats", 10, about)
    about = "Peak TFLOP/s of the device, in place of the data sheet's."
    flags.DEFINE_float("peak_tflops", None, about)
    about = "For memory: TPUs to compile for, such as v5p:2x2x1. Default: JAX's own device."
    flags.DEFINE_string("topology", None, about)
    flags.DEFINE_bool("json", False, "Print a line of JSON per row in place of a table.")
    command.define_path("out", None, "File to append the lines of JSON to.")


def main(argv: list[str]) -> None:
    """Prints a table row by row; an error that the user caused prints one line, exit code 1."""
    with command.reporting():
        *names, last = ["memory", "data", "paper", *workloads.PROGRAMS]
        if len(argv) != 2 or argv[1] not in (*names, last):
            which = f"{', '.join(names)} or {last}, not {' '.join(argv[1:])!r}"
            raise UserError(f"Give what to measure: {which}.")
        name, config = argv[1], command.given_config()
        if name == "paper" and config is not None:
            raise UserError("The table paper has its own configs: leave out --config.")
        if name != "paper" and config is None:
            raise UserError("Give a config, for example --config=configs/churches256.py.")
        experiment = None if config is None else experiments.resolve(config)
        _check_numbers(name, experiment)
        if FLAGS.out:
            _append(FLAGS.out, "")  # fails before the measurement if the file cannot be written
        columns = {"data": loading.COLUMNS, "memory": memory.COLUMNS}.get(name, speed.COLUMNS)
        for number, row in enumerate(_measured(name, experiment)):
            if not FLAGS.json and not number:
                print(rows.table_head(columns, row))
            print(to_json(row) if FLAGS.json else rows.table_line(columns, row), flush=True)


def _measured(name: str, experiment: Experiment | None) -> Iterable[Row]:
    """Returns the rows of a command; new rows are also appended to --out."""
    sizes = FLAGS.batch_size
    if name == "data":
        data, seed = experiment.data, experiment.seed
        return _kept(loading.measure_loading(data, seed, size) for size in sizes)
    if name == "memory":
        device = memory.device_to_compile_for(FLAGS.topology)
        return _kept(memory.measure_memory(experiment, sizes, device))
    # Programs from the cache would not show the time of compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    options = {"repeats": FLAGS.repeats, "peak": FLAGS.peak_tflops and 1e12 * FLAGS.peak_tflops}
    if name != "paper":
        return _kept(measure_speeds(name, experiment, sizes, FLAGS.steps, **options))
    subjects = paper_sizes.paper_subjects()
    there = paper_sizes.known_rows(FLAGS.out, subjects) if FLAGS.out else {}
    if there:
        log.info("--out already has %d of %d rows", len(there), len(subjects))
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
            f"Cannot write --out={path} ({error.strerror}): give a file in an existing folder."
        ) from error


def _check_numbers(name: str, experiment: Experiment | None) -> None:
    """Refuses invalid numbers on the command line, before anything is compiled."""
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
            raise UserError(f"--{flag} is for {', '.join(programs)}, not for {name}.")
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
