"""Metrics between sets of features: torch-fidelity's numbers, brute force and closed forms."""

from pathlib import Path

import numpy as np
import pytest

from binlatent.evaluation.metrics import distances, feature_metrics, image_metrics

GOLDEN = np.load(Path(__file__).parent / "data" / "feature_metrics.npz", allow_pickle=False)


def gaussian(seed, n, d, scale=1.0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def test_all_agree_with_torch_fidelity():
    # Its first set is the one that is judged, which was the "reference" here.
    first, second = GOLDEN["reference_features"], GOLDEN["generated_features"]
    a, b = map(feature_metrics.Statistics.of, (first, second))
    fid = feature_metrics.gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    np.testing.assert_allclose(fid, GOLDEN["frechet_inception_distance"], rtol=1e-6)
    score = feature_metrics.inception_score(GOLDEN["logits"])
    np.testing.assert_allclose(score[0], GOLDEN["inception_score_mean"], rtol=1e-6)
    np.testing.assert_allclose(score[1], GOLDEN["inception_score_std"], rtol=1e-6)
    precision, recall = feature_metrics.precision_recall(second, first)
    np.testing.assert_allclose(precision, GOLDEN["precision"], rtol=1e-6)
    np.testing.assert_allclose(recall, GOLDEN["recall"], rtol=1e-6)
    # Its kernels are of float32: 1.4e-6 from ours, whatever the draw of the subsets.
    mean, std = feature_metrics.kernel_distance(first, second, num_subsets=10, subset_size=500)
    np.testing.assert_allclose(mean, GOLDEN["kernel_inception_distance_mean"], rtol=2e-6)
    np.testing.assert_allclose(std, GOLDEN["kernel_inception_distance_std"], rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_statistics_add_up_whatever_the_batches(batch):
    features = gaussian(0, 500, 12, 3.0, 100.0)
    total = feature_metrics.Statistics.of(features[:0])
    for start in range(0, 500, batch):
        total = total + feature_metrics.Statistics.of(features[start : start + batch])
    assert total.count == 500
    np.testing.assert_allclose(total.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)


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
    """Few, far from each other, of samples that float32 does not tell apart."""
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
    assert feature_metrics.precision_recall(*scaled, 4) == (
        expected["precision"],
        expected["recall"],
    )
    assert feature_metrics.density_coverage(*scaled, 4) == (
        expected["density"],
        expected["coverage"],
    )


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 300), (300, 300)])
def test_frechet_distance_of_singular_covariances_is_that_of_the_features(n, m):
    # Wide: fewer samples than features. Flat: constant and repeated features.
    for a, b in (
        (gaussian(0, n, 60), gaussian(1, m, 60, 1.1)),
        tuple(gaussian(i, k, 30) @ gaussian(2, 30, 60) for i, k in ((0, n), (1, m))),
    ):
        a[:, 0], b[:, 0], a[:, 1], b[:, 1] = 3.0, 3.0, a[:, 2], b[:, 2]
        x, y = map(feature_metrics.Statistics.of, (a, b))
        got = feature_metrics.gaussian_frechet_distance(x.mean, x.covariance, y.mean, y.covariance)
        assert got == pytest.approx(image_metrics.frechet_distance(a, b), rel=1e-6)


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


@pytest.mark.parametrize(
    "function", [feature_metrics.precision_recall, feature_metrics.density_coverage]
)
def test_bad_features_are_refused(function):
    good = gaussian(0, 10, 3)
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        function(good, good[:, :2])
    with pytest.raises(ValueError, match="must be finite"):
        function(good, np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="samples, got 2"):
        function(good[:2], good)
