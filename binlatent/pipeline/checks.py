"""Checks of the arguments that users give to the pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from binlatent.runtime.errors import UserError


def check_images(given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images as float32; refuses other shapes than (n, *shape) or values not in [-1, 1]."""
    if np.ndim(given) != 4 or not len(given) or np.shape(given)[1:] != shape:
        raise UserError(
            f"Images must be an array (n, {', '.join(map(str, shape))}) in [-1, 1], "
            f"not of shape {np.shape(given)}."
        )
    given = np.asarray(given, np.float32)
    if not np.max(np.abs(given)) <= 1 + 1e-3:  # also refuses NaN
        raise UserError(
            f"Images must be in [-1, 1], not from {np.min(given):g} to {np.max(given):g}; "
            "binlatent.data.transforms.to_float converts uint8 images."
        )
    return given


def check_codes(given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns codes as float32; refuses other shapes than (n, *shape)."""
    if np.ndim(given) != 4 or not len(given) or np.shape(given)[1:] != shape:
        raise UserError(
            f"Codes must be an array (n, {', '.join(map(str, shape))}), "
            f"not of shape {np.shape(given)}."
        )
    return np.asarray(given, np.float32)


def check_num(num: int) -> None:
    """Refuses a number of samples below 1."""
    if num < 1:
        raise UserError(f"The number of samples must be at least 1; got {num}.")


def check_guided(condition: str, options: Mapping[str, Any]) -> None:
    """Refuses a guidance above 0 among sampling options if the prior has no condition."""
    if condition == "none" and options.get("guidance"):
        raise UserError(
            "This prior is unconditional, so guidance has no effect: leave it out, or set it to 0."
        )


def check_text_encoder(name: str, prepared: bool, workdir: Path | None) -> None:
    """Refuses prompts if the text encoder is unknown.

    Args:
      name: of the encoder, "" if unknown.
      prepared: whether the prior was trained on prepared features of texts.
      workdir: for the message.
    """
    if not name:
        flags = f"--config=configs/workdir.py:{workdir or 'DIR'} --config.texts.encoder=clip"
        flags += " --config.data.texts=False" * prepared
        raise UserError(
            f"The text encoder of this prior is unknown: name it, for example with `{flags}`, and "
            "its file with --config.texts.weights; or give the features of a text instead of a "
            "prompt."
        )
