"""Weights of other projects' networks, as .npz files; `binlatent.convert` makes them."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from binlatent.errors import UserError
from binlatent.models.lpips import MIN_SIZE, VGG16


def vgg16_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of VGG16's parameters by name, such as `conv1_1/kernel`."""
    images = jax.ShapeDtypeStruct((1, MIN_SIZE, MIN_SIZE, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: VGG16().init(jax.random.key(0), x), images)
    return traverse_util.flatten_dict(variables["params"], sep="/")


def read_vgg16(path: str | Path) -> dict[str, Any]:
    """Returns the variables {"params": ...} of `VGG16` and of `LPIPS`, NumPy arrays, float32.

    Raises:
      UserError: if the file is missing, damaged, or of something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no file {str(path)!r} with VGG16's weights for the perceptual loss: "
            "download torchvision's https://download.pytorch.org/models/vgg16-397923af.pth and run "
            "`python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out FILE`, or train "
            "without it by --config.autoencoder.loss.perceptual=0."
        )
    return {"params": traverse_util.unflatten_dict(_read(path, "vgg16", vgg16_shapes()), sep="/")}


def _read(
    path: str | Path, model: str, like: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, which must have the names, shapes and types of `like`."""
    wrong = f"{path} is not what `python -m binlatent.convert {model}` writes: make it anew, as "
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file.items())
    except PermissionError:
        raise
    except Exception as error:  # by where the damage is
        raise UserError(f"{wrong}it is damaged or no .npz file.") from error
    if missing := sorted(like.keys() - arrays.keys()):
        raise UserError(f"{wrong}it lacks {missing[0]}.")
    if extra := sorted(arrays.keys() - like.keys()):
        raise UserError(f"{wrong}it also holds {extra[0]}.")
    for name, expected in like.items():
        found = arrays[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise UserError(
                f"{wrong}{name} is {found.dtype} {found.shape}, not "
                f"{expected.dtype} {expected.shape}."
            )
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name to an .npz file, all of it or nothing; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
