"""What a config must be: checked before anything starts, and against what was trained."""

import functools
import json
import math
import numbers
import operator
import textwrap
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from binlatent import build
from binlatent.priors.bernoulli import losses, sampling, schedules
from binlatent.runtime.errors import UserError

Config = ml_collections.ConfigDict

# What fixes the meaning of a checkpoint's arrays, a stage.
_MODEL_KEYS = {
    "data": ("image_size", "channels"),
    "autoencoder": (
        *("bottleneck", "base_width", "multipliers", "patch", "num_blocks", "decoder_depth"),
        *("attention_resolutions", "embedding_width", "norm_first"),
    ),
    "prior": (
        *("width", "num_layers", "num_heads", "condition", "text_width"),
        *("num_timesteps", "continuous", "schedule", "keep", "target", "pair", "evidence"),
    ),
}
# And of config.autoencoder, a bottleneck.
_BOTTLENECK_KEYS = {
    "binary": ("num_bits", "deterministic", "signed"),
    "vq": ("codebook_size", "codebook_width"),
    "real": ("num_channels", "variational"),
}


def _check_version(config: Config, where: Any) -> None:
    """Refuses the config of a checkpoint that another version of binlatent wrote.

    Args:
      config: as stored in the checkpoint.
      where: the checkpoint is, for the message.

    Raises:
      UserError: naming a key that it does not have.
    """
    for section, keys in _MODEL_KEYS.items():
        there = config.get(section)
        there = there if isinstance(there, Config) else {}
        if missing := [key for key in keys if key not in there]:
            raise UserError(
                f"{where} was written by another version of binlatent, as its config has no "
                f"{section}.{missing[0]}: use that version, or train anew in another --workdir."
            )


def check_stored(config: Config, where: Any) -> None:
    """Refuses a checkpoint's config that describes no model: it may come from anyone.

    Args:
      config, where: its config as stored, and where it is, for messages.

    Raises:
      UserError: saying what is wrong with it.
    """
    _check_version(config, where)
    try:
        check(config)
    except Exception as error:  # also of a key that is not there, or of another type
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(
            f"The config in {where} is none of this version of binlatent: {reason}"
        ) from error


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)  # what is no JSON came from a file that someone changed


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
    own = _BOTTLENECK_KEYS[config.autoencoder.bottleneck]
    keys += [("autoencoder", key) for key in own]
    if stage == "prior":
        keys.append(("data", "num_classes"))  # the autoencoder knows no classes
    differences = [
        f"{section}.{key} is {trained[section].get(key)} there and {config[section][key]} here"
        for section, key in keys
        # As JSON: tuples come back from a checkpoint as lists.
        if _as_json(config[section][key]) != _as_json(trained[section].get(key))
    ]
    if differences:
        raise UserError(
            f"The config does not fit the trained {stage} in the workdir: "
            f"{'; '.join(differences)}. Use the same values, or another --workdir."
        )


def check_same_data(config: Config, trained: Config, stage: str) -> None:
    """Refuses a config with other data than a checkpoint's training began with.

    Args:
      config, trained, stage: as of `check_same_model`.

    Raises:
      UserError: naming the key that differs, with both values.
    """
    for name in ("name", "texts"):
        here, there = config.data[name], trained.data.get(name)
        if here != there:
            raise UserError(
                f"The {stage} in the workdir is being trained on config.data.{name} = {there!r}, "
                f"not {here!r}: use the same, or another --workdir."
            )


def check_resumable(config: Config, trained: Config, stage: str) -> None:
    """Refuses a config with which a checkpoint's training cannot go on.

    Args:
      config, trained, stage: as of `check_same_model`.

    Raises:
      UserError: naming the keys that differ, with both values.
    """
    check_same_model(config, trained, stage)
    here, there = config.autoencoder, trained.autoencoder
    if stage != "autoencoder" or not (here.loss.adversarial or there.loss.adversarial):
        return
    if not (here.loss.adversarial and there.loss.adversarial):
        raise UserError(
            "The autoencoder in the workdir was trained with config.autoencoder.loss.adversarial = "
            f"{there.loss.adversarial}, so it cannot go on with {here.loss.adversarial}: only with "
            "one above 0 does it have a discriminator. To start one late, set loss.start_step."
        )
    for name in ("width", "num_layers", "norm"):
        if here.discriminator[name] != there.discriminator[name]:
            raise UserError(
                f"config.autoencoder.discriminator.{name} was {there.discriminator[name]!r} and "
                f"cannot become {here.discriminator[name]!r}: use the same, or another --workdir."
            )


_COUNTS = (
    *("log_every", "preview_every", "checkpoint_every", "keep_checkpoints"),
    *("autoencoder.num_bits", "autoencoder.codebook_size", "autoencoder.codebook_width"),
    *("autoencoder.num_channels", "autoencoder.base_width"),
    *("autoencoder.patch", "autoencoder.embedding_width"),
    *("autoencoder.discriminator.width", "autoencoder.discriminator.num_layers"),
    *("autoencoder.train.batch_size", "autoencoder.train.num_steps"),
    "autoencoder.train.accumulate",
    *("prior.num_heads", "prior.num_timesteps", "prior.text_width"),
    *("prior.train.batch_size", "prior.train.num_steps"),
    *("sample.batch_size", "evaluate.num_images", "evaluate.num_samples"),
    *("evaluate.classifier_images", "evaluate.bound_draws"),
    *("evaluate.cas_epochs", "evaluate.cas_batch_size"),
)

# More is a slip, or someone's config that would keep the machine busy for ever.
_AT_MOST = {
    "data.image_size": 2**14,
    "autoencoder.num_blocks": 100,
    "autoencoder.decoder_depth": 100,
    "autoencoder.discriminator.num_layers": 100,
    "prior.num_layers": 200,
    "prior.num_timesteps": 1_000_000,
}

_CHOICES = {
    "data.crop": ("centre", "random"),
    "evaluate.network": ("inception", "efficientnet", "classifier"),
    "evaluate.labels": ("balanced", "data"),
    "on_nonfinite": ("stop", "skip"),
}


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
    for name, most in _AT_MOST.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if value > most:
            raise UserError(f"config.{name} must be at most {most}, not {value}.")
    shares = (
        "data.max_broken",
        "autoencoder.train.ema_decay",
        "prior.train.ema_decay",
        "prior.label_dropout",
    )
    for name in shares:
        value = functools.reduce(operator.getitem, name.split("."), config)
        if not 0 <= value <= 1:
            raise UserError(f"config.{name} must be between 0 and 1, not {value}.")
    weights = [f"autoencoder.loss.{name}" for name in build.LOSS_WEIGHTS]
    for name in (
        "prior.vlb_weight",
        "prior.train.accumulate",
        "autoencoder.decoder_depth",
        "autoencoder.num_blocks",
        "evaluate.every",
        *weights,
    ):
        value = functools.reduce(operator.getitem, name.split("."), config)
        if not 0 <= value < math.inf:
            raise UserError(f"config.{name} must be at least 0, not {value}.")
    for name, choices in _CHOICES.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if value not in choices:
            shown = ", ".join(f'"{x}"' for x in choices[:-1])
            raise UserError(f'config.{name} must be {shown} or "{choices[-1]}", not {value!r}.')
    augmented = config.data.flip or config.data.crop == "random"
    if augmented and (config.prior.cache_codes or config.prior.codes):
        raise UserError(
            "Codes on disk (prior.cache_codes, prior.codes) are of images as they are: learn from "
            'the images, or set data.crop to "centre" and data.flip to False.'
        )
    if config.data.image_size < 11:
        raise UserError(
            f"config.data.image_size must be at least 11, the window of SSIM, not "
            f"{config.data.image_size}."
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed must be between 0 and 2**32 - 1, not {config.seed}.")
    build.autoencoder(config)
    build.networks(config)
    T = build.denoiser(config).num_timesteps
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


def check_bits(config: Config) -> None:
    """Refuses an autoencoder without bits, which the prior is over.

    Raises:
      UserError: for another bottleneck than "binary".
    """
    if config.autoencoder.bottleneck != "binary":
        raise UserError(
            'The prior is over bits: config.autoencoder.bottleneck must be "binary", not '
            f"{config.autoencoder.bottleneck!r}; --mode=train_autoencoder trains any."
        )
