"""Table 5 of the paper: kinds of prior over the same bits, trained at equal budget.

`python -m binlatent.paper table5 --workdir=DIR` uses the autoencoder of DIR, encodes the training
images once, and trains all of `VARIANTS` (or some, with `--kinds`) for each of `--seeds`, with the
steps and batches of `config.prior.train`, in folders of DIR/table5. The options of sampling are
tuned on training images by the sweep of `GRID`, and measured with test images. Trained priors and
measured numbers are kept, so the command can be repeated.
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
      changes: values of `config.prior` by key.
      samplers: options of samplers; each has a row, or one per number of steps.
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

STEPS = (4, 8, 16)  # of samplers that take any number, in addition to the largest

# Values of the sweep for the options that a sampler has, with the last of `STEPS` steps. The best
# point has the smallest Frechet distance to training images.
GRID = {"temperature": (0.8, 1.0, 1.2), "guidance": (0.0, 0.5, 1.0)}

SWEPT = 300  # samples per point of the grid, at most

BATCHES = (1, 64)  # batch sizes whose seconds are measured
_REPEATS = 3


def variant_experiment(experiment: Experiment, name: str, seed: int) -> Experiment:
    """Returns the experiment of a variant and seed, which trains on cached codes."""
    # Each row sets its own number of steps; that of the config may be too large for a variant.
    return runs.of_changes(experiment, VARIANTS[name].changes, seed, STEPS[0])


def samplings(prior: Prior, sampler: Options) -> list[Options]:
    """Returns the options of a sampler's rows, one for each number of steps."""
    if not _takes(prior, "steps"):
        return [sampler]
    most = prior.max_steps
    steps = sorted({min(count, most or count) for count in (*STEPS, most or STEPS[-1])})
    return [{**sampler, "steps": count} for count in steps]


def sweep_points(prior: Prior, labelled: bool, sampler: Options) -> list[Options]:
    """Returns the points of a sampler's sweep, over the options that it has."""
    fixed = dict(sampler)
    if _takes(prior, "steps"):
        fixed["steps"] = min(STEPS[-1], prior.max_steps or STEPS[-1])
    if _takes(prior, "guidance"):
        fixed["guidance"] = 0.0  # replaced by the grid if there are labels
    names = [name for name in GRID if _takes(prior, name) and (labelled or name != "guidance")]
    points = itertools.product(*(GRID[name] for name in names))
    return [fixed | dict(zip(names, point, strict=True)) for point in points]


def _takes(prior: Prior, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(prior.Settings))


def _of_seed(
    numbers: runs.Numbers, name: str, seed: int, num: int, asked: Sequence[Options]
) -> list[dict[str, float]]:
    """Returns the numbers of a prior for each of the options.

    They are the mean length of test codes (for a bound, the tightest), which does not depend on the
    options, and `Judge.sample_quality` compared with test images.
    """
    bits = numbers.bits(name, seed)
    return [
        {"seed": seed, **bits, **numbers.quality(name, seed, "test", num, options)}
        for options in asked
    ]


def _sweep(
    numbers: runs.Numbers, name: str, seed: int, num: int, points: Sequence[Options]
) -> list[dict[str, Any]]:
    """Returns each point's `options` and its `Judge.sample_quality` against training images."""
    return [
        {"options": point, **numbers.quality(name, seed, "train", num, point)} for point in points
    ]


def _seconds(numbers: runs.Numbers, name: str, batch_size: int, options: Options) -> float:
    """Returns the seconds per sample, decoder included; the batch size is per device."""
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
      experiment: from `runs.base_experiment`.
      workdir: with a trained autoencoder.
      names: keys of `VARIANTS`.
      seeds: of the priors. The sweep uses the prior of the first seed.
      num: number of samples per row.

    Returns:
      `rows`; `sweeps`, with their points; `protocol`.
    """
    numbers = runs.Numbers(
        *(experiment, workdir, runs.budget_folder(experiment, workdir / "table5")),
        *(functools.partial(variant_experiment, experiment), num),
        title="table 5",
    )
    for name, seed in itertools.product(names, seeds):  # check all before any training
        numbers.check(name, seed)
    swept = min(SWEPT, num)
    found, sweeps = [], []
    for name in names:
        own, variant = variant_experiment(experiment, name, seeds[0]), VARIANTS[name]
        prior, labelled = own.prior.prior, own.prior.conditioning.kind == "class"
        shapes = jax.eval_shape(own.prior.init, jax.random.key(0))
        drawn = []  # (description, options) of each row
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
    """Returns a row of the table of sweeps: the distance at each point, the best in bold."""
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
    """Returns the result of `compare_priors` as two tables in Markdown."""
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
        f"Each prior is trained for {how['steps']:,} steps of {how['batch_size']} codes. "
        f"{how['samples']:,} samples per row are compared with at most {how['images']:,} test "
        "images. A network call covers all tokens; an autoregressive prior takes them one by one. "
        f"Seconds include the decoder; {how['devices']} x {how['device']}, JAX {how['jax']}."
        f"{floors.in_words(how.get('floors', {}))}\n\n"
        f"### The sweep\n\n{swept}\n"
        f"Frechet distance of {how['swept']:,} samples to training images, by "
        f"{' and '.join(GRID)}. The samples of the table above are drawn with the best values."
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
    """Makes Table 5 for a workdir's autoencoder.

    Args:
      pipeline: of the workdir.
      workdir: of the autoencoder; codes and priors are added to it.
      kinds: keys of `VARIANTS`; None for all.
      seeds: of the priors.
      num: number of samples per row; None for `evaluate.num_samples`.
      config: changes of the workdir's config, as KEY=VALUE.

    Returns:
      The table in Markdown, and the result of `compare_priors`.
    """
    experiment = runs.base_experiment(pipeline.experiment, config)
    num = experiment.evaluate.num_samples if num is None else num
    content = compare_priors(experiment, workdir, kinds or list(VARIANTS), seeds, num)
    return text_of(content), content
