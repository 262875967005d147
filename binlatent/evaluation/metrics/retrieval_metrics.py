"""How often the image drawn from a caption is nearest to the image that the caption describes.

It is R-precision (Xu et al., "AttnGAN", 2018) that ranks images in place of texts.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from binlatent.runtime.errors import UserError

_CANDIDATES = 100  # real images that a drawn image is compared with, including its own
SEED = 0  # of the choice of images, which is the same for all seeds of samples

Captions = Sequence[tuple[str, ...]]  # of each image


def retrieval(real: np.ndarray, drawn: np.ndarray, candidates: np.ndarray) -> tuple[float, float]:
    """Returns how often a drawn image's own is the nearest candidate, or among the nearest five.

    Nearness is the cosine between features. In a tie, the other candidate counts as nearer.

    Args:
      real: features of real images, (m, d).
      drawn: features of drawn images, (n, d).
      candidates: int (n, c), indices of the real images to rank; the first is the own image.

    Returns:
      Two shares in [0, 1]; uninformative features give 1 / c and 5 / c on average.
    """
    ranks = []
    for image, row in zip(_of_length_1(drawn), candidates, strict=True):
        # A separate sum per row makes cosines of equal features exactly equal.
        cosines = np.sum(_of_length_1(real[row]) * image, axis=-1)
        ranks.append(np.sum(~(cosines[1:] < cosines[0])))  # NaN counts as nearer too
    return float(np.mean(np.less(ranks, 1))), float(np.mean(np.less(ranks, 5)))


def _of_length_1(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def different(captions: Captions, own: int, order: Iterable[int], num: int) -> list[int]:
    """Returns the first `num` images of an order that differ from `own` and from each other.

    They share no caption with the image `own`, and no two have the same first caption. Fewer than
    `num` may be returned.
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
    """The images of a split that are compared, as indices into the images with captions."""

    own: np.ndarray  # (n,), images whose first captions are drawn
    candidates: np.ndarray  # (n, c), `own` first
    shuffled: np.ndarray  # (n,), index of the sample in its place with shuffled captions

    @classmethod
    def of(cls, captions: Captions, num: int, split: str) -> "Choice":
        """Chooses at random, with a fixed seed; a larger `num` begins with the same images.

        If an image differs from fewer than 99 others, all images have as few candidates.
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
