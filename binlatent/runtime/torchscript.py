"""Reads the tensors of PyTorch's zip files without PyTorch, and without running their code.

The files are TorchScript archives, and state dicts that `torch.save` has written.
"""

import collections
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

_TYPES = {
    **{"HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8"},
    **{"LongStorage": "<i8", "IntStorage": "<i4"},
}


def read(file: str | Path | BinaryIO) -> dict[str, np.ndarray] | None:
    """Returns the tensors of a file by name, such as `layers.conv.weight`.

    Returns None if the file is neither TorchScript nor a plain state dict; PyTorch may still read
    it. The position of an open file does not change.

    Raises:
      Exception: of many types, if the file is damaged.
    """
    if isinstance(file, str | Path):
        with open(file, "rb") as stream:
            return _read(stream)
    place = file.tell()
    try:
        return _read(file)
    finally:
        file.seek(place)


def _read(file: BinaryIO) -> dict[str, np.ndarray] | None:
    begins = file.read(4)
    if not zipfile.is_zipfile(file):
        if begins == b"PK\3\4":
            raise zipfile.BadZipFile("it is cut short")
        return None
    with zipfile.ZipFile(file) as archive:
        folders = {name.name: name.parent for name in map(PurePosixPath, archive.namelist())}
        scripted = "constants.pkl" in folders
        folder = folders.get("constants.pkl" if scripted else "data.pkl")
        big_endian = "byteorder" in folders and archive.read(f"{folder}/byteorder") != b"little"
        if folder is None or big_endian:
            return None
        try:
            with archive.open(f"{folder}/data.pkl") as stream:
                content = _Unpickler(stream, archive, f"{folder}/data").load()
        except Exception:  # of many types: the file is damaged or holds more than tensors
            if scripted:
                raise
            return None
    if not scripted:
        plain = isinstance(content, dict) and all(
            isinstance(name, str) and isinstance(x, np.ndarray) for name, x in content.items()
        )
        return dict(content) if plain else None
    tensors: dict[str, np.ndarray] = {}
    _collect(content, "", tensors)
    return tensors


class _Module:
    """Stands for any class of the archive; keeps only the attributes."""


def _collect(module: _Module, prefix: str, tensors: dict[str, np.ndarray]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, np.ndarray):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or end > storage.size:
        raise ValueError("a tensor reaches beyond its storage")
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
