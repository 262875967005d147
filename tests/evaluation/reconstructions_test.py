"""Test images against their reconstructions, and the floors of a distance of samples."""

import json
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import quality, reconstructions, report
from binlatent.evaluation.floors import floors, in_words
from binlatent.evaluation.judge import near_chance
from binlatent.evaluation.metrics.feature_metrics import (
    Gaussian,
    Statistics,
    frechet_distance,
    kernel_distance,
)
from binlatent.evaluation.networks.features import Network
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion

WIDTH = 5  # features: pixels in a row


def pixels(images, batch_size):
    """The features of the network below."""
    return {"pool": images[:, 14, :WIDTH, 0].astype(np.float32)}


NETWORK = Network("inception", WIDTH, pixels, {"name": "pixels"}, logits=False)


@pytest.fixture
def shifted(tmp_path, tiny_experiment):
    """12 test images, 12 training images brighter by 7, and an autoencoder that adds 0 or more."""
    images = np.random.default_rng(0).integers(40, 200, (12, 28, 28), np.uint8)
    for split, brighter in (("train", 7), ("test", 0)):
        (folder := tmp_path / "images" / split).mkdir(parents=True)
        for i, image in enumerate(images + np.uint8(brighter)):
            Image.fromarray(image).save(folder / f"{i:02}.png")
    values = {"data.name": "folder", "data.path": str(tmp_path / "images")}
    values |= {"data.num_classes": 0, "sample.batch_size": 4}
    params = {"brighter": np.zeros(1)}
    pipeline = SimpleNamespace(
        experiment=tiny_experiment.change(values),
        autoencoder_params=params,
        encode=lambda x: x,
        encode_probs=lambda x: (x + 1) / 2,
        decode=lambda codes: codes + 2 * params["brighter"] / 255,
    )
    return pipeline, images


@pytest.mark.parametrize("brighter", [0, 5])
def test_identical_images_have_no_distance_and_brighter_ones_that_of_the_means(
    shifted, tmp_path, brighter
):
    pipeline, images = shifted
    pipeline.autoencoder_params["brighter"][:] = brighter
    values, protocol, settings = reconstructions.compare_reconstructions(
        pipeline, NETWORK, tmp_path, ["rfid", "rkid"]
    )
    assert values["rfid"] == pytest.approx(WIDTH * brighter**2, abs=1e-6)
    # One subset of all 12: the unbiased distance of Gretton et al., by loops.
    x = images[:, 14, :WIDTH].astype(float)
    y, n = x + brighter, len(x)

    def kernel(a, b):
        return (a @ b / WIDTH + 1) ** 3

    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = [kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j]
    between = [kernel(x[i], y[j]) for i, j in pairs]
    expected = sum(within) / (n * (n - 1)) - 2 * np.mean(between)
    assert values["rkid"] == pytest.approx(expected, rel=1e-9)
    assert set(values) == {"rfid", "rfid_drawn", "rkid", "rkid_drawn"}
    assert protocol["count"] == 12 and protocol["split"] == "test"
    assert protocol["codes"] == "y > 0.5; drawn from B(y), seed 0"
    assert settings["rkid"].startswith("1 subsets of 12")


@pytest.mark.parametrize("bottleneck", ["vq", "real"])
def test_codes_without_bits_are_not_described_by_y(shifted, tmp_path, bottleneck):
    pipeline, _ = shifted
    pipeline.experiment = pipeline.experiment.change({"autoencoder.bottleneck": bottleneck})
    values, protocol, _ = reconstructions.compare_reconstructions(
        pipeline, NETWORK, tmp_path, ["rfid"]
    )
    assert set(values) == {"rfid"} and protocol["codes"] == "deterministic"
    assert report.HeldOut.read(pipeline).protocol["codes"] == "deterministic"


def test_too_few_reconstructions_are_warned_of_once_and_the_log_says_which_codes(
    shifted, tmp_path, caplog
):
    pipeline, _ = shifted
    with caplog.at_level(logging.INFO):
        reconstructions.compare_reconstructions(pipeline, NETWORK, tmp_path, ["rfid"], 4)
    told = "There are 4 reference images and 4 reconstructions for 5 features, so the covariance is"
    assert caplog.text.count("singular") == 1 and told in caplog.text
    for codes in ("y > 0.5", "drawn from B(y), seed 0"):
        assert f"Judging 4 reconstructions of codes {codes}\n" in caplog.text


def test_the_floors_of_shifted_images(shifted, tmp_path):
    pipeline, images = shifted
    pipeline.autoencoder_params["brighter"][:] = 5
    pipeline.encode_probs = lambda x: (x > 0).astype(np.float32)  # B(y) of certain bits
    x = Statistics.of(images[:, 14, :WIDTH].astype(float)).gaussian
    train = Gaussian(x.mean + 7, x.covariance)
    bits = to_float(images[..., None]) > 0
    y = Statistics.of(to_uint8(bits + 10 / 255)[:, 14, :WIDTH, 0].astype(float)).gaussian
    expected = {"real": WIDTH * 49, "reconstructions": frechet_distance(x, y)}
    for known, split in ((train, "train"), (x, "test")):
        found, counts = floors(pipeline, NETWORK, tmp_path, known, split, 100)
        assert counts == {"real": 12, "reconstructions": 12}  # all images
        assert found == pytest.approx(expected, abs=1e-6)
    assert "245 for real images of the other split; " in in_words(found)
    # A single image has none; of several images, those spread evenly are used.
    assert floors(pipeline, NETWORK, tmp_path, x, "test", 1) == ({}, {})
    assert in_words({}) == ""
    few = Statistics.of(images[[0, 5, 11], 14, :WIDTH].astype(float)).gaussian
    found, counts = floors(pipeline, NETWORK, tmp_path, train, "train", 3)
    assert counts == {"real": 3, "reconstructions": 3}
    assert found["real"] == pytest.approx(frechet_distance(train, few), rel=1e-6)


def test_reconstructions_go_on_where_they_stopped(shifted, tmp_path, monkeypatch):
    pipeline, _ = shifted
    monkeypatch.setattr(reconstructions, "_SHARD", 5)
    decoded, decode = [], pipeline.decode
    pipeline.decode = lambda codes: decoded.append(len(codes)) or decode(codes)

    def run(codes="_drawn", limit=None):
        decoded.clear()
        found = reconstructions.features_of_reconstructions(
            pipeline, NETWORK, tmp_path, codes, limit
        )
        return found.pool

    first = run()
    assert sum(decoded) == 12
    np.testing.assert_array_equal(run(), first)
    assert not decoded
    next(tmp_path.glob("evaluation/reconstructions_*/0000005_5.npz")).unlink()
    np.testing.assert_array_equal(run(), first)
    assert sum(decoded) == 5
    # Each image has the same drawn codes in any batch; other weights give other codes.
    pipeline.experiment = pipeline.experiment.change({"sample.batch_size": 3})
    next(tmp_path.glob("evaluation/reconstructions_*/0000000_5.npz")).unlink()
    np.testing.assert_array_equal(run(), first)
    assert len(run(limit=3)) == 3 and sum(decoded) == 3
    pipeline.autoencoder_params = {"brighter": np.ones(1)}
    run()
    assert sum(decoded) == 12


@pytest.mark.parametrize("bottleneck", ["binary", "vq"])
def test_a_workdir_without_a_prior(tiny_config, tmp_path, bottleneck):
    tiny_config.autoencoder.bottleneck = bottleneck
    tiny_config.evaluate.classifier_images = 8
    experiment = resolve(tiny_config).with_classes(10)
    params = jax.jit(experiment.autoencoder.init)(jax.random.key(0))
    pipeline = BinaryLatentDiffusion(experiment, params)
    values, protocol = quality.measure(pipeline, tmp_path, ["rfid", "rkid"], num=30)
    names = {"rfd_classifier", "rkd_classifier"}
    drawn = {f"{name}_drawn" for name in names} if bottleneck == "binary" else set()
    assert set(values) == names | drawn
    # Computed directly, from the same images.
    images, _ = load_images(open_split(experiment.data, "test"), 30)
    network = quality.network(experiment, tmp_path)
    rebuilt = to_uint8(pipeline.reconstruct(to_float(images)))
    x, y = (network.apply(z, 20)["pool"] for z in (images, rebuilt))
    expected = frechet_distance(*(Statistics.of(z).gaussian for z in (x, y)))
    assert values["rfd_classifier"] == pytest.approx(expected, rel=1e-3)
    expected, _ = kernel_distance(y, x, 1, 30)
    assert values["rkd_classifier"] == pytest.approx(expected, rel=1e-3)
    if drawn:
        assert values["rfd_classifier_drawn"] != values["rfd_classifier"]
    told = protocol["reconstructions"]
    assert told["count"] == 30 and told["spread evenly over"] == 500
    assert told["size"] == "28x28x1" and protocol["quantised"] == "uint8"
    (path,) = (tmp_path / "evaluation").glob("*.json")
    assert json.loads(path.read_text())["metrics"] == values


@pytest.mark.parametrize(
    ("accuracy", "labels", "judges"),
    [
        (0.55, [0, 1] * 50, False),
        (0.64, [0, 1] * 50, False),
        (0.66, [0, 1] * 50, True),  # 3 sqrt(0.5 * 0.5 / 100) = 0.15
        (0.92, [0] * 90 + [1] * 10, False),  # 3 sqrt(0.9 * 0.1 / 100) = 0.09
        (1.0, [0] * 90 + [1] * 10, True),
        (1.0, [0], False),
    ],
)
def test_a_classifier_near_chance_does_not_judge(tiny_experiment, accuracy, labels, judges):
    told = near_chance(tiny_experiment.evaluate, accuracy, np.array(labels))
    assert (told is None) == judges
    if accuracy == 0.55:
        assert "accuracy on 100 real images is 55.0%" in told
        assert "most frequent class gives 50.0% ± 5.0%" in told


def test_what_to_do_about_a_classifier_near_chance_names_what_is_missing(tiny_experiment, tmp_path):
    path = tmp_path / "effnet.npz"

    def told(name, weights=""):
        values = {"evaluate.network": name, "evaluate.weights": str(weights)}
        return near_chance(tiny_experiment.change(values).evaluate, 0.5, np.array([0, 1]))

    for name in ("classifier", "inception"):
        assert told(name).endswith("--metrics=fid with --config.evaluate.network=efficientnet.")
    missing = told("efficientnet", path)
    assert "--config.evaluate" not in missing
    assert missing.endswith(f"use --metrics=fid, which needs {path} (docs/evaluation.md).")
    path.touch()
    assert told("efficientnet", path).endswith("it cannot judge samples: use --metrics=fid.")


@pytest.mark.parametrize("accuracy", [0.1, 0.9])
def test_metrics_by_a_classifier_near_chance_warn_once(
    tiny_experiment, tmp_path, monkeypatch, caplog, accuracy
):
    experiment = tiny_experiment.change({"evaluate.num_images": 100, "sample.batch_size": 50})
    labels = load_images(open_split(experiment.data, "test"), 100)[1]

    def judged(images, batch_size):
        # The first images are classified correctly; `pixels` has as many features.
        named = (labels[: len(images)] + (np.arange(len(images)) >= 100 * accuracy)) % 10
        return pixels(images, batch_size) | {"logits": np.eye(10)[named]}

    network = Network("classifier", WIDTH, judged, {"name": "pixels"})
    monkeypatch.setattr(quality, "network", lambda *_: network)
    pipeline = SimpleNamespace(
        experiment=experiment,
        autoencoder_params={"x": np.zeros(1)},
        encode=lambda x: x,
        encode_probs=lambda x: (x + 1) / 2,
        decode=lambda codes: codes,
    )
    with caplog.at_level(logging.WARNING):
        quality.measure(pipeline, tmp_path, ["rfid"], num=20)
    assert caplog.text.count("cannot judge samples") == (accuracy < 0.5)
