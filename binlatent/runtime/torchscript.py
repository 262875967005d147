"""The tensors of a TorchScript archive, read without PyTorch and without running its code."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "LongStorage": "<i8", "IntStorage": "<i4"}


def read(file: str | Path | BinaryIO) -> dict[str, np.ndarray] | None:
    """Returns the tensors of a TorchScript archive by their names, `layers.conv.weight`.

    None of any other file. An open one is left where it was, for who reads it next.

    Raises:
      Exception: of many types, if it is damaged.
    """
    if isinstance(file, str | Path):
        return _read(file)
    place = file.tell()
    try:
        return _read(file)
    finally:
        file.seek(place)


def _read(file: str | Path | BinaryIO) -> dict[str, np.ndarray] | None:
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        parts = [name.rpartition("/") for name in archive.namelist()]
        folders = [folder for folder, _, name in parts if name == "constants.pkl"]
        if not folders:
            return None
        with archive.open(f"{folders[0]}/data.pkl") as stream:
            module = _Unpickler(stream, archive, f"{folders[0]}/data").load()
    tensors: dict[str, np.ndarray] = {}
    _collect(module, "", tensors)
    return tensors


class _Module:
    """Any class of the archive: what is left of it are its attributes."""


def _collect(module: _Module, prefix: str, tensors: dict[str, np.ndarray]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, np.ndarray):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or end > storage.size:
        raise ValueError("a tensor lies outside its storage")
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, archive: zipfile.ZipFile, data: str):
        super().__init__(stream)
        self._archive, self._data = archive, data

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_Module", (_Module,), {})
        if module == "torch" and name in _TYPES:
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
            **{("torch.jit._pickle", f"build_{x}list"): list for x in ("int", "double", "bool")},
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, kind, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._data}/{key}"), _TYPES[kind])
