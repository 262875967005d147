"""What is refused of what a user gives to the pipeline."""

from pathlib import Path
from typing import Any

import numpy as np

from binlatent.runtime.errors import UserError


def check_images(given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images as float32, (n, *shape), if they have that shape and are in [-1, 1]."""
    if np.ndim(given) != 4 or not len(given) or np.shape(given)[1:] != shape:
        raise UserError(
            f"Images must be an array (n, {', '.join(map(str, shape))}) in [-1, 1], "
            f"not of shape {np.shape(given)}."
        )
    given = np.asarray(given, np.float32)
    if not np.max(np.abs(given)) <= 1 + 1e-3:  # nor if one is NaN
        raise UserError(
            f"Images must be in [-1, 1], not from {np.min(given):g} to {np.max(given):g}; "
            "binlatent.data.transforms.to_float makes them of uint8."
        )
    return given


def check_codes(given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns codes as float32, (n, *shape), if they have that shape."""
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


def check_text_encoder(name: str, prepared: bool, workdir: Path | None) -> None:
    """Refuses prompts where the text encoder is not known.

    Args:
      name: of the encoder, "" if it is not known.
      prepared: whether the prior was trained on prepared features of texts.
      workdir: for the message.
    """
    if not name:
        flags = f"--config=configs/workdir.py:{workdir or 'DIR'} --config.texts.encoder=clip"
        flags += " --config.data.texts=False" * prepared
        raise UserError(
            f"The text encoder of this prior is not known: name it by `{flags}`, say, and its file "
            "by --config.texts.weights, or give features of a text in place of a prompt."
        )
