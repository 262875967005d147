"""Metrics of features (n, d), in NumPy and float64; features that are not finite are refused."""

from typing import NamedTuple

import numpy as np
from scipy import special

from binlatent.evaluation.metrics import distances


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d) of features; the covariance may be singular."""

    mean: np.ndarray
    covariance: np.ndarray


class Statistics(NamedTuple):
    """Mean (d,) and scatter (d, d) of `count` samples of features; batches can be added.

    The scatter is the sum over samples of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Returns the statistics of features (n, d)."""
        features = _checked(features, "features")
        n, d = features.shape
        mean = np.mean(features, axis=0, dtype=np.float64) if n else np.zeros(d)
        scatter = np.zeros((d, d))
        for block in distances.blocks(n):
            centred = features[block] - mean
            scatter += centred.T @ centred
        return cls(n, mean, scatter)

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
    def gaussian(self) -> Gaussian:
        """The Gaussian with the unbiased covariance, which is 0 for a single sample."""
        return Gaussian(self.mean, self.scatter / max(self.count - 1, 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance between two Gaussians; of Inception features, the FID.

    It is |m_a - m_b|^2 + Tr S_a + Tr S_b - 2 Tr sqrt(S_a S_b), at least 0 (Heusel et al., "GANs
    trained by a two time-scale update rule converge to a local Nash equilibrium", 2017).
    """
    d = np.size(a.mean)
    shapes = [np.shape(x) for x in (*a, *b)]
    if shapes != [(d,), (d, d)] * 2:
        raise ValueError(f"means (d,) and covariances (d, d) of one width needed, got {shapes}.")
    # With S = R R^T, Tr sqrt(S_a S_b) is the sum of the singular values of R_a^T R_b. This avoids
    # eigenvalues of a product, which rounding can make negative or complex.
    trace_of_root = np.linalg.norm(_root(a.covariance).T @ _root(b.covariance), "nuc")
    of_means = np.sum(np.square(np.subtract(a.mean, b.mean, dtype=np.float64)))
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(of_means + traces - 2.0 * trace_of_root), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Returns R with R R^T = covariance, by Cholesky or, if singular, by eigenvectors (slower)."""
    covariance = np.asarray(covariance, np.float64)
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0.0))


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Inception score: exp of the mean KL(p(y | x) || p(y)), over `splits` consecutive parts.

    The logits, (n, k), n >= splits, are those of the FID Inception without its bias. Returns mean
    and standard deviation over the parts (Salimans et al., "Improved techniques for training
    GANs", 2016).
    """
    logits = _checked(logits, "logits", splits)
    n, scores = len(logits), []
    for i in range(splits):
        part = logits[i * n // splits : (i + 1) * n // splits].astype(np.float64)
        log_p = special.log_softmax(part, axis=1)
        log_marginal = special.logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features_a: np.ndarray,
    features_b: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1_000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel distance, (x.y / d + 1)^3, unbiased, over random subsets; on Inception features, KID.

    The features are (n_a, d) and (n_b, d), n_a and n_b at least `subset_size`. Subsets are drawn
    without replacement, first from a and then from b, with NumPy's RandomState, as in
    torch-fidelity. Returns mean and standard deviation over the subsets (Binkowski et al.,
    "Demystifying MMD GANs", 2018).
    """
    features_a, features_b = _pair(features_a, features_b, max(subset_size, 2))
    random, m, values = np.random.RandomState(seed), subset_size, []
    for _ in range(num_subsets):
        rows = [random.choice(len(x), m, replace=False) for x in (features_a, features_b)]
        a, b = (np.float64(x[i]) for x, i in zip((features_a, features_b), rows, strict=True))
        k_aa, k_bb, k_ab = (_cubic_kernel(x, y) for x, y in ((a, a), (b, b), (a, b)))
        within = np.sum(k_aa) - np.trace(k_aa) + np.sum(k_bb) - np.trace(k_bb)
        values.append(within / (m * (m - 1)) - 2 * np.mean(k_ab))
    return float(np.mean(values)), float(np.std(values))


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel * kernel * kernel  # ten times faster than kernel**3


def manifold_metrics(
    real: np.ndarray, generated: np.ndarray, k_pr: int = 3, k_dc: int = 5
) -> dict[str, float]:
    """Precision, recall, density and coverage, from one pass over the distances.

    A manifold is the union of balls around its samples, each up to its k-th nearest neighbour:
    `k_pr` is for precision and recall, `k_dc` for density and coverage. The features are (n, d) and
    (m, d), with n, m > k. Distances are exact as in float64 for any type of features.

    Returns:
      `precision`: share of generated samples within the real manifold, in [0, 1]. `recall`: share
      of real samples within the generated manifold, in [0, 1]. `density`: mean number of real balls
      around a generated sample, divided by k; at least 0, and 1 for equal distributions.
      `coverage`: share of real balls that contain a generated sample, in [0, 1].

    References:
      Kynkaanniemi et al., "Improved precision and recall metric", 2019.
      Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.
    """
    k = max(k_pr, k_dc)
    real, generated = _pair(real, generated, k + 1)
    means = [np.mean(x, axis=0, dtype=np.float64) for x in (real, generated)]
    scale = distances.scale_of(real, generated)
    # Origins: within a set its mean, between the sets the midpoint of their means.
    near_real, near_generated = (
        distances.nearest(distances.Points.of(x, mean, scale), k)
        for x, mean in zip((real, generated), means, strict=True)
    )
    a, b = (distances.Points.of(x, (means[0] + means[1]) / 2, scale) for x in (generated, real))
    precise, recalled, covered = (np.zeros(len(x), bool) for x in (generated, real, real))
    inside = 0
    for rows in distances.blocks(len(generated)):
        for columns in distances.blocks(len(real)):
            radius_a, radius_b = near_generated[rows], near_real[columns]
            i, j, lower, upper = distances.closer(
                a.part(rows), b.part(columns), radius_a[:, k_pr], radius_b[:, k]
            )
            radii = radius_b[j, k_pr], radius_a[i, k_pr], radius_b[j, k_dc]
            unsure = np.any([(lower <= r) & (r < upper) for r in radii], axis=0)
            squared = lower
            squared[unsure] = distances.squared_distances(
                a.part(rows), b.part(columns), i[unsure], j[unsure]
            )
            in_pr, in_generated, in_dc = (squared <= r for r in radii)
            precise[rows][i[in_pr]] = True
            recalled[columns][j[in_generated]] = True
            covered[columns][j[in_dc]] = True
            inside += int(np.sum(in_dc))
    return {
        "precision": float(np.mean(precise)),
        "recall": float(np.mean(recalled)),
        "density": inside / (k_dc * len(generated)),
        "coverage": float(np.mean(covered)),
    }


def _pair(a: np.ndarray, b: np.ndarray, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a, "the first features", at_least), _checked(b, "the second", at_least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have one width, got {a.shape[1]} and {b.shape[1]}.")
    return a, b


def _checked(features: np.ndarray, name: str, at_least: int = 0) -> np.ndarray:
    features = np.asarray(features)
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {features.shape}.")
    if len(features) < at_least:
        raise ValueError(f"{name} must be at least {at_least} samples, got {len(features)}.")
    if not np.all(np.isfinite(features)):
        raise ValueError(f"{name} must be finite.")
    return features
