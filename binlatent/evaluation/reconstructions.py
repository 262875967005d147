"""Compares reconstructions with the test images that they were made from: rFID, rKID.

Both sides are uint8 images of the model's size: the encoder's input, cropped and resized as
everywhere in the evaluation, and the decoder's output.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder.bottleneck import Binary
from binlatent.data import loader, sources
from binlatent.data.splits import open_split
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import comparison, exchange
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.features import Features, Network
from binlatent.evaluation.reference import choose, features_of_split
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.keys import key_for, sample_keys
from binlatent.runtime.locks import only_process
from binlatent.runtime.progress import progress
from binlatent.runtime.weights import digest

log = logging.getLogger(__name__)

_SHARD = 500  # reconstructions per file of features
_SEED = 0  # of the drawn codes

# Which codes are decoded, by the suffix of the name of a number.
_CODES = {"": "y > 0.5", "_drawn": f"drawn from B(y), seed {_SEED}"}
_IN_WORDS = {"": "", "_drawn": ", drawn codes"}


def _titles(name: str, elsewhere: str, title: str, title_elsewhere: str) -> dict[str, str]:
    of_networks = {f"r{elsewhere}_effnet": f"r{title_elsewhere}-EffNet"}
    of_networks[f"r{elsewhere}_classifier"] = f"r{title_elsewhere}-classifier"
    every = {f"r{name}": f"r{title}", **of_networks}
    return {f"{x}{end}": f"{y}{_IN_WORDS[end]}" for x, y in every.items() for end in _CODES}


# Each is the metric of `comparison.METRICS` without the r, between images and reconstructions.
METRICS = {
    "rfid": Metric(comparison.METRICS["fid"].measure, _titles("fid", "fd", "FID", "FD")),
    "rkid": Metric(comparison.METRICS["kid"].measure, _titles("kid", "kd", "KID", "KD")),
}


def ends(experiment: Experiment) -> list[str]:
    """Returns the kinds of codes to decode: "" for y > 0.5 and, for bits, "_drawn"."""
    return list(_CODES) if isinstance(experiment.autoencoder.bottleneck, Binary) else [""]


def codes_in_words(experiment: Experiment) -> list[str]:
    """Returns descriptions of the codes of `ends`; those of a bottleneck without bits have no y."""
    if isinstance(experiment.autoencoder.bottleneck, Binary):
        return list(_CODES.values())
    return ["deterministic"]


def features_of_reconstructions(
    pipeline: BinaryLatentDiffusion,
    network: Network,
    workdir: Path,
    codes: str = "",
    limit: int | None = None,
) -> Features:
    """Returns the features of reconstructed images of the test split.

    They are kept in the folder `evaluation` of the workdir, 500 per file, so that a call that was
    interrupted continues, and a second call reads them.

    Args:
      pipeline: with the autoencoder.
      network: whose features are returned.
      workdir: of the pipeline.
      codes: "" for y > 0.5, "_drawn" for codes drawn from B(y).
      limit: how many images at most, spread evenly; None for all.
    """
    experiment = pipeline.experiment
    source = open_split(experiment.data, "test", workdir, keep=False)
    indices, protocol = choose(experiment, source, "test", limit)
    described = codes_in_words(experiment)[ends(experiment).index(codes)]
    protocol |= {
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
        "codes": described,
        "dtype": experiment.dtype.name,
    }
    name = digest(protocol, sources.stamp(source.files), network.protocol)
    folder, count = workdir / "evaluation" / f"reconstructions_{name}", len(indices)
    sizes = {start: min(_SHARD, count - start) for start in range(0, count, _SHARD)}
    paths = {start: folder / f"{start:07}_{size}.npz" for start, size in sizes.items()}

    def judged(start: int) -> np.ndarray:
        def read(i: int) -> np.ndarray:
            return source.examples[int(indices[start + i])]["image"]

        (images,) = loader.in_order(sizes[start], read, sizes[start])
        keys = sample_keys(key_for(_SEED, "reconstructions"), len(images), start)
        size = experiment.sample.batch_size
        edges = range(size, len(images) - size + 1, size)  # no part is smaller than a batch
        pools = []
        for part, part_keys in zip(np.split(images, edges), _split(keys, edges), strict=True):
            decoded = pipeline.decode(_encode(pipeline, part, part_keys, codes))
            pools.append(network.apply(to_uint8(decoded), size)["pool"])
        return np.concatenate(pools)

    if missing := [start for start, path in paths.items() if not path.exists()]:
        of_codes = f" of codes {described}" if len(ends(experiment)) > 1 else ""
        log.info("Judging %d reconstructions%s", count, of_codes)
        folder.mkdir(parents=True, exist_ok=True)
        doing, total = "are being judged", sum(sizes[start] for start in missing)
        with (
            only_process(folder / ".lock", f"The reconstructions in {folder} {doing}"),
            progress(total, "images") as shown,
        ):
            for start in missing:
                weights.write_npz(paths[start], {"pool": judged(start)})
                shown.update(sizes[start])
    parts = (exchange.read_arrays(path, "it is made anew") for path in paths.values())
    return features.collect(parts, count, "The reconstructions")


def _split(keys: jax.Array, edges: range) -> list[jax.Array]:
    starts = [0, *edges]
    return [keys[a:b] for a, b in zip(starts, [*edges, len(keys)], strict=True)]


def _encode(
    pipeline: BinaryLatentDiffusion, images: np.ndarray, keys: jax.Array, codes: str
) -> np.ndarray:
    """Returns codes of images, uint8 (n, h, w, c); each has a key, so batches do not matter."""
    if not codes:
        return pipeline.encode(to_float(images))
    probs = pipeline.encode_probs(to_float(images))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, probs.shape[1:]))(keys)
    return np.asarray(uniform < probs, np.float32)


def compare_reconstructions(
    pipeline: BinaryLatentDiffusion,
    network: Network,
    workdir: Path,
    metrics: list[str],
    limit: int | None = None,
) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """Compares test images with their reconstructions, from codes y > 0.5 and from drawn codes.

    Args:
      pipeline: with the autoencoder; the prior is not used.
      network: whose features are compared.
      workdir: of the pipeline, where the features are kept.
      metrics: names in `METRICS`.
      limit: how many images at most, spread evenly; None for the whole split.

    Returns:
      Numbers by name, such as `rfid` and `rfid_drawn`, or `rfd_effnet` for another network than
      FID's; a description of the images; and how each metric was measured.
    """
    real, protocol = features_of_split(pipeline.experiment, network, workdir, "test", limit)
    values, settings, decoded = {}, {}, ends(pipeline.experiment)
    names = [name.removeprefix("r") for name in metrics]
    for codes in decoded:
        found = features_of_reconstructions(pipeline, network, workdir, codes, limit)
        # Warn once: the numbers of images are equal.
        called = "reconstructions" if codes == decoded[0] else None
        numbers, how = comparison.compare(real, found, names, network.suffix, called)
        for name, value in numbers.items():
            std = "_std" if name.endswith("_std") else ""
            values[f"r{name.removesuffix(std)}{codes}{std}"] = value
        settings |= {f"r{name}": text for name, text in how.items()}
    protocol |= {
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
        "codes": "; ".join(codes_in_words(pipeline.experiment)),
        "dtype": pipeline.experiment.dtype.name,
        "compared with": "the same images, cropped and resized alike",
    }
    return values, protocol, settings
