"""From a config to modules, optimisers and keys: the only reader of its model sections."""

import functools
import json
import math
import numbers
import operator
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from binlatent.diffusion import losses, sampling, schedules, targets
from binlatent.errors import UserError
from binlatent.models.autoencoder import Autoencoder, Decoder, Encoder
from binlatent.models.transformer import Transformer
from binlatent.stages.prior import Denoiser, Objective
from binlatent.stages.state import create_optimizer

Config = ml_collections.ConfigDict

# What fixes the meaning of a checkpoint's arrays, a stage.
_MODEL_KEYS = {
    "data": ("image_size", "channels"),
    "autoencoder": ("num_bits", "widths", "factors", "attention", "num_blocks"),
    "prior": (
        *("width", "num_layers", "num_heads"),
        *("num_timesteps", "continuous", "schedule", "keep", "target", "pair", "evidence"),
    ),
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
        f"{section}.{key} is {trained[section].get(key)} there and {config[section][key]} here"
        for section, key in keys
        # As JSON: tuples come back from a checkpoint as lists.
        if json.dumps(config[section][key]) != json.dumps(trained[section].get(key))
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
    *("evaluate.classifier_images", "evaluate.bound_draws"),
)


def check(config: Config) -> None:
    """Refuses a config with a number outside its range, or parts that do not fit together.

    Called before anything starts, so that what stage 2 or a picture at the end would refuse does
    not cost the training before it.

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
    if not 0 <= config.prior.vlb_weight < math.inf:
        raise UserError(
            f"config.prior.vlb_weight must be at least 0, not {config.prior.vlb_weight}."
        )
    if config.data.image_size < 11:
        raise UserError(
            f"config.data.image_size must be at least 11, the window of SSIM, not "
            f"{config.data.image_size}."
        )
    if min(config.autoencoder.factors, default=1) < 1:
        raise UserError("config.autoencoder.factors must be at least 1 each.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed must be between 0 and 2**32 - 1, not {config.seed}.")
    autoencoder(config)
    T = denoiser(config).num_timesteps
    settings = sample_settings(config)
    try:
        times = schedules.visited_times(settings.steps, T, continuous=config.prior.continuous)
    except ValueError as error:
        raise UserError(f"config.sample.steps: {error}.") from error
    guidance_weights(settings, times, T)


def sample_settings(config: Config, options: Mapping[str, Any] | None = None) -> Config:
    """Returns `config.sample` and `times`, some replaced by a caller's options, all checked.

    Args:
      config: of the whole run.
      options: values by name; None leaves the config's.

    Raises:
      UserError: for a name that is no option, or a value outside its range.
    """
    settings = Config({**config.sample.to_dict(), "times": None})
    for name, value in (options or {}).items():
        if name not in settings or name == "batch_size":
            names = ", ".join(sorted(set(settings) - {"batch_size"}))
            raise UserError(f"There is no sampling option {name!r}; there are {names}.")
        if value is None:
            continue
        if not _fits(value, settings[name]):
            raise UserError(
                f"The sampling option {name} must be like {settings[name]!r}, not {value!r}."
            )
        with settings.ignore_type():
            settings[name] = value
    if not 0 < settings.temperature < math.inf:
        raise UserError(f"The temperature must be above 0 and finite; got {settings.temperature}.")
    if not 0 <= settings.guidance < math.inf:
        raise UserError(f"The guidance must not be negative nor infinite; got {settings.guidance}.")
    if settings.corrector_steps < 0 or not 0 <= settings.corrector_size <= 1:
        raise UserError(
            "corrector_steps must be at least 0 and corrector_size between 0 and 1; got "
            f"{settings.corrector_steps} and {settings.corrector_size}."
        )
    if settings.known not in ("kept", "noised"):
        raise UserError(f'known must be "kept" or "noised"; got {settings.known!r}.')
    if settings.pair == "trained":
        settings.pair = config.prior.pair
    if settings.pair not in losses.PAIRS:
        raise UserError(
            f'The pair must be "trained" or one of {", ".join(losses.PAIRS)}; '
            f"got {settings.pair!r}."
        )
    if settings.pair != "plain_mixture" and config.prior.target == "z_s":
        raise UserError('A prior with the target "z_s" samples with "plain_mixture" alone.')
    return settings


def _fits(value: Any, example: Any) -> bool:
    """Returns whether a value is of an example's kind; an integer is a float, a list a tuple."""
    if example is None:
        return True
    if isinstance(example, tuple):
        listed = isinstance(value, tuple | list) and len(value) == len(example)
        return listed and all(map(_fits, value, example))
    if isinstance(value, bool | np.bool_) or isinstance(example, bool):
        return isinstance(value, bool | np.bool_) and isinstance(example, bool)
    if isinstance(example, str):
        return isinstance(value, str)
    return isinstance(value, numbers.Integral if isinstance(example, int) else numbers.Real)


def guidance_weights(settings: Config, times: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Returns w at each step of a sampler; `sampling.guidance_weights` of the settings.

    Raises:
      UserError: for a shape, power or interval that is none.
    """
    try:
        return sampling.guidance_weights(
            settings.guidance,
            times,
            num_timesteps,
            shape=settings.guidance_shape,
            power=settings.guidance_power,
            interval=tuple(settings.guidance_interval),
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error


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
      UserError: if its width and heads do not fit, or for an unknown schedule, target or pair, or
        some that do not go together.
    """
    section = config.prior
    if section.width % section.num_heads or section.width % 4:
        raise UserError(
            f"config.prior.width must be a multiple of 4 and of config.prior.num_heads; "
            f"{section.width} and {section.num_heads} are not."
        )
    named = {"target": targets.TARGETS, "pair": losses.PAIRS, "time_weight": losses.TIME_WEIGHTS}
    for name, values in named.items():
        if section[name] not in values:
            raise UserError(
                f"config.prior.{name} must be one of {', '.join(values)}; got {section[name]!r}."
            )
    if section.pair == "balanced_plugin" and section.target != "flip":
        raise UserError('config.prior.pair "balanced_plugin" needs config.prior.target "flip".')
    if section.evidence and (section.target == "z_s" or section.pair != "plain_mixture"):
        raise UserError(
            'config.prior.evidence needs the target "flip" or "z_0" and the pair "plain_mixture"; '
            "set it to False."
        )
    if (section.schedule == "given") != bool(section.keep):
        raise UserError(
            'config.prior.keep, k_0 to k_T, goes with config.prior.schedule "given", and only so.'
        )
    schedule = tuple(section.keep) if section.keep else section.schedule
    try:
        schedules.keep_schedule(schedule, section.num_timesteps)
    except ValueError as error:
        raise UserError(f"config.prior: {error}.") from error
    network = Transformer(
        width=section.width,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        num_classes=config.data.num_classes,
        dtype=_dtype(config),
    )
    return Denoiser(
        network,
        schedule,
        section.num_timesteps,
        section.continuous,
        section.target,
        section.pair,
        section.evidence,
    )


def objective(config: Config) -> Objective:
    """Returns what the prior of `config.prior` is trained for."""
    section = config.prior
    return Objective(
        section.vlb_weight, section.time_weight, section.stratified, section.label_dropout
    )


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
