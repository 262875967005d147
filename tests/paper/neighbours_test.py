"""Nearest training images against brute force, and the share that is memorised."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import untrained_pipeline
from matplotlib import pyplot as plt
from PIL import Image

from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float
from binlatent.evaluation import reference
from binlatent.evaluation.metrics import pairs
from binlatent.evaluation.networks import features
from binlatent.paper import __main__ as plots
from binlatent.paper import neighbours
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError


@pytest.fixture(autouse=True)
def close_figures():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture
def pipeline(tiny_experiment):
    experiment = tiny_experiment.change({"sample.batch_size": 500})  # 4,500 images are judged
    return untrained_pipeline(experiment)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One for several tests: the classifier is trained and the images are judged once."""
    return tmp_path_factory.mktemp("workdir")


@pytest.fixture
def train_images(tiny_experiment):
    return load_images(open_split(tiny_experiment.data, "train"), 10_000)[0]


def brute_force(queries, features):
    """Returns all distances, (n, m), float64."""
    differences = queries[:, None].astype(np.float64) - features[None].astype(np.float64)
    return np.sqrt(np.sum(differences**2, axis=-1))


@pytest.mark.parametrize("k", [1, 7, 53])
def test_nearest_is_brute_force(monkeypatch, k):
    monkeypatch.setattr(neighbours, "_BLOCK", 530)  # 10 queries at a time
    random = np.random.default_rng(0)
    # Far from 0, where |a|^2 + |b|^2 - 2 ab cancels.
    features = random.normal(1e4, 1.0, (53, 5)).astype(np.float32)
    queries = random.normal(1e4, 1.0, (37, 5)).astype(np.float32)
    queries[31] = features[17]
    indices, distances = neighbours.nearest_rows(queries, features, k)
    expected = brute_force(queries, features)
    np.testing.assert_allclose(distances, np.sort(expected)[:, :k], rtol=1e-12)
    np.testing.assert_array_equal(indices, np.argsort(expected)[:, :k])
    assert indices[31, 0] == 17 and distances[31, 0] == 0


def test_memorised_is_all_of_copies_and_one_in_a_hundred_of_fresh_draws():
    random = np.random.default_rng(0)
    train, held_out = random.normal(size=(300, 4)), random.normal(size=(2_000, 4))
    of_held_out = neighbours.nearest_rows(held_out, train, 1)[1][:, 0]
    copies = neighbours.memorised(neighbours.nearest_rows(train, train, 1)[1][:, 0], of_held_out)
    assert copies["memorised"] == 1 and copies["median"] == 0
    fresh = neighbours.nearest_rows(random.normal(size=(20_000, 4)), train, 1)[1][:, 0]
    found = neighbours.memorised(fresh, of_held_out)
    # Five standard deviations, mostly those of the rank of the held-out quantile.
    assert found["memorised"] == pytest.approx(0.01, abs=5 * np.sqrt(0.01 / 2_000))
    assert found["median"] == pytest.approx(found["median_held_out"], rel=0.05)


def test_copies_in_both_splits_hide_no_copies():
    of_held_out = np.concatenate([np.zeros(20), np.linspace(1, 2, 979)])
    found = neighbours.memorised(np.zeros(500), of_held_out)
    assert (found["memorised"], found["copies"], found["threshold"]) == (1, 1, 0)
    assert found["expected"] == pytest.approx(0.02) and found["copies_held_out"] == 20 / 999


@pytest.mark.parametrize(("count", "expected"), [(20, 1 / 21), (150, 0.01)])
def test_the_share_that_is_expected(count, expected):
    random, shares = np.random.default_rng(0), []
    for _ in range(4_000):
        found = neighbours.memorised(random.random(100), random.random(count))
        assert found["expected"] == pytest.approx(expected)
        shares.append(found["memorised"])
    assert np.mean(shares) == pytest.approx(expected, rel=0.05)


def test_samples_and_their_neighbours(pipeline, train_images, workdir):
    found = neighbours.find(pipeline, workdir, num=3, seed=1)
    assert found.samples.shape == (3, 28, 28, 1) and found.images.shape == (3, 10, 28, 28, 1)
    network = reference.network(pipeline.experiment, workdir)
    train, samples = (network.apply(x, 500)["pool"] for x in (train_images, found.samples))
    expected = brute_force(samples, train)
    np.testing.assert_allclose(found.distances, np.sort(expected)[:, :10], rtol=1e-4)
    np.testing.assert_array_equal(found.images[:, 0], train_images[np.argmin(expected, axis=1)])
    # As many held-out images as samples, spread over the test images.
    test_images, _ = load_images(open_split(pipeline.experiment.data, "test"), 20)
    held_out = np.min(brute_force(network.apply(test_images, 500)["pool"], train), axis=1)
    np.testing.assert_allclose(found.of_held_out, held_out, rtol=1e-4)
    assert found.of_samples.shape == (20,)
    assert found.metrics["memorised"] == np.mean(found.of_samples <= np.min(held_out))
    protocol = found.protocol
    assert protocol["training images"]["searched"] == len(train_images) == 4_500
    assert protocol["samples"]["count"] == protocol["held-out images"]["used"] == 20
    assert protocol["samples"]["seed"] == 1 and protocol["network"] == network.protocol
    json.dumps(protocol)
    assert found.names == ["0", "1", "2"]  # the classes in turn
    labels = [text.get_text() for text in neighbours.figure(found).axes[0].get_yticklabels()]
    assert labels == [f"{i}\n{distance:.3g}" for i, distance in enumerate(found.distances[:, 0])]


def test_copies_of_training_images_are_told(pipeline, train_images, workdir, tmp_path, monkeypatch):
    # With more images than kept features: the copies are of images with kept features.
    monkeypatch.setattr(features, "MAX_KEPT", 100)
    kept = train_images[np.linspace(0, 4_499, 100).astype(int)]
    monkeypatch.setattr(pipeline, "sample", lambda num, *_, **__: to_float(kept[:num]))
    for path in (workdir / "evaluation").glob("classifier_*"):
        (tmp_path / "evaluation").mkdir()
        shutil.copy(path, tmp_path / "evaluation")
    found = neighbours.find(pipeline, tmp_path, num=2)
    np.testing.assert_array_equal(found.images[:, 0], kept[:2])
    assert found.metrics["memorised"] == 1 and found.metrics["median"] < 1e-3
    assert found.protocol["training images"]["searched"] == 100
    assert "of 100 of 4,500 training images" in neighbours.figure(found).axes[0].get_title()


def test_lpips_ranks_the_nearest_by_features(pipeline, train_images, workdir, monkeypatch):
    def squared(variables, x, y, batch_size):
        assert variables == "VGG16"
        return np.mean((x.astype(np.float32) - y) ** 2, axis=(1, 2, 3))

    monkeypatch.setattr(neighbours, "read_vgg16", lambda path: "VGG16")
    monkeypatch.setattr(pairs, "lpips", squared)
    found = neighbours.find(pipeline, workdir, num=2, by="lpips")
    network = reference.network(pipeline.experiment, workdir)
    train, samples = (network.apply(x, 500)["pool"] for x in (train_images, found.samples))
    for i in range(2):
        candidates = train_images[np.argsort(brute_force(samples[i : i + 1], train)[0])[:100]]
        by_pixels = squared("VGG16", np.stack([found.samples[i]] * 100), candidates, 1)
        np.testing.assert_allclose(found.distances[i], np.sort(by_pixels)[:10], rtol=1e-5)
        np.testing.assert_array_equal(found.images[i, 0], candidates[np.argmin(by_pixels)])
    assert found.protocol["shown"]["neighbours"] == "by LPIPS, of the 100 nearest by features"


def test_the_command_draws_them_and_writes_how_many(pipeline, workdir, monkeypatch):
    monkeypatch.setattr(plots.BinaryLatentDiffusion, "from_workdir", lambda *_, **__: pipeline)
    drawn = []
    monkeypatch.setattr(
        neighbours,
        "figure",
        lambda found, draw=neighbours.figure: drawn.append(draw(found)) or drawn[0],
    )
    plots.main(["neighbours", f"--workdir={workdir}", "--num=3", "--seed=1"])
    grid, histogram = drawn[0].axes
    assert grid.images[0].get_array().shape[:2] == (3 * 30 + 2, 11 * 30 + 2)
    names = [label.get_text() for label in grid.get_xticklabels()]
    assert names == ["sample", *map(str, range(1, 11))]
    stored = json.loads((workdir / "neighbours.json").read_text())
    metrics, protocol = stored["metrics"], stored["protocol"]
    assert 0 <= metrics["memorised"] <= 1 and metrics["expected"] == pytest.approx(1 / 21)
    assert histogram.get_title().startswith(f"{metrics['memorised']:.1%} of samples")
    assert "4,500 training images, by features" in grid.get_title()
    assert protocol["samples"]["seed"] == 1 and protocol["jax"] == jax.__version__
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == [
        f"20 samples, median {metrics['median']:.3g}",
        f"20 held-out, median {metrics['median_held_out']:.3g}",
    ]
    assert Image.open(workdir / "neighbours.png").size[0] > 1_000


def test_what_is_missing_is_said_first(pipeline, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"no file .* with VGG16's weights"):
        neighbours.find(pipeline, tmp_path, by="lpips")
    params = pipeline.autoencoder_params
    pipeline = BinaryLatentDiffusion(pipeline.experiment.change({"data.image_size": 14}), params)
    with pytest.raises(UserError, match="at least 16x16 pixels"):
        neighbours.find(pipeline, tmp_path, by="lpips")
    monkeypatch.setattr(BinaryLatentDiffusion, "from_workdir", lambda *_, **__: pipeline)
    with pytest.raises(SystemExit):
        plots.main(["neighbours", f"--workdir={tmp_path}"])
    assert "has no prior yet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
