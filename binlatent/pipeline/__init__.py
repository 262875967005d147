"""`BinaryLatentDiffusion`: a trained autoencoder and prior, and what users do with them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder import bottleneck, programs
from binlatent.data.masks import known_tokens
from binlatent.experiment import Experiment
from binlatent.pipeline import checks
from binlatent.pipeline.checks import check_codes, check_images, check_num, check_text_encoder
from binlatent.pipeline.loading import load_stage
from binlatent.priors import step
from binlatent.priors.conditions import Condition
from binlatent.priors.prior import Known, optional
from binlatent.priors.prompts import make_condition
from binlatent.priors.settings import with_options
from binlatent.runtime import command, paths
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import Key, as_key, sample_keys
from binlatent.runtime.weights import fingerprint
from binlatent.texts.encoder import TextEncoder
from binlatent.training.checkpoint import exists

Array = jax.Array


class BinaryLatentDiffusion:
    """A binary autoencoder and, once trained, the prior over its codes.

    Images are NumPy float32 (n, height, width, channels) in [-1, 1]; codes are float32 in {0, 1},
    (n, h, w, c). Methods work in batches of `config.sample.batch_size`, spread over the devices.
    """

    def __init__(
        self,
        experiment: Experiment,
        autoencoder_params: Any,
        prior_params: Any = None,
        workdir: Path | None = None,
    ):
        """Wraps parameters that fit the experiment; `prior_params` is None before stage 2."""
        self.experiment = experiment
        self.workdir = workdir  # may hold the text encoder
        self.autoencoder_params = replicate(autoencoder_params)
        self._prior_params = replicate(prior_params)
        self._autoencoder = experiment.autoencoder.networks.autoencoder
        self._prior = experiment.prior.prior

    @classmethod
    def from_workdir(
        cls, workdir: str | Path, experiment: Experiment | None = None, *, prior: bool = True
    ) -> "BinaryLatentDiffusion":
        """Loads the EMA weights of the newest whole checkpoints in a workdir.

        Args:
          workdir: of a training run. Without a prior, only methods on images and codes work.
          experiment: to use instead of the checkpoint's; its model must be the same.
          prior: whether to load the prior.
        """
        workdir = Path(paths.expand(str(workdir), "workdir"))
        command.prepare_jax()
        pipeline = cls(*load_stage(workdir, "autoencoder", experiment), workdir=workdir)
        if not prior or not exists(workdir, "prior"):
            return pipeline
        used, prior_params = load_stage(workdir, "prior", experiment, pipeline.encoder_fingerprint)
        return cls(used, pipeline.autoencoder_params, prior_params, workdir)

    @property
    def has_prior(self) -> bool:
        """Whether stage 2 is trained."""
        return self._prior_params is not None

    @property
    def prior_params(self) -> Any:
        """The parameters of the prior; raises a UserError without a prior."""
        if not self.has_prior:
            raise UserError(
                "This workdir has no prior yet: train one with `python -m binlatent.main "
                "--config=CONFIG --workdir=DIR --mode=train_prior`."
            )
        return self._prior_params

    @property
    def num_classes(self) -> int:
        """The number of classes of the prior, 0 without classes."""
        conditioning = self.experiment.prior.conditioning
        return conditioning.num_classes if conditioning.kind == "class" else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes by number; the numbers themselves if they have no names."""
        names = self.experiment.prior.conditioning.names
        return names or tuple(map(str, range(self.num_classes)))

    @property
    def encoder_fingerprint(self) -> str:
        """A hash of the encoder's weights; a prior fits one encoder only."""
        params = self.autoencoder_params["params"]
        return fingerprint([params["encoder"], params["bottleneck"]])

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code."""
        return self.experiment.autoencoder.code_shape

    def _map(self, function: Callable, *arrays: Any) -> Any:
        return map_batches(function, self.experiment.sample.batch_size, *arrays)

    # Images and codes

    def encode_probs(self, images: np.ndarray) -> np.ndarray:
        """Returns y, the Bernoulli parameters of the images' bits, (n, h, w, c) in [0, 1].

        If the bottleneck is deterministic, they are the bits themselves.
        """
        self.experiment.autoencoder.check_bits()
        encode = functools.partial(
            programs.encode_probs, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, check_images(images, self.experiment.data.image_shape))

    def encode(
        self, images: np.ndarray, mode: str = "deterministic", key: Key | None = None
    ) -> np.ndarray:
        """Returns the codes of images, as `decode` takes them.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mode: "deterministic" for y > 0.5, "sample" to draw from B(y), "soft" for y itself. The
            bottlenecks "vq" and "real" have "deterministic" only.
          key: a seed or a typed PRNG key, for "sample".
        """
        if mode not in ("deterministic", "sample", "soft"):
            raise UserError(f'mode must be "deterministic", "sample" or "soft"; got {mode!r}.')
        if mode == "sample" and key is None:
            raise UserError('encode(mode="sample") needs a key: a seed, or jax.random.key(seed).')
        if mode == "deterministic":
            return self.encode_with_aux(images)[0]
        probs = self.encode_probs(images)
        uniform = None if key is None else jax.random.uniform(as_key(key), probs.shape)
        return np.asarray(bottleneck.binarize(probs, mode, uniform))

    def encode_with_aux(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the deterministic codes and the auxiliary outputs of the bottleneck.

        The outputs are `probs` for "binary", `indices` for "vq", and none for "real"; see
        `binlatent.autoencoder.bottleneck`.
        """
        encode = functools.partial(
            programs.encode_codes, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, check_images(images, self.experiment.data.image_shape))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the decoded images of codes."""
        decode = functools.partial(
            programs.decode_codes, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(decode, check_codes(codes, self.code_shape))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encodes images deterministically and decodes the codes."""
        return self.decode(self.encode(images))

    # The prior

    def settings(self, options: dict[str, Any]) -> Any:
        """Returns the sampler's settings, with options replaced; an option of None is ignored."""
        checks.check_guided(self.experiment.prior.conditioning.kind, options)
        return with_options(self._prior, self.experiment.sample.settings, options)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder of the prior's captions and prompts."""
        texts, prepared = self.experiment.texts, self.experiment.data.texts
        check_text_encoder(texts.encoder, prepared, self.workdir)
        return texts.load(self.workdir)

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Returns features of n texts, for use as labels: (n, e) or (n, m, e), float32."""
        per_token = self.experiment.prior.conditioning.kind == "text_cross"
        different = list(dict.fromkeys(texts))
        features = self.text_encoder.features(different, per_token)
        return features[[different.index(text) for text in texts]]

    def _asked(self, label: Any, num: int, options: dict[str, Any]) -> tuple[Condition | None, Any]:
        """Returns the condition of `num` samples, and the settings of the sampler."""
        prompts = {name: x for name, x in options.items() if name.endswith("prompt")}
        settings = self.settings({name: x for name, x in options.items() if name not in prompts})
        conditioning = self.experiment.prior.conditioning
        if prompts.get("negative_prompt") and not getattr(settings, "guidance", 0):
            raise UserError("A negative prompt needs a guidance above 0, for example --guidance=2.")
        condition = make_condition(conditioning, self.text_features, num, label, **prompts)
        return condition, settings

    def _draw(
        self,
        method: str,
        key: Key,
        condition: Condition | None,
        num: int,
        *arrays: Any,
        settings: Any,
        then: Callable = dict,
    ) -> Any:
        """Applies a method of the prior to batches.

        Args:
          method: name of a method of `Prior`; called with parameters, keys and condition.
          key: see `sample_codes`.
          condition: of all samples.
          num: n.
          *arrays: (n, ...) each; `then` receives them in batches.
          settings: of the sampler.
          then: maps a batch of the arrays to further keyword arguments of the method.
        """
        function, params = optional(self._prior, method), self.prior_params

        def draw(keys: Array, label: Array | None, given: Any, against: Any, *arrays: Array) -> Any:
            condition = None if label is None else Condition(label, given, against)
            return function(params, keys, condition, settings=settings, **then(*arrays))

        return self._map(draw, sample_keys(key, num), *(condition or (None,) * 3), *arrays)

    def sample_codes(self, num: int, key: Key, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new codes, float32 in {0, 1}, (num, h, w, c).

        The same key gives the same codes for every batch size, up to rounding. With a smaller
        `num` it gives the first of them.

        Args:
          num: n, at least 1.
          key: a seed; or a typed PRNG key, `jax.random.key(seed)`, or one per sample, (num,).
          label: a class by number or name, or n classes. For a prior of texts: the features of a
            text, (e,) or (m, e), or of n texts. None: no condition.
          **options: `prompt`, a text or n texts in place of a label; `negative_prompt`, a text or
            n texts that guidance leads away from; and options that replace those of the same name
            in `config.sample`: `temperature` (tau > 0; lower is less diverse), `guidance`
            (w >= 0), `steps`, and others of the kind of prior.
        """
        check_num(num)
        condition, settings = self._asked(label, num, options)
        return self._draw("sample", key, condition, num, settings=settings)

    def trajectory(self, num: int, key: Key, label: Any = None, **options: Any) -> Any:
        """Returns the intermediate states of drawing `num` codes; arguments as in `sample_codes`.

        Returns:
          `z_t`, bool (num, S + 1, h, w, c), from z_T to z_0. For a Bernoulli prior also `p_0`,
          P(z_0 = 1 | z_t), float32 (num, S, h, w, c). For an absorbing prior also `hidden`, bool,
          the shape of z_t; hidden bits of z_t have the values that the last call drew.
        """
        check_num(num)
        condition, settings = self._asked(label, num, options)
        return self._draw("trajectory", key, condition, num, settings=settings)

    def sample(self, num: int, key: Key, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new images; arguments as in `sample_codes`."""
        return self.decode(self.sample_codes(num, key, label, **options))

    def inpaint(
        self, images: np.ndarray, mask: np.ndarray, key: Key, label: Any = None, **options: Any
    ) -> np.ndarray:
        """Returns the images with the hidden pixels drawn anew (paper, Figure 8).

        A token is known if all of its pixels are known; the prior draws the other tokens given
        these. The encoder sees the mean of the known pixels in place of the hidden ones. Its
        receptive field is larger than a token, so the bits of known tokens near the hidden part
        can differ from those of the whole image.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          mask: bool (height, width) or (n, height, width), True where a pixel is kept. Mask files
            are the opposite, white where pixels are drawn; `masks.read_mask` inverts them.
          key, label: as in `sample_codes`.
          **options: as in `sample_codes`; also `known`, the noise of the known bits at t > 0, and
            `keep_pixels`, whether known pixels are returned unchanged or decoded.
        """
        images = check_images(images, self.experiment.data.image_shape)
        condition, settings = self._asked(label, len(images), options)
        mask = np.asarray(mask, bool)
        if mask.shape not in (images.shape[1:3], images.shape[:3]):
            raise UserError(
                f"The mask must have the images' height and width, {images.shape[1:3]}, "
                f"not {mask.shape}."
            )
        mask = np.broadcast_to(mask, images.shape[:3])
        known_mask = self.known_bits(mask)
        keep = mask[..., None]
        count = np.maximum(keep.sum(axis=(1, 2), keepdims=True), 1)
        mean = (images * keep).sum(axis=(1, 2), keepdims=True) / count
        codes = self.encode(np.where(keep, images, mean))
        codes = self._draw(
            *("sample", key, condition, len(images), codes, known_mask),
            settings=settings,
            then=lambda bits, mask: {"known": Known(bits, mask)},
        )
        decoded = self.decode(codes)
        return np.where(keep, images, decoded) if settings.keep_pixels else decoded

    def known_bits(self, mask: np.ndarray) -> np.ndarray:
        """Returns 1 for bits of known tokens, float32 (n, h, w, c); the mask is as in `inpaint`."""
        tokens = known_tokens(mask, self.code_shape[:2])[..., None]
        known = np.broadcast_to(tokens, (len(mask), *self.code_shape)).astype(np.float32)
        self._prior.check_known(known)
        return known

    def vary(
        self,
        images: np.ndarray,
        key: Key,
        label: Any = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> np.ndarray:
        """Returns variations of images: adds noise to their codes, or hides a part, and redraws it.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          key, label: as in `sample_codes`.
          strength: in (0, 1]: t / T, or the hidden share. Near 0 gives the image itself, 1 a new
            image.
          **options: as in `sample_codes`. For a Bernoulli prior, `steps` counts from T, and only
            those below t are made. If `times` are given, t is the first of them.
        """
        optional(self._prior, "vary")  # refuses a prior without it, before any work
        if not 0 < strength <= 1:
            raise UserError(f"The strength must be above 0 and at most 1; got {strength}.")
        condition, settings = self._asked(label, len(images), options)
        codes = self._draw(
            *("vary", key, condition, len(images), self.encode(images)),
            settings=settings,
            then=lambda bits: {"bits": bits, "strength": strength},
        )
        return self.decode(codes)

    def code_lengths(
        self,
        codes: np.ndarray,
        key: Key,
        label: Any = None,
        *,
        num_draws: int = 1,
        **options: Any,
    ) -> np.ndarray:
        """Returns -log2 p(code), or an upper bound on it, in bits per image: (n,).

        A Bernoulli prior gives the variational bound (paper, (7)), an absorbing prior the bound for
        a random order, and an autoregressive prior the exact value.

        Args:
          codes: in {0, 1}, (n, h, w, c).
          key: a seed or a typed PRNG key, for the noise that a bound averages over.
          label: as in `sample_codes`.
          num_draws: how many draws of that noise.
          **options: of the sampler whose bound is computed, such as `steps` or `times`. Without
            options, the tightest bound: over all T steps, or one unit per step.
        """
        if num_draws < 1:
            raise UserError(f"num_draws must be at least 1; got {num_draws}.")
        codes = check_codes(codes, self.code_shape)
        if not np.all((codes == 0) | (codes == 1)):
            raise UserError("Only codes of 0 and 1 have a length; got other values.")
        condition, settings = self._asked(label, len(codes), options)
        given = {name for name, value in options.items() if value is not None}
        return self._draw(
            *("code_lengths", key, condition, len(codes), codes),
            settings=settings if given - {"prompt"} else None,
            then=lambda bits: {"bits": bits, "num_draws": num_draws},
        )

    def image_metrics(
        self, probs: np.ndarray, labels: np.ndarray | None, key: Key
    ) -> dict[str, np.ndarray]:
        """Returns the prior's metrics of test images, as reported during training, (n,) each.

        Args:
          probs: the encoder's y, (n, h, w, c).
          labels: of the images, as returned by `Conditioning.known`.
          key: a seed or a typed PRNG key, for codes and noise.
        """
        key, batches = as_key(key), itertools.count()
        return self._map(
            lambda probs, labels: step.image_metrics(
                *(self.prior_params, probs, labels, jax.random.fold_in(key, next(batches))),
                prior=self._prior,
            ),
            *(probs, labels),
        )
