"""Samples and the training images nearest to them, to see whether the prior memorised its data.

`python -m binlatent.paper neighbours` draws the figure (supplement, Figure O).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt

from binlatent.autoencoder.lpips import MIN_SIZE, read_vgg16
from binlatent.data.splits import open_split
from binlatent.evaluation import reference, results
from binlatent.evaluation.judge import warn_near_chance
from binlatent.evaluation.metrics import pairs
from binlatent.evaluation.networks import features
from binlatent.evaluation.samples import Samples
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import png
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

NEIGHBOURS = 10  # per sample, as in Figure O
BY = ("features", "lpips")

_RANKED = 100  # nearest images by features that LPIPS ranks
_SHARE = 0.01  # of held-out images nearer than the threshold
_BLOCK = 2**25  # entries per block of float64: 256 MiB


class Neighbours(NamedTuple):
    """Samples and the training images nearest to them.

    Fields:
      samples: the samples shown, uint8 (num, h, w, c).
      images: the training images nearest to each, the nearest first, uint8 (num, k, h, w, c).
      distances: to these images, (num, k), of features or LPIPS.
      of_samples: distances of many samples to the nearest training image, in features, (n,).
      of_held_out: the same for as many test images, or all if there are fewer, (m,).
      metrics: those of the function `memorised`.
      protocol: how they were measured.
      names: the class of each sample, "" without classes.
    """

    samples: np.ndarray
    images: np.ndarray
    distances: np.ndarray
    of_samples: np.ndarray
    of_held_out: np.ndarray
    metrics: dict[str, float]
    protocol: dict[str, Any]
    names: Sequence[str]


def nearest_rows(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows nearest to each query, block by block, in float64.

    Args:
      queries: (n, d).
      rows: (m, d).
      k: number of neighbours, at most m.

    Returns:
      Indices into `rows`, (n, k), the nearest first, and Euclidean distances, float64 (n, k).
    """
    rows = np.asarray(rows, np.float64)
    squares = np.sum(np.square(rows), axis=1)
    size = max(_BLOCK // max(rows.shape), 1)
    found = []
    for start in range(0, len(queries), size):
        block = np.asarray(queries[start : start + size], np.float64)
        # |a - b|^2 without |a|^2, which is equal for all b.
        order = np.argpartition(squares[None] - 2 * (block @ rows.T), k - 1, axis=1)[:, :k]
        # Again from the differences: for copies the expansion gives rounding errors instead of 0.
        columns = [np.linalg.norm(block - rows[order[:, i]], axis=1) for i in range(k)]
        distances = np.stack(columns, axis=1)
        by_distance = np.argsort(distances, axis=1, kind="stable")
        found.append([np.take_along_axis(x, by_distance, axis=1) for x in (order, distances)])
    indices, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return indices, distances


def memorised(of_samples: np.ndarray, of_held_out: np.ndarray) -> dict[str, float]:
    """Returns the share of samples that are nearer to a training image than held-out images are.

    Args:
      of_samples: distance of each sample to the nearest training image, (n,).
      of_held_out: the same for held-out images, (m,).

    Returns:
      `threshold`: the 1st percentile of held-out images, or the nearest of fewer than 99.
      `memorised`: the share of samples at or below the threshold; 1 for copies.
      `expected`: that share if samples and held-out images had one distribution: 0.01, more if
        several held-out images are at or below the threshold (such as copies in both splits), and
        1 / (m + 1) for fewer than 99.
      `copies`, `copies_held_out`: the shares at distance 0.
      `median`, `median_held_out`: the medians.
    """
    # "weibull": a draw from the same distribution is below it with probability 0.01.
    threshold = np.quantile(of_held_out, _SHARE, method="weibull")
    return {
        "memorised": float(np.mean(of_samples <= threshold)),
        "expected": max(_SHARE, np.sum(of_held_out <= threshold) / (len(of_held_out) + 1)),
        "threshold": float(threshold),
        "copies": float(np.mean(of_samples == 0)),
        "copies_held_out": float(np.mean(of_held_out == 0)),
        "median": float(np.median(of_samples)),
        "median_held_out": float(np.median(of_held_out)),
    }


def find(
    pipeline: BinaryLatentDiffusion,
    workdir: Path,
    *,
    num: int = 8,
    by: str = "features",
    seed: int = 0,
) -> Neighbours:
    """Finds the training images nearest to samples, in the features of `evaluate.network`.

    LPIPS of all pairs would be too expensive, so it ranks the 100 training images that are nearest
    by features; `memorised` is always measured by features. At most `features.MAX_KEPT` training
    images, spread evenly, are searched; the protocol has the number.

    Args:
      pipeline: of the workdir.
      workdir: where samples and features are kept and read.
      num: of samples to show; `memorised` uses `config.evaluate.num_samples`.
      by: "features" or "lpips", with the weights of `config.autoencoder.loss.vgg16`.
      seed: of the samples.
    """
    experiment = pipeline.experiment
    if by == "lpips":
        if experiment.data.image_size < MIN_SIZE:
            raise UserError(
                f"LPIPS needs images of at least {MIN_SIZE}x{MIN_SIZE} pixels: use --by=features."
            )
        vgg16 = read_vgg16(experiment.autoencoder.vgg16)
    network, folder = reference.network(experiment, workdir), workdir / "evaluation"
    warn_near_chance(experiment, network)
    (train, train_protocol), (test, test_protocol) = (
        reference.features_of_split(experiment, network, workdir, split)
        for split in ("train", "test")
    )
    shown = Samples(pipeline, network, folder, num, seed=seed, images=True)
    many = Samples(pipeline, network, folder, experiment.evaluate.num_samples, seed=seed)

    log.info("Searching %d training images", len(train.pool))
    pool = many.features().pool
    spread = np.linspace(0, len(test.pool) - 1, min(len(pool), len(test.pool))).astype(int)
    of_samples, of_held_out = (
        nearest_rows(x, train.pool, 1)[1][:, 0] for x in (pool, test.pool[spread])
    )

    candidates = min(_RANKED if by == "lpips" else NEIGHBOURS, len(train.pool))
    indices, distances = nearest_rows(shown.features().pool, train.pool, candidates)
    source = open_split(experiment.data, "train", workdir, keep=False)
    in_source = features.kept(train.count)[indices]
    samples, images = np.concatenate(shown.images().parts), []
    for i, sample in enumerate(samples):
        found = np.stack([source.examples[int(j)]["image"] for j in in_source[i]])
        if by == "lpips":
            copies = np.broadcast_to(sample, found.shape)
            distances[i] = pairs.lpips(vgg16, copies, found, experiment.sample.batch_size)
            order = np.argsort(distances[i], kind="stable")
            found, distances[i] = found[order], distances[i, order]
        images.append(found[:NEIGHBOURS])

    by_class = experiment.prior.conditioning.kind == "class"
    names = [pipeline.class_names[label] for label in shown.labels()] if by_class else [""] * num
    how = f"LPIPS, of the {candidates} nearest by features" if by == "lpips" else "features"
    protocol = {
        "samples": many.protocol,
        "network": network.protocol,
        "training images": {**train_protocol, "searched": len(train.pool)},
        "held-out images": {**test_protocol, "used": len(spread)},
        "shown": {"samples": num, "neighbours": f"by {how}"},
        "memorised": "share of samples as near to a training image, in Euclidean distance of "
        "features, as the 1st percentile of held-out images",
        "quantised": "uint8",
        **results.machine(),
    }
    return Neighbours(
        *(samples, np.stack(images), distances[:, :NEIGHBOURS], of_samples, of_held_out),
        *(memorised(of_samples, of_held_out), protocol, names),
    )


def figure(found: Neighbours) -> plt.Figure:
    """Draws the result of `find` (supplement, Figure O).

    Each row has a sample and its nearest training images. A histogram below has the distances of
    samples and held-out images to the training images.
    """
    sheet = png.grid(list(np.concatenate([found.samples[:, None], found.images], axis=1)))
    height, width, _ = sheet.shape
    num, k = found.distances.shape
    drawn, (axis, below) = plt.subplots(
        *(2, 1),
        figsize=(8, 8 * height / width + 3),
        height_ratios=(8 * height / width, 2.5),
        layout="constrained",
    )
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axis.set(
        xticks=(np.arange(k + 1) + 0.5) * width / (k + 1),
        xticklabels=["sample", *map(str, range(1, k + 1))],
        yticks=(np.arange(num) + 0.5) * height / num,
        yticklabels=[
            f"{name}\n{distance:.3g}".strip()
            for name, distance in zip(found.names, found.distances[:, 0], strict=True)
        ],
        ylabel="distance of the nearest",
    )
    searched, count = (found.protocol["training images"][name] for name in ("searched", "count"))
    of = f"{searched:,}" if searched == count else f"{searched:,} of {count:,}"
    by = found.protocol["shown"]["neighbours"]
    axis.set_title(f"The nearest of {of} training images, {by}", fontsize="medium")
    largest = max(np.max(found.of_samples), np.max(found.of_held_out))
    bins = np.linspace(0, largest or 1, 51)
    for name, distances in (("samples", found.of_samples), ("held-out", found.of_held_out)):
        label = f"{len(distances):,} {name}, median {np.median(distances):.3g}"
        weights = np.full(len(distances), 1 / len(distances))
        below.hist(distances, bins, weights=weights, histtype="step", label=label)
    metrics = found.metrics
    below.axvline(metrics["threshold"], color="black", linestyle=":")
    below.set(xlabel="distance of features to the nearest training image", ylabel="share")
    below.set_title(
        f"{metrics['memorised']:.1%} of samples are nearer than the 1st percentile of held-out "
        f"images ({metrics['expected']:.1%} expected)",
        fontsize="medium",
    )
    below.legend()
    return drawn


def draw_neighbours(
    pipeline: BinaryLatentDiffusion, workdir: Path, **options: Any
) -> tuple[plt.Figure, dict[str, Any]]:
    """Returns the figure of `find` with these options, and its metrics and protocol."""
    found = find(pipeline, workdir, **options)
    return figure(found), {"metrics": found.metrics, "protocol": found.protocol}
