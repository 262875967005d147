"""What the images of a workdir are compared with: a network, and its features of real images.

They are kept in the folder `evaluation` of the workdir. File names are hashes of all inputs.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from binlatent.data import loader, sources
from binlatent.data.sources import Source
from binlatent.data.splits import load_images, open_split, spread_indices
from binlatent.evaluation import comparison, exchange
from binlatent.evaluation.exchange import ImageSet
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.classifier import train_classifier
from binlatent.evaluation.networks.features import Features, Network
from binlatent.experiment import Experiment
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.runtime.locks import only_process
from binlatent.runtime.weights import digest

log = logging.getLogger(__name__)


def network(experiment: Experiment, workdir: Path) -> Network:
    """Returns the network that `evaluate.network` names."""
    if experiment.evaluate.network == "classifier":
        return classifier(experiment, workdir)
    asked, flag = experiment.evaluate, "--config.evaluate.weights=FILE"
    return features.published(asked.network, asked.weights, flag)


def classifier(experiment: Experiment, workdir: Path) -> Network:
    """Returns a classifier of the training images, trained once per workdir."""
    source = open_split(experiment.data, "train")
    num_images = min(experiment.evaluate.classifier_images, len(source.examples))
    if not source.num_classes:
        raise UserError(
            'config.evaluate.network = "classifier" needs images with classes: use "inception" or '
            '"efficientnet".'
        )
    shape, stamp = experiment.data.image_shape, sources.stamp(source.files)
    name = digest(source.fingerprint, stamp, shape, num_images, experiment.seed)
    path = workdir / "evaluation" / f"classifier_{name}.npz"
    if not path.exists() and jax.process_index() == 0:
        log.info("Training a classifier on %d real images", num_images)
        images, labels = load_images(source, num_images)
        key = key_for(experiment.seed, "classifier")
        params = jax.device_get(train_classifier(images, labels, source.num_classes, key))
        weights.write_npz(path, traverse_util.flatten_dict(params, sep="/"))
    while not path.exists():  # written by process 0; if that fails, this process is ended
        time.sleep(0.5)
    arrays = exchange.read_arrays(path, "it is made anew")
    return features.classifier(traverse_util.unflatten_dict(arrays, sep="/"))


def reference(
    experiment: Experiment, network: Network, workdir: Path
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of the images of `evaluate.reference`, and a description of these.

    Images in a folder are cropped and resized as those that the model is trained on. Images in a
    file must have the model's size.
    """
    name, data = experiment.evaluate.reference, experiment.data
    if name in ("train", "test"):
        return features_of_split(experiment, network, workdir, name)
    path, size = Path(name), None
    if path.is_dir():
        size = data.image_size
    elif exchange.holds_images(path):
        _check_size(exchange.open_set(path).protocol["size"], data.image_size, path)
    how = {"max_broken": data.max_broken, "key": "config.data.max_broken"}
    how |= {"channels": data.channels}
    batch_size = experiment.sample.batch_size
    known, protocol = comparison.load_features(path, network, batch_size, size, **how)
    protocol.pop("network", None)
    return known, protocol


def _check_size(found: str, image_size: int, path: Path) -> None:
    """Refuses images in a file whose size is not that of the model's images."""
    expected = f"{image_size}x{image_size}"
    if found != expected:
        raise UserError(
            f"The images in {path} are {found}, but the model's are {expected}: set "
            "config.evaluate.reference to a folder, whose images are cropped and resized, or to a "
            "file of images of that size."
        )


def choose(
    experiment: Experiment, source: Source, split: str, limit: int | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the indices of `limit` images of a split, spread evenly, and a description of them.

    Without a limit, or with fewer images, they are all images.
    """
    count = len(source.examples)
    indices = spread_indices(count, count if limit is None else limit)
    protocol = {
        "images": experiment.data.name,
        "split": split,
        "fingerprint": source.fingerprint,
        "count": len(indices),
        **({"spread evenly over": count} if len(indices) < count else {}),
        "size": "x".join(map(str, experiment.data.image_shape)),
        "transform": exchange.CENTRE_SQUARE,
    }
    return indices, protocol


def features_of_split(
    experiment: Experiment,
    network: Network,
    workdir: Path,
    split: str,
    limit: int | None = None,
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of images of a split, "train" or "test", and a description of these.

    They are all images, or `limit` of them, spread evenly.
    """
    source = open_split(experiment.data, split, workdir, keep=False)
    indices, protocol = choose(experiment, source, split, limit)
    count = len(indices)
    name = digest(protocol, sources.stamp(source.files), network.protocol)
    path = workdir / "evaluation" / f"reference_{name}.npz"
    if path.exists():
        try:
            found, stored = exchange.read_statistics(path)
            del stored["network"]
            return found, stored
        except (UserError, KeyError):
            log.warning("%s is damaged and is made again.", path)
    log.info("Judging %d real images", count)

    def batches(size: int) -> Iterator[np.ndarray]:
        return loader.in_order(count, lambda i: source.examples[int(indices[i])]["image"], size)

    images = ImageSet(count, batches, protocol, lambda: source.examples.num_unreadable)
    folder = path.with_suffix("")  # features so far, from which an interrupted call continues
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder / ".lock", f"The real images of {folder} are being judged"):
        size = experiment.sample.batch_size
        found, protocol = comparison.features_of(network, images, size, folder)
        found = found._replace(logits=None)
        exchange.write_statistics(path, found, {**protocol, "network": network.protocol})
        shutil.rmtree(folder)
    return found, protocol
