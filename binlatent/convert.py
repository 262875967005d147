"""Turns other projects' weights into ours: `python -m binlatent.convert vgg16 --from X --out Y`."""

import argparse
import logging
from pathlib import Path

import numpy as np

from binlatent import command, weights
from binlatent.errors import UserError

log = logging.getLogger("binlatent.convert")  # also as __main__

# Where the 13 convolutions are among the layers of torchvision's `features`.
_VGG16_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch checkpoint by name, floating ones as float32.

    Runs no code that the file may hold.

    Raises:
      UserError: if PyTorch or the file is missing, or the file holds anything but tensors by name.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {str(path)!r}: check --from.")
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "This command, and no other, needs PyTorch: run `pip install torch`."
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a dozen types, by how the file is damaged
        raise UserError(
            f"{path} is no checkpoint that can be read safely, as it is damaged or holds more than "
            "tensors: download it again, or save the model's state_dict() alone."
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict: save the model's state_dict() alone.")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise UserError(
                f"{path} holds {name!r}, which is no tensor: save the model's state_dict() alone."
            )
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in state.items()
    }


def vgg16(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the convolutions of torchvision's VGG16 for LPIPS.

    Args:
      state: of `torchvision.models.vgg16()`, kernels (out, in, height, width).

    Returns:
      What `weights.read_vgg16` reads, kernels (height, width, in, out).

    Raises:
      UserError: if a tensor is missing, left over or of another shape; but those of the classifier
        may be missing and are ignored.
    """
    wrong = "The checkpoint is not torchvision's VGG16, such as vgg16-397923af.pth:"
    shapes = weights.vgg16_shapes()
    layers = sorted({name.split("/")[0] for name in shapes})  # conv1_1, conv1_2, conv2_1, ...
    state = {name: x for name, x in state.items() if not name.startswith("classifier.")}
    arrays = {}
    for index, layer in zip(_VGG16_LAYERS, layers, strict=True):
        for theirs, ours, axes in (("weight", "kernel", (2, 3, 1, 0)), ("bias", "bias", (0,))):
            name = f"features.{index}.{theirs}"
            if name not in state:
                raise UserError(f"{wrong} it lacks {name}.")
            x = state.pop(name)
            shape = shapes[f"{layer}/{ours}"].shape
            if x.ndim != len(axes) or x.transpose(axes).shape != shape:
                raise UserError(f"{wrong} the shape of {name} is {x.shape}.")
            arrays[f"{layer}/{ours}"] = np.ascontiguousarray(x.transpose(axes), np.float32)
    if state:
        raise UserError(f"{wrong} it also holds {min(state)}.")
    return arrays


_CONVERSIONS = {"vgg16": vgg16}


def main(argv: list[str] | None = None) -> None:
    """Converts one file; a user's error is one sentence and exit code 1."""
    parser = argparse.ArgumentParser("binlatent.convert", description=__doc__)
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True)
    for name, conversion in _CONVERSIONS.items():
        summary = conversion.__doc__.splitlines()[0]
        model = models.add_parser(name, help=summary, description=summary)
        model.add_argument("--from", dest="source", required=True, help="PyTorch checkpoint")
        model.add_argument("--out", type=Path, required=True, help=".npz file to write")
    flags = parser.parse_args(argv)
    with command.reporting():
        if flags.out.suffix != ".npz":
            raise UserError(f"--out must end in .npz, not {str(flags.out)!r}.")
        weights.write(flags.out, _CONVERSIONS[flags.model](read_state_dict(flags.source)))
        log.info("Wrote %s", flags.out)


if __name__ == "__main__":
    main()
