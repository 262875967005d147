"""How often the image drawn from a caption is nearest to the caption's own image.

As R-precision (Xu et al., "AttnGAN", 2018), with images in place of the texts that it ranks.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from binlatent.runtime.errors import UserError

_CANDIDATES = 100  # real images that a drawn one is compared with, its own among them
SEED = 0  # of all choices of images, so that samples of any seed are compared with the same

Captions = Sequence[tuple[str, ...]]  # of each image


def retrieval(real: np.ndarray, drawn: np.ndarray, candidates: np.ndarray) -> tuple[float, float]:
    """Returns how often a drawn image's own is the nearest of its candidates, or of the first five.

    Nearest is the largest cosine between features. A candidate that is as near as the own image
    counts as nearer.

    Args:
      real: features of real images, (m, d).
      drawn: features of drawn images, (n, d).
      candidates: int (n, c), in each row the real images to rank by number, its own the first.

    Returns:
      Two shares in [0, 1]; 1 / c and 5 / c are expected of features that tell nothing.
    """
    ranks = []
    for image, row in zip(_of_length_1(drawn), candidates, strict=True):
        # A sum a row, whatever its place: equal features have equal cosines to the last bit.
        cosines = np.sum(_of_length_1(real[row]) * image, axis=-1)
        ranks.append(np.sum(~(cosines[1:] < cosines[0])))  # NaN counts against it too
    return float(np.mean(np.less(ranks, 1))), float(np.mean(np.less(ranks, 5)))


def _of_length_1(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def different(captions: Captions, own: int, order: Iterable[int], num: int) -> list[int]:
    """Returns the first `num` images of an order that differ from one, and from each other.

    They share no caption with the image `own`, and no two have the same first caption. There may be
    fewer.
    """
    firsts, chosen, shared = set(), [], set(captions[own])
    for i in order:
        if len(chosen) == num:
            break
        if captions[i][0] not in firsts and shared.isdisjoint(captions[i]):
            firsts.add(captions[i][0])
            chosen.append(int(i))
    return chosen


class Choice(NamedTuple):
    """Which images of a split are compared, by their numbers among those that have captions."""

    own: np.ndarray  # (n,), whose first captions are drawn from
    candidates: np.ndarray  # (n, c), `own` first
    shuffled: np.ndarray  # (n,), the sample that stands for each where captions are shuffled

    @classmethod
    def of(cls, captions: Captions, num: int, split: str) -> "Choice":
        """Chooses at random, always the same; with a larger `num` the first stay as they are.

        Where an image differs from less than 99 others, all have as few candidates.
        """
        own = np.random.default_rng(SEED).permutation(len(captions))[:num]
        places = {image: place for place, image in enumerate(own)}
        others, shuffled = [], []
        for image in own:
            random = np.random.default_rng((SEED, image))
            everyone = random.permutation(len(captions))
            others.append(different(captions, image, everyone, _CANDIDATES - 1))
            found = different(captions, image, random.permutation(own), 1)
            if not found:
                raise UserError(
                    "The metric retrieval compares images with different captions, and of "
                    f"{len(own)} in the split {split!r} none differs from "
                    f"{captions[image][0]!r}: raise --num, or add images."
                )
            shuffled.append(places[found[0]])
        fewest = min(map(len, others))
        rows = [[image, *row[:fewest]] for image, row in zip(own, others, strict=True)]
        return cls(own, np.array(rows), np.array(shuffled))
