"""The classification accuracy score: train on samples, test on real images."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from binlatent.evaluation.networks.classifier import (
    ImageRows,
    apply_classifier,
    check_labels,
    shuffled_batches,
    to_float,
    train_classifier,
)
from binlatent.evaluation.networks.resnet import ResNet50
from binlatent.runtime import devices
from binlatent.runtime.devices import AXIS, map_batches, mean_over_devices
from binlatent.runtime.errors import UserError
from binlatent.training.optimizer import Training

Array = jax.Array

_SMALL = 64  # longest shorter side, in pixels, for which `Classifier` is trained
_LEARNING_RATE = 0.1  # for 256 images per step; proportional to the batch size
_WARMUP_EPOCHS = 5
_WEIGHT_DECAY = 1e-4
_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the area, width / height
_REFUSED = "CAS cannot be measured:"
_ATTEMPTS = 10  # to draw a crop that lies within the image


def classification_accuracy(
    samples: Sequence[np.ndarray],
    sample_labels: np.ndarray,
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    key: Array,
    *,
    num_epochs: int,
    batch_size: int,
    dtype: Any = jnp.float32,
) -> dict[str, float]:
    """Classification accuracy score: the accuracy on real images of a network trained on samples.

    With a shorter side of at most 64 pixels the network is `Classifier`, else a ResNet-50, which
    sees squares of 224 pixels in images of 256. The same key gives the same result.

    Args:
      samples, images: n images each, uint8 (h, w, c): arrays, memory-mapped files or other
        sequences. They are read batch by batch.
      sample_labels, labels: their classes, integers (n,) in [0, num_classes). Each class needs a
        sample.
      num_classes, num_epochs: of the training.
      key: draws the parameters, the order of the samples and the augmentation.
      batch_size: samples per step and images per batch, over all devices. For the ResNet-50 it is
        rounded down to a multiple of the number of devices.
      dtype: in which the ResNet-50 computes, float32 or bfloat16.

    Returns:
      `cas_top1` and `cas_top5`, top-1 and top-5 accuracy in [0, 1]. With fewer than five classes
      `cas_top5` is 1.

    References:
      Ravuri and Vinyals, "Classification accuracy score for conditional generative models", 2019;
      supplement B.2 of the binary latent diffusion paper.
    """
    sample_images, real_images = ImageRows(samples), ImageRows(images)
    sample_labels = check_labels(sample_labels, len(sample_images), num_classes)
    labels = check_labels(labels, len(real_images), num_classes)
    of_samples, of_images = sample_images.shape[1:], real_images.shape[1:]
    if of_samples != of_images:
        raise ValueError(f"samples and images must be of one shape, got {of_samples}, {of_images}.")
    missing = np.flatnonzero(np.bincount(sample_labels, minlength=num_classes) == 0)
    if len(missing):
        raise UserError(
            f"{_REFUSED} each class needs a sample to train on, but class {missing[0]} has none "
            f"({len(missing)} of {num_classes} classes have none): draw more samples."
        )
    if min(real_images.shape[1:3]) <= _SMALL:
        params = train_classifier(samples, sample_labels, num_classes, key, num_epochs, batch_size)
        logits, _ = apply_classifier(params, images, batch_size)
    else:
        model = ResNet50(num_classes, dtype=dtype, axis_name=AXIS)
        variables = train_resnet(model, samples, sample_labels, key, num_epochs, batch_size)
        logits = apply_resnet(model, variables, images, batch_size)
    return {
        "cas_top1": top_k_accuracy(logits, labels, 1),
        "cas_top5": top_k_accuracy(logits, labels, min(5, num_classes)),
    }


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the top-k accuracy; of equal logits, the first counts as larger."""
    if not np.all(np.isfinite(logits)):
        raise UserError(f"{_REFUSED} the logits are not finite, so the training diverged.")
    largest = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return float(np.mean(np.any(largest == labels[:, None], axis=-1)))


class State(NamedTuple):
    """The training state of the ResNet-50."""

    params: Any
    batch_stats: Any
    opt_state: Any


def train_resnet(
    model: ResNet50,
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    key: Array,
    num_epochs: int,
    batch_size: int,
) -> dict[str, Any]:
    """Trains a ResNet-50 on all local devices: random crops and flips, SGD, a cosine (He et al.).

    Nesterov momentum is 0.9. Weight decay is 1e-4, for convolutions and the last layer. The
    learning rate, 0.1 per 256 images, rises for five epochs, or half of the epochs if they are
    fewer than ten, and falls to 0. The model must average over `AXIS`. Images are uint8 (h, w, c),
    with sides above 32 pixels. Returns the variables, `params` and `batch_stats`, for
    `apply_resnet`.
    """
    images, labels = ImageRows(images), np.asarray(labels)
    num_devices = jax.local_device_count()
    batch_size = min(batch_size, len(images)) // num_devices * num_devices
    if batch_size < 1 or num_epochs < 1:
        raise UserError(
            f"{_REFUSED} training needs an image for each of {num_devices} devices in a batch and "
            f"num_epochs >= 1, got batches of {batch_size} and {num_epochs}."
        )
    optimizer = _optimizer(batch_size, len(images) // batch_size, num_epochs)
    size = crop_size(*images.shape[1:3])
    step = functools.partial(_train_step, model=model, optimizer=optimizer, size=size)
    step = devices.parallel(step, num_frozen=1)
    init_key, batches_key = jax.random.split(key)
    variables = jax.jit(model.init)(init_key, jnp.zeros((1, size, size, images.shape[-1])))
    state = devices.replicate(State(**variables, opt_state=optimizer.init(variables["params"])))
    batches = shuffled_batches(images, labels, batches_key, num_epochs, batch_size)
    index, metrics = np.arange(batch_size), {}
    for batch_images, batch_labels, step_key in batches:
        batch = {"image": batch_images, "label": batch_labels, "index": index}
        # Waiting batches fill the devices' memory; above 32 of them, JAX's fake CPU devices hang.
        jax.block_until_ready(metrics)
        state, metrics = step(state, devices.shard(batch), step_key)
    return {"params": state.params, "batch_stats": state.batch_stats}


def apply_resnet(
    model: ResNet50, variables: dict[str, Any], images: Sequence[np.ndarray], batch_size: int
) -> np.ndarray:
    """Returns the logits, (n, k), of the centres of images, uint8 (h, w, c), sides above 32."""
    logits = functools.partial(_logits, variables, model=model)
    return map_batches(logits, batch_size, ImageRows(images))


@functools.partial(jax.jit, static_argnames="model")
def _logits(variables: dict[str, Any], images: Array, *, model: ResNet50) -> Array:
    size = crop_size(*images.shape[1:3])
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    centre = images[:, top : top + size, left : left + size]
    return model.apply(variables, to_float(centre))


def crop_size(height: int, width: int) -> int:
    """Returns the side of the ResNet-50's input: a multiple of 32, 224 for images of 256."""
    side = min(height, width)
    return 32 * max(min(round(side * 224 / 256 / 32), side // 32), 1)


def random_crop(image: Array, key: Array, size: int) -> Array:
    """Returns a random box of an image (h, w, c) as a square, mirrored with probability 1/2.

    A box has 8% to 100% of the image's area, and its width is 3/4 to 4/3 of its height (Szegedy et
    al., "Going deeper with convolutions", 2015).
    """
    area_key, ratio_key, offset_key, flip_key = jax.random.split(key, 4)
    height_width = jnp.array(image.shape[:2], jnp.float32)
    low, high = _AREAS
    area = jax.random.uniform(area_key, (_ATTEMPTS,), minval=low, maxval=high)
    low, high = np.log(_RATIOS)
    log_ratio = jax.random.uniform(ratio_key, (_ATTEMPTS,), minval=low, maxval=high)
    sides = jnp.sqrt(area * jnp.prod(height_width))[:, None] * jnp.exp(
        0.5 * log_ratio[:, None] * jnp.array([[-1.0, 1.0]])
    )
    # The first that fits. If none fits, the first, clipped to the image.
    fits = jnp.all(sides <= height_width[None], axis=1)
    box = jnp.minimum(sides[jnp.argmax(fits)], height_width)
    offset = jax.random.uniform(offset_key, (2,)) * (height_width - box)
    scale = size / box
    shape = (size, size, image.shape[-1])
    crop = jax.image.scale_and_translate(image, shape, (0, 1), scale, -offset * scale, "linear")
    return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)


def _optimizer(batch_size: int, epoch: int, num_epochs: int) -> optax.GradientTransformation:
    num_steps = epoch * num_epochs
    warmup_steps = min(_WARMUP_EPOCHS * epoch, num_steps // 2)
    rate = _LEARNING_RATE * batch_size / 256
    training = Training(batch_size, num_steps, rate, warmup_steps, "cosine")

    def decayed(params):  # all but scales and biases (Goyal et al., 2017)
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY, decayed),
        optax.sgd(training.schedule(), 0.9, nesterov=True),
    )


def _train_step(state, batch, key, *, model, optimizer, size):
    """One step on this device's part of a batch; call under pmap over `AXIS`."""
    # Keys follow the place in the whole batch, so that results do not depend on the devices.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["index"])
    crop = functools.partial(random_crop, size=size)
    images = jax.vmap(crop)(to_float(batch["image"]), keys)
    targets = jax.nn.one_hot(batch["label"], model.num_classes)

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable="batch_stats")
        return optax.softmax_cross_entropy(logits, targets).mean(), updated["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    gradients, loss = mean_over_devices((gradients, loss))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), {"loss": loss}
