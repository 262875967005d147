"""Nearest neighbours among many samples: exact as in float64, fast as float32 products.

A matrix product gives bounds of the squared distances. Where the bounds do not decide, the distance
is computed in float64 from the difference, so results do not depend on the bounds.
"""

from typing import NamedTuple

import numpy as np

_BLOCK = 4_096  # samples per block: the distances between two blocks take 64 MiB


class Points(NamedTuple):
    """Samples with an embedding whose products are lower bounds of squared distances."""

    features: np.ndarray  # (n, d), float32 or float64
    origin: np.ndarray  # (d,), near the samples; nearer gives tighter bounds
    scale: float  # brings distances to the order of 1, against overflow and underflow
    embedded: np.ndarray  # (n, d + 2), float32

    @classmethod
    def of(cls, features: np.ndarray, origin: np.ndarray, scale: float) -> "Points":
        """Embeds features (n, d); points to compare must share origin and scale."""
        embedded = np.empty((len(features), features.shape[1] + 2), np.float32)
        for block in blocks(len(features)):
            embedded[block] = _embed(features[block], origin, scale, np.float32)
        return cls(features, origin, scale, embedded)

    def part(self, block: slice) -> "Points":
        """Returns the samples of a slice."""
        return self._replace(features=self.features[block], embedded=self.embedded[block])


def blocks(n: int, at_least: int = 1) -> list[slice]:
    """Returns slices of n samples, of about equal sizes, each at least min(n, at_least)."""
    edges = np.linspace(0, n, max(n // max(_BLOCK, at_least), 1) + 1).astype(int).tolist()
    return [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]


def scale_of(*sets: np.ndarray) -> float:
    """Returns the power of 2 that brings the widest range of a feature of (n, d) to about 1."""
    top = np.max([np.max(x, axis=0) for x in sets], axis=0).astype(np.float64)
    bottom = np.min([np.min(x, axis=0) for x in sets], axis=0).astype(np.float64)
    return float(np.ldexp(1.0, -np.frexp(np.max(top - bottom))[1]))


def nearest(points: Points, k: int) -> np.ndarray:
    """Returns the squared distances to itself, 0, and to the k nearest, ascending: (n, k + 1)."""
    n = len(points.features)
    parts = blocks(n, k + 1)
    limits = np.empty(n)  # distance within which there are k samples, from the own block alone
    for block in parts:
        part = points.part(block)
        columns = np.argpartition(_lower_bounds(part.embedded, part.embedded), k, axis=1)
        columns = columns[:, : k + 1]
        rows = np.repeat(np.arange(len(columns)), k + 1)
        squared = squared_distances(part, part, rows, columns.ravel())
        limits[block] = np.max(squared.reshape(columns.shape), axis=1)
    best = np.repeat(np.where(limits > 0, np.inf, 0.0)[:, None], k + 1, axis=1)

    def limit(block):
        least = np.minimum(limits[block], best[block, k])
        return np.where(least > 0, least, -np.inf)  # nothing is nearer than copies

    for p, rows in enumerate(parts):
        for columns in parts[p:]:
            a, b = points.part(rows), points.part(columns)
            i, j, _, _ = closer(a, b, limit(rows), limit(columns))
            squared = squared_distances(a, b, i, j)
            _keep_least(best[rows], i, squared)
            if columns != rows:  # a block with itself has each pair twice
                _keep_least(best[columns], j, squared)
    return best


def closer(
    a: Points, b: Points, limits_a: np.ndarray, limits_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns all pairs within the limit of either point, and some that are farther.

    The limits are squared distances, (n_a,) and (n_b,). A pair is a row of a and one of b, with a
    lower and an upper bound of their squared distance: four arrays (pairs,).
    """
    x, y = a.embedded, b.embedded
    for dtype in (np.float32, np.float64):
        if dtype == np.float64:
            x, y = (_embed(p.features, p.origin, p.scale, dtype) for p in (a, b))
        bounds = _lower_bounds(x, y)
        up_a, up_b = (np.nextafter(limit.astype(dtype), np.inf) for limit in (limits_a, limits_b))
        close = bounds <= up_a[:, None]
        close |= bounds <= up_b[None]
        # If many are close, float32 may not tell them apart: repeat in float64.
        if np.count_nonzero(close) < close.size / 64:
            break
    i, j = np.divmod(np.flatnonzero(close), close.shape[1])  # five times faster than nonzero
    lower = bounds[i, j].astype(np.float64)
    share, least = _error(a.features.shape[1], dtype)
    # The embedding holds |x|^2 minus the error, from which the error is recovered.
    squares = (x[i, -2].astype(np.float64) + y[j, -2] + 2 * least) / (1 - share)
    return i, j, lower, lower + 2.01 * (share * squares + 2 * least)


def squared_distances(a: Points, b: Points, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns the squared distances of a's rows i and b's rows j, both (pairs,), in float64."""
    squared = np.empty(len(i))
    size = max(2**19 // a.features.shape[1], 1)  # pairs per block: 4 MiB, which fit into caches
    for start in range(0, len(i), size):
        some = slice(start, start + size)
        difference = a.features[i[some]].astype(np.float64)
        difference -= b.features[j[some]]
        difference *= a.scale
        squared[some] = np.sum(np.square(difference, out=difference), axis=1)
    return squared


def _error(d: int, dtype: type) -> tuple[float, float]:
    """Bounds the error of |x|^2 + |y|^2 - 2 x.y: a share of the squares, and a least error of each.

    With the unit roundoff u = eps / 2, the sum of the product has 2 u (d + 2); x and y have 4 u.
    The squares and distances in float64 have less than the rest.
    """
    # The least error covers underflow in float32.
    return 2 * (d + 8) * float(np.finfo(dtype).eps), 8 * d * float(np.finfo(np.float32).tiny)


def _embed(features: np.ndarray, origin: np.ndarray, scale: float, dtype: type) -> np.ndarray:
    """Returns x, |x|^2 minus its share of the error, and 1: (n, d + 2)."""
    embedded = np.ones((len(features), features.shape[1] + 2), dtype)
    embedded[:, :-2] = (features - origin) * scale
    share, least = _error(features.shape[1], dtype)
    squares = np.sum(np.square(embedded[:, :-2], dtype=np.float64), axis=1)
    embedded[:, -2] = (1 - share) * squares - least
    return embedded


def _lower_bounds(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns |x|^2 + |y|^2 - 2 x.y minus its error, from embeddings: (n_x, n_y)."""
    return np.concatenate([-2 * x[:, :-2], x[:, [-1, -2]]], axis=1) @ y.T


def _keep_least(best: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """Merges values (pairs,) into the rows of best (n, k + 1), which keep the smallest, sorted."""
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)  # among those of its row
    few = rank < best.shape[1]
    new = np.full_like(best, np.inf)
    new[rows[few], rank[few]] = values[few]
    best[:] = np.sort(np.concatenate([best, new], axis=1), axis=1)[:, : best.shape[1]]
