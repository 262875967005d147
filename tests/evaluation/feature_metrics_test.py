"""Metrics between sets of features: torch-fidelity's numbers, brute force and closed forms."""

from pathlib import Path

import numpy as np
import pytest

from binlatent.evaluation.metrics import distances, feature_metrics
from binlatent.evaluation.metrics.feature_metrics import Gaussian, Statistics, frechet_distance

DATA = Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "feature_metrics.npz", allow_pickle=False)


def gaussian(seed, n, d, scale=1.0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def test_all_agree_with_torch_fidelity():
    # Its first set is the one that is judged, here named "reference".
    first, second = GOLDEN["reference_features"], GOLDEN["generated_features"]
    fid = frechet_distance(*(Statistics.of(x).gaussian for x in (first, second)))
    np.testing.assert_allclose(fid, GOLDEN["frechet_inception_distance"], rtol=1e-6)
    score = feature_metrics.inception_score(GOLDEN["logits"])
    np.testing.assert_allclose(score[0], GOLDEN["inception_score_mean"], rtol=1e-6)
    np.testing.assert_allclose(score[1], GOLDEN["inception_score_std"], rtol=1e-6)
    found = feature_metrics.manifold_metrics(second, first)
    np.testing.assert_allclose(found["precision"], GOLDEN["precision"], rtol=1e-6)
    np.testing.assert_allclose(found["recall"], GOLDEN["recall"], rtol=1e-6)
    # Its kernels are in float32: 1.4e-6 from ours, for any draw of the subsets.
    mean, std = feature_metrics.kernel_distance(first, second, num_subsets=10, subset_size=500)
    np.testing.assert_allclose(mean, GOLDEN["kernel_inception_distance_mean"], rtol=2e-6)
    np.testing.assert_allclose(std, GOLDEN["kernel_inception_distance_std"], rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_statistics_add_up_whatever_the_batches(batch):
    features = gaussian(0, 500, 12, 3.0, 100.0)
    total = Statistics.of(features[:0])
    for start in range(0, 500, batch):
        total = total + Statistics.of(features[start : start + batch])
    assert total.count == 500
    np.testing.assert_allclose(total.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.gaussian.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)


def brute_force(real, generated, k_pr, k_dc):
    def squared(a, b):
        return np.array([np.sum(np.square(np.float64(x) - b), axis=1) for x in a])

    def radii(a, k):
        return np.sort(squared(a, a), axis=1)[:, k]

    between = squared(generated, real)
    balls = between <= radii(real, k_dc)
    return {
        "precision": np.mean(np.any(between <= radii(real, k_pr), axis=1)),
        "recall": np.mean(np.any(between <= radii(generated, k_pr)[:, None], axis=0)),
        "density": np.sum(balls) / (k_dc * len(generated)),
        "coverage": np.mean(np.any(balls, axis=0)),
    }


def lattice(seed, n):
    return np.random.default_rng(seed).integers(0, 3, (n, 4)).astype(np.float64)


def modes(seed, n, d=5):
    """A few distant groups of samples that are equal in float32."""
    centre = 1e3 * gaussian(7, 3, d)[np.random.default_rng(seed).integers(0, 3, n)]
    return centre + gaussian(seed, n, d, 1e-3)


SETS = {
    "plain": (gaussian(0, 130, 3), gaussian(1, 90, 3, 1.3)),
    "wide": (gaussian(0, 70, 300), gaussian(1, 80, 300)),
    "float32": (gaussian(0, 70, 20).astype(np.float32), gaussian(1, 80, 20).astype(np.float32)),
    "offset": (gaussian(0, 100, 4, mean=1e4), gaussian(1, 100, 4, mean=1e4)),
    "tiny float32": tuple(gaussian(i, 90, 4, 1e-30).astype(np.float32) for i in (0, 1)),
    "copies": (gaussian(0, 50, 3)[np.arange(120) % 50], gaussian(0, 50, 3)[np.arange(60) % 30]),
    "ties": (lattice(0, 150), lattice(1, 130)),
    "collapsed": (gaussian(0, 90, 3), np.ones((70, 3))),
    "collapsed to a real": (gaussian(0, 90, 3), gaussian(0, 90, 3)[:1] + np.zeros((70, 1))),
    "all one": (np.ones((40, 2)), np.ones((30, 2))),
    "modes": (modes(0, 120), modes(1, 140)),
    "far apart": (gaussian(0, 90, 3), gaussian(1, 90, 3, 1e-4, 1e3)),
    "outlier": (
        np.concatenate([gaussian(0, 90, 3), 1e6 * np.ones((1, 3))]),
        gaussian(1, 90, 3, 1e-5),
    ),
    "narrow in wide": (gaussian(0, 90, 300), gaussian(1, 90, 300, 0.1)),
}


@pytest.mark.parametrize("block", [32, 4096])
@pytest.mark.parametrize("name", SETS)
def test_manifolds_are_exactly_those_of_brute_force(monkeypatch, name, block):
    monkeypatch.setattr(distances, "_BLOCK", block)
    real, generated = SETS[name]
    assert feature_metrics.manifold_metrics(real, generated) == brute_force(real, generated, 3, 5)
    assert feature_metrics.manifold_metrics(generated, real, 6, 2) == brute_force(
        generated, real, 6, 2
    )


@pytest.mark.parametrize("exponent", [-530, 500])
def test_manifolds_do_not_depend_on_the_scale(exponent):
    real, generated = SETS["plain"]
    expected = brute_force(real, generated, 4, 4)
    scaled = real * 2.0**exponent, generated * 2.0**exponent
    assert feature_metrics.manifold_metrics(*scaled, 4, 4) == expected


def distance(a, b):
    """The Frechet distance of two sets of features."""
    return frechet_distance(*(Statistics.of(np.asarray(x)).gaussian for x in (a, b)))


def random_covariance(seed, d):
    root = gaussian(seed, d, d)
    return root @ root.T + np.eye(d)


def test_frechet_distance_of_equal_and_of_shifted_sets():
    features = gaussian(0, 50, 8, 100)
    permuted = np.random.default_rng(1).permutation(features)
    assert distance(features, permuted) == pytest.approx(0, abs=1e-8)
    features = gaussian(0, 50, 3)
    assert distance(features, features + np.array([1.0, -2.0, 3.0])) == pytest.approx(14, rel=1e-12)


def test_frechet_distance_of_diagonal_covariances():
    a = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([0.0, 3.0, 0.0]), np.diag([25.0, 4.0, 1.0]))
    # The squared mean difference, and a squared difference of standard deviations an axis.
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + 0 + 4, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # In two dimensions Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M)).
    s_a, s_b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    product = s_a @ s_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = frechet_distance(Gaussian(np.zeros(2), s_a), Gaussian(np.ones(2), s_b))
    assert found == pytest.approx(2 + np.trace(s_a) + np.trace(s_b) - 2 * root, rel=1e-12)


def test_frechet_distance_of_an_optimal_map():
    # A symmetric positive A is the optimal map between N(0, S) and N(0, A S A), so the distance
    # is E|x - A x|^2 = Tr (I - A) S (I - A).
    d = 32
    s, a = random_covariance(0, d), random_covariance(1, d) / d
    found = frechet_distance(Gaussian(np.zeros(d), s), Gaussian(np.zeros(d), a @ s @ a))
    i = np.eye(d)
    assert found == pytest.approx(np.trace((i - a) @ s @ (i - a)), rel=1e-10)


def test_frechet_distance_of_orthogonal_subspaces():
    # 4 samples in 64 dimensions, turned into another subspace: all mass moves between orthogonal
    # subspaces, so the traces of the covariances add up.
    samples = gaussian(0, 4, 32)
    zeros = np.zeros_like(samples)
    a, b = np.concatenate([samples, zeros], axis=1), np.concatenate([zeros, samples], axis=1)
    size = np.sum(samples.mean(axis=0) ** 2) + np.sum(np.var(samples, axis=0, ddof=1))
    assert distance(a, b) == pytest.approx(2 * size, rel=1e-12)
    assert distance(a, a) == pytest.approx(0, abs=1e-5)
    for point in (np.zeros((9, 64)), np.zeros((1, 64))):  # a constant set is a point mass
        assert distance(a, point) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 300), (300, 300)])
def test_frechet_distance_of_singular_covariances_is_that_of_the_features(n, m):
    def roots(x):  # R with R^T R the covariance, of the features themselves
        return np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1), mode="r")

    # Wide: fewer samples than features. Flat: constant and repeated features.
    for a, b in (
        (gaussian(0, n, 60), gaussian(1, m, 60, 1.1)),
        tuple(gaussian(i, k, 30) @ gaussian(2, 30, 60) for i, k in ((0, n), (1, m))),
    ):
        a[:, 0], b[:, 0], a[:, 1], b[:, 1] = 3.0, 3.0, a[:, 2], b[:, 2]
        x, y = roots(a), roots(b)
        expected = np.sum(np.square(a.mean(axis=0) - b.mean(axis=0)))
        expected += np.sum(x**2) + np.sum(y**2) - 2 * np.linalg.norm(x @ y.T, "nuc")
        assert distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_agrees_with_torch_fidelity():
    with np.load(DATA / "frechet_distance.npz", allow_pickle=False) as golden:
        found = distance(golden["reference_features"], golden["generated_features"])
        assert found == pytest.approx(float(golden["frechet_inception_distance"]), rel=1e-6)


def test_frechet_distance_refuses_bad_features():
    features = gaussian(0, 10, 3)
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        distance(features[0], features)
    with pytest.raises(ValueError, match="of one width"):
        distance(features, features[:, :2])
    with pytest.raises(ValueError, match="must be finite"):
        distance(features, np.full((10, 3), np.nan))


def test_inception_score_is_one_without_and_k_with_all_information():
    assert feature_metrics.inception_score(np.zeros((20, 7)))[0] == pytest.approx(1)
    sure = 1e3 * np.eye(5)[np.arange(50) % 5]
    mean, std = feature_metrics.inception_score(sure)
    assert mean == pytest.approx(5) and std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_all_samples_is_the_unbiased_estimate():
    x, y = gaussian(0, 30, 4), gaussian(1, 30, 4, mean=0.5)

    def kernel(a, b):
        return (np.dot(a, b) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    expected = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    got, std = feature_metrics.kernel_distance(x, y, num_subsets=3, subset_size=30)
    assert got == pytest.approx(expected) and std == pytest.approx(0, abs=1e-12)


def test_bad_features_are_refused():
    good, function = gaussian(0, 10, 3), feature_metrics.manifold_metrics
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        function(good, good[:, :2])
    with pytest.raises(ValueError, match="must be finite"):
        function(good, np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="samples, got 2"):
        function(good[:2], good)
