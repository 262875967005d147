"""From a config to modules, optimisers and keys: the only reader of its model sections."""

import functools
import json
import math
import operator
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import optax

from binlatent.diffusion import schedules
from binlatent.errors import UserError
from binlatent.models.autoencoder import Autoencoder, Decoder, Encoder
from binlatent.models.transformer import Transformer
from binlatent.stages.prior import Denoiser
from binlatent.stages.state import create_optimizer

Config = ml_collections.ConfigDict

# What fixes the meaning of a checkpoint's arrays, a stage.
_MODEL_KEYS = {
    "data": ("image_size", "channels"),
    "autoencoder": ("num_bits", "widths", "factors", "attention", "num_blocks"),
    "prior": ("width", "num_layers", "num_heads", "num_timesteps", "schedule", "evidence"),
}


def check_same_model(config: Config, trained: Config, stage: str) -> None:
    """Refuses a config that describes another model than a checkpoint's.

    Args:
      config: as given now.
      trained: as stored in the checkpoint.
      stage: "autoencoder", or "prior", which is made for one autoencoder.

    Raises:
      UserError: naming the keys that differ, with both values.
    """
    sections = ["data", "autoencoder"] + (["prior"] if stage == "prior" else [])
    keys = [(section, key) for section in sections for key in _MODEL_KEYS[section]]
    if stage == "prior":
        keys.append(("data", "num_classes"))  # the autoencoder knows no classes
    differences = [
        f"{section}.{key} is {trained[section][key]} there and {config[section][key]} here"
        for section, key in keys
        # As JSON: tuples come back from a checkpoint as lists.
        if json.dumps(config[section][key]) != json.dumps(trained[section][key])
    ]
    if differences:
        raise UserError(
            f"The config does not fit the trained {stage} in the workdir: "
            f"{'; '.join(differences)}. Use the same values, or another --workdir."
        )


_COUNTS = (
    *("log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"),
    *("autoencoder.num_bits", "autoencoder.train.batch_size", "autoencoder.train.num_steps"),
    *("prior.num_heads", "prior.num_timesteps"),
    *("prior.train.batch_size", "prior.train.num_steps"),
    *("sample.batch_size", "evaluate.num_images", "evaluate.num_samples"),
    "evaluate.classifier_images",
)


def check_ranges(config: Config) -> None:
    """Refuses a config with a number outside its range, before anything starts.

    Raises:
      UserError: naming the key.
    """
    for name in _COUNTS:
        value = functools.reduce(operator.getitem, name.split("."), config)
        if value < 1:
            raise UserError(f"config.{name} must be at least 1, not {value}.")
    shares = ("autoencoder.train.ema_decay", "prior.train.ema_decay", "prior.label_dropout")
    for name in shares:
        value = functools.reduce(operator.getitem, name.split("."), config)
        if not 0 <= value <= 1:
            raise UserError(f"config.{name} must be between 0 and 1, not {value}.")
    if config.data.image_size < 11:
        raise UserError(
            f"config.data.image_size must be at least 11, the window of SSIM, not "
            f"{config.data.image_size}."
        )
    if min(config.autoencoder.factors, default=1) < 1:
        raise UserError("config.autoencoder.factors must be at least 1 each.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed must be between 0 and 2**32 - 1, not {config.seed}.")


def key(seed: int, purpose: str) -> jax.Array:
    """Returns the key of a seed for one purpose, so that no two purposes share randomness."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def _dtype(config: Config) -> jnp.dtype:
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype must be float32 or bfloat16, not {config.dtype!r}.")
    return jnp.dtype(config.dtype)


def autoencoder(config: Config) -> Autoencoder:
    """Returns the autoencoder of `config.autoencoder` for images of `config.data`.

    Raises:
      UserError: if its levels do not fit together or do not divide the image.
    """
    section = config.autoencoder
    levels = {len(section.widths), len(section.factors), len(section.attention)}
    if len(levels) != 1:
        raise UserError(
            "config.autoencoder.widths, factors and attention must have one entry a level, "
            f"not {len(section.widths)}, {len(section.factors)} and {len(section.attention)}."
        )
    downsampling = math.prod(section.factors)
    if config.data.image_size % downsampling:
        raise UserError(
            f"config.data.image_size is {config.data.image_size}, which the downsampling of "
            f"config.autoencoder.factors, {downsampling}, does not divide."
        )
    if bad := [width for width in section.widths if width % 32]:
        raise UserError(f"config.autoencoder.widths must be multiples of 32, not {bad[0]}.")
    levels = dict(
        widths=tuple(section.widths),
        factors=tuple(section.factors),
        attention=tuple(section.attention),
        num_blocks=section.num_blocks,
        dtype=_dtype(config),
    )
    return Autoencoder(
        Encoder(num_bits=section.num_bits, **levels),
        Decoder(num_channels=config.data.channels, **levels),
    )


def code_shape(config: Config) -> tuple[int, int, int]:
    """Returns (h, w, c) of a code."""
    side = config.data.image_size // math.prod(config.autoencoder.factors)
    return side, side, config.autoencoder.num_bits


def image_shape(config: Config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of an image."""
    return config.data.image_size, config.data.image_size, config.data.channels


def denoiser(config: Config) -> Denoiser:
    """Returns the prior of `config.prior`.

    Raises:
      UserError: if its width and heads do not fit, or for an unknown schedule.
    """
    section = config.prior
    if section.width % section.num_heads or section.width % 4:
        raise UserError(
            f"config.prior.width must be a multiple of 4 and of config.prior.num_heads; "
            f"{section.width} and {section.num_heads} are not."
        )
    try:
        keep = schedules.keep_schedule(section.schedule, section.num_timesteps)
    except ValueError as error:
        raise UserError(f"config.prior: {error}.") from error
    network = Transformer(
        width=section.width,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        num_classes=config.data.num_classes,
        dtype=_dtype(config),
    )
    return Denoiser(network, tuple(keep.tolist()), section.evidence)


def init_autoencoder(config: Config, key: jax.Array) -> dict:
    """Returns fresh parameters of the autoencoder."""
    return autoencoder(config).init(key, jnp.zeros((1, *image_shape(config))))


def init_prior(config: Config, key: jax.Array) -> dict:
    """Returns fresh parameters of the prior's network."""
    return denoiser(config).network.init(
        key, jnp.zeros((1, *code_shape(config))), jnp.ones(1), jnp.zeros(1, jnp.int32)
    )


def optimizer(train: Config) -> optax.GradientTransformation:
    """Returns the optimiser of a stage's `train` section."""
    try:
        return create_optimizer(
            train.learning_rate,
            train.warmup_steps,
            train.num_steps,
            train.decay,
            train.max_grad_norm,
        )
    except ValueError as error:
        raise UserError(f"config train section: {error}.") from error
