"""Samples of a prior for the metrics: drawn shard by shard, with their features, resumably."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from binlatent.runtime.errors import UserError
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
        """Draws what is not there yet.

        Args:
          pipeline: with a prior.
          network: whose features are kept; None for none.
          folder: in which the folder of these samples lies.
          num: how many samples; with a larger number they are the first.
          seed: of the draw.
          options: of the sampler, in place of `config.sample`.
          keep: "png" for a file each in `png`, "npz" for one file as ADM's evaluator reads, "none".
          images: whether the samples themselves are needed, not their features alone.
        """
        self._pipeline, self._network, self._num = pipeline, network, num
        self._seed, self._options, self._keep = seed, options or {}, keep
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
        self._draw()

    def _parts(self) -> list[tuple[int, int, Path]]:
        """Returns first index, size and file of each shard."""
        shard = min(_SHARD, -(-self._num // jax.process_count()))
        sizes = [(i, min(shard, self._num - i)) for i in range(0, self._num, shard)]
        return [(i, size, self.folder / f"{i:07}_{size}.npz") for i, size in sizes]

    def _draw(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = key_for(self._seed, "evaluate")
        this, turns = jax.process_index(), jax.process_count()
        with tqdm(total=self._num, unit=" samples", disable=True if this else None) as progress:
            for shard, (start, size, path) in enumerate(self._parts()):
                if shard % turns == this and not self._is_whole(start, size, path):
                    self._draw_shard(start, size, path, sample_keys(key, size, start))
                progress.update(size)
        # If another process fails, this one is ended.
        while not this and not all(self._is_whole(*part) for part in self._parts()):
            time.sleep(0.5)

    def _is_whole(self, start: int, size: int, path: Path) -> bool:
        needed = [path]
        if self._with_images:
            needed.append(_images_of(path))
        if self._keep == "png":
            needed += [self._png(i) for i in range(start, start + size)]
        return all(file.exists() for file in needed)

    def _png(self, index: int) -> Path:
        return self.folder / "png" / f"{index:07}.png"

    def _draw_shard(self, start: int, size: int, path: Path, keys: jax.Array) -> None:
        labels = self._labels.take(start, size)
        images = to_uint8(self._pipeline.sample(size, keys, labels, **self._options))
        arrays = {} if labels is None or labels.ndim > 1 else {"labels": labels}
        if self._network is not None:
            batch_size = self._pipeline.experiment.sample.batch_size
            arrays |= self._network.apply(images, batch_size)
        if self._keep == "png":
            for i, image in enumerate(images, start):
                png.save_png(self._png(i), image, min_side=1)
        if self._with_images:
            unfinished = path.with_name(f"{path.stem}.unfinished.npy")
            np.save(unfinished, images)
            os.replace(unfinished, _images_of(path))
        weights.write_npz(path, arrays)  # last: with it the shard is whole

    def features(self) -> Features:
        """Returns the features of all samples."""

        def parts() -> Iterator[dict[str, np.ndarray]]:
            for _, _, path in self._parts():
                stored = _read(path)
                yield {name: x for name, x in stored.items() if name != "labels"}

        try:
            return features.collect(parts(), self._num)
        except ValueError as error:
            raise UserError(f"The samples cannot be judged: {error}") from error

    def labels(self) -> np.ndarray:
        """Returns the class of each sample, (num,)."""
        return np.concatenate([_read(path)["labels"] for _, _, path in self._parts()])

    def images(self) -> "Stored":
        """Returns the samples, which lie on disk."""
        return Stored([_images_of(path) for _, _, path in self._parts()])

    def write_batch(self) -> Path:
        """Writes the samples as ADM's evaluator reads them, and returns the file."""
        images = self.images()
        size = "x".join(map(str, images[0].shape[:2]))
        path = self.folder / f"samples_{self._num}x{size}x3.npz"
        labels = self.labels() if self._labels.num_classes else None
        exchange.write_batch(path, iter(images.parts), self._num, labels)
        return path


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(file.items())
    except Exception as error:  # by where the damage is
        raise UserError(f"{path} is damaged: delete it, and it is drawn anew.") from error


def _images_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_images.npy")


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
        self._examples = self._order = None
        if conditioning.kind == "none":
            self.protocol = "none"
        elif self.num_classes and experiment.evaluate.labels == "balanced":
            self.protocol = f"balanced, {self.num_classes} classes in turn"
        else:
            source = open_split(experiment.data, "train", keep=False)
            order = "those of training images in a random order"
            self.protocol = f"{order}, {source.fingerprint}"
            self._examples = source.examples
            self._order = np.random.default_rng(seed).permutation(len(self._examples))

    def take(self, start: int, size: int) -> np.ndarray | None:
        indices = np.arange(start, start + size)
        if self._examples is not None:
            order = self._order[indices % len(self._order)]
            return np.stack([np.asarray(self._examples[int(i)]["label"]) for i in order])
        return (indices % self.num_classes).astype(np.int32) if self.num_classes else None
