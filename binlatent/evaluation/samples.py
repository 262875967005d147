"""Samples of a prior, and their features, for metrics; drawn in shards, so they can be resumed."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from binlatent.data.splits import open_split
from binlatent.data.transforms import to_uint8
from binlatent.evaluation import exchange
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.features import Features, Network
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import png, weights
from binlatent.runtime.files import atomic
from binlatent.runtime.keys import key_for, sample_keys
from binlatent.runtime.locks import only_process
from binlatent.runtime.progress import progress
from binlatent.runtime.weights import digest

_SHARD = 500  # samples per shard, at most

# A description of the labels of samples, and the function from indices to labels.
Labelling = tuple[str, Callable[[np.ndarray], np.ndarray | None]]


class Samples:
    """Samples of a prior with their features; processes draw shards in turn."""

    def __init__(
        self,
        pipeline: BinaryLatentDiffusion,
        network: Network | None,
        folder: Path,
        num: int,
        *,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        keep: str = "none",
        images: bool = False,
        labels: Labelling | None = None,
    ):
        """Draws missing samples, in their own folder below `folder`.

        Args:
          network: whose features are kept; None for no features.
          num: how many samples. A larger number begins with the same samples.
          options: of the sampler, in place of `config.sample`.
          keep: "png" for files in `png`, "npz" for one file in the format of ADM's evaluator, or
            "none".
          images: whether to keep the samples themselves, and not only their features.
          labels: of the samples; None for `evaluate.labels`.
        """
        self._pipeline, self._network, self._num = pipeline, network, num
        self._options, self._keep = options or {}, keep
        self._with_images = images or keep == "npz"
        key = key_for(seed, "evaluate")
        experiment = pipeline.experiment
        described, self._labels = labels or labelling(pipeline, seed)
        self.protocol = {
            "weights": f"EMA, {weights.fingerprint(pipeline.prior_params)}",
            "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
            "prior": experiment.prior.kind,
            "dtype": experiment.dtype.name,
            "seed": seed,
            "labels": described,
            **dataclasses.asdict(pipeline.settings(self._options)),
        }
        name = digest(self.protocol, network.protocol if network else {})
        self.folder = folder / f"samples_{name}"
        self.protocol["count"] = num
        shard = min(_SHARD, -(-num // jax.process_count()))
        sizes = [(start, min(shard, num - start)) for start in range(0, num, shard)]
        self._shards = [_Shard(self.folder, start, size) for start, size in sizes]
        self._draw(key)

    def _draw(self, key: jax.Array) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        this, turns = jax.process_index(), jax.process_count()
        doing = f"The samples in {self.folder} are being drawn"
        # Process 0 locks the folder for the run. Reading needs no lock.
        apart = this or all(map(self._is_whole, self._shards))
        with nullcontext() if apart else only_process(self.folder / ".lock", doing):
            with progress(self._num, "samples", silent=bool(this)) as shown:
                for i, shard in enumerate(self._shards):
                    missing = i % turns == this and not self._is_whole(shard)
                    if missing:
                        self._draw_shard(shard, sample_keys(key, shard.size, shard.start))
                    shown.update(shard.size, skipped=not missing)
            # If another process fails, this one is ended from outside.
            while not this and not all(map(self._is_whole, self._shards)):
                time.sleep(0.5)

    def _is_whole(self, shard: "_Shard") -> bool:
        needed = [shard.path] + [shard.images] * self._with_images
        needed += shard.pngs if self._keep == "png" else []
        return all(file.exists() for file in needed)

    def _draw_shard(self, shard: "_Shard", keys: jax.Array) -> None:
        labels = self._labels(np.arange(shard.start, shard.start + shard.size))
        images = to_uint8(self._pipeline.sample(shard.size, keys, labels, **self._options))
        arrays = {} if labels is None or labels.ndim > 1 else {"labels": labels}
        if self._network is not None:
            arrays |= self._network.apply(images, self._pipeline.experiment.sample.batch_size)
        if self._keep == "png":
            for path, image in zip(shard.pngs, images, strict=True):
                png.save_png(path, image, min_side=1)
        if self._with_images:
            with atomic(shard.images, alone=True) as unfinished, unfinished.open("wb") as file:
                np.save(file, images)
        weights.write_npz(shard.path, arrays)  # last: this file marks a whole shard

    def features(self) -> Features:
        """Returns the features of all samples."""
        parts = (shard.read() for shard in self._shards)
        return features.collect(parts, self._num, "The samples")

    def labels(self) -> np.ndarray:
        """Returns the class of each sample, (num,)."""
        return np.concatenate([shard.read()["labels"] for shard in self._shards])

    def images(self) -> "Stored":
        """Returns the samples, which stay on disk."""
        return Stored([shard.images for shard in self._shards])

    def write_batch(self) -> Path:
        """Writes the samples in the format of ADM's evaluator; returns the file."""
        images = self.images()
        size = "x".join(map(str, images[0].shape[:2]))
        path = self.folder / f"samples_{self._num}x{size}x3.npz"
        by_class = self._pipeline.experiment.prior.conditioning.kind == "class"
        labels = self.labels() if by_class else None
        exchange.write_batch(path, images.parts, labels)
        return path


class _Shard(NamedTuple):
    """The files of `size` samples from `start` on: features and classes, images, PNGs."""

    folder: Path
    start: int
    size: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.start:07}_{self.size}.npz"

    @property
    def images(self) -> Path:
        return self.folder / f"{self.path.stem}_images.npy"

    @property
    def pngs(self) -> list[Path]:
        indices = range(self.start, self.start + self.size)
        return [self.folder / "png" / f"{i:07}.png" for i in indices]

    def read(self) -> dict[str, np.ndarray]:
        return exchange.read_arrays(self.path, "it is drawn anew")


class Stored:
    """Images by index, in memory-mapped .npy files of equal size; the last may be smaller."""

    def __init__(self, paths: Sequence[Path]):
        self.parts = [np.load(path, mmap_mode="r") for path in paths]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> np.ndarray:
        shard, place = divmod(int(index), len(self.parts[0]))
        return self.parts[shard][place]


def labelling(pipeline: BinaryLatentDiffusion, seed: int) -> Labelling:
    """Returns the labels of `evaluate.labels`; for a prior of texts, those of training images."""
    experiment, conditioning = pipeline.experiment, pipeline.experiment.prior.conditioning
    if conditioning.kind == "none":
        return "none", lambda indices: None
    if conditioning.kind == "class" and experiment.evaluate.labels == "balanced":
        k = conditioning.num_classes
        return f"balanced, {k} classes in turn", lambda indices: (indices % k).astype(np.int32)
    source = open_split(experiment.data, "train", keep=False)
    order = np.random.default_rng(seed).permutation(len(source.examples))
    by_captions = experiment.texts.encoder and source.captions is not None
    captions = source.captions() if by_captions else ()

    def of_images(indices: np.ndarray) -> np.ndarray:
        images = order[indices % len(order)]
        if by_captions:
            return pipeline.text_features([(*captions[i], "")[0] for i in images])
        return np.stack([np.asarray(source.examples[int(i)]["label"]) for i in images])

    # The hash of the images does not depend on their captions.
    what = f"first captions, {digest(captions)}," if by_captions else "those"
    return f"{what} of training images in a random order, {source.fingerprint}", of_images
