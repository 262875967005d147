"""Weight files (.npz), checked when read, and fingerprints of weights."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from binlatent.runtime import files
from binlatent.runtime.errors import UserError


def shapes(model: nn.Module, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of a model's variables by name, for RGB images of side `size`."""
    return dict(_shapes(model, size))


@functools.cache
def _shapes(model: nn.Module, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return traverse_util.flatten_dict(variables, sep="/")


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(params: Any) -> str:
    """Returns a fingerprint of parameters, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8))
    return digest.hexdigest()[:16]


def digest(*content: Any) -> str:
    """Returns a fingerprint of JSON-like values, 16 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_npz(
    path: str | Path, model: str, like: dict[str, jax.ShapeDtypeStruct], optional: tuple = ()
) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, which must have the names, shapes and types of `like`.

    The arrays named in `optional` may be missing, but only all together.
    """
    command = f"python -m binlatent.convert {model} --from FILE --out FILE.npz"
    wrong = f"{path} is not a file that `{command}` wrote: create it again, as "
    arrays = load_npz(path, wrong)
    if not any(name in arrays for name in optional):
        like = {name: x for name, x in like.items() if name not in optional}
    check_arrays(arrays, like, wrong)
    return arrays


def load_npz(path: str | Path, wrong: str) -> dict[str, np.ndarray]:
    """Returns all arrays of a file; `wrong` begins the error message if it is damaged."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(file.items())
    except PermissionError:
        raise
    except Exception as error:  # of many types, depending on the damage
        raise UserError(f"{wrong}it is damaged or not an .npz file.") from error


def check_arrays(
    arrays: dict[str, np.ndarray], like: dict[str, jax.ShapeDtypeStruct], wrong: str
) -> None:
    """Raises UserError, which begins with `wrong`, if names, shapes or types differ."""
    if missing := sorted(like.keys() - arrays.keys()):
        raise UserError(f"{wrong}it lacks {missing[0]}.")
    if extra := sorted(arrays.keys() - like.keys()):
        raise UserError(f"{wrong}it also holds {extra[0]}.")
    for name, expected in like.items():
        found = arrays[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            wanted = f"{expected.dtype} {expected.shape}"
            raise UserError(f"{wrong}{name} is {found.dtype} {found.shape}, not {wanted}.")


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name to an .npz file, atomically; makes its folder."""
    with files.atomic(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)
