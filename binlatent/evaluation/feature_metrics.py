"""Metrics between sets of features, as pure NumPy functions in float64.

Dimension legend: `n` samples, `d` feature width, `k` classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import special

_BLOCK = 2**25  # entries of a matrix of distances at a time: 256 MiB


class Statistics(NamedTuple):
    """Mean and scatter of features, which add up batch by batch.

    Fields:
      count: n.
      mean: (d,).
      scatter: (d, d), the sum over samples of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Returns the statistics of features (n, d).

        Raises:
          ValueError: If the features are not finite or not two-dimensional.
        """
        features = _checked(features, "features")
        mean = np.mean(features, axis=0) if len(features) else np.zeros(features.shape[1])
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both sets together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        weight = self.count * other.count / count
        return Statistics(
            count,
            self.mean + difference * (other.count / count),
            self.scatter + other.scatter + weight * np.outer(difference, difference),
        )

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, (d, d).

        Raises:
          ValueError: If there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}.")
        return self.scatter / (self.count - 1)


def gaussian_frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians; of Inception features, the FID.

    `metrics.frechet_distance` takes the features themselves, and is exact for few of them.

    Args:
      mean_a, mean_b: (d,).
      covariance_a, covariance_b: (d, d), symmetric, singular or not.

    Returns:
      |m_a - m_b|^2 + Tr S_a + Tr S_b - 2 Tr sqrt(S_a S_b), at least 0.

    Raises:
      ValueError: If the shapes do not fit.

    References:
      Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash
      equilibrium", 2017.
    """
    d = np.size(mean_a)
    shapes = [np.shape(x) for x in (mean_a, covariance_a, mean_b, covariance_b)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(
            f"means (d,) and covariances (d, d) of one width are needed, got {shapes}."
        )
    # Tr sqrt(S_a S_b) is the sum of the singular values of sqrt(S_a) sqrt(S_b): symmetric roots
    # need no eigenvalue of a product, which rounding can make negative or complex.
    trace_of_root = np.linalg.norm(_root(covariance_a) @ _root(covariance_b), "nuc")
    distance = (
        np.sum(np.square(np.subtract(mean_a, mean_b, dtype=np.float64)))
        + np.trace(covariance_a)
        + np.trace(covariance_b)
        - 2.0 * trace_of_root
    )
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Inception score: exp of the mean KL(p(y | x) || p(y)), of consecutive parts of the samples.

    Args:
      logits: (n, k), n >= splits; of the FID Inception, without its bias.
      splits: how many parts.

    Returns:
      Mean and standard deviation over the parts.

    Raises:
      ValueError: If the logits are not finite, or fewer than the parts.

    References:
      Salimans et al., "Improved techniques for training GANs", 2016.
    """
    logits = _checked(logits, "logits", splits)
    log_p = special.log_softmax(logits, axis=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        log_marginal = special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(part) * (part - log_marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1_000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel distance, (x.y / d + 1)^3, unbiased, over random subsets; on Inception features, KID.

    Args:
      features_a: (n_a, d), n_a >= subset_size.
      features_b: (n_b, d), n_b >= subset_size.
      num_subsets: drawn without replacement each, first of a and then of b, by NumPy's
        RandomState, as torch-fidelity draws them.
      subset_size: samples of each.
      seed: of the draw.

    Returns:
      Mean and standard deviation over the subsets.

    Raises:
      ValueError: If the features are not finite, of different widths or fewer than a subset.

    References:
      Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    features_a, features_b = _pair(features_a, features_b, max(subset_size, 2))
    random, m, values = np.random.RandomState(seed), subset_size, []
    for _ in range(num_subsets):
        a, b = (x[random.choice(len(x), m, replace=False)] for x in (features_a, features_b))
        k_aa, k_bb, k_ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
        within = np.sum(k_aa) - np.trace(k_aa) + np.sum(k_bb) - np.trace(k_bb)
        values.append(within / (m * (m - 1)) - 2 * np.mean(k_ab))
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Shares of generated samples within the real ones' manifold, and of real within theirs.

    A manifold is the union of balls around its samples, each up to its k-th nearest neighbour.

    Args:
      real: (n, d), n > k.
      generated: (m, d), m > k.
      k: the neighbour.

    Returns:
      Precision and recall, in [0, 1].

    Raises:
      ValueError: If the features are not finite, of different widths or too few.

    References:
      Kynkaanniemi et al., "Improved precision and recall metric", 2019.
    """
    real, generated = _pair(real, generated, k + 1)
    precision, recall = (
        float(np.mean(np.concatenate([np.any(near, axis=1) for near in _within(a, b, k)])))
        for a, b in ((generated, real), (real, generated))
    )
    return precision, recall


def density_coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> tuple[float, float]:
    """How many real balls a generated sample lies in, in ks, and the share of balls with any.

    Args:
      real, generated, k: as of `precision_recall`.

    Returns:
      Density, at least 0, 1 for equal distributions, and coverage, in [0, 1].

    Raises:
      ValueError: As `precision_recall`.

    References:
      Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.
    """
    real, generated = _pair(real, generated, k + 1)
    inside, covered = 0, np.zeros(len(real), bool)
    for near in _within(generated, real, k):
        inside += int(np.sum(near))
        covered |= np.any(near, axis=0)
    return inside / (k * len(generated)), float(np.mean(covered))


def _within(samples: np.ndarray, centres: np.ndarray, k: int) -> Iterator[np.ndarray]:
    """Yields, for blocks of samples, in which centres' balls they lie: bool (block, n)."""
    radii = np.concatenate(
        # The nearest is the sample itself.
        [np.partition(block, k, axis=1)[:, k] for block in _distances(centres, centres, same=True)]
    )
    for block in _distances(samples, centres):
        yield block <= radii


def _distances(a: np.ndarray, b: np.ndarray, same: bool = False) -> Iterator[np.ndarray]:
    """Yields squared distances of blocks of a's rows to all of b's; `same`: exactly 0 to itself."""
    size = max(_BLOCK // len(b), 1)
    b_squared = np.sum(np.square(b), axis=1)
    for start in range(0, len(a), size):
        block = a[start : start + size]
        squared = np.sum(np.square(block), axis=1)[:, None] + b_squared - 2 * block @ b.T
        if same:
            rows = np.arange(len(block))
            squared[rows, start + rows] = 0.0
        yield np.maximum(squared, 0.0)


def _pair(a: np.ndarray, b: np.ndarray, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a, "the first features", at_least), _checked(b, "the second", at_least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have one width, got {a.shape[1]} and {b.shape[1]}.")
    return a, b


def _checked(features: np.ndarray, name: str, at_least: int = 0) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {features.shape}.")
    if len(features) < at_least:
        raise ValueError(f"{name} must be at least {at_least} samples, got {len(features)}.")
    if not np.all(np.isfinite(features)):
        raise ValueError(f"{name} must be finite.")
    return features
