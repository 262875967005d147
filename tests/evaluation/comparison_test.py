"""Comparing two sets of images: values, names, and refused inputs."""

import hashlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.evaluation import comparison, exchange, results
from binlatent.evaluation.metrics.feature_metrics import Gaussian, Statistics, frechet_distance
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.features import Features, Network
from binlatent.runtime.devices import map_batches
from binlatent.runtime.errors import UserError


def means(images, batch_size):
    """A network whose features are means and standard deviations of channels."""
    x = jnp.asarray(images, jnp.float32)
    pool = jnp.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)
    return {"pool": pool, "logits": pool / 100, "spatial": x.reshape(len(x), -1)[:, :5]}


NETWORK = Network("inception", 6, means, {"name": "inception", "network": "means"})


def images(seed, n=40, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def image_set(array, name="there"):
    def batches(size):
        return (array[i : i + size] for i in range(0, len(array), size))

    return exchange.ImageSet(len(array), batches, {"images": name})


def drawn(seed, n=40, d=4, shift=0.0, **more):
    x = np.random.default_rng(seed).normal(shift, 1, (n, d))
    gaussians = {"pool": Gaussian(x.mean(axis=0), np.cov(x.T))}
    return Features(n, gaussians, x.astype(np.float32), **more)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_features_do_not_depend_on_the_batches(batch_size):
    array = images(0)
    found, protocol = comparison.features_of(NETWORK, image_set(array), batch_size)
    assert protocol["pixels"] == hashlib.sha256(array.tobytes()).hexdigest()[:16]
    x = array.astype(np.float64)
    expected = np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(found.pool, expected, rtol=1e-5)
    np.testing.assert_allclose(found.gaussians["pool"].mean, found.pool.mean(axis=0, dtype=float))
    np.testing.assert_allclose(
        found.gaussians["pool"].covariance, np.cov(found.pool.T.astype(float)), rtol=1e-9, atol=1e-9
    )
    assert found.gaussians["spatial"].mean.shape == (5,) and found.count == 40


def test_statistics_agree_to_1e_9_whatever_the_batches():
    array = images(1, 300)
    outputs = NETWORK.apply(array, 300)
    found = []
    for size in (7, 64, 300):
        parts = (
            {name: x[i : i + size] for name, x in outputs.items()} for i in range(0, 300, size)
        )
        found.append(features.collect(parts, 300, "They").gaussians["pool"])
    for gaussian in found[:2]:
        np.testing.assert_allclose(gaussian.mean, found[2].mean, rtol=1e-9)
        np.testing.assert_allclose(gaussian.covariance, found[2].covariance, rtol=1e-9, atol=1e-9)


def test_batches_spread_over_four_devices_change_nothing():
    """Padding of the last batch and splitting over devices do not change results."""
    array = images(5, 150)

    @jax.jit
    def sums(batch):  # exact in float32 for any batch size
        x = batch.astype(jnp.float32)
        return {"pool": x.sum(axis=2).reshape(len(x), -1), "logits": x[:, 0, 0]}

    def apply(batch, batch_size):
        return map_batches(sums, batch_size, batch)

    assert jax.device_count() == 4
    network = Network("inception", 24, apply, {})
    found = [comparison.features_of(network, image_set(array), size)[0] for size in (7, 64, 150)]
    expected = array.astype(np.float64).sum(axis=2).reshape(150, -1)
    for x in found:
        np.testing.assert_array_equal(x.pool, expected)
        mean, covariance = x.gaussians["pool"]
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(expected.T), rtol=1e-9, atol=1e-6)
    other = drawn(0, 200, 24)
    values = [comparison.compare(other, x, ["fid", "pr"])[0] for x in found]
    for value in values[:2]:
        assert value == pytest.approx(values[2], rel=1e-9)


def test_kept_features_are_spread(monkeypatch):
    monkeypatch.setattr(features, "MAX_KEPT", 5)
    outputs = {"pool": np.arange(21.0)[:, None], "logits": np.zeros((21, 2))}
    parts = ({name: x[i : i + 4] for name, x in outputs.items()} for i in range(0, 21, 4))
    found = features.collect(parts, 21, "They")
    np.testing.assert_array_equal(found.pool[:, 0], [0, 5, 10, 15, 20])
    assert found.gaussians["pool"].mean == 10.0


def kernel(a, b, d=4):
    """E (x.y / d + 1)^3 for x, y of unit variance around a and b in each of d dimensions."""
    first, second, third = a * b, (1 + a**2) * (1 + b**2), (a**3 + 3 * a) * (b**3 + 3 * b)
    variance = (second - first**2) / d
    skew = (third - 3 * first * second + 2 * first**3) / d**2
    squared = variance + first**2
    return skew + 3 * first * variance + first**3 + 3 * squared + 3 * first + 1


def test_means_give_closed_forms():
    reference, generated = drawn(0, 4_000), drawn(1, 4_000, shift=0.5)
    values, _ = comparison.compare(reference, generated, ["fid", "kid", "pr", "dc"])
    assert values["fid"] == pytest.approx(4 * 0.25, abs=0.1)
    expected = kernel(0, 0) + kernel(0.5, 0.5) - 2 * kernel(0, 0.5)
    assert values["kid"] == pytest.approx(expected, rel=0.1) and values["kid_std"] > 0
    assert 0.8 < values["precision"] <= 1 and 0.8 < values["recall"] <= 1
    same, _ = comparison.compare(reference, drawn(2, 4_000), ["fid", "dc"])
    assert same["fid"] < 0.01 and same["density"] == pytest.approx(1, abs=0.05)


def test_inception_score_of_sure_and_unsure_classes():
    sure = np.eye(10, dtype=np.float32)[np.arange(2_000) % 10] * 100
    values, _ = comparison.compare(None, drawn(0, 2_000, logits=sure), ["is"])
    # Ten, minus an effect of random shares of classes in 200 samples.
    assert values["is"] == pytest.approx(10 * np.exp(-9 / 2 / 200), rel=0.02)
    unsure, _ = comparison.compare(None, drawn(0, 2_000, logits=0 * sure), ["is"])
    assert unsure == {"is": pytest.approx(1), "is_std": pytest.approx(0, abs=1e-9)}


def test_other_networks_have_other_names():
    logits = np.zeros((40, 3), np.float32)
    values, _ = comparison.compare(
        drawn(0, 50), drawn(1, logits=logits), ["fid", "kid", "is", "pr"], "_effnet"
    )
    assert list(values) == [
        *("fd_effnet", "kd_effnet", "kd_effnet_std", "score_effnet", "score_effnet_std"),
        *("precision_effnet", "recall_effnet"),
    ]
    table = results.table(values, comparison.METRICS)
    assert "FD-EffNet" in table and "FID" not in table


def test_kid_of_all_samples_is_computed_once():
    values, _ = comparison.compare(drawn(0), drawn(1), ["kid"])
    x, y = (drawn(seed).pool.astype(np.float64) for seed in (0, 1))
    within = [
        (np.sum(k) - np.trace(k)) / (40 * 39) for k in ((z @ z.T / 4 + 1) ** 3 for z in (x, y))
    ]
    assert values == {"kid": pytest.approx(sum(within) - 2 * np.mean((x @ y.T / 4 + 1) ** 3))}
    several, told = comparison.compare(drawn(0), drawn(1, 60), ["kid", "pr", "fid"])
    assert list(several) == ["fid", "kid", "kid_std", "precision", "recall"]
    assert told["kid"].startswith("100 subsets of 40 by seed 2020 of 40 real and 60 generated")
    assert list(told) == ["kid", "pr"]


def test_grey_images_are_counted(caplog):
    array = images(3)
    array[:7] = array[:7, :, :, :1]
    with caplog.at_level(logging.WARNING):
        comparison.features_of(NETWORK, image_set(array), 16)
    assert "7 of the 40 images in there are greyscale and are expanded to RGB." in caplog.text


def test_too_few_images_for_the_features(caplog):
    with caplog.at_level(logging.WARNING):
        values, _ = comparison.compare(drawn(0, 10, 64), drawn(1, 10, 64), ["fid"])
    told = "There are 10 reference images and 10 generated images for 64 features, so "
    assert caplog.text.count("singular") == 1 and told in caplog.text
    caplog.clear()
    comparison.compare(drawn(0, 100, 64), drawn(1, 10, 64), ["fid"])
    assert "There are 10 generated images for 64 features, so " in caplog.text
    a, b = (Statistics.of(drawn(seed, 10, 64).pool).gaussian for seed in (0, 1))
    assert values["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-5)


@pytest.mark.parametrize(
    ("reference", "generated", "names", "text"),
    [
        (drawn(0), drawn(1), ["fdi"], "no metric 'fdi'"),
        (drawn(0), drawn(1), [], "No metric was given"),
        (None, drawn(1), ["fid"], "Give a reference"),
        (drawn(0), drawn(1, d=5), ["fid"], "has 4 features and the images have 5"),
        (drawn(0), drawn(1), ["sfid"], "sfid needs statistics of Inception's spatial"),
        (
            drawn(0),
            drawn(1)._replace(pool=None),
            ["kid"],
            "the set of images has only their statistics",
        ),
        (drawn(0)._replace(pool=None), drawn(1), ["pr"], "the reference has only their statistics"),
        (drawn(0), drawn(1, d=5), ["pr"], "different networks, so make both"),
        (drawn(0, 5), drawn(1), ["pr"], "at least 6 images of each, and the reference has 5"),
        (None, drawn(1), ["is"], "at least 10 generated images"),
    ],
)
def test_what_cannot_be_compared(reference, generated, names, text):
    with pytest.raises(UserError, match=text):
        comparison.compare(reference, generated, names)


def test_what_a_network_has_not_is_refused_first():
    with pytest.raises(UserError, match="needs logits, and these weights of Inception have none"):
        comparison.check_network("inception", ["fid", "is"], logits=False)
    with pytest.raises(UserError, match="sfid needs the network inception"):
        comparison.check_network("efficientnet", ["sfid"])
    comparison.check_network("inception", comparison.METRICS)


def test_features_that_are_not_finite():
    def broken(images, batch_size):
        return {name: x + jnp.nan for name, x in means(images, batch_size).items()}

    with pytest.raises(UserError, match=r"The images in there cannot be judged: .*must be finite"):
        comparison.features_of(NETWORK._replace(apply=broken), image_set(images(0)), 16)


def test_statistics_of_another_network(tmp_path):
    path = tmp_path / "x.npz"
    exchange.write_statistics(path, drawn(0), {"network": {"network": "another"}})
    with pytest.raises(UserError, match="another network or other weights"):
        comparison.load_features(path, NETWORK, 4)


def test_statistics_beside_images(tmp_path):
    """As in ADM's references: the statistics are of more images than the file has."""
    array = images(0)
    np.savez(tmp_path / "x.npz", arr_0=array, mu=np.ones(6), sigma=np.eye(6))
    found, protocol = comparison.load_features(tmp_path / "x.npz", NETWORK, 16)
    np.testing.assert_array_equal(found.gaussians["pool"].mean, np.ones(6))
    assert found.pool.shape == (40, 6) and protocol["statistics"] == str(tmp_path / "x.npz")
    # They are Inception's: another network's are computed.
    found, protocol = comparison.load_features(tmp_path / "x.npz", NETWORK._replace(width=5), 16)
    assert np.any(found.gaussians["pool"].mean != 1) and "statistics" not in protocol
