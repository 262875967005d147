"""The paper's Tables 1, 2, 4 and 6 for a workdir, in Markdown, with all their numbers as JSON.

`python -m binlatent.paper table1|table4|table6` writes them. Tables 1 and 4 are made of the results
of `--mode=evaluate --metrics=...` in the workdir; Table 6 is measured on the spot.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent import build, checks
from binlatent.evaluation import comparison
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

STEPS = (16, 64)  # of Table 6

_SUFFIXES = ("", "_effnet", "_classifier")  # of metrics, by the network whose features they are of


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(path: Path, text: str, rows: list[dict[str, Any]]) -> None:
    """Writes a table, and its rows as JSON beside it."""
    path.write_text(text)
    path.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _has_classes(pipeline: BinaryLatentDiffusion) -> bool:
    return build.condition(pipeline.config) == "class"


def _results(workdir: Path) -> list[dict[str, Any]]:
    """Returns what `quality.run` has written, the newest first.

    Raises:
      UserError: naming a file that is none of its own.
    """
    paths = (workdir / "evaluation").glob("*.json")
    results = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            content = json.loads(path.read_text())
            results.append({name: dict(content[name]) for name in ("metrics", "protocol")})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of an evaluation: delete it.") from error
    return results


def _no_results(workdir: Path, found: bool, metrics: str) -> UserError:
    command = f"run --mode=evaluate --workdir={workdir} --metrics={metrics}"
    if found:
        return UserError(
            f"The results in {workdir} are of other weights than its newest checkpoints': "
            f"{command} again."
        )
    return UserError(f"There are no results for this table in {workdir}: {command} first.")


def _of_samples(pipeline: BinaryLatentDiffusion, workdir: Path) -> list[dict[str, Any]]:
    """Returns the newest result with a distance for each draw of samples, network and reference.

    What was measured of the same samples without a reference, as IS and CAS, is added to them.
    """
    if pipeline.prior_params is None:
        raise UserError(f"{workdir} has no prior yet: run --mode=train_prior first.")
    current = {
        "weights": f"EMA, {weights.fingerprint(pipeline.prior_params)}",
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
    }
    results = [result for result in _results(workdir) if "samples" in result["protocol"]]
    rows: dict[str, dict[str, Any]] = {}
    older = False
    for result in results:
        protocol, metrics = result["protocol"], result["metrics"]
        if not any(f"{name}{suffix}" in metrics for name in ("fid", "fd") for suffix in _SUFFIXES):
            continue
        if any(protocol["samples"].get(name) != value for name, value in current.items()):
            older = True
            continue
        parts = [protocol.get(name) for name in ("samples", "network", "reference")]
        rows.setdefault(json.dumps(parts, sort_keys=True), result)
    if not rows:
        raise _no_results(workdir, older, "fid,is,pr")
    for row in rows.values():
        for result in results:
            same = result["protocol"]["samples"] == row["protocol"]["samples"]
            if same and "reference" not in result["protocol"]:
                row["metrics"] = result["metrics"] | row["metrics"]
    return sorted(rows.values(), key=lambda row: _settings(row)["steps"])


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what samples and their reference are, by what the columns of a table could be."""
    settings = dict(row["protocol"]["samples"])
    if settings.get("times"):
        settings["steps"] = len(settings["times"]) - 1
    if settings["labels"] == "none":
        settings["guidance"] = "-"  # there is nothing to guide by
    reference = row["protocol"]["reference"]
    names = [name for name in ("split", "images", "statistics") if name in reference]
    settings["reference"] = reference[names[0]] if names else "-"
    return settings


def _shown(name: str, metrics: dict[str, float]) -> str:
    value = metrics.get(name)
    if value is None:  # also of a number that was not finite
        return "-"
    if name.startswith("cas"):
        return f"{value:.2%}"
    if name.startswith(("precision", "recall")):
        return f"{value:.3f}"
    std = metrics.get(f"{name}_std")
    return f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}")


def table1(pipeline: BinaryLatentDiffusion, workdir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Makes a row for each draw of samples that was judged: Table 1, and with classes Table 2.

    Args:
      pipeline: of the workdir; results of other weights than its own are left out.
      workdir: with results of `quality.run`, of which the newest count.

    Returns:
      The table in Markdown, and its rows: `metrics`, `protocol` and the prior's `parameters`.

    Raises:
      UserError: if there are no results with a distance, or without a prior.
    """
    rows = _of_samples(pipeline, workdir)
    names = []
    for suffix in _SUFFIXES:
        distance, score = ("fd", "score") if suffix else ("fid", "is")
        of_network = [f"{name}{suffix}" for name in (distance, score, "precision", "recall")]
        if any(of_network[0] in row["metrics"] for row in rows):
            names += of_network
    if _has_classes(pipeline):
        names += ["cas_top1", "cas_top5"]
    settings = [_settings(row) for row in rows]
    always = ["steps", "temperature", "guidance", "count"]
    # What else tells the rows apart: the seed, the pair, ...
    others = [
        name
        for name in settings[0]
        if name not in always and len({str(one.get(name)) for one in settings}) > 1
    ]
    parameters = _count(pipeline.prior_params)
    titles = [*always[:3], "samples", *others, *map(comparison.title, names), "parameters"]
    lines = [
        [
            *(str(one.get(name, "-")) for name in always[:3]),
            f"{one['count']:,}",
            *(str(one.get(name, "-")) for name in others),
            *(_shown(name, row["metrics"]) for name in names),
            f"{parameters:,}",
        ]
        for one, row in zip(settings, rows, strict=True)
    ]
    return markdown(titles, lines), [{**row, "parameters": parameters} for row in rows]


def table4_row(pipeline: BinaryLatentDiffusion, workdir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Makes the row of Table 4 that is the workdir's autoencoder.

    `bottlenecks.run` trains several to compare them.

    Args:
      pipeline, workdir: as of `table1`.

    Returns:
      The table in Markdown, and its row: `metrics`, `protocol`, `size` and `bits` of an image.

    Raises:
      UserError: if there are no results with PSNR.
    """
    results = [x for x in _results(workdir) if {"psnr", "ssim", "lpips"} & x["metrics"].keys()]
    current = weights.fingerprint(pipeline.autoencoder_params)
    own = [x for x in results if x["protocol"]["test images"].get("autoencoder") == current]
    if not own:
        raise _no_results(workdir, bool(results), "psnr,ssim")
    # Of the most images; what was measured of the same ones is added.
    best = max(own, key=lambda x: x["protocol"]["test images"]["count"])
    count = best["protocol"]["test images"]["count"]
    same = [x["metrics"] for x in own if x["protocol"]["test images"]["count"] == count]
    metrics = dict(pair for x in reversed(same) for pair in x.items())
    config = pipeline.config
    section = config.autoencoder
    h, w, _ = build.code_shape(config)
    depth = {
        "vq": math.log2(section.codebook_size),
        "binary": section.num_bits,
        "real": 32 * section.num_channels,
    }
    bits = h * w * depth[section.bottleneck]
    titles = ["method", "size", "bits an image", "images", "PSNR", "SSIM", "LPIPS"]
    row = [
        bottlenecks.NAMES[section.bottleneck],
        bottlenecks.size(config),
        f"{bits:,.0f}",
        f"{count:,}",
        *(
            bottlenecks.with_spread(metrics, name, digits)
            for name, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3))
        ),
    ]
    return markdown(titles, [row]), [{**best, "metrics": metrics, "size": row[1], "bits": bits}]


def table6(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    *,
    num: int = 100,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
) -> tuple[str, list[dict[str, Any]]]:
    """Measures the seconds that one sample takes, decoder included (Table 6).

    Samples are drawn one by one, as `config.sample` says, from the call to the image in the host's
    memory; what is compiled is compiled before. Of several devices each draws the same sample at
    the same time, as the pipeline spreads a batch over all, and the protocol says how many.

    Args:
      pipeline: with a prior.
      workdir: that it is of.
      num: of samples a row.
      steps: of the sampler, a row each; those beyond T are left out.
      seed: of the samples.

    Returns:
      The table in Markdown, and its rows: `steps`, `seconds` (mean), `median`, `parameters` of the
      prior, `protocol`.

    Raises:
      UserError: without a prior, or if no steps are left.
    """
    if pipeline.prior_params is None:
        raise UserError(f"{workdir} has no prior yet: run --mode=train_prior first.")
    config = pipeline.config
    T = math.inf if config.prior.bernoulli.continuous else config.prior.bernoulli.num_timesteps
    if beyond := [str(count) for count in steps if count > T]:
        log.info("Left out %s steps: the prior was trained with %s.", ", ".join(beyond), T)
    steps = [count for count in steps if count <= T]
    if not steps:
        raise UserError(f"The prior was trained with {T} timesteps: give --steps of at most {T}.")
    settings = checks.sample_settings(config).to_dict()
    kept = ("temperature", "guidance", "pair", "threshold_last", "corrector_steps")
    machine, devices = comparison.machine(), jax.local_device_count()
    protocol = {
        "samples": num,
        "batch": "1" if devices == 1 else f"1 a device, the same sample on all {devices}",
        "decoder": "included",
        **{name: settings[name] for name in kept},
        "dtype": config.dtype,
        "seed": seed,
        **machine,
    }
    if not _has_classes(pipeline):
        protocol["guidance"] = 0.0  # there is nothing to guide by
    parameters = _count(pipeline.prior_params)
    rows = []
    for count in steps:
        log.info("%d samples of %d steps, one by one", num, count)
        seconds = _seconds(pipeline, num, count, seed)
        rows.append(
            {
                "steps": count,
                "seconds": float(np.mean(seconds)),
                "median": float(np.median(seconds)),
                "parameters": parameters,
                "protocol": protocol,
            }
        )
    titles = ["steps", "s/sample", "median", "samples", "guidance", "parameters", "dtype"]
    lines = [
        [
            *(str(row["steps"]), f"{row['seconds']:.3g}", f"{row['median']:.3g}", str(num)),
            *(f"{protocol['guidance']:g}", f"{parameters:,}", config.dtype),
            *(machine["device"], protocol["batch"], machine["jax"]),
        ]
        for row in rows
    ]
    return markdown([*titles, "device", "batch", "JAX"], lines), rows


def _seconds(pipeline: BinaryLatentDiffusion, num: int, steps: int, seed: int) -> list[float]:
    """Returns the seconds of each of `num` samples, classes in turn, after one that compiles."""
    keys = list(jax.random.split(build.key(seed, "table6"), num + 1))
    seconds = []
    for i, key in enumerate(keys):
        label = i % pipeline.num_classes if _has_classes(pipeline) else None
        start = time.perf_counter()
        pipeline.sample(1, key, label, steps=steps)  # a NumPy array: nothing is under way any more
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
