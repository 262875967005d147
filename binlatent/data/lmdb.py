"""Images in LMDB, as LSUN has them."""

import functools
import io
import os
from typing import Any, BinaryIO

from binlatent.data.images import EncodedImages
from binlatent.runtime.errors import UserError


def open_images(path: str, split: str) -> EncodedImages:
    """Opens a split: of *train*lmdb/ and *val*lmdb/ below a folder, or of one LMDB for both."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("data.name=lmdb needs the package lmdb: pip install lmdb") from error
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path!r}: give --config.data.path=DIR, one of LMDB")
    names = [name for name in sorted(os.listdir(path)) if name.lower().endswith("lmdb")]
    train, test = ([x for x in names if word in x.lower()] for word in ("train", "val"))
    alone = os.path.isfile(os.path.join(path, "data.mdb"))
    if not alone and not len(train) == len(test) == 1:
        raise UserError(
            f"{path!r} has neither data.mdb nor one subfolder *train*lmdb and one *val*lmdb: give "
            "the folder of one, or the one that holds both"
        )
    if not alone:
        path = os.path.join(path, *(train if split == "train" else test))
    file = os.path.join(path, "data.mdb")
    try:
        environment = _environment(path)
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(file) < size:
            # To read past the end of what is mapped would end the process.
            raise UserError(f"the LMDB {path!r} is cut short: bring all of data.mdb here")
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"cannot read the LMDB {path!r}: {error}") from error
    if alone:  # every tenth is for testing, as of a folder
        keys = [key for i, key in enumerate(keys) if (i % 10 == 0) == (split == "test")]
    if not keys:
        raise UserError(f"the LMDB {path!r} has no images for the split {split!r}")

    def read(index: int) -> tuple[BinaryIO, str, int]:
        with environment.begin() as transaction:
            image = transaction.get(keys[index])
        return io.BytesIO(image), f"{keys[index]!r} of {path!r}", 0

    return EncodedImages(len(keys), (), read, "\n".join(map(repr, keys)), [file])


@functools.cache  # one process may not open the same one twice
def _environment(path: str) -> Any:
    import lmdb

    return lmdb.open(path, readonly=True, lock=False, readahead=False)
