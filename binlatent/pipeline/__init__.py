"""The user's object: a trained autoencoder and prior, and all that is done with them."""

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
from binlatent.pipeline.checks import check_codes, check_images, check_num, check_text_encoder
from binlatent.pipeline.loading import load_stage
from binlatent.priors import step
from binlatent.priors.conditions import Condition
from binlatent.priors.prior import Known, optional
from binlatent.priors.prompts import make_condition
from binlatent.priors.settings import with_options
from binlatent.runtime import paths
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import sample_keys
from binlatent.runtime.weights import fingerprint
from binlatent.texts.encoder import TextEncoder
from binlatent.training.checkpoint import exists

Array = jax.Array


class BinaryLatentDiffusion:
    """A binary autoencoder and, once trained, the prior over its codes.

    Images are NumPy float32 (n, height, width, channels) in [-1, 1]; codes are float32 in {0, 1},
    (n, h, w, c). Everything runs in batches of `config.sample.batch_size`, spread over the devices.
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
        self.workdir = workdir  # a text encoder is also looked for there
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
          workdir: of a training run. The prior may be missing; nothing can be sampled then.
          experiment: to use instead of the checkpoint's; with the same model.
          prior: whether to load the prior.
        """
        workdir = Path(paths.expand(str(workdir), "workdir"))
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
        """The prior's parameters; without a prior, a UserError."""
        if not self.has_prior:
            raise UserError(
                "This workdir has no prior yet: train it first, by `python -m binlatent.main "
                "--config=CONFIG --workdir=DIR --mode=train_prior`."
            )
        return self._prior_params

    @property
    def num_classes(self) -> int:
        """Classes that the prior can be asked for, 0 if there are none."""
        conditioning = self.experiment.prior.conditioning
        return conditioning.num_classes if conditioning.kind == "class" else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of those classes by number; digits where they have none."""
        names = self.experiment.prior.conditioning.names
        return names or tuple(map(str, range(self.num_classes)))

    @property
    def encoder_fingerprint(self) -> str:
        """Tells the weights that make the bits, which a prior belongs to, from others."""
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

        Where the bottleneck never draws bits, they are the bits.
        """
        self.experiment.autoencoder.check_bits()
        encode = functools.partial(
            programs.encode_probs, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, check_images(images, self.experiment.data.image_shape))

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
        """Returns the deterministic codes, and what the bottleneck reports about each.

        That is `probs` of bits, `indices` of "vq", nothing of "real"; see
        `binlatent.autoencoder.bottleneck`.
        """
        encode = functools.partial(
            programs.encode_codes, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(encode, check_images(images, self.experiment.data.image_shape))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the images of codes."""
        decode = functools.partial(
            programs.decode_codes, self.autoencoder_params, model=self._autoencoder
        )
        return self._map(decode, check_codes(codes, self.code_shape))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Returns the decoded deterministic codes of images."""
        return self.decode(self.encode(images))

    # The prior

    def settings(self, options: dict[str, Any]) -> Any:
        """Returns the settings of the sampler, some replaced by options; None replaces nothing."""
        return with_options(self._prior, self.experiment.sample.settings, options)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder of the prior's captions and prompts."""
        texts, prepared = self.experiment.texts, self.experiment.data.texts
        check_text_encoder(texts.encoder, prepared, self.workdir)
        return texts.load(self.workdir)

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Returns features of n texts as labels of the prior, (n, e) or (n, m, e), float32."""
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
            raise UserError("A negative prompt needs a guidance above 0: give --guidance=2, say.")
        condition = make_condition(conditioning, self.text_features, num, label, **prompts)
        return condition, settings

    def _draw(
        self,
        method: str,
        key: Array,
        condition: Condition | None,
        num: int,
        *arrays: Any,
        settings: Any,
        then: Callable = dict,
    ) -> Any:
        """Applies a method of the prior to batches.

        Args:
          method: of `Prior`, called with parameters, keys, condition and what follows.
          key: as of `sample_codes`.
          condition: of all samples.
          num: n.
          *arrays: (n, ...) each, given to `then` in batches.
          settings: of the sampler.
          then: makes further arguments of the arrays of a batch.
        """
        function, params = optional(self._prior, method), self.prior_params

        def draw(keys: Array, label: Array | None, given: Any, against: Any, *arrays: Array) -> Any:
            condition = None if label is None else Condition(label, given, against)
            return function(params, keys, condition, settings=settings, **then(*arrays))

        return self._map(draw, sample_keys(key, num), *(condition or (None,) * 3), *arrays)

    def sample_codes(self, num: int, key: Array, label: Any = None, **options: Any) -> np.ndarray:
        """Returns `num` new codes, float32 in {0, 1}, (num, h, w, c).

        The same key gives the same codes, whatever the batch size (but for rounding), and a
        smaller `num` the first of them.

        Args:
          num: n, at least 1.
          key: a typed PRNG key, `jax.random.key(seed)`; or one a sample, (num,).
          label: a class, by its number, or by its name as a string, or n of them; of a prior of
            texts, the features of one, (e,) or (m, e), or of n; None for none.
          **options: `prompt`, in place of a label, and `negative_prompt`, which guidance goes
            against, a text or n of them each; and in place of those in `config.sample`, by the
            same names, of the prior's kind: `temperature` (tau > 0; less is less diverse),
            `guidance` (w >= 0), `steps`, ...
        """
        check_num(num)
        condition, settings = self._asked(label, num, options)
        return self._draw("sample", key, condition, num, settings=settings)

    def trajectory(self, num: int, key: Array, label: Any = None, **options: Any) -> Any:
        """Returns what the sampler passes through on its way to `num` codes, as `sample_codes`.

        Returns:
          `z_t`, bool (num, S + 1, h, w, c), from z_T to z_0; of a Bernoulli prior also `p_0`,
          P(z_0 = 1 | z_t), float32 (num, S, h, w, c); of an absorbing one also `hidden`, bool as
          z_t, in which hidden bits are as the last call drew them.
        """
        check_num(num)
        condition, settings = self._asked(label, num, options)
        return self._draw("trajectory", key, condition, num, settings=settings)

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
        """Returns 1 for bits of known tokens, float32 (n, h, w, c), of a mask as of `inpaint`."""
        tokens = known_tokens(mask, self.code_shape[:2])[..., None]
        known = np.broadcast_to(tokens, (len(mask), *self.code_shape)).astype(np.float32)
        self._prior.check_known(known)
        return known

    def vary(
        self,
        images: np.ndarray,
        key: Array,
        label: Any = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> np.ndarray:
        """Returns variations of images: codes noised to t, or partly hidden, and drawn anew.

        Args:
          images: (n, height, width, channels) in [-1, 1].
          key, label: as of `sample_codes`.
          strength: in (0, 1], t / T, or the share that is hidden: near 0 the image itself, at 1 a
            new one.
          **options: as of `sample_codes`; of a Bernoulli prior's `steps` from T those below t are
            made. `times` start at t, whatever the strength.
        """
        optional(self._prior, "vary")  # before any work
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
        key: Array,
        label: Any = None,
        *,
        num_draws: int = 1,
        **options: Any,
    ) -> np.ndarray:
        """Returns -log2 p(code), or an upper bound on it, in bits per image: (n,).

        Of a Bernoulli prior, the variational bound (paper, (7)); of an absorbing one, the bound for
        a random order.

        Args:
          codes: in {0, 1}, (n, h, w, c).
          key: a typed PRNG key, for the noise that a bound averages over.
          label: a class, by number or name, or n of them; None for no class.
          num_draws: of that noise.
          **options: of the sampler that the bound is about, such as `steps` or `times`; without
            any, the tightest bound, over all T steps or one unit a step.
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
        self, probs: np.ndarray, labels: np.ndarray | None, key: Array
    ) -> dict[str, np.ndarray]:
        """Returns what is reported of test images while the prior is trained, (n,) each.

        Args:
          probs: the encoder's y, (n, h, w, c).
          labels: of the images, as of `Conditioning.known`.
          key: a typed PRNG key, for codes and noise.
        """
        batches = itertools.count()
        return self._map(
            lambda probs, labels: step.image_metrics(
                *(self.prior_params, probs, labels, jax.random.fold_in(key, next(batches))),
                prior=self._prior,
            ),
            *(probs, labels),
        )
