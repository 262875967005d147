"""The user's object: a trained autoencoder and prior, and all that is done with them."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from binlatent import build, checkpoint
from binlatent.diffusion import sampling, schedules
from binlatent.errors import UserError
from binlatent.models import bottleneck
from binlatent.models.autoencoder import Autoencoder
from binlatent.stages.prior import Denoiser

Array = jax.Array


@functools.partial(jax.jit, static_argnames="model")
def encode_probs(params: Any, images: Array, *, model: Autoencoder) -> Array:
    """Returns the encoder's y, (n, h, w, c) in [0, 1]."""
    return model.apply(params, images, method="encode")


@functools.partial(jax.jit, static_argnames="model")
def decode_codes(params: Any, codes: Array, *, model: Autoencoder) -> Array:
    """Returns the images of codes, clipped to [-1, 1]."""
    return jnp.clip(model.apply(params, codes, method="decode"), -1, 1)


@functools.partial(jax.jit, static_argnames=("denoiser", "threshold_last"))
def sample_codes(
    params: Any,
    key: Array,
    labels: Array,
    known: Array,
    known_mask: Array,
    times: Array,
    temperature: Array,
    guidance: Array,
    *,
    denoiser: Denoiser,
    threshold_last: bool,
) -> tuple[Array, Array]:
    """Draws codes from the prior; one compiled program for each number of steps.

    Args:
      params: of the prior's network.
      key: a typed PRNG key.
      labels: (n,) int; num_classes means unlabelled.
      known, known_mask: of inpainting, (n, h, w, c); see `sampling.reverse_process`.
      times: (S + 1,) int, from T to 0.
      temperature, guidance: scalars.
      denoiser, threshold_last: static.

    Returns:
      Codes (n, h, w, c) and the trajectory (S + 1, n, h, w, c).
    """
    num_classes = denoiser.network.num_classes

    def denoise(z_t, t, labels):
        return denoiser.flip_logit(params, z_t, jnp.full(len(z_t), t), labels)

    conditional = functools.partial(denoise, labels=labels)
    unconditional = functools.partial(denoise, labels=jnp.full_like(labels, num_classes))
    return sampling.reverse_process(
        key,
        sampling.with_guidance(conditional, unconditional, guidance)
        if num_classes
        else conditional,
        known.shape,
        times=times,
        keep=jnp.asarray(denoiser.keep, jnp.float32),
        temperature=temperature,
        known=known,
        known_mask=known_mask,
        threshold_last=threshold_last,
    )


def map_batches(function: Callable, batch_size: int, *arrays: np.ndarray) -> np.ndarray:
    """Applies `function` to batches of equal size along the first axis and joins the results.

    The last batch is filled up with its last entry, so that one compiled program serves all.
    """
    n = len(arrays[0])
    batch_size = min(batch_size, n)
    results = []
    for start in range(0, n, batch_size):
        take = np.minimum(np.arange(start, start + batch_size), n - 1)
        results.append(jax.device_get(function(*[array[take] for array in arrays])))
    return np.concatenate(results)[:n]


class BinaryLatentDiffusion:
    """A binary autoencoder and, once trained, the prior over its codes.

    Images are NumPy float32 (n, height, width, channels) in [-1, 1]; codes are float32 in {0, 1},
    (n, h, w, c). Everything runs in batches of `config.sample.batch_size`.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, autoencoder_params: Any, prior_params: Any = None
    ):
        """Wraps parameters that fit `config`; `prior_params` is None before stage 2."""
        self.config = config
        self.autoencoder_params = autoencoder_params
        self.prior_params = prior_params
        self._autoencoder = build.autoencoder(config)
        self._denoiser = build.denoiser(config)

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        config: ml_collections.ConfigDict | None = None,
        *,
        prior: bool = True,
    ) -> "BinaryLatentDiffusion":
        """Loads the EMA weights of the newest checkpoints in a workdir.

        Args:
          workdir: of a training run. The prior may be missing; nothing can be sampled then.
          config: to use instead of the one in the checkpoint; of the same model.
          prior: whether to load the prior.

        Raises:
          UserError: if the folder or the autoencoder's checkpoint is not there, if `config`
            describes another model, or if the prior belongs to another autoencoder.
        """
        workdir = Path(workdir)
        if not workdir.is_dir():
            raise UserError(f"There is no workdir {workdir}: train one, or check --workdir.")

        def load(stage, init):
            with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
                trained = checkpoints.config()
                used = copy.deepcopy(trained if config is None else config)
                if used.data.num_classes == -1:
                    used.data.num_classes = trained.data.num_classes
                build.check_ranges(used)
                build.check_same_model(used, trained, stage)
                like = jax.eval_shape(functools.partial(init, used), jax.random.key(0))
                return used, checkpoints.restore_ema(like)

        pipeline = cls(*load("autoencoder", build.init_autoencoder))
        if not prior or not checkpoint.exists(workdir, "prior"):
            return pipeline
        with checkpoint.Checkpoints.open(workdir, "prior") as checkpoints:
            checkpoints.check_encoder(pipeline.encoder_fingerprint)
        used, prior_params = load("prior", build.init_prior)
        return cls(used, pipeline.autoencoder_params, prior_params)

    @property
    def num_classes(self) -> int:
        """Classes that the prior can be asked for, 0 if it is unconditional."""
        return self.config.data.num_classes

    @property
    def encoder_fingerprint(self) -> str:
        """Tells the encoder's weights, which a prior belongs to, from others."""
        return checkpoint.fingerprint(self.autoencoder_params["params"]["encoder"])

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return build.code_shape(self.config)

    def _map(self, function: Callable, *arrays: np.ndarray) -> np.ndarray:
        return map_batches(function, self.config.sample.batch_size, *arrays)

    def encode_probs(self, images: np.ndarray) -> np.ndarray:
        """Returns y, the Bernoulli parameters of the images' bits, (n, h, w, c) in [0, 1].

        Raises:
          UserError: if the images are not of the shape that the autoencoder was trained on.
        """
        expected = build.image_shape(self.config)
        if np.ndim(images) != 4 or not len(images) or np.shape(images)[1:] != expected:
            raise UserError(
                f"Images must be an array (n, {', '.join(map(str, expected))}) in [-1, 1], "
                f"not of shape {np.shape(images)}."
            )
        encode = functools.partial(encode_probs, self.autoencoder_params, model=self._autoencoder)
        return self._map(encode, np.asarray(images, np.float32))

    def encode(
        self, images: np.ndarray, mode: str = "deterministic", key: Array | None = None
    ) -> np.ndarray:
        """Returns the images' codes.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mode: "deterministic" for y > 0.5, "sample" to draw from B(y), "soft" for y itself.
          key: a typed PRNG key, for "sample".
        """
        if mode == "sample" and key is None:
            raise UserError('encode(mode="sample") needs a key, jax.random.key(seed).')
        probs = self.encode_probs(images)
        uniform = None if key is None else jax.random.uniform(key, probs.shape)
        return np.asarray(bottleneck.binarize(probs, mode, uniform))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the images of codes.

        Raises:
          UserError: if the codes are not (n, h, w, c) of the autoencoder.
        """
        if np.ndim(codes) != 4 or not len(codes) or np.shape(codes)[1:] != self.code_shape:
            raise UserError(
                f"Codes must be an array (n, {', '.join(map(str, self.code_shape))}) in {{0, 1}}, "
                f"not of shape {np.shape(codes)}."
            )
        decode = functools.partial(decode_codes, self.autoencoder_params, model=self._autoencoder)
        return self._map(decode, np.asarray(codes, np.float32))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Returns the decoded deterministic codes of images."""
        return self.decode(self.encode(images))

    def _labels(self, label: Any, num: int) -> np.ndarray:
        """Returns (num,) labels; None means unlabelled."""
        if label is None:
            return np.full(num, self.num_classes, np.int32)
        if not self.num_classes:
            raise UserError("This prior is unconditional, so it takes no label.")
        if np.shape(label) not in ((), (num,)) or np.any(np.asarray(label) % 1):
            raise UserError(f"Labels must be one integer or {num} of them; got {label}.")
        labels = np.broadcast_to(np.asarray(label, np.int32), num)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(
                f"A label must be between 0 and {self.num_classes - 1}; "
                f"got {labels.min() if labels.min() < 0 else labels.max()}."
            )
        return labels

    def _sample_states(
        self,
        key: Array,
        label: Any,
        known: np.ndarray,
        known_mask: np.ndarray,
        steps: int | None,
        temperature: float | None,
        guidance: float | None,
    ) -> np.ndarray:
        """Returns the trajectories, bool (n, S + 1, h, w, c), from z_T to z_0."""
        defaults = self.config.sample
        steps = defaults.steps if steps is None else steps
        temperature = defaults.temperature if temperature is None else temperature
        guidance = defaults.guidance if guidance is None else guidance
        if self.prior_params is None:
            raise UserError("This workdir has no prior yet: run --mode=train_prior first.")
        if not 0 < temperature < math.inf:
            raise UserError(f"The temperature must be above 0 and finite; got {temperature}.")
        if not 0 <= guidance < math.inf:
            raise UserError(f"The guidance must not be negative nor infinite; got {guidance}.")
        try:
            times = schedules.visited_times(steps, self._denoiser.num_timesteps)
        except ValueError as error:
            raise UserError(f"{error}.") from error
        batches = iter(range(len(known)))

        def draw(labels, known, known_mask):
            _, states = sample_codes(
                self.prior_params,
                jax.random.fold_in(key, next(batches)),
                labels,
                known,
                known_mask,
                times,
                float(temperature),  # an integer would compile another program
                float(guidance),
                denoiser=self._denoiser,
                threshold_last=defaults.threshold_last,
            )
            return states.swapaxes(0, 1)

        return self._map(draw, self._labels(label, len(known)), known, known_mask)

    def trajectory(
        self,
        num: int,
        key: Array,
        label: Any = None,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Returns the codes along the way, z_T to z_0: bool (n, S + 1, h, w, c).

        Args:
          num: n, at least 1.
          key: a typed PRNG key, `jax.random.key(seed)`.
          label: a class, or n of them; None for no class.
          steps: S, between 1 and the T of training.
          temperature: tau > 0; less is less diverse.
          guidance: w >= 0.
          The last three default to `config.sample`.

        Raises:
          UserError: for a value outside these ranges, or without a prior.
        """
        if num < 1:
            raise UserError(f"The number of samples must be at least 1; got {num}.")
        nothing = np.zeros((num, *self.code_shape), np.float32)
        return self._sample_states(key, label, nothing, nothing, steps, temperature, guidance)

    def sample(self, num: int, key: Array, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new images; arguments as of `trajectory`."""
        return self.decode(self.trajectory(num, key, label, **options)[:, -1])

    def inpaint(
        self,
        images: np.ndarray,
        mask: np.ndarray,
        key: Array,
        label: Any = None,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Returns the images with what the mask hides drawn anew (paper, Figure 8).

        A token is kept if all of its pixels are; the others are drawn from the prior given those.
        The encoder sees each image's mean in place of the hidden pixels, and the pixels under the
        mask are in the result as they were.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mask: bool (height, width) or (n, height, width), True where a pixel is to be kept.
          key, label, steps, temperature, guidance: as of `trajectory`.

        Raises:
          UserError: as `trajectory`, and for images or a mask of another shape.
        """
        images = np.asarray(images, np.float32)
        mask = np.asarray(mask, bool)
        if mask.shape not in (images.shape[1:3], images.shape[:3]):
            raise UserError(
                f"The mask must have the images' height and width, {images.shape[1:3]}, "
                f"not {mask.shape}."
            )
        keep = np.broadcast_to(mask, images.shape[:3])[..., None]
        count = np.maximum(keep.sum(axis=(1, 2), keepdims=True), 1)
        mean = (images * keep).sum(axis=(1, 2), keepdims=True) / count
        seen = np.where(keep, images, mean)

        n, (h, w, c) = len(images), self.code_shape
        patches = keep.reshape(n, h, images.shape[1] // h, w, images.shape[2] // w)
        known_mask = np.broadcast_to(patches.all(axis=(2, 4))[..., None], (n, h, w, c))
        states = self._sample_states(
            key,
            label,
            self.encode(seen),
            known_mask.astype(np.float32),
            steps,
            temperature,
            guidance,
        )
        return np.where(keep, images, self.decode(states[:, -1]))
