"""Images in LMDB, in the layout of LSUN."""

import functools
import io
import os
from typing import Any, BinaryIO

from binlatent.data.images import EncodedImages
from binlatent.runtime.errors import UserError


def open_images(path: str, split: str) -> EncodedImages:
    """Opens a split: subfolder *train*lmdb/ or *val*lmdb/ of a folder, or part of one LMDB."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("data.name=lmdb needs the package lmdb: pip install lmdb") from error
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(
            f"there is no folder {path!r}: set --config.data.path=DIR to a folder with LMDB"
        )
    names = [name for name in sorted(os.listdir(path)) if name.lower().endswith("lmdb")]
    train, test = ([x for x in names if word in x.lower()] for word in ("train", "val"))
    alone = os.path.isfile(os.path.join(path, "data.mdb"))
    if not alone and not len(train) == len(test) == 1:
        raise UserError(
            f"{path!r} has neither data.mdb nor exactly one subfolder *train*lmdb and one "
            "*val*lmdb: set --config.data.path to a folder with one of these"
        )
    if not alone:
        path = os.path.join(path, *(train if split == "train" else test))
    file = os.path.join(path, "data.mdb")
    try:
        environment = _environment(path)
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(file) < size:
            # Reading beyond the end of the mapped file would crash the process.
            raise UserError(f"the LMDB {path!r} is cut short: copy all of data.mdb again")
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"cannot read the LMDB {path!r}: {error}") from error
    if alone:  # every tenth image is a test image, as in a folder
        keys = [key for i, key in enumerate(keys) if (i % 10 == 0) == (split == "test")]
    if not keys:
        raise UserError(f"the LMDB {path!r} has no images for the split {split!r}")

    def read(index: int) -> tuple[BinaryIO, str, int]:
        with environment.begin() as transaction:
            image = transaction.get(keys[index])
        return io.BytesIO(image), f"{keys[index]!r} of {path!r}", 0

    return EncodedImages(len(keys), (), read, "\n".join(map(repr, keys)), [file])


@functools.cache  # a process may not open the same LMDB twice
def _environment(path: str) -> Any:
    import lmdb

    return lmdb.open(path, readonly=True, lock=False, readahead=False)
