"""Builds stage 1 from its config, with checks: networks, losses and training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.autoencoder import adversarial, lpips, step
from binlatent.autoencoder.bottleneck import BOTTLENECKS, Binary, Bottleneck
from binlatent.autoencoder.discriminator import NORMS, Discriminator, logits_side
from binlatent.autoencoder.modules import Autoencoder, Decoder, Encoder, Levels
from binlatent.autoencoder.step import Networks, Objective
from binlatent.runtime.devices import AXIS
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.training.optimizer import Training
from binlatent.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
    """The part of the config that defines stage 1.

    Fields:
      networks: the modules; None for those that no loss needs.
      objective: the weights of the losses.
      train: batches, optimiser, EMA.
      start_step: the step at which the adversarial loss and the discriminator start.
      discriminator_rate: the discriminator's learning rate relative to the autoencoder's.
      vgg16: path of the weights for the perceptual loss.
      image_shape: (height, width, channels).
    """

    networks: Networks
    objective: Objective
    train: Training
    start_step: int
    discriminator_rate: float
    vgg16: str
    image_shape: tuple[int, int, int]

    @property
    def bottleneck(self) -> Bottleneck:
        """The module between encoder and decoder."""
        return self.networks.autoencoder.bottleneck

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a code; for "vq", c is the width of a vector."""
        side = self.image_shape[0] // downsampling(self.networks.autoencoder.encoder.levels)
        return side, side, self.bottleneck.code_width

    def check_bits(self) -> None:
        """Raises UserError if the bottleneck has no bits, which priors need."""
        if not isinstance(self.bottleneck, Binary):
            name = next(key for key, x in BOTTLENECKS.items() if isinstance(self.bottleneck, x))
            raise UserError(
                'A prior needs bits: config.autoencoder.bottleneck must be "binary", not '
                f"{name!r}. Others can only be trained with --mode=train_autoencoder."
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters of the autoencoder."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        return self.networks.autoencoder.lazy_init(key, image)

    def init_state(self, seed: int) -> TrainState:
        """Returns the state before the first step."""
        init_key, base_key = jax.random.split(key_for(seed, "autoencoder"))
        adam, discriminator = self.train.optimizer(), None
        if self.networks.discriminator:
            discriminator = step.create_discriminator_state(
                *(self.networks.discriminator, key_for(seed, "discriminator")),
                *(self.image_shape, adam),
            )
        return create_state(base_key, self.init(init_key), adam, discriminator)

    def step(self, networks: Networks) -> Callable:
        """Returns the training step, (state, batch, LPIPS's parameters) -> (state, metrics).

        Args:
          networks: of this object; without the discriminator for steps before `start_step`.
        """
        return functools.partial(
            step.train_step,
            code_shape=self.code_shape,
            networks=networks,
            objective=self.objective,
            optimizer=self.train.optimizer(),
            ema_decay=self.train.ema_decay,
            discriminator_rate=self.discriminator_rate,
            accumulate=self.train.accumulate,
        )


def downsampling(levels: Levels) -> int:
    """Returns k, the side of a token in pixels."""
    return levels.patch * 2 ** (len(levels.multipliers) - 1)


def build_autoencoder(
    bottleneck: Bottleneck,
    levels: Levels,
    image_shape: tuple[int, int, int],
    *,
    num_blocks: int,
    decoder_depth: float,
    refine_width: int,
    norm_first: bool,
) -> Autoencoder:
    """Builds an autoencoder; raises UserError if its sizes do not fit the image.

    Args:
      bottleneck, levels: parts of the autoencoder.
      image_shape: (height, width, channels).
      num_blocks: residual blocks per level of the encoder.
      decoder_depth: the decoder has int(num_blocks * decoder_depth) blocks per level.
      refine_width: of the decoder's two convolutions on pixels, 0 for none.
      norm_first: whether the decoder normalises its input.
    """
    multipliers = levels.multipliers
    if min(multipliers, default=0) < 1:
        raise UserError(
            "config.autoencoder.multipliers must have at least one entry, each at least 1, not "
            f"{multipliers}."
        )
    side, k = image_shape[0], downsampling(levels)
    if side % k:
        raise UserError(
            f"config.data.image_size, {side}, must be a multiple of the downsampling of "
            f"config.autoencoder, {k} (patch {levels.patch}, {len(multipliers)} levels)."
        )
    sides = [side // levels.patch // 2**level for level in range(len(multipliers))]
    if absent := sorted(set(levels.attention_resolutions) - set(sides)):
        raise UserError(
            f"config.autoencoder.attention_resolutions has {absent[0]}, but the levels of an "
            f"image of side {side} have the sides {', '.join(map(str, sides))}."
        )
    if levels.attention_resolutions and not num_blocks:
        raise UserError(
            "config.autoencoder.attention_resolutions needs num_blocks of at least 1, as attention "
            "follows a residual block; set it to () or num_blocks to 1."
        )
    embedding_width = bottleneck.embedding_width
    widths = [levels.base_width * multiplier for multiplier in multipliers]
    widths += [levels.base_width] + [embedding_width] * norm_first
    if bad := [width for width in widths if width % 32]:
        raise UserError(
            "config.autoencoder.base_width times each multiplier, and embedding_width with "
            f"norm_first, must be multiples of 32, the groups of a norm, not {bad[0]}."
        )
    return Autoencoder(
        Encoder(levels, num_blocks, embedding_width),
        bottleneck,
        Decoder(levels, int(num_blocks * decoder_depth), image_shape[2], refine_width, norm_first),
    )


def build_networks(
    autoencoder: Autoencoder,
    objective: Objective,
    side: int,
    dtype: Any,
    *,
    width: int,
    num_layers: int,
    norm: str,
) -> Networks:
    """Builds the modules that the losses need.

    Args:
      autoencoder, objective: of the stage.
      side: of an image, in pixels.
      dtype: of the computation.
      width, num_layers, norm: of the discriminator, see `Discriminator`.
    """
    perceptual = critic = None
    if not (objective.mse or objective.l1 or objective.perceptual):
        raise UserError(
            "config.autoencoder.loss: at least one of mse, l1 and perceptual must be above 0, to "
            "compare the reconstruction with the image."
        )
    if objective.perceptual:
        if side < lpips.MIN_SIZE:
            raise UserError(
                f"config.autoencoder.loss.perceptual needs images of side {lpips.MIN_SIZE} or "
                f"more, not {side}: set it to 0."
            )
        perceptual = lpips.LPIPS(dtype)
    if objective.adversarial:
        if norm not in NORMS:
            raise UserError(
                f"config.autoencoder.discriminator.norm must be {' or '.join(NORMS)}, not {norm!r}."
            )
        if unknown := sorted(set(objective.augment) - set(adversarial.POLICIES)):
            raise UserError(
                f"config.autoencoder.discriminator.augment knows "
                f"{' and '.join(adversarial.POLICIES)}, not {unknown[0]!r}."
            )
        if logits_side(side, num_layers) < 1:
            raise UserError(
                f"An image of side {side} is too small for config.autoencoder.discriminator."
                f"num_layers = {num_layers}: use fewer layers, or set loss.adversarial to 0."
            )
        critic = Discriminator(width, num_layers, norm, AXIS, dtype)
    return Networks(autoencoder, critic, perceptual)
