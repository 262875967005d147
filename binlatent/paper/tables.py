"""The paper's Tables 1, 2 and 6 for a workdir, in Markdown, with all their numbers for JSON.

`python -m binlatent.paper table1|table6` writes them; Table 4 is in `bottlenecks`. Table 1 is made
from the results of `--mode=evaluate --metrics=...` in the workdir; Table 6 is measured directly.
"""

import dataclasses
import json
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.evaluation import results
from binlatent.evaluation.metrics.table import title
from binlatent.evaluation.networks.features import SUFFIXES
from binlatent.evaluation.quality import METRICS
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for

log = logging.getLogger(__name__)

STEPS = (16, 64)  # of Table 6

_COLUMNS = ("steps", "temperature", "guidance")  # columns of every Table 1


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stored_results(workdir: Path) -> list[dict[str, Any]]:
    """Returns the `metrics` and `protocol` of each result of `quality.measure`, newest first."""
    paths = (workdir / "evaluation").glob("*.json")
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            result = {name: dict(content[name]) for name in ("metrics", "protocol")}
            found.append((path.stat().st_mtime_ns, result))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # OSError: such as a broken link
            raise UserError(f"{path} is not a result of an evaluation: delete it.") from error
    return [result for _, result in sorted(found, key=lambda x: x[0], reverse=True)]


def no_results(workdir: Path, older: bool, metrics: str) -> UserError:
    """Returns the error for missing results, or for results of `older` weights only."""
    what, when = f"There are no results for this table in {workdir}", "first"
    if older:
        what = f"The results in {workdir} do not belong to the weights of its newest checkpoints"
        when = "again"
    flags = f"--workdir={shlex.quote(str(workdir))} --mode=evaluate --metrics={metrics}"
    return UserError(f"{what}: run `python -m binlatent.main {flags}` {when}.")


def _of_samples(pipeline: BinaryLatentDiffusion, workdir: Path) -> list[dict[str, Any]]:
    """Returns the newest result with a distance for each draw of samples, network and reference.

    Metrics of the same samples without a reference, such as IS and CAS, are added.
    """
    current = {
        "weights": f"EMA, {weights.fingerprint(pipeline.prior_params)}",
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
    }
    found = [result for result in stored_results(workdir) if "samples" in result["protocol"]]
    distances = {f"{name}{suffix}" for name in ("fid", "fd") for suffix in SUFFIXES.values()}
    rows: dict[str, dict[str, Any]] = {}
    older = False
    for result in found:
        protocol = result["protocol"]
        if not distances & result["metrics"].keys():
            continue
        if any(protocol["samples"].get(name) != value for name, value in current.items()):
            older = True
            continue
        parts = [protocol.get(name) for name in ("samples", "network", "reference")]
        rows.setdefault(json.dumps(parts, sort_keys=True), result)
    if not rows:
        raise no_results(workdir, older, "fid,is,pr")
    for row in rows.values():
        for result in found:
            same = result["protocol"]["samples"] == row["protocol"]["samples"]
            if same and "reference" not in result["protocol"]:
                row["metrics"] = result["metrics"] | row["metrics"]
    return sorted(rows.values(), key=lambda row: _settings(row).get("steps", 0))


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of samples and their reference, by names of columns."""
    settings = dict(row["protocol"]["samples"])
    if settings.get("times"):
        settings["steps"] = len(settings["times"]) - 1
    if settings["labels"] == "none":
        settings["guidance"] = "-"  # unconditional
    reference = row["protocol"]["reference"]
    names = [name for name in ("split", "images", "statistics") if name in reference]
    settings["reference"] = reference[names[0]] if names else "-"
    return settings


def _shown(name: str, metrics: dict[str, float]) -> str:
    value = metrics.get(name)
    if value is None:  # missing, or not finite
        return "-"
    if name.startswith("cas"):
        return f"{value:.2%}"
    if name.startswith(("precision", "recall")):
        return f"{value:.3f}"
    std = metrics.get(f"{name}_std")
    return f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _num_params(pipeline: BinaryLatentDiffusion) -> int:
    return sum(x.size for x in jax.tree.leaves(pipeline.prior_params))


def table1(pipeline: BinaryLatentDiffusion, workdir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Makes Table 1, or with classes Table 2: a row for each measured draw of samples.

    Args:
      pipeline: of the workdir; results of other weights are left out.
      workdir: with results of `quality.measure`; newer results replace older ones.

    Returns:
      The table in Markdown, and its rows: `metrics`, `protocol` and the prior's `parameters`.
    """
    rows = _of_samples(pipeline, workdir)
    names = []
    for suffix in SUFFIXES.values():
        distance, score = ("fd", "score") if suffix else ("fid", "is")
        of_network = [f"{name}{suffix}" for name in (distance, score, "precision", "recall")]
        if any(of_network[0] in row["metrics"] for row in rows):
            names += of_network
    if pipeline.num_classes:
        names += ["cas_top1", "cas_top5"]
    settings = [_settings(row) for row in rows]
    # Other settings in which rows differ: the seed, the pair, ...
    others = [
        name
        for name in settings[0]
        if name not in (*_COLUMNS, "count") and len({str(one.get(name)) for one in settings}) > 1
    ]
    parameters = _num_params(pipeline)
    titles = [*_COLUMNS, "samples", *others, *(title(name, METRICS) for name in names)]
    lines = [
        [
            *(str(one.get(name, "-")) for name in _COLUMNS),
            f"{one['count']:,}",
            *(str(one.get(name, "-")) for name in others),
            *(_shown(name, row["metrics"]) for name in names),
            f"{parameters:,}",
        ]
        for one, row in zip(settings, rows, strict=True)
    ]
    rows = [{**row, "parameters": parameters} for row in rows]
    return markdown([*titles, "parameters"], lines) + _floor_lines(rows, names), rows


def _floor_lines(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Returns the floors of the distances in rows of Table 1, as distinct lines."""
    lines = []
    for row in rows:
        metrics, count = row["metrics"], row["protocol"]["samples"]["count"]
        for name in names:
            ends = [end for end in ("real", "reconstructions") if f"{name}_{end}" in metrics]
            floors = [f"{name}_{end}" for end in ends]
            shown = [f"{title(floor, METRICS)} {_shown(floor, metrics)}" for floor in floors]
            if shown:
                lines.append(f"To compare with {count:,} samples: {', '.join(shown)}.\n")
    return "".join(f"\n{line}" for line in dict.fromkeys(lines))


def table6(
    pipeline: BinaryLatentDiffusion,
    *,
    num: int = 100,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
) -> tuple[str, list[dict[str, Any]]]:
    """Measures the seconds per sample, decoder included (Table 6).

    Samples are drawn one by one with the options of `config.sample`. The time is from the call to
    the image in the host's memory, after compilation. With several devices all draw the same sample
    at the same time, because the pipeline spreads a batch over all; the protocol has their number.

    Args:
      pipeline: with a prior.
      num: number of samples per row.
      steps: of the sampler, one row each; numbers above T are left out.
      seed: of the samples.

    Returns:
      The table in Markdown, and its rows: `steps`, `seconds` (mean), `median`, `parameters` of the
      prior, `protocol`.
    """
    T = pipeline.experiment.prior.prior.max_steps
    if beyond := [str(count) for count in steps if T is not None and count > T]:
        log.info("Left out %s steps: the prior was trained with T = %s.", ", ".join(beyond), T)
    steps = [count for count in steps if T is None or count <= T]
    if not steps:
        raise UserError(f"The prior was trained with {T} timesteps: give --steps of at most {T}.")
    devices, parameters = jax.local_device_count(), _num_params(pipeline)
    rows, lines = [], []
    for count in steps:
        settings = dataclasses.asdict(pipeline.settings({"steps": count}))
        if "guidance" in settings and not pipeline.num_classes:
            settings["guidance"] = 0.0  # unconditional
        protocol = {
            "samples": num,
            "batch": "1" if devices == 1 else f"1 per device, the same sample on all {devices}",
            "decoder": "included",
            **settings,
            "dtype": pipeline.experiment.dtype.name,
            "seed": seed,
            **results.machine(),
        }
        log.info("%d samples of %d steps, one by one", num, count)
        seconds = _seconds(pipeline, num, count, seed)
        row = {
            "steps": count,
            "seconds": float(np.mean(seconds)),
            "median": float(np.median(seconds)),
            "parameters": parameters,
            "protocol": protocol,
        }
        rows.append(row)
        shown = [str(count), *(f"{row[name]:.3g}" for name in ("seconds", "median")), str(num)]
        shown += [f"{protocol.get('guidance', 0.0):g}", f"{parameters:,}"]
        lines.append([*shown, *(protocol[name] for name in ("dtype", "device", "batch", "jax"))])
    titles = ["steps", "s/sample", "median", "samples", "guidance", "parameters", "dtype"]
    return markdown([*titles, "device", "batch", "JAX"], lines), rows


def _seconds(pipeline: BinaryLatentDiffusion, num: int, steps: int, seed: int) -> list[float]:
    """Returns the seconds of each of `num` samples, of the classes in turn, after compilation."""
    keys = list(jax.random.split(key_for(seed, "table6"), num + 1))
    seconds = []
    for i, key in enumerate(keys):
        label = i % pipeline.num_classes if pipeline.num_classes else None
        start = time.perf_counter()
        pipeline.sample(1, key, label, steps=steps)  # returns a NumPy array, so all work is done
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
