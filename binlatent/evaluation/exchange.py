"""Sets of images, and statistics of their features, in files that evaluators exchange.

- Image sets: a folder, or an .npz file in the format of ADM's evaluator: `arr_0`, uint8 (n, h, w,
  3), and optionally `arr_1`, labels.
- Statistics: .npz files in the format of ADM and pytorch-fid: `mu` and `sigma` of FID's features,
  optionally `mu_s` and `sigma_s` of sFID's. The package adds `count`, `features`, `logits` and
  `protocol`, which other tools ignore.
- Caches of torch-fidelity: .pt files of features or of `mu` and `sigma`; they need PyTorch.
"""

import contextlib
import json
import math
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from binlatent.data import loader, walk
from binlatent.data.decoded import StandIns
from binlatent.data.images import UnreadableImage, read_image, read_whole
from binlatent.evaluation.metrics.feature_metrics import Gaussian, Statistics
from binlatent.evaluation.networks.features import Features
from binlatent.runtime import state_dicts, weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.files import atomic
from binlatent.runtime.strict_json import to_json

CENTRE_SQUARE = "centre square, bicubic with antialiasing where its size is another"

_GAUSSIANS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ImageSet(NamedTuple):
    """A set of images of one height and width."""

    count: int  # n
    # Batch size -> uint8 (b, h, w, 1 or 3), in order.
    batches: Callable[[int], Iterator[np.ndarray]]
    protocol: dict[str, Any]  # describes the images
    # How many of the images read so far were unreadable and were replaced by others.
    num_unreadable: Callable[[], int] = lambda: 0
    names: list[str] | None = None  # of the files in a folder, without endings


def open_set(
    path: Path,
    image_size: int | None = None,
    *,
    max_broken: float | None = None,
    key: str = "--max_broken",
    channels: int = 3,
) -> ImageSet:
    """Opens an .npz file of images, or a folder, resized to squares of `image_size` if given.

    Images that are resized get `channels`, 1 or 3; those of a folder at their own size have 3.
    `batches` refuses images of different sizes and unreadable images. In a folder a share of up to
    `max_broken` unreadable images is replaced by others; `key` names that setting in the message.
    """
    if path.is_dir():
        return _open_folder(path, image_size, max_broken, key, channels)
    if not path.is_file():
        raise UserError(f"There is no folder or .npz file {str(path)!r}.")
    if image_size is not None:
        raise UserError(f"--size is for folders: the images in {path} have one size.")
    with _opened(path) as (_, count, shape):
        pass
    protocol = _protocol(path, count, shape[:2], "none")
    return ImageSet(count, lambda batch_size: _npz_batches(path, batch_size), protocol)


def _protocol(path: Path, count: int, size: tuple[int, ...], transform: str) -> dict[str, Any]:
    size = "x".join(map(str, size))
    return {"images": str(path), "count": count, "size": size, "transform": transform}


def _open_folder(
    path: Path, image_size: int | None, max_broken: float | None, key: str, channels: int
) -> ImageSet:
    files = walk.find_images(str(path))
    count, size, transform = len(files), (image_size, image_size), CENTRE_SQUARE
    stand_ins = StandIns(count, max_broken or 0.0, key=key)

    def read(index: int, decode: Callable[[int], Any]) -> Any:
        if max_broken is not None:
            return stand_ins.read(index, decode)
        try:
            return decode(index)
        except UnreadableImage as error:
            exact = "metrics of pairs need every image"
            raise UserError(f"{error}; {exact}") from error

    def whole(index: int) -> tuple[str, np.ndarray]:
        return files[index], read_whole(files[index], repr(files[index]))

    if image_size is None:
        first, image = read(0, whole)
        size, transform = image.shape[:2], "none"

    def decode(index: int) -> np.ndarray:
        if image_size is not None:
            return read_image(files[index], image_size, channels)
        file, image = whole(index)
        if image.shape[:2] != size:
            raise UserError(
                f"The images in {path} have several sizes: {Path(first).name} is "
                f"{size[1]}x{size[0]}, {Path(file).name} {image.shape[1]}x{image.shape[0]}. Resize "
                "them to one size, or give binlatent.evaluation --size=N, for squares of N pixels."
            )
        return image

    def batches(batch_size: int) -> Iterator[np.ndarray]:
        return loader.in_order(count, lambda i: read(i, decode), batch_size)

    names = [str(Path(file).relative_to(path).with_suffix("")) for file in files]
    protocol = _protocol(path, count, size, transform)
    return ImageSet(count, batches, protocol, lambda: stand_ins.num_unreadable, names)


def _damaged(path: Path, error: Exception | str) -> UserError:
    reason = textwrap.shorten(str(error), 200)
    return UserError(
        f"{path} is not a valid .npz file of images (arr_0, uint8 (n, h, w, 3)) or of statistics "
        f"(mu and sigma): {reason}."
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int, tuple[int, int, int]]]:
    """Opens the images of an .npz file; yields a stream of bytes, their number and their shape."""
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            stream = stack.enter_context(archive.open("arr_0.npy"))
            lib, version = np.lib.format, np.lib.format.read_magic(stream)
            read = lib.read_array_header_1_0 if version == (1, 0) else lib.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except Exception as error:  # its type depends on the damage
            raise _damaged(path, error) from error
        if fortran:
            raise _damaged(path, "arr_0 is stored by columns")
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or not all(shape):
            raise _damaged(path, f"arr_0 is {dtype} {shape}")
        yield stream, shape[0], shape[1:]


def _npz_batches(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the images of an .npz file, which may be larger than memory."""
    with _opened(path) as (stream, count, shape):
        for start in range(0, count, batch_size):
            n = min(batch_size, count - start)
            try:
                pixels = np.frombuffer(stream.read(n * math.prod(shape)), np.uint8)
                batch = pixels.reshape(n, *shape)
            except Exception as error:
                raise _damaged(path, f"the file ends after {start} images, {error}") from error
            yield batch


def write_batch(path: Path, parts: Sequence[np.ndarray], labels: np.ndarray | None) -> None:
    """Writes images, uint8 (m, h, w, c), given in parts; greyscale is expanded to RGB."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:3], 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic(path) as unfinished, zipfile.ZipFile(unfinished, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                stream.write(np.broadcast_to(part, (len(part), *shape[1:])).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as stream:
                np.lib.format.write_array(stream, np.asarray(labels, np.int64))


def holds_statistics(path: Path) -> bool:
    """Returns whether a file holds statistics or features, possibly with images."""
    return path.suffix == ".pt" or "mu.npy" in _names(path)


def holds_images(path: Path) -> bool:
    """Returns whether a path is a folder or an .npz file of images, possibly with statistics."""
    return path.is_dir() or "arr_0.npy" in _names(path)


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def read_arrays(path: Path, anew: str) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file; `anew` tells what happens after it is deleted."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(file.items())
    except Exception as error:  # its type depends on the damage
        raise UserError(f"{path} is damaged: delete it, and {anew}.") from error


def read_statistics(path: Path) -> tuple[Features, dict[str, Any]]:
    """Reads features or statistics, and their protocol, from any file described above."""
    if path.suffix == ".pt":
        content = state_dicts.read_cache(path)
        if isinstance(content, dict):
            return Features(0, {"pool": _gaussian(path, content, "mu", "sigma")}), {}
        try:
            found = Statistics.of(content)
        except ValueError as error:
            raise _damaged(path, error) from error
        return Features(found.count, {"pool": found.gaussian}, content), {}
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = [name for name in file.files if name not in ("arr_0", "arr_1")]
            arrays = {name: file[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"There is no file {str(path)!r}.") from None
    except Exception as error:  # its type depends on the damage
        raise _damaged(path, error) from error
    gaussians = {}
    for name, (mean, covariance) in _GAUSSIANS.items():
        if name == "pool" or mean in arrays:
            gaussians[name] = _gaussian(path, arrays, mean, covariance)
    try:
        protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
        count = int(arrays.get("count", 0))
    except (TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    pool, logits = arrays.get("features"), arrays.get("logits")
    for name, array in (("features", pool), ("logits", logits)):
        if array is not None and (array.dtype.kind != "f" or array.ndim != 2):
            raise _damaged(path, f"{name} is {array.dtype} {array.shape}")
    if pool is not None and pool.shape[1] != gaussians["pool"].mean.size:
        raise _damaged(
            path,
            f"features has the shape {pool.shape}, mu has {gaussians['pool'].mean.size} entries",
        )
    return Features(count, gaussians, pool, logits), protocol


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Gaussian:
    if mean not in arrays or covariance not in arrays:
        raise _damaged(path, f"it lacks {mean} or {covariance}")
    for key in (mean, covariance):
        if arrays[key].dtype.kind not in "fiu":
            raise _damaged(path, f"{key} is {arrays[key].dtype}")
    m, s = (np.asarray(arrays[key], np.float64) for key in (mean, covariance))
    if m.ndim != 1 or s.shape != (m.size, m.size) or not m.size:
        raise _damaged(path, f"{mean} and {covariance} have the shapes {m.shape, s.shape}")
    if not (np.isfinite(m).all() and np.isfinite(s).all()):
        raise _damaged(path, f"{mean} or {covariance} is not finite")
    if not np.allclose(s, s.T, rtol=1e-3, atol=1e-6):
        raise _damaged(path, f"{covariance} is not symmetric")
    if np.any(np.diag(s) < 0):
        raise _damaged(path, f"{covariance} has negative variances")
    return Gaussian(m, s)


def write_statistics(path: Path, features: Features, protocol: dict[str, Any]) -> None:
    """Writes features and protocol; a .pt file for torch-fidelity has `mu` and `sigma` only."""
    if path.suffix == ".pt":
        path.parent.mkdir(parents=True, exist_ok=True)
        state_dicts.write_cache(path, *features.gaussians["pool"])
        return
    arrays = {"count": np.array(features.count), "protocol": np.array(to_json(protocol))}
    for name, gaussian in features.gaussians.items():
        arrays |= dict(zip(_GAUSSIANS[name], gaussian, strict=True))
    optional = {"features": features.pool, "logits": features.logits}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    weights.write_npz(path, arrays)
