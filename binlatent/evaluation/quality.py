"""Measures a workdir by the metrics of the literature; an interrupted measurement continues.

The folder `evaluation` of a workdir holds the statistics of the reference, a folder of features for
each way to draw samples, and the results: JSON files of metrics and their protocol.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder import lpips
from binlatent.data import loader
from binlatent.data.splits import open_split
from binlatent.evaluation import cas, comparison, reconstructions, report, results, retrieval
from binlatent.evaluation.floors import floors
from binlatent.evaluation.judge import warn_near_chance
from binlatent.evaluation.metrics import pairs
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.networks.features import Features, Network
from binlatent.evaluation.reference import network, reference
from binlatent.evaluation.samples import Samples
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import strict_json
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.runtime.locks import in_turn
from binlatent.runtime.weights import digest
from binlatent.training.checkpoint import Checkpoints, exists
from binlatent.training.logbook import Logbook

log = logging.getLogger(__name__)

KEEP = ("none", "png", "npz")


def _classification_accuracy(
    experiment: Experiment, samples: Samples, folder: Path
) -> dict[str, float]:
    """Returns CAS: the accuracy on test images of a classifier trained on samples."""
    source = open_split(experiment.data, "test", keep=False)
    count, labels = len(source.examples), []
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:
        # The images may not fit in memory.
        shape = (count, *experiment.data.image_shape)
        images = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
        for i, batch in enumerate(loader.in_order(count, lambda i: source.examples[i], 64)):
            images[64 * i : 64 * (i + 1)] = batch["image"]
            labels.append(batch["label"])
        return cas.classification_accuracy(
            *(samples.images(), samples.labels(), images, np.concatenate(labels)),
            experiment.prior.conditioning.num_classes,
            key_for(experiment.seed, "cas"),
            num_epochs=experiment.evaluate.cas_epochs,
            batch_size=experiment.evaluate.cas_batch_size,
            dtype=experiment.dtype,
        )


def _how_classified(experiment: Experiment) -> dict[str, Any]:
    return {
        "epochs": experiment.evaluate.cas_epochs,
        "batch_size": experiment.evaluate.cas_batch_size,
        "test_images": len(open_split(experiment.data, "test", keep=False).examples),
        "seed": experiment.seed,
    }


# Arguments: the experiment, its `Samples` with images, and a folder for temporary files.
_OF_SAMPLES = {
    "cas": Metric(
        _classification_accuracy,
        {"cas_top1": "CAS top-1", "cas_top5": "CAS top-5"},
        needs=("classes",),
        settles=_how_classified,
    )
}

# Arguments: the pipeline, the network and the workdir. These metrics draw their own samples.
_OF_CAPTIONS = {"retrieval": retrieval.METRIC}

METRICS = comparison.METRICS | _OF_SAMPLES | _OF_CAPTIONS | reconstructions.METRICS
METRICS |= pairs.METRICS | report.METRICS

_BY_NETWORK = comparison.METRICS | _OF_CAPTIONS | reconstructions.METRICS


def _asked(table: dict[str, Metric], metrics: Sequence[str]) -> list[str]:
    return [name for name in metrics if name in table]


def check(experiment: Experiment, metrics: Sequence[str], num: int) -> None:
    """Refuses unknown metrics and those that this prior cannot support, before any sampling."""
    comparison.check_metrics(metrics, METRICS)
    conditioning = experiment.prior.conditioning
    for name in [name for name in metrics if "classes" in METRICS[name].needs]:
        if conditioning.kind != "class":
            raise UserError(f"The metric {name} is for priors with classes: leave it out.")
        if num < conditioning.num_classes:
            raise UserError(
                f"The metric {name} trains on samples of {conditioning.num_classes} classes, so "
                f"--num={num} is not enough: give at least --num={conditioning.num_classes}."
            )
    if _asked(_OF_CAPTIONS, metrics):
        retrieval.check(experiment)
    of_features = _asked(comparison.METRICS, metrics)
    comparison.check_network(experiment.evaluate.network, of_features)
    comparison.check_count(num, of_features)


def measure(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    metrics: Sequence[str],
    *,
    num: int | None = None,
    seed: int = 0,
    keep: str = "none",
    **options: Any,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures a workdir, and writes a JSON file and TensorBoard events.

    An interrupted measurement continues where it stopped.

    Args:
      pipeline: of the workdir.
      workdir: of the pipeline.
      metrics: names in `METRICS`.
      num: how many samples, None for `evaluate.num_samples`. For rfid and rkid, how many
        reconstructions at most, None for all test images.
      seed, keep: of `Samples`.
      **options: of the sampler, in place of `config.sample`; an option of None is ignored.

    Returns:
      The metrics by name, and the protocol; both {} in all processes but the first.
    """
    experiment = pipeline.experiment
    limit, num = num, experiment.evaluate.num_samples if num is None else num
    check(experiment, metrics, num)
    of_samples = _asked(comparison.METRICS | _OF_SAMPLES, metrics)
    needs = {need for name in metrics for need in METRICS[name].needs}
    if "vgg16" in needs:  # refuses a missing file before any work
        lpips.read_vgg16(experiment.autoencoder.vgg16)
    if of_samples or "prior" in needs:
        _ = pipeline.prior_params  # raises without a prior, before any work
    judge = None
    if _asked(_BY_NETWORK, metrics):
        judge = network(experiment, workdir)
        warn_near_chance(experiment, judge)
    values, protocol = {}, {}
    options = {name: value for name, value in options.items() if value is not None}
    drawing = {"num": num, "seed": seed, "keep": keep, "options": options}
    if of_samples:
        values, protocol = _of_samples(pipeline, judge, workdir, metrics, drawing)
    for name in _asked(_OF_CAPTIONS, metrics):
        more, told = _OF_CAPTIONS[name].measure(pipeline, judge, workdir, **drawing)
        values, protocol = values | more, protocol | {name: told, "network": judge.protocol}
    of_reconstructions = _asked(reconstructions.METRICS, metrics)
    if jax.process_index():
        return {}, {}
    if of_reconstructions:
        more, told, settings = reconstructions.compare_reconstructions(
            *(pipeline, judge, workdir, of_reconstructions, limit)
        )
        values |= more
        protocol |= {"reconstructions": told, "network": judge.protocol}
        protocol["metrics"] = protocol.get("metrics", {}) | settings
    if _asked(pairs.METRICS | report.METRICS, metrics):
        test = report.HeldOut.read(pipeline, workdir)
        more, settings = report.measure(pipeline, test, metrics)
        values, protocol["test images"] = values | more, test.protocol | settings
    protocol |= {"quantised": "uint8", **results.machine()}
    _write(workdir, values, protocol)
    return values, protocol


def _opponent(
    experiment: Experiment, judge: Network, workdir: Path, metrics: Sequence[str]
) -> tuple[Features | None, dict[str, Any]]:
    """Returns, in process 0, the features to compare with and their protocol, if needed."""
    comparison.check_network(judge.name, metrics, judge.logits)
    if jax.process_index() or not comparison.needing("reference", metrics):
        return None, {}
    known, protocol = reference(experiment, judge, workdir)
    comparison.check_reference(known, metrics, judge.width)
    return known, {"reference": protocol}


def _of_samples(
    pipeline: BinaryLatentDiffusion,
    judge: Network | None,
    workdir: Path,
    metrics: Sequence[str],
    drawing: dict[str, Any],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics of samples. Refuses an unsuitable reference before samples are drawn."""
    experiment, folder = pipeline.experiment, workdir / "evaluation"
    of_features, of_images = (_asked(x, metrics) for x in (comparison.METRICS, _OF_SAMPLES))
    values, protocol, known = {}, {}, None
    judge = judge if of_features else None
    if of_features:
        known, protocol = _opponent(experiment, judge, workdir, of_features)
    samples = Samples(pipeline, judge, folder, images=bool(of_images), **drawing)
    if jax.process_index():
        return {}, {}
    protocol["samples"] = samples.protocol
    if drawing["keep"] == "npz":
        log.info("Wrote %s", samples.write_batch())
    if of_features:
        protocol["network"] = judge.protocol
        values, protocol["metrics"] = comparison.compare(
            known, samples.features(), of_features, judge.suffix
        )
    split = experiment.evaluate.reference
    if "fid" in of_features and split in ("train", "test"):
        distance = f"fd{judge.suffix}" if judge.suffix else "fid"
        of = pipeline, judge, workdir, known.gaussians["pool"], split, drawing["num"]
        found, counts = floors(*of)
        values |= {f"{distance}_{name}": value for name, value in found.items()}
        decoded = f", codes: {reconstructions.codes_in_words(experiment)[-1]}"
        about = {"real": "", "reconstructions": decoded}
        shown = [f"{name}: {num} images{about[name]}" for name, num in counts.items()]
        protocol["metrics"]["floors"] = "; ".join(shown)
    for name in of_images:
        values |= _OF_SAMPLES[name].measure(experiment, samples, folder)
        protocol[name] = _OF_SAMPLES[name].settles(experiment)
    return values, protocol


def _write(workdir: Path, values: dict[str, float], protocol: dict[str, Any]) -> None:
    """Writes metrics to TensorBoard, and to the JSON file of the protocol without its `metrics`."""
    common = {name: value for name, value in protocol.items() if name != "metrics"}
    path = workdir / "evaluation" / f"{digest(common)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".results.lock").open("a") as file, in_turn(file):
        try:
            earlier = json.loads(path.read_text())
            earlier, settled = earlier["metrics"], earlier["protocol"].get("metrics", {})
        except (FileNotFoundError, ValueError, KeyError):  # missing, or cut off by a kill
            earlier, settled = {}, {}
        together = common | {"metrics": settled | protocol.get("metrics", {})}
        strict_json.write_json(path, {"metrics": earlier | values, "protocol": together})
    step = 0  # of the newest checkpoint of the last trained stage
    if stages := [stage for stage in ("prior", "autoencoder") if exists(workdir, stage)]:
        with Checkpoints.open(workdir, stages[0]) as checkpoints:
            step = checkpoints.latest_step()
    with Logbook(workdir, "evaluation", step, step) as logbook:
        logbook.record(step, values)


def judge_while_training(
    experiment: Experiment, workdir: Path, pipeline: Callable[[Any], BinaryLatentDiffusion]
) -> Callable[[Any], dict[str, float]] | None:
    """Returns a function that measures a prior in training; None if `evaluate.every` is 0.

    Unsuitable metrics, weights or references are refused here, before any training. The function
    maps the parameters that `pipeline` takes to `evaluate.metrics`; {} in all processes but the
    first. All processes draw a part of the samples, whose features are kept in the workdir until
    then.
    """
    asked = experiment.evaluate
    if not asked.every:
        return None
    comparison.check_metrics(asked.metrics, comparison.METRICS)
    check(experiment, asked.metrics, asked.num_samples)
    judge = network(experiment, workdir)
    warn_near_chance(experiment, judge)
    known, _ = _opponent(experiment, judge, workdir, asked.metrics)

    def measure(params: Any) -> dict[str, float]:
        # In its own folder: --mode=evaluate may draw the same samples at the same time.
        folder = workdir / "evaluation" / "while_training"
        samples = Samples(pipeline(params), judge, folder, asked.num_samples)
        if jax.process_index():
            return {}
        values, _ = comparison.compare(known, samples.features(), asked.metrics, judge.suffix)
        shutil.rmtree(samples.folder)
        return values

    return measure
