"""Checks of single values of a config: ranges of numbers and choices of words."""

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

from binlatent.autoencoder.bottleneck import BOTTLENECKS
from binlatent.priors.dit import POSITIONS
from binlatent.priors.kinds import KINDS
from binlatent.priors.prior import NETWORKS
from binlatent.runtime import strict_json
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import MAX_SEED
from binlatent.texts.encoder import ENCODERS
from binlatent.training.optimizer import DECAYS

Content = Mapping[str, Any]  # a config as nested dictionaries

# Smallest and largest values. A larger value is a mistake, and could make a command run for ever.
_AT_LEAST_0, _AT_LEAST_1, _SHARE = (0, math.inf), (1, math.inf), (0, 1)
_RANGES = {
    "seed": (0, MAX_SEED),
    **dict.fromkeys(("log_every", "preview_every", "checkpoint_every"), _AT_LEAST_1),
    "keep_checkpoints": _AT_LEAST_1,
    "data.image_size": (11, 2**14),  # 11 is the window of SSIM
    "data.max_broken": _SHARE,
    **{
        f"autoencoder.{name}": _AT_LEAST_1
        for name in (
            *("num_bits", "codebook_size", "codebook_width", "num_channels", "base_width"),
            *("patch", "embedding_width", "discriminator.width"),
        )
    },
    "autoencoder.discriminator.num_layers": (1, 100),
    "autoencoder.discriminator.learning_rate_ratio": _AT_LEAST_0,
    "autoencoder.num_blocks": (0, 100),
    "autoencoder.refine_width": _AT_LEAST_0,
    "autoencoder.decoder_depth": (0, 100),
    **{
        f"autoencoder.loss.{name}": _AT_LEAST_0
        for name in ("mse", "l1", "perceptual", "adversarial", "r1", "entropy", "commitment", "kl")
    },
    "autoencoder.train.accumulate": _AT_LEAST_1,
    "prior.text_width": _AT_LEAST_0,
    "prior.label_dropout": _SHARE,
    "prior.network.num_layers": (0, 200),
    "prior.network.num_heads": _AT_LEAST_1,
    "prior.train.accumulate": _AT_LEAST_0,
    **{
        f"{stage}.train.{name}": limits
        for stage in ("autoencoder", "prior")
        for name, limits in (
            ("batch_size", _AT_LEAST_1),
            ("num_steps", _AT_LEAST_1),
            ("ema_decay", _SHARE),
        )
    },
    "sample.batch_size": _AT_LEAST_1,
    **{
        f"evaluate.{name}": _AT_LEAST_1
        for name in (
            *("num_images", "num_samples", "classifier_images", "bound_draws"),
            *("cas_epochs", "cas_batch_size"),
        )
    },
    "evaluate.every": _AT_LEAST_0,
}

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "data.crop": ("centre", "random"),
    "autoencoder.bottleneck": BOTTLENECKS,  # a config file may add to it
    "autoencoder.train.decay": DECAYS,
    "prior.network.name": NETWORKS,
    "prior.network.dit.positions": POSITIONS,
    "prior.train.decay": DECAYS,
    "texts.encoder": ("", *ENCODERS),
    "evaluate.network": ("inception", "efficientnet", "classifier"),
    "evaluate.labels": ("balanced", "data"),
    "on_nonfinite": ("stop", "skip"),
}


# American spellings, and those that the package uses.
_SPELLINGS = {"center": "centre", "color": "colour"}


def spell(content: dict[str, Any]) -> None:
    """Replaces American spellings in a config."""
    data, discriminator = content["data"], content["autoencoder"]["discriminator"]
    data["crop"] = _SPELLINGS.get(data["crop"], data["crop"])
    words = discriminator["augment"]
    discriminator["augment"] = tuple(_SPELLINGS.get(word, word) for word in words)


def value_of(content: Content, name: str) -> Any:
    """Returns the value of a key such as "prior.kind"; KeyError without it."""
    try:
        return functools.reduce(operator.getitem, name.split("."), content)
    except (KeyError, TypeError) as error:
        raise KeyError(name) from error


def check_values(content: Content) -> None:
    """Refuses numbers out of range and unknown choices."""
    kind = value_of(content, "prior.kind")
    if kind not in KINDS:
        raise UserError(
            f"config.prior.kind must be one of {', '.join(KINDS)}, not {kind!r}. To use your own "
            "kind, give --config with the file that registers it."
        )
    of_kind = {f"prior.{kind}.{key}": limits for key, limits in KINDS[kind].ranges.items()}
    for name, (least, most) in (_RANGES | of_kind).items():
        value = value_of(content, name)
        if not least <= value <= most or not math.isfinite(value):
            limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"config.{name} must be {limits}, not {value}.")
    for name in strict_json.not_finite(content):  # a checkpoint could not store it
        raise UserError(f"config.{name} must be finite, not infinite or NaN.")
    for name, choices in _CHOICES.items():
        value, (*others, last) = value_of(content, name), choices
        if value not in (*others, last):
            shown = ", ".join(f'"{x}"' for x in others)
            raise UserError(f'config.{name} must be {shown} or "{last}", not {value!r}.')


def check_texts(conditional: bool, prepared: bool, encoder: str) -> None:
    """Refuses texts that the prior does not use, or two sources of their features.

    Args:
      conditional: whether the prior is conditioned on texts.
      prepared: `data.texts`, whether features of texts are in files beside the images.
      encoder: `texts.encoder`, which computes them from captions.
    """
    if prepared and encoder:
        raise UserError(
            f"config.data.texts reads features of texts from files, and config.texts.encoder="
            f"{encoder} computes them from captions: set one of the two."
        )
    if (prepared or encoder) and not conditional:
        given = "config.data.texts=True" if prepared else f"config.texts.encoder={encoder}"
        raise UserError(
            f"{given} is for a prior of texts: set config.prior.condition to text_token or "
            f"text_cross, or leave out {given}."
        )
