"""What the networks cost: `python -m binlatent.benchmark NAME --config=configs/X.py`.

`train_autoencoder`, `train_prior`, `sample`, `decode`, `encode` and `network` (the prior's, once)
run the compiled programs with random weights, no data and no workdir, and say how fast they are;
see docs/performance.md. As no data says how many classes there are, the prior has to be told, as by
--config.data.num_classes=10. `paper` measures all rows of that page's table for GPUs, but those
that --out has already. `data` reads the config's training images as training does, and says how
many a second. `memory` compiles the autoencoder's training step and its decoder, without running
them, and says what memory the compiled programs ask for. With --topology they are compiled for
TPUs that need not be there (`pip install libtpu`).
"""

import copy
import functools
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from flax import traverse_util
from ml_collections import config_flags

from binlatent import build, checks
from binlatent.autoencoder import lpips
from binlatent.benchmark import paper_sizes, speed, workloads
from binlatent.data import loader
from binlatent.evaluation import report
from binlatent.runtime import command
from binlatent.runtime.devices import AXIS
from binlatent.runtime.errors import UserError

FLAGS = flags.FLAGS
log = logging.getLogger("binlatent.benchmark")  # also as __main__

_GIB = 2**30


def device_to_compile_for(topology: str | None) -> Any:
    """Returns JAX's first device, or one of TPUs that need not be there.

    Raises:
      UserError: if there is no such topology, or libtpu is not installed.
    """
    if not topology:
        return jax.devices()[0]
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices[0]
    except Exception as error:  # of JAX's runtime, of several types
        raise UserError(
            f"Cannot compile for {topology!r} ({str(error).splitlines()[0]}): name one as "
            "v5p:2x2x1, and `pip install libtpu` in the version that this JAX asks for."
        ) from error


def train_step_memory(config: ml_collections.ConfigDict, batch_size: int, device: Any) -> dict:
    """Returns what the autoencoder's training step asks for, in bytes.

    Args:
      config: of the whole run.
      batch_size: images on the device.
      device: to compile for.

    Returns:
      `arguments`: state, images and frozen weights. `temporary`: what the step needs beside them.
      `total`, the sum, as the new state takes the place of the old one. `flops`, as the compiler
      counts them, None if it does not.
    """
    mesh = jax.sharding.Mesh(np.array([device]), (AXIS,))
    spec = jax.sharding.PartitionSpec
    networks = build.networks(config)
    # What jax.pmap makes of a step, on a mesh of one.
    step = jax.jit(
        jax.shard_map(
            build.autoencoder_step(config, networks),
            mesh=mesh,
            in_specs=(spec(), spec(AXIS), spec()),
            out_specs=(spec(), spec()),
            check_vma=False,
        ),
        donate_argnums=0,
    )
    state = jax.eval_shape(functools.partial(build.init_autoencoder_state, config))
    image = jax.ShapeDtypeStruct((batch_size, *build.image_shape(config)), jnp.float32)
    vgg16 = traverse_util.unflatten_dict(lpips.vgg16_shapes(), sep="/")
    lpips_params = {"params": vgg16} if networks.lpips else {}
    parts = config.autoencoder.train.accumulate
    return _memory(step, device, state, {"image": image}, lpips_params, times=parts)


def decode_memory(config: ml_collections.ConfigDict, batch_size: int, device: Any) -> dict:
    """Returns what decoding asks for, in bytes; arguments and result as of `train_step_memory`."""
    model = build.autoencoder(config)
    params = jax.eval_shape(functools.partial(build.init_autoencoder, config), jax.random.key(0))
    code = jax.ShapeDtypeStruct((batch_size, *build.code_shape(config)), jnp.float32)
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    return _memory(decode, device, params, code)


def _memory(function: Any, device: Any, *arguments: Any, times: int = 1) -> dict[str, float | None]:
    """Returns the row; `times` is how often the loop that is nearly all of it goes round."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    program = workloads.compile_program(function, *arguments)
    given = program.compiled.memory_analysis().argument_size_in_bytes
    return {
        "arguments": given,
        "temporary": program.memory - given,
        "total": program.memory,
        "flops": workloads.counted_flops((times, program)),
    }


def data_speed(
    config: ml_collections.ConfigDict, batch_size: int, seconds: float = 20.0
) -> dict[str, Any]:
    """Returns how many training images a second the loader delivers.

    Args:
      config: of the whole run.
      batch_size: images a batch.
      seconds: to measure for, after what was prepared ahead has been taken.

    Returns:
      `images_per_second`, the median of up to ten parts of that time, `images_per_second_min` and
      `images_per_second_max`, and what they depend on. JAX's devices are left alone.
    """
    source = report.open_data(config, "train", keep=False)  # each is decoded, as of large data
    batches = loader.train_batches(
        source,
        batch_size,
        config.seed,
        random_crop=config.data.crop == "random",
        random_flip=config.data.flip,
    )
    log.info("Measuring %s at batch size %d", config.data.name, batch_size)
    for _ in range(10):
        next(batches)
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds:
        next(batches)
        times.append(time.perf_counter())
    # Several batches may come at once; their mean is what keeps a step fed.
    tenths = np.array_split(np.diff(times), min(10, len(times) - 1))
    speeds = [batch_size / float(np.mean(part)) for part in tenths]
    return {
        "data": config.data.name,
        "image_size": config.data.image_size,
        "batch_size": batch_size,
        "images_per_second": statistics.median(speeds),
        "images_per_second_min": min(speeds),
        "images_per_second_max": max(speeds),
        "device": speed.cpu_name(),
        "devices": 1,
        "jax": jax.__version__,
        "driver": None,
    }


def memory(
    config: ml_collections.ConfigDict, batch_sizes: list[int], device: Any
) -> Iterator[dict]:
    """Yields a row for the training step, and one for the decoder, at each batch size."""
    for batch_size in batch_sizes:
        for what, function in (("train", train_step_memory), ("decode", decode_memory)):
            log.info("Compiling %s at batch size %d", what, batch_size)
            yield {
                "what": what,
                "image_size": config.data.image_size,
                "batch_size": batch_size,
                "dtype": config.dtype,
                "remat": config.autoencoder.remat,
                **function(config, batch_size, device),
                "device": speed.device_name(device),
                "devices": 1,
                "jax": jax.__version__,
                "driver": speed.driver() if device.platform == "gpu" else None,
            }


def data_table(rows: list[dict]) -> str:
    """Returns the rows of `data_speed` in Markdown."""
    names = ("data", "image_size", "batch_size")
    lines = ["| data | image | batch | images/s (least to most) |", "|" + "---|" * 4]
    for row in rows:
        median, least, most = (row[f"images_per_second{end}"] for end in ("", "_min", "_max"))
        cells = [*(row[name] for name in names), f"{median:.0f} ({least:.0f} to {most:.0f})"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *speed.measured_on(rows)]) + "\n"


def table(rows: list[dict]) -> str:
    """Returns the rows of `memory` in Markdown."""
    lines = [
        "| program | image | batch | compute | remat | arguments | temporary | total | TFLOP |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        sizes = " | ".join(
            f"{row[name] / _GIB:.3g} GiB" for name in ("arguments", "temporary", "total")
        )
        lines.append(
            f"| {row['what']} | {row['image_size']} | {row['batch_size']} | {row['dtype']} "
            f"| {'yes' if row['remat'] else 'no'} | {sizes} "
            f"| {'-' if row['flops'] is None else format(row['flops'] / 1e12, '.3g')} |"
        )
    return "\n".join([*lines, *speed.measured_on(rows)]) + "\n"


def speeds(
    name: str,
    config: ml_collections.ConfigDict,
    batch_sizes: list[int],
    steps: list[int],
    **options: Any,
) -> Iterator[dict]:
    """Yields a row of `speed.measure` for each batch size and number of steps, of `sample` alone.

    Raises:
      UserError: before the first row, if one of the numbers of steps cannot be, or the config lacks
        what the program needs.
    """
    configs = []
    for num_steps in steps or [config.sample.steps]:
        configs.append(copy.deepcopy(config))
        configs[-1].sample.steps = num_steps
        checks.check(configs[-1])
        workloads.check(name, configs[-1])
    for batch_size in batch_sizes:
        for config in configs:
            log.info("Measuring %s", speed.title(name, config, batch_size))
            yield speed.measure(name, config, batch_size, **options)


def define_flags() -> None:
    """Defines the command's flags; not on import, as `binlatent.main` has a --config too."""
    about = "Config file; its keys are flags, as --config.dtype and --config.sample.guidance."
    config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    flags.DEFINE_multi_integer("batch_size", [1], "Images a device; may be repeated.")
    flags.DEFINE_multi_integer("steps", [], "Sampling steps of sample; may be repeated.")
    flags.DEFINE_integer(
        "repeats",
        10,
        "Measurements of a program, of which the median counts; not of data and memory.",
    )
    flags.DEFINE_float(
        "peak_tflops", None, "What the device can reach, in place of what is known of it."
    )
    flags.DEFINE_string(
        "topology", None, "TPUs to compile for, such as v5p:2x2x1; JAX's own device if not given."
    )
    flags.DEFINE_bool("json", False, "One line of JSON a row, at once, in place of a table.")
    flags.DEFINE_string("out", None, "File to append the lines of JSON to.")


def main(argv: list[str]) -> None:
    """Prints a table; a user's error is one sentence and exit code 1."""
    command.prepare_jax()
    with command.reporting():
        names = ["memory", "data", "paper", *workloads.PROGRAMS]
        if len(argv) != 2 or argv[1] not in names:
            raise UserError(
                f"Name what to measure: {', '.join(names[:-1])} or {names[-1]}, not "
                f"{' '.join(argv[1:])!r}."
            )
        name, config = argv[1], command.given_config()
        if name == "paper":
            if config is not None:
                raise UserError("The word paper has configs of its own: leave out --config.")
        elif config is None:
            raise UserError("Name a config, for example --config=configs/churches256.py.")
        else:
            checks.check(config)
        _check_numbers(name, config)
        if FLAGS.out:
            _append(FLAGS.out, "")  # not to find out after the measurement
        rows = []
        if name == "data":
            measured = (data_speed(config, size) for size in FLAGS.batch_size)
        elif name == "memory":
            measured = memory(config, FLAGS.batch_size, device_to_compile_for(FLAGS.topology))
        else:
            # What was compiled by an earlier run would not say how long it takes.
            jax.config.update("jax_enable_compilation_cache", False)
            peak = FLAGS.peak_tflops and 1e12 * FLAGS.peak_tflops
            options = {"repeats": FLAGS.repeats, "peak": peak}
            if name == "paper":
                wanted = paper_sizes.rows()
                left = paper_sizes.missing(FLAGS.out, wanted) if FLAGS.out else (wanted,)
                measured = paper_sizes.measure(*left, **options)
            else:
                measured = speeds(name, config, FLAGS.batch_size, FLAGS.steps, **options)
        try:
            for row in measured:
                rows.append(row)
                line = json.dumps(row) + "\n"
                if FLAGS.json:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                if FLAGS.out:
                    _append(FLAGS.out, line)
        finally:  # what is measured is shown, even if the next row fails or is interrupted
            if name == "paper" and FLAGS.out:
                rows = list(paper_sizes.known(FLAGS.out, wanted).values())
            if rows and not FLAGS.json:
                as_table = {"data": data_table, "memory": table}.get(name, speed.table)
                sys.stdout.write(as_table(rows))


def _append(path: str, text: str) -> None:
    try:
        with Path(path).open("a") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"Cannot write --out={path} ({error.strerror}): name a file in a folder that is there."
        ) from error


def _check_numbers(name: str, config: ml_collections.ConfigDict | None) -> None:
    """Refuses numbers on the command line that cannot be, before anything is compiled."""
    timed = [*workloads.PROGRAMS, "paper"]
    of_some = {"steps": ["sample"], "topology": ["memory"], "repeats": timed, "peak_tflops": timed}
    of_some["batch_size"] = ["memory", "data", *workloads.PROGRAMS]
    for flag, programs in of_some.items():
        if FLAGS[flag].present and name not in programs:
            raise UserError(f"--{flag} is not for {name} but for {', '.join(programs)}.")
    stages = {"memory": "autoencoder", "train_autoencoder": "autoencoder", "train_prior": "prior"}
    parts = max(config[stages[name]].train.accumulate, 1) if name in stages else 1
    for size in FLAGS.batch_size:
        if size < 1 or size % parts:
            key = f"--config.{stages.get(name)}.train.accumulate"
            multiple = f" and a multiple of {key}, {parts}" if parts > 1 else ""
            raise UserError(f"--batch_size must be at least 1{multiple}, not {size}.")
    if FLAGS.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {FLAGS.repeats}.")
    if FLAGS.peak_tflops is not None and not 0 < FLAGS.peak_tflops < float("inf"):
        raise UserError(f"--peak_tflops must be above 0 and finite, not {FLAGS.peak_tflops}.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
