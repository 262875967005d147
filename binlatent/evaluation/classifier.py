"""Training and applying the digit classifier whose features and predictions judge samples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from binlatent.models.classifier import Classifier

_MAX_SHIFT = 2
_PEAK_LEARNING_RATE = 6e-3
_WEIGHT_DECAY = 0.05
_LABEL_SMOOTHING = 0.1

Params = dict[str, Any]


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    key: jax.Array,
    num_epochs: int = 12,
    batch_size: int = 128,
) -> Params:
    """Trains a `Classifier` with random shifts of up to two pixels; the same key, the same result.

    Args:
      images: uint8 (n, h, w, c).
      labels: Integers (n,) in [0, num_classes).
      num_classes: Number of classes.
      key: Typed PRNG key; it draws the parameters, the order of the images and the shifts.
      num_epochs: Passes over the images. Each drops the images that do not fill a last batch.
      batch_size: Images a step; with fewer images than that, all of them.

    Returns:
      The parameters, for `apply_classifier`.

    Raises:
      ValueError: If shapes, dtypes or labels are not as above.
    """
    _check_images(images)
    labels = np.asarray(labels)
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must have one entry for each image, got {labels.shape} for {len(images)}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}."
        )
    if num_epochs < 1 or batch_size < 1:
        raise ValueError(
            f"num_epochs and batch_size must be positive, got {num_epochs} and {batch_size}."
        )

    batch_size = min(batch_size, len(images))
    num_batches = len(images) // batch_size
    init_key, epochs_key = jax.random.split(key)
    params = Classifier(num_classes).lazy_init(init_key, _to_float(images[:1]))["params"]
    state = params, _optimizer(num_epochs * num_batches).init(params)
    # The loop over the steps is Python's because on CPUs XLA runs convolutions about fifteen
    # times slower inside `lax.scan`.
    for epoch in range(num_epochs):
        order_key, shifts_key = jax.random.split(jax.random.fold_in(epochs_key, epoch))
        order = np.asarray(jax.random.permutation(order_key, len(images)))
        for i in range(num_batches):
            indices = order[i * batch_size : (i + 1) * batch_size]
            state = _train_step(
                state,
                images[indices],
                labels[indices],
                jax.random.fold_in(shifts_key, i),
                num_steps=num_epochs * num_batches,
                num_classes=num_classes,
            )
    return state[0]


def apply_classifier(
    params: Params, images: np.ndarray, num_classes: int, batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts the classes of images and gives their penultimate features.

    Args:
      params: From `train_classifier`.
      images: uint8 (n, h, w, c).
      num_classes: As in training.
      batch_size: Images at a time; it changes memory and speed, not the result.

    Returns:
      The predicted classes, int32 (n,), and the features, float32 (n, d).

    Raises:
      ValueError: If the images are not uint8 (n, h, w, c) with n >= 1 or batch_size is not
        positive.
    """
    _check_images(images)
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            f"at least one image and a positive batch_size are needed, got {len(images)} images "
            f"and batch_size {batch_size}."
        )
    batch_size = min(batch_size, len(images))
    predictions, features = [], []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        # Padded to one shape, so that the last batch compiles nothing new.
        padding = [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
        logits, batch_features = _apply(params, np.pad(batch, padding), num_classes=num_classes)
        predictions.append(np.argmax(np.asarray(logits), axis=-1)[: len(batch)].astype(np.int32))
        features.append(np.asarray(batch_features)[: len(batch)])
    return np.concatenate(predictions), np.concatenate(features)


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 (n, h, w, c), got {images.dtype} of shape {images.shape}."
        )


def _to_float(images: jax.Array) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def _optimizer(num_steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=_PEAK_LEARNING_RATE,
        warmup_steps=num_steps // 10,
        decay_steps=num_steps,
    )
    return optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)


def _random_shift(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to `_MAX_SHIFT` pixels each way, repeating its edge."""
    pad = (_MAX_SHIFT, _MAX_SHIFT)
    padded = jnp.pad(images, [(0, 0), pad, pad, (0, 0)], mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * _MAX_SHIFT + 1)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


@functools.partial(jax.jit, static_argnames=("num_steps", "num_classes"), donate_argnames="state")
def _train_step(state, images, labels, key, *, num_steps, num_classes):
    """One step of AdamW on a batch; state holds the parameters and the optimizer's state."""
    params, optimizer_state = state
    batch = _to_float(_random_shift(images, key))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), _LABEL_SMOOTHING)

    def loss_fn(params):
        logits, _ = Classifier(num_classes).apply({"params": params}, batch)
        return optax.softmax_cross_entropy(logits, targets).mean()

    updates, optimizer_state = _optimizer(num_steps).update(
        jax.grad(loss_fn)(params), optimizer_state, params
    )
    return optax.apply_updates(params, updates), optimizer_state


@functools.partial(jax.jit, static_argnames="num_classes")
def _apply(params, images, *, num_classes):
    return Classifier(num_classes).apply({"params": params}, _to_float(images))
