"""Samples of a prior for the metrics: drawn shard by shard, with their features, resumably."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from binlatent.data.splits import open_split
from binlatent.data.transforms import to_uint8
from binlatent.evaluation import exchange
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.features import Features, Network
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import png, weights
from binlatent.runtime.files import atomic
from binlatent.runtime.keys import key_for, sample_keys
from binlatent.runtime.weights import digest

_SHARD = 500  # samples drawn before their features are written, at most


class Samples:
    """Samples of a prior with their features, drawn shard by shard into a folder.

    What is there already is not drawn again. Several processes take turns at the shards.
    """

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
    ):
        """Draws what is not there yet, in a folder of its own below `folder`.

        Args:
          network: whose features are kept; None for none.
          num: how many samples; with a larger number they are the first.
          options: of the sampler, in place of `config.sample`.
          keep: "png" for a file each in `png`, "npz" for one file as ADM's evaluator reads, "none".
          images: whether the samples themselves are needed, not their features alone.
        """
        self._pipeline, self._network, self._num = pipeline, network, num
        self._options, self._keep = options or {}, keep
        self._with_images = images or keep == "npz"
        experiment = pipeline.experiment
        self._labels = _Labels(experiment, seed)
        self.protocol = {
            "weights": f"EMA, {weights.fingerprint(pipeline.prior_params)}",
            "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
            "prior": experiment.prior.kind,
            "dtype": experiment.dtype.name,
            "seed": seed,
            "labels": self._labels.protocol,
            **dataclasses.asdict(pipeline.settings(self._options)),
        }
        described = network.protocol if network else {}
        self.folder = folder / f"samples_{digest(self.protocol, described)}"
        self.protocol["count"] = num
        shard = min(_SHARD, -(-num // jax.process_count()))
        sizes = [(start, min(shard, num - start)) for start in range(0, num, shard)]
        self._shards = [_Shard(self.folder, start, size) for start, size in sizes]
        self._draw(key_for(seed, "evaluate"))

    def _draw(self, key: jax.Array) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        this, turns = jax.process_index(), jax.process_count()
        with tqdm(total=self._num, unit=" samples", disable=True if this else None) as progress:
            for i, shard in enumerate(self._shards):
                if i % turns == this and not self._is_whole(shard):
                    self._draw_shard(shard, sample_keys(key, shard.size, shard.start))
                progress.update(shard.size)
        # If another process fails, this one is ended.
        while not this and not all(map(self._is_whole, self._shards)):
            time.sleep(0.5)

    def _is_whole(self, shard: "_Shard") -> bool:
        needed = [shard.path] + [shard.images] * self._with_images
        needed += shard.pngs if self._keep == "png" else []
        return all(file.exists() for file in needed)

    def _draw_shard(self, shard: "_Shard", keys: jax.Array) -> None:
        labels = self._labels.take(shard.start, shard.size)
        images = to_uint8(self._pipeline.sample(shard.size, keys, labels, **self._options))
        arrays = {} if labels is None or labels.ndim > 1 else {"labels": labels}
        if self._network is not None:
            arrays |= self._network.apply(images, self._pipeline.experiment.sample.batch_size)
        if self._keep == "png":
            for path, image in zip(shard.pngs, images, strict=True):
                png.save_png(path, image, min_side=1)
        if self._with_images:
            with atomic(shard.images) as unfinished, unfinished.open("wb") as file:
                np.save(file, images)
        weights.write_npz(shard.path, arrays)  # last: with it the shard is whole

    def features(self) -> Features:
        """Returns the features of all samples."""
        parts = (shard.read() for shard in self._shards)
        return features.collect(parts, self._num, "The samples")

    def labels(self) -> np.ndarray:
        """Returns the class of each sample, (num,)."""
        return np.concatenate([shard.read()["labels"] for shard in self._shards])

    def images(self) -> "Stored":
        """Returns the samples, which lie on disk."""
        return Stored([shard.images for shard in self._shards])

    def write_batch(self) -> Path:
        """Writes the samples as ADM's evaluator reads them, and returns the file."""
        images = self.images()
        size = "x".join(map(str, images[0].shape[:2]))
        path = self.folder / f"samples_{self._num}x{size}x3.npz"
        labels = self.labels() if self._labels.num_classes else None
        exchange.write_batch(path, images.parts, labels)
        return path


class _Shard(NamedTuple):
    """Where samples from `start` on are kept."""

    folder: Path
    start: int
    size: int

    @property
    def path(self) -> Path:
        """The file of their features and classes."""
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
    """Images in .npy files of equal numbers but for the last, by index."""

    def __init__(self, paths: Sequence[Path]):
        """Maps the files into memory."""
        self.parts = [np.load(path, mmap_mode="r") for path in paths]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> np.ndarray:
        shard, place = divmod(int(index), len(self.parts[0]))
        return self.parts[shard][place]


class _Labels:
    """The labels of samples by their index: classes in turn, or those of training images."""

    def __init__(self, experiment: Experiment, seed: int):
        conditioning = experiment.prior.conditioning
        self.num_classes = conditioning.num_classes if conditioning.kind == "class" else 0
        self._examples = None
        if conditioning.kind == "none":
            self.protocol = "none"
        elif self.num_classes and experiment.evaluate.labels == "balanced":
            self.protocol = f"balanced, {self.num_classes} classes in turn"
        else:
            source = open_split(experiment.data, "train", keep=False)
            order = "those of training images in a random order"
            self.protocol, self._examples = f"{order}, {source.fingerprint}", source.examples
            self._order = np.random.default_rng(seed).permutation(len(self._examples))

    def take(self, start: int, size: int) -> np.ndarray | None:
        indices = np.arange(start, start + size)
        if self._examples is not None:
            order = self._order[indices % len(self._order)]
            return np.stack([np.asarray(self._examples[int(i)]["label"]) for i in order])
        return (indices % self.num_classes).astype(np.int32) if self.num_classes else None
