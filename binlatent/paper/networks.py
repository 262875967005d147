"""Compares the parts of the Bernoulli prior's network, at an equal budget.

`python -m binlatent.paper networks --workdir=DIR --seeds=0,1` uses the autoencoder of DIR, encodes
the training images once, and trains the Bernoulli diffusion with each of `ROWS` (or some, with
`--rows`): the released network, the released network with each part of `PARTS`, the network dit,
which has all parts, and dit without each one. The budget is the steps of `config.prior.train` or,
with `--seconds=N`, the number of steps that take N seconds. Results in folders of DIR/networks are
kept, so the command can be repeated.
"""

import itertools
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from binlatent import stages
from binlatent.benchmark import flops, workloads
from binlatent.benchmark.rows import place
from binlatent.evaluation import floors
from binlatent.evaluation.reference import network
from binlatent.experiment import Experiment
from binlatent.paper import runs
from binlatent.paper.tables import markdown
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.devices import replicate, shard
from binlatent.runtime.weights import digest
from binlatent.training.loop import Stage

log = logging.getLogger(__name__)

# Name of a part -> its title, and a key in `config.prior` with its value.
PARTS = {
    "adaln": ("adaLN-Zero", "network.dit.adaln", True),
    "qk_norm": ("QK-norm", "network.dit.qk_norm", True),
    "swiglu": ("SwiGLU", "network.dit.swiglu", True),
    "rotary": ("rotary positions", "network.dit.positions", "rotary"),
}

_RELEASED = {
    **{"kind": "bernoulli", "network.name": "released"},
    **{"network.dit.adaln": False, "network.dit.qk_norm": False, "network.dit.swiglu": False},
    **{"network.dit.positions": "learned"},
}


def _with(*parts: str) -> dict[str, Any]:
    """Returns values of `config.prior` for the released network with some parts."""
    values = dict(PARTS[part][1:] for part in parts)
    return _RELEASED | values | ({"network.name": "dit"} if parts else {})


# Name of a row -> its title and its values of `config.prior`.
ROWS = {
    "released": ("released", _with()),
    **{part: (f"released + {title}", _with(part)) for part, (title, *_) in PARTS.items()},
    "dit": ("dit", _with(*PARTS)),
    **{
        f"without_{part}": (
            f"dit without {title}",
            _with(*(other for other in PARTS if other != part)),
        )
        for part, (title, *_) in PARTS.items()
    },
}

STEPS = (4, 8, 16, 64)  # of the sampler

_TIMED = 20  # timed steps that decide how many fit, after two that compile
_STEPS_FILE = "steps.jsonl"


def row_experiment(experiment: Experiment, name: str, seed: int) -> Experiment:
    """Returns the experiment of a row and seed, with the steps of `config.prior.train`."""
    return runs.of_changes(experiment, ROWS[name][1], seed, STEPS[0])


def seconds_a_step(stage: Stage) -> float:
    """Returns the median seconds of `_TIMED` training steps, including the reading of batches."""
    state, seconds = replicate(stage.state), []
    for index in range(_TIMED + 2):
        start = time.perf_counter()
        batch = shard(next(stage.batches))
        state, metrics = stage.step(state, batch, index)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _decide_steps(
    experiment: Experiment, workdir: Path, folder: Path, names: Sequence[str], seconds: int
) -> dict[str, int]:
    """Returns the number of steps of each row in `seconds`; it is timed once and kept in a file."""
    path, decided = folder / _STEPS_FILE, {}
    known = runs.read_rows(path)
    for name in names:
        own = row_experiment(experiment, name, 0)
        prior = own.without_paths["prior"]
        prior["train"].pop("num_steps")
        row = name, digest(own.dtype.name, prior), 0
        if row not in known:
            log.info("Timing %s", name)
            place_of = folder / f"{name}_0"
            runs.link_shared(own, workdir, place_of)
            with stages.alone_in(place_of):
                step = seconds_a_step(stages.setup_prior(own, place_of))
            known[row] = {"steps": max(round(seconds / step), 1), "seconds_a_step": step}
            runs.write_rows(path, known)
            log.info("%s takes %d steps of %.3g s", name, known[row]["steps"], step)
        decided[name] = known[row]["steps"]
    return decided


def _logged_seconds(folder: Path, steps: int, batch_size: int) -> float:
    """Returns the seconds of training, from the log in a prior's folder.

    They are the number of steps times the median seconds of a step, without compilation,
    checkpoints and pictures.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    speeds = [x["images_per_second"] for x in lines if "images_per_second" in x]
    return steps * batch_size / statistics.median(speeds)


def _training(numbers: runs.Numbers, name: str, seed: int) -> dict[str, Any]:
    """Returns `parameters`, `steps` and `seconds` of a prior, and `flops` of training per image."""

    def measure() -> dict[str, Any]:
        pipeline = numbers.trained(name, seed)
        spec = pipeline.experiment.prior
        steps, batch_size = spec.train.num_steps, spec.train.batch_size
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(pipeline.prior_params)),
            "flops": flops.count_prior_step(spec.prior, workloads.TEXT_TOKENS),
            "steps": steps,
            "seconds": _logged_seconds(numbers.of(name, seed), steps, batch_size),
        }

    return numbers.once(name, "training", seed, measure)


def _of_seed(numbers: runs.Numbers, name: str, seed: int, num: int) -> dict[str, Any]:
    """Returns the numbers of a prior; `samples` is a list over numbers of steps."""
    most = numbers.variant(name, seed).prior.prior.max_steps
    counts = sorted({min(count, most or count) for count in STEPS})
    training, bits = _training(numbers, name, seed), numbers.bits(name, seed)
    samples = [
        {"sampling_steps": count, **numbers.quality(name, seed, "test", num, _plain(count))}
        for count in counts
    ]
    return {"seed": seed, **training, **bits, "samples": samples}


def _plain(steps: int) -> runs.Options:
    return {"steps": steps, "temperature": 1.0, "guidance": 0.0}


def compare_networks(
    experiment: Experiment,
    workdir: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    num: int,
    seconds: int | None = None,
) -> dict[str, Any]:
    """Trains and measures rows.

    Args:
      experiment: of `runs.base_experiment`.
      workdir: with a trained autoencoder.
      names: keys of `ROWS`.
      seeds: of the priors.
      num: number of samples.
      seconds: of training per prior; None for the steps of the config.

    Returns:
      `rows`, each with the numbers of its `seeds`; `protocol`.
    """
    for name in names:  # check all before any work
        stages.check_prior(row_experiment(experiment, name, seeds[0]))
    network(experiment, workdir)  # fails now if its weights are missing
    folder, decided = runs.budget_folder(experiment, workdir / "networks"), {}
    if seconds:
        folder = workdir / "networks" / f"{seconds}_seconds"
        decided = _decide_steps(experiment, workdir, folder, names, seconds)

    def variant(name: str, seed: int) -> Experiment:
        own = row_experiment(experiment, name, seed)
        steps = decided.get(name, own.prior.train.num_steps)
        # At least ten log entries; only the first includes compilation.
        log_every = min(own.run.log_every, max(steps // 10, 1))
        return own.change({"prior.train.num_steps": steps, "log_every": log_every})

    numbers = runs.Numbers(
        *(experiment, workdir, folder, variant, num), title="networks", named=True
    )
    for name, seed in itertools.product(names, seeds):  # all, before any training
        numbers.check(name, seed)
    found = []
    for name in names:
        measured = [_of_seed(numbers, name, seed, num) for seed in seeds]
        found.append({"row": name, "title": ROWS[name][0], "seeds": measured})
    protocol = {
        "seconds": seconds,
        "steps": None if seconds else experiment.prior.train.num_steps,
        "batch_size": experiment.prior.train.batch_size,
        "samples": num,
        "images": experiment.evaluate.num_images,
        "network": experiment.evaluate.network,
        "floors": numbers.floors("test", num),
        **place(jax.devices()[0], jax.local_device_count()),
    }
    return {"rows": found, "protocol": protocol}


def _cells(row: dict[str, Any], qualities: Sequence[str]) -> list[str]:
    of_seeds = row["seeds"]
    by_steps = list(zip(*(one["samples"] for one in of_seeds), strict=True))
    return [
        *(row["title"], f"{of_seeds[0]['parameters']:,}", f"{of_seeds[0]['flops'] / 1e9:.3g}"),
        *(f"{of_seeds[0]['steps']:,}", runs.spread_cell(of_seeds, "seconds")),
        runs.spread_cell(of_seeds, "bits_per_dim"),
        *(runs.spread_cell(values, name) for name in qualities for values in by_steps),
    ]


def networks_text(content: dict[str, Any]) -> str:
    """Returns the result of `compare_networks` as a table in Markdown."""
    found, how = content["rows"], content["protocol"]
    samples = [values for row in found for one in row["seeds"] for values in one["samples"]]
    counts = [values["sampling_steps"] for values in found[0]["seeds"][0]["samples"]]
    titles, qualities = runs.titles_of([found[0]["seeds"][0]]), runs.titles_of(samples)
    head = ["network", "parameters", "GFLOP", "steps", titles["seconds"], titles["bits_per_dim"]]
    head += [f"{title}, {count} steps" for title in qualities.values() for count in counts]
    budget = f"{how['seconds']:,} seconds" if how["seconds"] else f"{how['steps']:,} steps"
    table = markdown(head, [_cells(row, list(qualities)) for row in found])
    return (
        f"### Parts of the network, {budget} of training\n\n{table}\n"
        f"Batches of {how['batch_size']} codes. GFLOP are of training, per image. Seconds are "
        "without compilation. Bits per dimension are the bound for all T steps. Samples: "
        f"{how['samples']:,} for each number of steps, at temperature 1 and without guidance, "
        f"compared by {how['network']} with at most {how['images']:,} test images. "
        f"{how['devices']} x {how['device']}, JAX {how['jax']}."
        f"{floors.in_words(how['floors'])}\n"
    )


def networks(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    num: int | None = None,
    seconds: int | None = None,
    config: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Makes the table of the parts of the network, on a workdir's autoencoder.

    Args:
      pipeline: of the workdir.
      workdir: of the autoencoder; codes and priors are added to it.
      rows: keys of `ROWS`; None for all.
      seeds: of the priors.
      num: number of samples for each number of steps; None for `evaluate.num_samples`.
      seconds: of training per prior, in place of the steps of the config.
      config: changes of the workdir's config, as KEY=VALUE.

    Returns:
      The table in Markdown, and the result of `compare_networks`.
    """
    experiment = runs.base_experiment(pipeline.experiment, config)
    num = experiment.evaluate.num_samples if num is None else num
    content = compare_networks(experiment, workdir, rows or list(ROWS), seeds, num, seconds)
    return networks_text(content), content
