"""A prior's samples beside the training images nearest to them: does it repeat what it has seen?

The supplement's Figure O shows it, `python -m binlatent.paper neighbours` draws it.
"""

import logging
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

NEIGHBOURS = 10  # beside each sample, as in Figure O
BY = ("features", "lpips")

_RANKED = 100  # of the nearest by features, that LPIPS ranks
_SHARE = 0.01  # of held-out images that are nearer to training images than the threshold
_BLOCK = 2**25  # entries of an array of float64 at a time: 256 MiB


class Neighbours(NamedTuple):
    """Samples and the training images nearest to them.

    Fields:
      samples: a few of them, uint8 (num, h, w, c).
      images: the training images nearest to each, the nearest first, uint8 (num, k, h, w, c).
      distances: to these, (num, k), of features or LPIPS.
      of_samples: of the features of many samples, the distance to the nearest training image, (n,).
      of_held_out: the same of as many test images, or of all if there are fewer, (m,).
      metrics: `memorised`; `expected`, what it is of samples that are to the training images as
        held-out images are; `threshold`, and both medians.
      protocol: how it was measured.
    """

    samples: np.ndarray
    images: np.ndarray
    distances: np.ndarray
    of_samples: np.ndarray
    of_held_out: np.ndarray
    metrics: dict[str, float]
    protocol: dict[str, Any]


def nearest_rows(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows nearest to each query, block by block, in float64.

    Args:
      queries: (n, d).
      rows: (m, d).
      k: how many, at most m.

    Returns:
      Indices into `rows`, (n, k), the nearest first, and Euclidean distances, float64 (n, k).
    """
    rows = np.asarray(rows, np.float64)
    squares = np.sum(np.square(rows), axis=1)
    size = max(_BLOCK // max(rows.shape), 1)
    found = []
    for start in range(0, len(queries), size):
        block = np.asarray(queries[start : start + size], np.float64)
        # |a - b|^2 without |a|^2, which is the same for all b.
        order = np.argpartition(squares[None] - 2 * (block @ rows.T), k - 1, axis=1)[:, :k]
        # Once more from the differences: of a copy the expansion leaves rounding errors, not 0.
        columns = [np.linalg.norm(block - rows[order[:, i]], axis=1) for i in range(k)]
        distances = np.stack(columns, axis=1)
        by_distance = np.argsort(distances, axis=1, kind="stable")
        found.append([np.take_along_axis(x, by_distance, axis=1) for x in (order, distances)])
    indices, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return indices, distances


def memorised(of_samples: np.ndarray, of_held_out: np.ndarray) -> dict[str, float]:
    """Says how many samples are nearer to a training image than held-out images ever are.

    Args:
      of_samples: distance of each sample to the nearest training image, (n,).
      of_held_out: the same of images that were not trained on, (m,).

    Returns:
      `memorised`, the share of samples as near as `threshold`, the 1st percentile of held-out
      images, or nearer: 1 of copies. `expected`, the share if both are of one distribution: 0.01,
      or more where several held-out images are as near, as copies in both splits are; of fewer than
      99 held-out images, of which the nearest is the threshold, 1 / (m + 1). `copies`, the share of
      samples at distance 0, and `copies_held_out`. Both medians.
    """
    # Of several definitions, that below which a draw of the same distribution lies with 0.01.
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
    """Finds the training images nearest to samples, by the network of `config.evaluate`.

    LPIPS of all pairs would be too costly: it ranks the 100 training images that are nearest by
    features, and how much is memorised stays a matter of features. Of more than
    `features.MAX_KEPT` training images so many, evenly spread, are searched; the protocol says so.

    Args:
      pipeline: of the workdir.
      workdir: where samples and features are kept, and are taken from if they are there.
      num: of samples with their neighbours; `memorised` is of `config.evaluate.num_samples`.
      by: "features" or "lpips", with the weights of `config.autoencoder.loss.vgg16`.
      seed: of the samples.
    """
    experiment = pipeline.experiment
    if by == "lpips":
        if experiment.data.image_size < MIN_SIZE:
            raise UserError(f"LPIPS needs images of at least {MIN_SIZE} pixels: use --by=features.")
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
        *(memorised(of_samples, of_held_out), protocol),
    )


def figure(found: Neighbours) -> plt.Figure:
    """Draws what `find` has found (supplement, Figure O).

    A row a sample, its nearest training images beside it; below, how near the samples and held-out
    images are to the training images.
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
        yticklabels=[f"{distance:.3g}" for distance in found.distances[:, 0]],
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
    """Returns the figure of what `find` finds, which takes the options, and how it was measured."""
    found = find(pipeline, workdir, **options)
    return figure(found), {"metrics": found.metrics, "protocol": found.protocol}
