"""Nearest neighbours and bounds of distances, against distances of float64."""

import numpy as np
import pytest

from binlatent.evaluation.metrics import distances


def squared(a, b):
    return np.array([np.sum(np.square(np.float64(x) - b), axis=1) for x in a])


def points(features, origin=0.0):
    return distances.Points.of(features, np.full(features.shape[1], origin), 1.0)


@pytest.mark.parametrize("n", [0, 1, 9, 10, 29, 100])
def test_blocks_cover_and_are_not_too_small(monkeypatch, n):
    monkeypatch.setattr(distances, "_BLOCK", 7)
    blocks = distances.blocks(n, 10)
    assert np.concatenate([np.arange(n)[block] for block in blocks]).tolist() == list(range(n))
    assert all(len(np.arange(n)[block]) >= min(n, 10) for block in blocks)


@pytest.mark.parametrize("block", [1, 16, 4096])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_nearest_are_exactly_those_of_brute_force(monkeypatch, block, kind):
    monkeypatch.setattr(distances, "_BLOCK", block)
    features = np.random.default_rng(0).normal(2, 1, (90, 7)).astype(kind)
    features[40:60] = features[:20]
    expected = np.sort(squared(features, features), axis=1)[:, :5]
    np.testing.assert_array_equal(distances.nearest(points(features, 2.0), 4), expected)


@pytest.mark.parametrize("limit", [0.5, 1e3])  # few pairs, by float32; and all, by float64
@pytest.mark.parametrize("d", [1, 6, 500])
def test_bounds_hold_and_no_close_pair_is_missed(limit, d):
    r = np.random.default_rng(0)
    a, b = (points(x) for x in r.normal(5, 1 / np.sqrt(d), (2, 120, d)))
    i, j, lower, upper = distances.closer(a, b, np.full(120, limit), np.zeros(120))
    exact = squared(a.features, b.features)
    assert {*zip(*np.nonzero(exact <= limit), strict=True)} <= {*zip(i, j, strict=True)}
    np.testing.assert_array_equal(distances.squared_distances(a, b, i, j), exact[i, j])
    assert np.all(lower <= exact[i, j]) and np.all(exact[i, j] <= upper)
    squares = np.sum(np.square(a.features), axis=1)[i] + np.sum(np.square(b.features), axis=1)[j]
    assert np.all(upper - lower <= (1e-11 if limit > 1 else 1e-3) * squares)


def test_scale_is_a_power_of_two_near_the_range():
    a, b = np.array([[1.0, 0.0], [1.5, 0.0]]), np.array([[0.0, -300.0], [0.0, 300.0]])
    assert distances.scale_of(a, b) == 2.0**-10
    assert distances.scale_of(np.ones((2, 2))) == 1.0
