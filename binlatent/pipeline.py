"""The user's object: a trained autoencoder and prior, and all that is done with them."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from binlatent import build, checks, programs
from binlatent.autoencoder import bottleneck
from binlatent.priors.bernoulli import process, sampling, schedules
from binlatent.runtime import devices, weights
from binlatent.runtime.devices import replicate
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint

Array = jax.Array


def known_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns which tokens of a code are known, bool (n, h, w): those with all pixels known.

    Args:
      mask: bool (n, height, width), True where a pixel is known.
      grid: (h, w) of the code, which divide the mask's.
    """
    n, height, width = mask.shape
    h, w = grid
    return mask.reshape(n, h, height // h, w, width // w).all(axis=(2, 4))


class BinaryLatentDiffusion:
    """A binary autoencoder and, once trained, the prior over its codes.

    Images are NumPy float32 (n, height, width, channels) in [-1, 1]; codes are float32 in {0, 1},
    (n, h, w, c). Everything runs in batches of `config.sample.batch_size`, spread over the devices.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, autoencoder_params: Any, prior_params: Any = None
    ):
        """Wraps parameters that fit `config`; `prior_params` is None before stage 2."""
        self.config = config
        self.autoencoder_params = replicate(autoencoder_params)
        self.prior_params = replicate(prior_params)
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
            describes another model, if the prior belongs to another autoencoder, or if no
            checkpoint of a stage is whole; otherwise the newest that is whole is used.
        """
        workdir = Path(workdir)
        if not workdir.is_dir():
            raise UserError(f"There is no workdir {workdir}: train one, or check --workdir.")

        def load(stage, init, encoder=None):
            def read(checkpoints):
                if encoder is not None:
                    checkpoints.check_encoder(encoder)
                trained = checkpoints.config()
                checks.check_stored(trained, workdir / stage)
                used = copy.deepcopy(trained if config is None else config)
                if used.data.num_classes == -1:
                    used.data.num_classes = trained.data.num_classes
                if config is not None:
                    checks.check(used)
                checks.check_same_model(used, trained, stage)
                like = jax.eval_shape(functools.partial(init, used), jax.random.key(0))
                return used, checkpoints.restore_ema(like)

            with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
                return checkpoints.newest(read)

        pipeline = cls(*load("autoencoder", build.init_autoencoder))
        if not prior or not checkpoint.exists(workdir, "prior"):
            return pipeline
        used, prior_params = load("prior", build.init_prior, pipeline.encoder_fingerprint)
        return cls(used, pipeline.autoencoder_params, prior_params)

    @property
    def num_classes(self) -> int:
        """Classes that the prior can be asked for, 0 if it is unconditional."""
        return self.config.data.num_classes

    @property
    def encoder_fingerprint(self) -> str:
        """Tells the weights that make the bits, which a prior belongs to, from others."""
        params = self.autoencoder_params["params"]
        return weights.fingerprint([params["encoder"], params["bottleneck"]])

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return build.code_shape(self.config)

    def _map(self, function: Callable, *arrays: Any) -> Any:
        return devices.map_batches(function, self.config.sample.batch_size, *arrays)

    def encode_probs(self, images: np.ndarray) -> np.ndarray:
        """Returns y, the Bernoulli parameters of the images' bits, (n, h, w, c) in [0, 1].

        Where the bottleneck never draws bits, they are the bits.

        Raises:
          UserError: if the images are not of the shape that the autoencoder was trained on, or the
            autoencoder has no bits.
        """
        checks.check_bits(self.config)
        encode = functools.partial(
            programs.encode_probs, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, self._check_images(images))

    def _check_images(self, images: np.ndarray) -> np.ndarray:
        """Returns images as float32, if they have the autoencoder's shape and range."""
        expected = build.image_shape(self.config)
        if np.ndim(images) != 4 or not len(images) or np.shape(images)[1:] != expected:
            raise UserError(
                f"Images must be an array (n, {', '.join(map(str, expected))}) in [-1, 1], "
                f"not of shape {np.shape(images)}."
            )
        images = np.asarray(images, np.float32)
        if not np.max(np.abs(images)) <= 1 + 1e-3:  # nor if one is NaN
            raise UserError(
                f"Images must be in [-1, 1], not from {np.min(images):g} to {np.max(images):g}; "
                "binlatent.data.transforms.to_float makes them of uint8."
            )
        return images

    def encode(
        self, images: np.ndarray, mode: str = "deterministic", key: Array | None = None
    ) -> np.ndarray:
        """Returns the images' codes; what `decode` takes.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mode: "deterministic" for y > 0.5, "sample" to draw from B(y), "soft" for y itself; the
            bottlenecks "vq" and "real" know the first alone.
          key: a typed PRNG key, for "sample".
        """
        if mode not in ("deterministic", "sample", "soft"):
            raise UserError(f'mode must be "deterministic", "sample" or "soft"; got {mode!r}.')
        if mode == "sample" and key is None:
            raise UserError('encode(mode="sample") needs a key, jax.random.key(seed).')
        if mode == "deterministic":
            return self.encode_with_aux(images)[0]
        probs = self.encode_probs(images)
        uniform = None if key is None else jax.random.uniform(key, probs.shape)
        return np.asarray(bottleneck.binarize(probs, mode, uniform))

    def encode_with_aux(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the deterministic codes, and what the bottleneck tells of each.

        That is `probs` of bits, `indices` of "vq", nothing of "real"; see
        `binlatent.models.bottleneck`.
        """
        encode = functools.partial(
            programs.encode, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, self._check_images(images))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the images of codes.

        Raises:
          UserError: if the codes are not (n, h, w, c) of the autoencoder.
        """
        decode = functools.partial(
            programs.decode_codes, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(decode, self._check_codes(codes))

    def _check_codes(self, codes: np.ndarray) -> np.ndarray:
        """Returns codes as float32, if they have the autoencoder's shape."""
        if np.ndim(codes) != 4 or not len(codes) or np.shape(codes)[1:] != self.code_shape:
            raise UserError(
                f"Codes must be an array (n, {', '.join(map(str, self.code_shape))}), "
                f"not of shape {np.shape(codes)}."
            )
        return np.asarray(codes, np.float32)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Returns the decoded deterministic codes of images."""
        return self.decode(self.encode(images))

    def _labels(self, label: Any, num: int) -> np.ndarray | None:
        """Returns the labels of `num` samples as the network takes them; None stays None."""
        if label is None:
            return None
        condition = build.condition(self.config)
        if condition == "none":
            raise UserError("This prior is unconditional, so it takes no label.")
        if condition != "class":
            return self._texts(label, num, {"text_token": 1, "text_cross": 2}[condition])
        given = np.asarray(label)
        whole = given.dtype.kind in "iuf" and not np.any(given % 1)
        if given.shape not in ((), (num,)) or not whole:
            shown = label if given.ndim == 0 else f"an array of {given.dtype} {given.shape}"
            raise UserError(
                f"This prior is asked for by classes: one integer or {num} of them, not {shown}."
            )
        labels = np.broadcast_to(np.asarray(label, np.int32), num)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(
                f"A label must be between 0 and {self.num_classes - 1}; "
                f"got {labels.min() if labels.min() < 0 else labels.max()}."
            )
        return labels

    def _texts(self, features: Any, num: int, ndim: int) -> np.ndarray:
        """Returns the features of `num` samples' texts, each an array of `ndim` dimensions."""
        features, width = np.asarray(features), self.config.prior.text_width
        one = features.ndim == ndim
        if (
            features.dtype.kind not in "fiu"
            or not (one or (features.ndim == ndim + 1 and len(features) in (1, num)))
            or features.shape[-1] != width
            or not features.size
        ):
            shape = f"({width},)" if ndim == 1 else f"(tokens, {width})"
            raise UserError(
                f"This prior is asked for by the features {shape} of a text, or {num} of them, not "
                f"by an array of {features.dtype} {features.shape}."
            )
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)
        if not np.isfinite(features).all():
            raise UserError("The features of a text must be finite.")
        return np.broadcast_to(features, (num, *features.shape[-ndim:]))

    def _times(self, steps: int, times: Any = None, start: float = 1.0) -> np.ndarray:
        """Returns the times to visit from `start` T to 0: given ones, or evenly spaced."""
        denoiser = self._denoiser
        T = denoiser.num_timesteps
        try:
            if times is not None:
                return schedules.check_times(times, T)
            even = schedules.visited_times(steps, T, continuous=denoiser.continuous)
            if start == 1:
                return even
            first = start * T if denoiser.continuous else max(round(start * T), 1)
            later = even[even < first]
            return np.concatenate([[first], later]).astype(np.float32)
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def _draw(
        self,
        key: Array,
        label: Any,
        start_probs: np.ndarray,
        times: np.ndarray,
        settings: ml_collections.ConfigDict,
        known: sampling.Known | None = None,
        return_trajectory: bool = False,
    ) -> tuple[np.ndarray, sampling.Trajectory | None]:
        """Returns codes, float32 (n, h, w, c), and what the sampler passed through."""
        if self.prior_params is None:
            raise UserError("This workdir has no prior yet: run --mode=train_prior first.")
        n, noised = len(start_probs), settings.known == "noised"
        guidance = checks.guidance_weights(settings, times, self._denoiser.num_timesteps)
        if label is None:
            guidance = np.zeros_like(guidance)  # (1 + w) a - w a is a, for half the cost

        def draw(keys, labels, start_probs, *known_parts):
            sample_codes = programs.sampler(start_probs, self._denoiser)
            codes, trajectory = sample_codes(
                self.prior_params,
                keys,
                labels,
                start_probs,
                sampling.Known(*known_parts, noised) if known_parts else None,
                times,
                guidance,
                float(settings.temperature),  # an integer would compile another program
                float(settings.corrector_size),
                denoiser=self._denoiser,
                pair=settings.pair,
                threshold_last=settings.threshold_last,
                corrector_steps=settings.corrector_steps,
                return_trajectory=return_trajectory,
            )
            # Samples first, for the batches to be joined.
            return codes, jax.tree.map(lambda x: x.swapaxes(0, 1), trajectory)

        arrays = (devices.sample_keys(key, n), self._labels(label, n), start_probs)
        return self._map(draw, *arrays, *(() if known is None else known[:2]))

    def _start(self, num: int) -> np.ndarray:
        """Returns the probabilities of the bits of z_T."""
        if num < 1:
            raise UserError(f"The number of samples must be at least 1; got {num}.")
        return np.full((num, *self.code_shape), 0.5, np.float32)

    def sample_codes(self, num: int, key: Array, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new codes, float32 in {0, 1}, (num, h, w, c).

        The same key gives the same codes, whatever the batch size (but for rounding), and a
        smaller `num` the first of them.

        Args:
          num: n, at least 1.
          key: a typed PRNG key, `jax.random.key(seed)`; or one a sample, (num,).
          label: a class, or n of them; of a prior of texts, the features of one, (e,) or (m, e), or
            of n; None for none.
          **options: in place of those in `config.sample`, whose names they have, among them
            `steps` (between 1 and the T of training), `temperature` (tau > 0; less is less
            diverse) and `guidance` (w >= 0). Besides, `times`, a list that falls to 0, in place
            of `steps`.

        Raises:
          UserError: for a value outside its range, or without a prior.
        """
        settings = checks.sample_settings(self.config, options)
        times = self._times(settings.steps, settings.times)
        return self._draw(key, label, self._start(num), times, settings)[0]

    def trajectory(
        self, num: int, key: Array, label: Any = None, **options: Any
    ) -> sampling.Trajectory:
        """Returns what the sampler passes through on its way to `num` codes.

        Arguments as of `sample_codes`.

        Returns:
          `z_t`, bool (num, S + 1, h, w, c), from z_T to z_0, and `p_0`, P(z_0 = 1 | z_t), float32
          (num, S, h, w, c).
        """
        settings = checks.sample_settings(self.config, options)
        times = self._times(settings.steps, settings.times)
        return self._draw(key, label, self._start(num), times, settings, return_trajectory=True)[1]

    def sample(self, num: int, key: Array, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new images; arguments as of `sample_codes`."""
        return self.decode(self.sample_codes(num, key, label, **options))

    def inpaint(
        self, images: np.ndarray, mask: np.ndarray, key: Array, label: Any = None, **options: Any
    ) -> np.ndarray:
        """Returns the images with what the mask hides drawn anew (paper, Figure 8).

        A token is known if all of its pixels are; the others are drawn from the prior given those.
        The encoder sees each image's mean in place of the hidden pixels. Where it looks beyond a
        token, the bits of known tokens near the hidden part are not quite those of the whole image.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mask: bool (height, width) or (n, height, width), True where a pixel is to be kept: the
            opposite of a picture that is white where it is to be drawn, which `masks.read_mask`
            reads.
          key, label: as of `sample_codes`.
          **options: as of `sample_codes`; of `config.sample`, `known` says how noisy the known
            bits are on the way, and `keep_pixels` whether the known pixels come back as they
            were or as decoded.

        Raises:
          UserError: as `sample_codes`, and for images or a mask of another shape.
        """
        settings = checks.sample_settings(self.config, options)
        images = self._check_images(images)
        mask = np.asarray(mask, bool)
        if mask.shape not in (images.shape[1:3], images.shape[:3]):
            raise UserError(
                f"The mask must have the images' height and width, {images.shape[1:3]}, "
                f"not {mask.shape}."
            )
        mask = np.broadcast_to(mask, images.shape[:3])
        keep = mask[..., None]
        count = np.maximum(keep.sum(axis=(1, 2), keepdims=True), 1)
        mean = (images * keep).sum(axis=(1, 2), keepdims=True) / count
        codes = self.encode(np.where(keep, images, mean))
        known_mask = known_tokens(mask, self.code_shape[:2])[..., None]
        known_mask = np.broadcast_to(known_mask, codes.shape).astype(np.float32)
        codes, _ = self._draw(
            key,
            label,
            self._start(len(images)),
            self._times(settings.steps, settings.times),
            settings,
            sampling.Known(codes, known_mask),
        )
        decoded = self.decode(codes)
        return np.where(keep, images, decoded) if settings.keep_pixels else decoded

    def vary(
        self,
        images: np.ndarray,
        key: Array,
        label: Any = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> np.ndarray:
        """Returns variations of images: their codes noised to a time t, and denoised.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          key, label: as of `sample_codes`.
          strength: t / T in (0, 1]: near 0 the image itself, at 1 a new one.
          **options: as of `sample_codes`; of the `steps` from T those below t are made. `times`
            start at t, whatever the strength.

        Raises:
          UserError: as `sample_codes`, and for a strength outside (0, 1].
        """
        if not 0 < strength <= 1:
            raise UserError(f"The strength must be above 0 and at most 1; got {strength}.")
        settings = checks.sample_settings(self.config, options)
        times = self._times(settings.steps, settings.times, strength)
        start = process.forward_probs(self.encode(images), self._denoiser.keep_at(times[0]))
        return self.decode(self._draw(key, label, np.asarray(start), times, settings)[0])

    def code_lengths(
        self,
        codes: np.ndarray,
        key: Array,
        label: Any = None,
        *,
        steps: int | None = None,
        times: Any = None,
        num_draws: int = 1,
    ) -> np.ndarray:
        """Returns the variational bound on -log2 p(code), in bits an image: (n,), (paper, (7)).

        Args:
          codes: in {0, 1}, (n, h, w, c).
          key: a typed PRNG key, for the noise that the bound averages over.
          label: a class, or n of them; None for no class.
          steps: of the sampler that the bound is about; all T if None.
          times: that it visits, in place of `steps`.
          num_draws: of noise a step.

        Raises:
          UserError: for codes of another shape, or values outside their ranges.
        """
        if self.prior_params is None:
            raise UserError("This workdir has no prior yet: run --mode=train_prior first.")
        if num_draws < 1:
            raise UserError(f"num_draws must be at least 1; got {num_draws}.")
        codes = self._check_codes(codes)
        if not np.all((codes == 0) | (codes == 1)):
            raise UserError("Only codes of 0 and 1 have a length; got other values.")
        times = self._times(self._denoiser.num_timesteps if steps is None else steps, times)
        bound = functools.partial(
            programs.code_lengths, self.prior_params, denoiser=self._denoiser, num_draws=num_draws
        )
        return self._map(
            lambda keys, labels, codes: bound(keys, labels, codes, times),
            *(devices.sample_keys(key, len(codes)), self._labels(label, len(codes)), codes),
        )
