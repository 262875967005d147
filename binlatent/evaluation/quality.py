"""Judges a workdir's samples, drawn resumably, by the metrics of the literature.

`--mode=evaluate --metrics=...` and `config.evaluate.every` run it. In `evaluation` of a workdir lie
the statistics of the reference, a folder of features for each way to draw samples, and the results,
a JSON file each, with the protocol that they were measured by.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from binlatent import build
from binlatent.autoencoder import lpips
from binlatent.data import loader, sources
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import cas, comparison, exchange, report
from binlatent.evaluation.exchange import Images
from binlatent.evaluation.metrics import pairs
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.classifier import train_classifier
from binlatent.evaluation.networks.features import Features, Network
from binlatent.evaluation.samples import Samples
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.weights import digest
from binlatent.training import checkpoint
from binlatent.training.logbook import Logbook

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict

METRICS = (*comparison.METRICS, "cas", *pairs.METRICS, "bound")
KEEP = ("none", "png", "npz")


def network(config: Config, workdir: Path) -> Network:
    """Returns the network that `config.evaluate` names; a classifier is trained once a workdir.

    Raises:
      UserError: if its weights are not there, or the data has no classes.
    """
    if config.evaluate.network == "classifier":
        return features.classifier(*_classifier(config, workdir / "evaluation"))
    return features.published(config.evaluate.network, config.evaluate.weights)


def _classifier(config: Config, folder: Path) -> tuple[Any, int]:
    """Returns a classifier's parameters, trained on the training images, and its classes.

    Raises:
      UserError: if the images have no classes.
    """
    source = report.open_data(config, "train")
    num_images = min(config.evaluate.classifier_images, len(source.examples))
    if not source.num_classes:
        raise UserError(
            'config.evaluate.network = "classifier" needs images with classes: use "inception" or '
            '"efficientnet".'
        )
    shape, stamp = build.image_shape(config), sources.stamp(source.files)
    name = digest(source.fingerprint, stamp, shape, num_images, config.seed)
    path = folder / f"classifier_{name}.npz"
    if not path.exists() and jax.process_index() == 0:
        log.info("Training a classifier on %d real images", num_images)
        images, labels = report.load_images(source, num_images)
        key = build.key(config.seed, "classifier")
        params = jax.device_get(train_classifier(images, labels, source.num_classes, key))
        weights.write_npz(path, traverse_util.flatten_dict(params, sep="/"))
    while not path.exists():  # all processes judge by the same; if one fails, this one is ended
        time.sleep(0.5)
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            params = traverse_util.unflatten_dict(dict(file.items()), sep="/")
    except Exception as error:  # by where the damage is
        raise UserError(f"{path} is damaged: delete it, and it is made anew.") from error
    return params, source.num_classes


def reference(config: Config, network: Network, workdir: Path) -> tuple[Features, dict[str, Any]]:
    """Returns the features of the real images of `config.evaluate.reference`, and which these are.

    Those of a split are kept in the workdir, under a name made of all that they depend on.
    """
    name = config.evaluate.reference
    if name in ("train", "test"):
        return features_of_split(config, network, workdir, name)
    known, protocol = comparison.load(Path(name), network, config.sample.batch_size)
    protocol.pop("network", None)
    return known, protocol


def features_of_split(
    config: Config, network: Network, workdir: Path, split: str
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of all images of a split, "train" or "test", and which these are.

    They are kept in the workdir, under a name made of all that they depend on.
    """
    source = report.open_data(config, split, workdir, keep=False)
    protocol = {
        "images": config.data.name,
        "split": split,
        "fingerprint": source.fingerprint,
        "count": len(source.examples),
        "size": "x".join(map(str, build.image_shape(config))),
        "transform": "centre square, bicubic with antialiasing where its size is another",
    }
    name = f"reference_{digest(protocol, sources.stamp(source.files), network.protocol)}.npz"
    path = workdir / "evaluation" / name
    if path.exists():
        try:
            found, stored = exchange.read_statistics(path)
            del stored["network"]
            return found, stored
        except (UserError, KeyError):
            log.warning("%s is damaged: it is made anew.", path)
    log.info("Judging %d real images", len(source.examples))
    images = _images(source, protocol)
    found, protocol = comparison.features_of(network, images, config.sample.batch_size)
    found = found._replace(logits=None)
    exchange.write_statistics(path, found, {**protocol, "network": network.protocol})
    return found, protocol


def check_reference(known: Features, metrics: Sequence[str], network: Network) -> None:
    """Refuses, before any drawing, a reference that the samples cannot be compared with.

    Raises:
      UserError: saying what is missing.
    """
    comparison.check_known(known, metrics)
    comparison.check_widths(known, network.width)


def _images(source: Source, protocol: dict[str, Any]) -> Images:
    def read(index: int) -> np.ndarray:
        return source.examples[index]["image"]

    count = len(source.examples)
    return Images(count, lambda batch_size: loader.in_order(count, read, batch_size), protocol)


def _classification_accuracy(
    config: Config, samples: Samples, folder: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns CAS, of a classifier of samples on the real test images, and its protocol."""
    source = report.open_data(config, "test", keep=False)
    count, labels = len(source.examples), []
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:
        # They need not fit in memory.
        images = np.lib.format.open_memmap(
            file.name, "w+", np.uint8, (count, *build.image_shape(config))
        )
        for batch in loader.in_order(count, lambda i: source.examples[i], 64):
            start = sum(map(len, labels))
            images[start : start + len(batch["image"])] = batch["image"]
            labels.append(batch["label"])
        try:
            values = cas.classification_accuracy(
                *(samples.images(), samples.labels(), images, np.concatenate(labels)),
                config.data.num_classes,
                build.key(config.seed, "cas"),
                num_epochs=config.evaluate.cas_epochs,
                batch_size=config.evaluate.cas_batch_size,
                dtype=jnp.dtype(config.dtype),
            )
        except ValueError as error:
            raise UserError(f"CAS cannot be measured: {error}") from error
    protocol = {
        "epochs": config.evaluate.cas_epochs,
        "batch_size": config.evaluate.cas_batch_size,
        "test_images": count,
        "seed": config.seed,
    }
    return values, protocol


def check(config: Config, metrics: Sequence[str], num: int) -> None:
    """Refuses metrics that there are not, or not for such a prior, before anything is drawn.

    Raises:
      UserError: naming the metric.
    """
    comparison.check_metrics(metrics, METRICS)
    if "cas" in metrics and build.condition(config) != "class":
        raise UserError("The metric cas is for priors with classes: leave it out.")
    if "cas" in metrics and num < config.data.num_classes:
        raise UserError(
            f"The metric cas trains on samples of {config.data.num_classes} classes, so "
            f"--num={num} is not enough."
        )
    if "sfid" in metrics and config.evaluate.network != "inception":
        raise UserError(
            'The metric sfid is of config.evaluate.network="inception" alone: leave it out.'
        )
    if "is" in metrics and num < 10:
        raise UserError(f"The metric is takes samples in ten parts, so --num={num} is not enough.")


def check_while_training(config: Config) -> None:
    """Refuses what `config.evaluate` asks for at each `every` steps, before any training.

    Raises:
      UserError: naming the metric.
    """
    comparison.check_metrics(config.evaluate.metrics, comparison.METRICS)
    check(config, config.evaluate.metrics, config.evaluate.num_samples)


def run(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    metrics: Sequence[str],
    *,
    num: int | None = None,
    seed: int = 0,
    keep: str = "none",
    **options: Any,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures a workdir and writes a JSON file and TensorBoard; goes on where it was interrupted.

    Args:
      pipeline: of the workdir.
      workdir: for the results.
      metrics: of `METRICS`.
      num: of samples; `config.evaluate.num_samples` if None.
      seed: of the samples.
      keep: what to keep of them, as of `Samples`.
      **options: of the sampler, in place of `config.sample`.

    Returns:
      The metrics by name, and the protocol; {} in all processes but the first.

    Raises:
      UserError: for an unknown metric, missing weights, or a workdir without a prior.
    """
    config = pipeline.config
    num = config.evaluate.num_samples if num is None else num
    check(config, metrics, num)
    options = {name: value for name, value in options.items() if value is not None}
    if "lpips" in metrics:
        lpips.read_vgg16(config.autoencoder.loss.vgg16)  # before any work
    of_features = [name for name in metrics if name in comparison.METRICS]
    of_pairs = [name for name in metrics if name in pairs.METRICS]
    values: dict[str, float] = {}
    protocol: dict[str, Any] = {}
    first = jax.process_index() == 0
    if of_features or "cas" in metrics:
        if pipeline.prior_params is None:
            raise UserError(f"{workdir} has no prior yet: run --mode=train_prior first.")
        judge = known = None
        if of_features:
            judge = network(config, workdir)
            comparison.check_network(judge, of_features)
        if of_features and set(of_features) != {"is"} and first:  # before hours of drawing
            known, protocol["reference"] = reference(config, judge, workdir)
            check_reference(known, of_features, judge)
        samples = Samples(
            *(pipeline, judge, workdir / "evaluation", num),
            seed=seed,
            options=options,
            keep=keep,
            images="cas" in metrics,
        )
        if not first:
            return {}, {}
        protocol["samples"] = samples.protocol
        if keep == "npz":
            log.info("Wrote %s", samples.write_batch())
        if of_features:
            protocol["network"] = judge.protocol
            drawn = samples.features()
            protocol["metrics"] = comparison.settings(known, drawn, of_features)
            values = comparison.compare(known, drawn, of_features, judge.suffix)
        if "cas" in metrics:
            more, protocol["cas"] = _classification_accuracy(
                config, samples, workdir / "evaluation"
            )
            values |= more
    if not first:
        return {}, {}
    if of_pairs or "bound" in metrics:
        more, protocol["test images"] = _of_test_images(pipeline, workdir, of_pairs, metrics)
        values |= more
    protocol |= {"quantised": "uint8", **comparison.machine()}
    _write(workdir, values, protocol)
    return values, protocol


def _write(workdir: Path, values: dict[str, float], protocol: dict[str, Any]) -> None:
    """Writes metrics to a file of all that were measured by the same protocol, and to the log.

    What a metric settles for itself, under `metrics`, does not make it another protocol.
    """
    common = {name: value for name, value in protocol.items() if name != "metrics"}
    path = workdir / "evaluation" / f"{digest(common)}.json"
    try:
        earlier = json.loads(path.read_text())
        earlier, settled = earlier["metrics"], earlier["protocol"].get("metrics", {})
    except (FileNotFoundError, ValueError, KeyError):  # none, or cut by a kill
        earlier, settled = {}, {}
    together = common | {"metrics": settled | protocol.get("metrics", {})}
    comparison.write(path, earlier | values, together)
    step = _newest_step(workdir)
    with Logbook(workdir, "evaluation", step, step) as logbook:
        logbook.record(step, values)


def _newest_step(workdir: Path) -> int:
    """Returns the step of the newest checkpoint of the last stage that there is, 0 without one."""
    for stage in ("prior", "autoencoder"):
        if checkpoint.exists(workdir, stage):
            with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
                return checkpoints.latest_step()
    return 0


def _of_test_images(
    pipeline: BinaryLatentDiffusion, workdir: Path, of_pairs: Sequence[str], metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics of test images' reconstructions and codes, and which images these are."""
    config = pipeline.config
    source = report.open_data(config, "test", workdir)
    images, labels = report.load_images(source, config.evaluate.num_images)
    protocol = {
        "images": config.data.name,
        "split": "test",
        "fingerprint": source.fingerprint,
        "count": len(images),
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
        "codes": "y > 0.5",
    }
    values: dict[str, float] = {}
    if of_pairs:
        size = config.sample.batch_size
        parts = (images[i : i + size] for i in range(0, len(images), size))
        both = ((part, to_uint8(pipeline.reconstruct(to_float(part)))) for part in parts)
        vgg16 = config.autoencoder.loss.vgg16
        values |= pairs.pair_metrics(both, of_pairs, vgg16=vgg16, batch_size=size)
        if "lpips" in of_pairs:
            protocol["lpips"] = f"VGG16, {weights.sha256(vgg16)}"
    if "bound" in metrics:
        if pipeline.prior_params is None:
            raise UserError(f"{workdir} has no prior yet: run --mode=train_prior first.")
        known = report.known_labels(config, source, labels)
        probs = pipeline.encode_probs(to_float(images))
        values |= report.likelihood_metrics(pipeline, probs, known)
        draws = f"codes drawn, {config.evaluate.bound_draws} draws of noise a step, {config.dtype}"
        protocol["bound"] = f"{draws}, prior {weights.fingerprint(pipeline.prior_params)}"
    return values, protocol


def while_training(
    pipeline: BinaryLatentDiffusion, network: Network, known: Features | None, workdir: Path
) -> dict[str, float]:
    """Returns `config.evaluate.metrics` of a prior that is being trained; {} but in process 0.

    All processes take part in drawing `config.evaluate.num_samples`; nothing of them stays.

    Args:
      pipeline: of the averaged weights.
      network: that judges.
      known: of the reference; needed in process 0 alone.
      workdir: for the samples' features meanwhile.
    """
    config = pipeline.config
    samples = Samples(pipeline, network, workdir / "evaluation", config.evaluate.num_samples)
    if jax.process_index():
        return {}
    metrics = config.evaluate.metrics
    values = comparison.compare(known, samples.features(), metrics, network.suffix)
    shutil.rmtree(samples.folder)
    return values
