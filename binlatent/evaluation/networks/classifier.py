"""Trains and applies the small classifier whose features and predictions judge samples."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from binlatent.runtime.devices import map_batches
from binlatent.runtime.errors import UserError
from binlatent.runtime.progress import progress

_NUM_GROUPS = 8
_MAX_SHIFT = 2
_PEAK_LEARNING_RATE = 6e-3
_WEIGHT_DECAY = 0.05
_LABEL_SMOOTHING = 0.1

Params = dict[str, Any]


class Classifier(nn.Module):
    """Maps images (n, h, w, c), float in [-1, 1], to class logits and penultimate features.

    Three stages halve the grid. Features are maxima over the last grid, so any size and any number
    of channels work; with means, digits take more epochs to learn. `width`, a multiple of 8, is
    that of the first stage; d = 4 * width.
    """

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the logits (n, num_classes) and the features (n, d)."""
        # The first convolution has a stride, because on CPUs convolutions with few input channels
        # at full resolution are the slowest.
        x = self._stage(images, self.width, kernel_size=5)
        x = self._stage(x, 2 * self.width, kernel_size=3)
        x = x + self._stage(x, 2 * self.width, kernel_size=3, stride=1)
        x = self._stage(x, 4 * self.width, kernel_size=3)
        features = jnp.max(x, axis=(1, 2))
        return nn.Dense(self.num_classes)(features), features

    def _stage(self, x: jax.Array, channels: int, kernel_size: int, stride: int = 2) -> jax.Array:
        kernel = (kernel_size, kernel_size)
        x = nn.Conv(channels, kernel, strides=(stride, stride), use_bias=False)(x)
        return nn.silu(nn.GroupNorm(num_groups=_NUM_GROUPS)(x))


class ImageRows:
    """Images, uint8 (h, w, c), in any sequence, such as memory-mapped files; read in batches."""

    def __init__(self, images: Sequence[np.ndarray]):
        if len(images) == 0:
            raise ValueError("at least one image is needed, got none.")
        first = np.asarray(images[0])
        self.shape = (len(images), *first.shape)
        if first.ndim != 3 or first.dtype != np.uint8:
            raise ValueError(f"images must be uint8 (n, h, w, c), got {first.dtype} {self.shape}.")
        self._images = images

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images of indices (b,), (b, h, w, c)."""
        return np.stack([self._images[i] for i in indices])


def check_labels(labels: np.ndarray, num_images: int, num_classes: int) -> np.ndarray:
    """Returns labels as an array of integers (num_images,) in [0, num_classes)."""
    labels = np.asarray(labels)
    wrong = None
    if labels.shape != (num_images,):
        wrong = f"have one entry for each image, got {labels.shape} for {num_images}"
    elif not np.issubdtype(labels.dtype, np.integer):
        wrong = f"be integers, got {labels.dtype}"
    elif labels.min() < 0 or labels.max() >= num_classes:
        wrong = f"lie in [0, {num_classes}), got {labels.min()} to {labels.max()}"
    if wrong:
        raise UserError(f"The labels must {wrong}.")
    return labels


def shuffled_batches(
    images: ImageRows, labels: np.ndarray, key: jax.Array, num_epochs: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
    """Yields batches of images (b, h, w, c), labels (b,) and a key for the step.

    Each epoch draws a new order and drops the images that do not fill a batch.
    """
    num_batches = len(images) // batch_size
    with progress(num_epochs * num_batches, "steps") as shown:
        for step in range(num_epochs * num_batches):
            epoch, i = divmod(step, num_batches)
            if i == 0:
                order_key, steps_key = jax.random.split(jax.random.fold_in(key, epoch))
                order = np.asarray(jax.random.permutation(order_key, len(images)))
            indices = order[i * batch_size : (i + 1) * batch_size]
            yield images[indices], labels[indices], jax.random.fold_in(steps_key, i)
            shown.update()


def train_classifier(
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    key: jax.Array,
    num_epochs: int = 12,
    batch_size: int = 128,
) -> Params:
    """Trains a `Classifier` with random shifts of up to two pixels.

    The same key gives the same result. The images are uint8 (h, w, c), in an array or another
    sequence; labels are integers (n,) in [0, num_classes). A `batch_size` above n is reduced to n.
    Each epoch drops the images that do not fill a batch.
    """
    images = ImageRows(images)
    labels = check_labels(labels, len(images), num_classes)
    if num_epochs < 1 or batch_size < 1:
        raise ValueError(
            f"num_epochs, batch_size must be positive, got {num_epochs}, {batch_size}."
        )
    batch_size = min(batch_size, len(images))
    num_steps = num_epochs * (len(images) // batch_size)
    init_key, batches_key = jax.random.split(key)
    params = Classifier(num_classes).lazy_init(init_key, to_float(images[[0]]))["params"]
    state = params, _optimizer(num_steps).init(params)
    # A Python loop, because on CPUs XLA runs convolutions about 15 times slower in `lax.scan`.
    for batch in shuffled_batches(images, labels, batches_key, num_epochs, batch_size):
        state = _train_step(state, *batch, num_steps=num_steps, num_classes=num_classes)
    return state[0]


def apply_classifier(
    params: Params, images: Sequence[np.ndarray], batch_size: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits, float32 (n, num_classes), and penultimate features, float32 (n, d).

    The images are as in `train_classifier`; `batch_size` affects memory and speed only.
    """
    images = ImageRows(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}.")
    return map_batches(functools.partial(_apply, params), batch_size, images)


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 values to float32 in [-1, 1], on the device."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def _optimizer(num_steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _PEAK_LEARNING_RATE, warmup_steps=num_steps // 10, decay_steps=num_steps
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
    batch = to_float(_random_shift(images, key))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), _LABEL_SMOOTHING)

    def loss_fn(params):
        logits, _ = Classifier(num_classes).apply({"params": params}, batch)
        return optax.softmax_cross_entropy(logits, targets).mean()

    gradients = jax.grad(loss_fn)(params)
    updates, optimizer_state = _optimizer(num_steps).update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


@jax.jit
def _apply(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_classes = params["Dense_0"]["bias"].size
    return Classifier(num_classes).apply({"params": params}, to_float(images))
