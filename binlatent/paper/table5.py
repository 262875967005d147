"""Table 5 of the paper: kinds of prior over the same bits, trained at equal budget.

`python -m binlatent.paper table5 --workdir=DIR` takes the autoencoder of DIR, encodes the training
images once, and trains every variant of `VARIANTS` (`--kinds`: some of them) for each of `--seeds`,
all with the steps and the batches of `config.prior.train`, in folders of DIR/table5. A prior is
tuned on training images by the sweep of `GRID`, and measured by test images. What is trained or
measured already is not done again.

On digits three seeds of all variants took 80 minutes of two busy CPU cores.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from binlatent.benchmark import rows, speed
from binlatent.evaluation import floors
from binlatent.experiment import Experiment
from binlatent.paper import runs
from binlatent.paper.runs import Options, described
from binlatent.paper.tables import markdown
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.prior import Prior
from binlatent.priors.settings import with_options


class Variant(NamedTuple):
    """A prior to compare.

    Fields:
      title: in the table.
      changes: values of `config.prior`, by key below it.
      samplers: options of the sampler, a row each, or several by the number of steps.
    """

    title: str
    changes: dict[str, Any]
    samplers: tuple[Options, ...] = ({},)


_ORDERS = ({"order": "random"}, {"order": "confidence"})

VARIANTS = {
    "bernoulli": Variant(
        "Bernoulli diffusion, z_0 in the evidence form",
        {"kind": "bernoulli", "bernoulli.target": "z_0", "bernoulli.evidence": True},
    ),
    **{
        f"absorbing_{name}": Variant(
            f"absorbing diffusion, {title}", {"kind": "absorbing", "absorbing.unit": unit}, _ORDERS
        )
        for name, unit, title in (
            ("token", "token", "by token"),
            ("bit", "bit", "by bit"),
            ("groups", "4", "by 4 bits"),
        )
    },
    **{
        f"autoregressive_{head}": Variant(
            f"autoregression, {head} bits", {"kind": "autoregressive", "autoregressive.head": head}
        )
        for head in ("independent", "joint")
    },
}

STEPS = (4, 8, 16)  # of samplers that take any number, beside the most

# What is tried of the options that a sampler has, at as many steps as `STEPS` has last. The best
# has the least Frechet distance to training images.
GRID = {"temperature": (0.8, 1.0, 1.2), "guidance": (0.0, 0.5, 1.0)}

SWEPT = 300  # samples of each point of the grid, at most

BATCHES = (1, 64)  # whose seconds are measured
_REPEATS = 3


def variant_experiment(experiment: Experiment, name: str, seed: int) -> Experiment:
    """Returns the experiment of a variant and seed, which learns from cached codes."""
    # Each row has its own number of steps; that of the config may be too large for a variant.
    return runs.of_changes(experiment, VARIANTS[name].changes, seed, STEPS[0])


def samplings(prior: Prior, sampler: Options) -> list[Options]:
    """Returns the options of a variant's rows: those of a sampler with each number of steps."""
    if not _takes(prior, "steps"):
        return [sampler]
    most = prior.max_steps
    steps = sorted({min(count, most or count) for count in (*STEPS, most or STEPS[-1])})
    return [{**sampler, "steps": count} for count in steps]


def sweep_points(prior: Prior, labelled: bool, sampler: Options) -> list[Options]:
    """Returns the points of the sweep of a sampler, of the options that it takes."""
    fixed = dict(sampler)
    if _takes(prior, "steps"):
        fixed["steps"] = min(STEPS[-1], prior.max_steps or STEPS[-1])
    if _takes(prior, "guidance"):
        fixed["guidance"] = 0.0  # without labels there is nothing to guide by
    names = [name for name in GRID if _takes(prior, name) and (labelled or name != "guidance")]
    points = itertools.product(*(GRID[name] for name in names))
    return [fixed | dict(zip(names, point, strict=True)) for point in points]


def _takes(prior: Prior, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(prior.Settings))


def _of_seed(
    numbers: runs.Numbers, name: str, seed: int, num: int, asked: Sequence[Options]
) -> list[dict[str, float]]:
    """Returns the numbers of a prior for each of the options asked for.

    They are the mean length of test codes, of a bound the tightest, whatever the options; and
    `Judge.sample_quality` beside test images.
    """
    bits = numbers.bits(name, seed)
    return [
        {"seed": seed, **bits, **numbers.quality(name, seed, "test", num, options)}
        for options in asked
    ]


def _sweep(
    numbers: runs.Numbers, name: str, seed: int, num: int, points: Sequence[Options]
) -> list[dict[str, Any]]:
    """Returns `Judge.sample_quality` beside training images of each point's `options`."""
    return [
        {"options": point, **numbers.quality(name, seed, "train", num, point)} for point in points
    ]


def _seconds(numbers: runs.Numbers, name: str, batch_size: int, options: Options) -> float:
    """Returns the seconds of a sample in a batch of so many a device, decoder included."""
    own = numbers.variant(name, 0)
    own = own.change({f"sample.{key}": value for key, value in options.items()})
    device = rows.place(jax.devices()[0], jax.local_device_count())
    what = f"batches of {batch_size}, {device['devices']} x {device['device']}"

    def measure() -> dict[str, float]:
        measured = speed.measure_speed("sample", own, batch_size, repeats=_REPEATS)
        return {"seconds": measured["seconds"] / batch_size}

    return numbers.once(name, f"{what}: {described(options)}", 0, measure)["seconds"]


def compare_priors(
    experiment: Experiment,
    workdir: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    num: int,
) -> dict[str, Any]:
    """Trains and measures variants.

    Args:
      experiment: of `runs.base_experiment`.
      workdir: with a trained autoencoder.
      names: of `VARIANTS`.
      seeds: of the priors. The sweep is of the first one's.
      num: of samples a row.

    Returns:
      `rows`; `sweeps`, the points of each; `protocol`.
    """
    numbers = runs.Numbers(
        *(experiment, workdir, runs.budget_folder(experiment, workdir / "table5")),
        *(functools.partial(variant_experiment, experiment), num),
        title="table 5",
    )
    for name, seed in itertools.product(names, seeds):  # all, before any training
        numbers.check(name, seed)
    swept = min(SWEPT, num)
    found, sweeps = [], []
    for name in names:
        own, variant = variant_experiment(experiment, name, seeds[0]), VARIANTS[name]
        prior, labelled = own.prior.prior, own.prior.conditioning.kind == "class"
        shapes = jax.eval_shape(own.prior.init, jax.random.key(0))
        drawn = []  # about each row, and its options
        for sampler in variant.samplers:
            asked = sweep_points(prior, labelled, sampler)
            points = _sweep(numbers, name, seeds[0], swept, asked)
            best = min(points, key=lambda point: point["frechet_distance"])["options"]
            tuned = {key: best[key] for key in GRID if key in best}
            about = {"variant": name, "title": variant.title, "sampler": sampler}
            sweeps.append({**about, "points": points, "best": tuned})
            drawn += [(about, sampling | tuned) for sampling in samplings(prior, sampler)]
        measured = [
            _of_seed(numbers, name, seed, num, [options for _, options in drawn]) for seed in seeds
        ]
        for (about, options), *of_seeds in zip(drawn, *measured, strict=True):
            settings = with_options(prior, own.sample.settings, options)
            row = {
                **about,
                "options": options,
                "parameters": sum(x.size for x in jax.tree.leaves(shapes)),
                "exact": prior.exact,
                "network_calls": prior.network_calls(settings, labelled),
                "seconds": {size: _seconds(numbers, name, size, options) for size in BATCHES},
                "seeds": of_seeds,
            }
            found.append(row)
    protocol = {
        "steps": experiment.prior.train.num_steps,
        "batch_size": experiment.prior.train.batch_size,
        "samples": num,
        "swept": swept,
        "images": experiment.evaluate.num_images,
        "floors": numbers.floors("test", num),
        "floors_of_sweep": numbers.floors("train", swept),
        **rows.place(jax.devices()[0], jax.local_device_count()),
    }
    return {"rows": found, "sweeps": sweeps, "protocol": protocol}


def _sweep_cells(sweep: dict[str, Any], points: Sequence[tuple[float, ...]]) -> list[str]:
    """Returns a line of the sweeps: the distance of each point, the best in bold."""
    shown = dict.fromkeys(points, "-")
    for point in sweep["points"]:
        place = tuple(point["options"].get(name, values[0]) for name, values in GRID.items())
        distance = f"{point['frechet_distance']:.2f}"
        best = sweep["best"].items() <= point["options"].items()
        shown[place] = f"**{distance}**" if best else distance
    return [sweep["title"], described(sweep["sampler"]) or "-", *shown.values()]


def _tuned_cells(options: Options) -> list[str]:
    return [f"{options[name]:g}" if name in options else "-" for name in GRID]


def text_of(content: dict[str, Any]) -> str:
    """Returns what `compare_priors` does as the table and its sweeps, in Markdown."""
    titles = runs.titles_of([one for row in content["rows"] for one in row["seeds"]])
    likelihood = titles.pop("bits_per_dim")
    lines = [
        [
            *(row["title"], described(row["sampler"]) or "-", f"{row['parameters']:,}"),
            runs.spread_cell(row["seeds"], "bits_per_dim"),
            "exact" if row["exact"] else "bound",
            " + ".join(str(calls) for calls in row["network_calls"] if calls),
            *_tuned_cells(row["options"]),
            *(f"{row['seconds'][size]:.3g}" for size in BATCHES),
            *(runs.spread_cell(row["seeds"], name) for name in titles),
        ]
        for row in content["rows"]
    ]
    head = ["prior", "sampling", "parameters", likelihood, "which is", "network calls", *GRID]
    head += [f"s/sample, batch {size}" for size in BATCHES]
    text = markdown([*head, *titles.values()], lines)
    points = list(itertools.product(*GRID.values()))
    head = ["prior", "sampling", *(", ".join(f"{x:g}" for x in point) for point in points)]
    swept = markdown(head, [_sweep_cells(sweep, points) for sweep in content["sweeps"]])
    how = content["protocol"]
    return (
        f"### Priors over the same bits\n\n{text}\n"
        f"Each is trained for {how['steps']:,} steps of {how['batch_size']} codes. Samples, "
        f"{how['samples']:,} a row, are judged beside {how['images']:,} test images at most. "
        "A network call sees all tokens, of an autoregressive prior one after the other. "
        f"Seconds include the decoder; {how['devices']} x {how['device']}, JAX {how['jax']}."
        f"{floors.in_words(how.get('floors', {}))}\n\n"
        f"### The sweep\n\n{swept}\n"
        f"Frechet distance of {how['swept']:,} samples to training images, by "
        f"{' and '.join(GRID)}; the best is what the table's samples are drawn with."
        f"{floors.in_words(how.get('floors_of_sweep', {}))}\n"
    )


def table5(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    *,
    kinds: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    num: int | None = None,
    config: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Makes Table 5 of a workdir's autoencoder.

    Args:
      pipeline: of the workdir.
      workdir: of the autoencoder; codes and priors are added to it.
      kinds: of `VARIANTS`, all of them by default.
      seeds: of the priors.
      num: of samples a row, `evaluate.num_samples` by default.
      config: what to change in the workdir's config, KEY=VALUE each.

    Returns:
      The table in Markdown, and what `compare_priors` does.
    """
    experiment = runs.base_experiment(pipeline.experiment, config)
    num = experiment.evaluate.num_samples if num is None else num
    content = compare_priors(experiment, workdir, kinds or list(VARIANTS), seeds, num)
    return text_of(content), content
