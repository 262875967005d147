"""Metrics between sets of features: torch-fidelity's numbers, brute force and closed forms."""

from pathlib import Path

import numpy as np
import pytest

from binlatent.evaluation import feature_metrics

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


@pytest.mark.parametrize("block", [1, 2**25])
def test_manifolds_are_those_of_brute_force(monkeypatch, block):
    monkeypatch.setattr(feature_metrics, "_BLOCK", block)
    real, generated, k = gaussian(0, 60, 3), gaussian(1, 40, 3, 1.3), 4

    def distance(x, y):
        return np.linalg.norm(x - y)

    radii = {
        name: [sorted(distance(x, y) for y in points)[k] for x in points]
        for name, points in (("real", real), ("generated", generated))
    }
    inside = np.array(
        [[distance(y, x) <= r for x, r in zip(real, radii["real"], strict=True)] for y in generated]
    )
    back = [
        any(distance(x, y) <= r for y, r in zip(generated, radii["generated"], strict=True))
        for x in real
    ]
    assert feature_metrics.precision_recall(real, generated, k) == pytest.approx(
        (inside.any(axis=1).mean(), np.mean(back))
    )
    assert feature_metrics.density_coverage(real, generated, k) == pytest.approx(
        (inside.sum() / (k * 40), inside.any(axis=0).mean())
    )


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
