"""Examples whose labels are the features of captions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from binlatent.data import classes
from binlatent.data.decoded import add_lines, locate
from binlatent.data.sources import Source
from binlatent.runtime.errors import UserError
from binlatent.texts.cache import CaptionFeatures


class CaptionedExamples:
    """Examples of images or codes whose label is the features of a caption."""

    def __init__(
        self, examples: Any, captions: Sequence[tuple[str, ...]], features: CaptionFeatures
    ):
        self._examples, self._captions, self._features = examples, captions, features
        self._shape = features.shape

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    @property
    def num_unreadable(self) -> int:
        """The number of unreadable images found so far."""
        return getattr(self._examples, "num_unreadable", 0)

    def read(self, index: int, position: float = 0.5, choice: float = 0.0) -> dict[str, Any]:
        """Returns an example with one of the image's captions.

        Args:
          index: of the image. If another image replaces it, that image's captions are used.
          position: of the crop, in [0, 1]; ignored for codes, which are of centre crops.
          choice: in [0, 1), selects the caption: 0 for the first, a uniform number for each with
            equal probability.
        """
        found, example = locate(self._examples, index, position)
        captions, label = self._captions[found], np.zeros(self._shape, np.float32)
        if captions:
            features = self._features[captions[int(choice * len(captions))]]
            label[tuple(map(slice, features.shape))] = features
        return dict(example, label=label)


def check_captions(source: Source, max_broken: float, report: Path | None = None) -> None:
    """Raises UserError if too many images have no caption; otherwise warns of those.

    Args:
      source: the images.
      max_broken: share of images that may have no caption.
      report: a file to which images without caption are added.
    """
    captions = source.captions() if source.captions else [()] * len(source.examples)
    missing = [i for i, of_image in enumerate(captions) if not of_image]
    if missing:
        named = len(source.files) == len(captions)
        names = [repr(source.files[i]) if named else f"number {i}" for i in missing]
        if report:
            add_lines(report, [f"there is no caption of the image {name}" for name in names])
        which = f"; {report} names them" if report else f", the first is {names[0]}"
        found = f"{len(missing)} of {len(captions)} images have no caption{which}"
        if len(missing) > min(max_broken * len(captions), len(captions) - 1):
            raise UserError(
                f"{found}, more than config.data.max_broken = {max_broken:g} allows: raise that "
                "share, or write the captions of x.png into x.txt beside it, one per line, or into "
                "a column 'caption' of a table"
            )
        classes.warn_once(f"{found}; they are trained as images without text")


def with_captions(source: Source, features: CaptionFeatures) -> Source:
    """Returns a source whose labels are the features of captions, float32 (e,) or (m, d).

    `examples[i]` has the first caption of an image, and `examples.read(i, position, choice)` the
    selected one. Features per token are padded with zeros to the longest caption. The label of an
    image without a caption is zeros.

    Args:
      source: images or codes that `check_captions` has accepted.
      features: of all its captions.
    """
    examples = CaptionedExamples(source.examples, source.captions(), features)
    return dataclasses.replace(source, examples=examples)
