"""Reading PyTorch's files, and converting VGG16."""

import pickle
import sys

import drawn
import numpy as np
import pytest

from binlatent import convert, weights
from binlatent.errors import UserError


@pytest.fixture(scope="module")
def state():
    return drawn.vgg16_state()


def test_kernels_are_transposed_and_keep_their_order(state):
    arrays = convert.vgg16(state)
    assert arrays.keys() == weights.vgg16_shapes().keys()
    for ours, index in (("conv1_1", 0), ("conv2_1", 5), ("conv3_3", 14), ("conv5_3", 28)):
        theirs = state[f"features.{index}.weight"]
        kernel = arrays[f"{ours}/kernel"]
        assert kernel.dtype == np.float32 and kernel.shape[:2] == (3, 3)
        assert kernel[0, 2, 1, 7] == theirs[7, 1, 0, 2]  # row, column, in, out
        np.testing.assert_array_equal(arrays[f"{ours}/bias"], state[f"features.{index}.bias"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features.2.weight": None}, r"it lacks features\.2\.weight"),
        ({"features.30.bias": np.zeros(512)}, r"it also holds features\.30\.bias"),
        (
            {"features.0.weight": np.zeros((64, 1, 3, 3))},
            r"the shape of features\.0\.weight is \(64, 1, 3, 3\)",
        ),
        ({"features.5.bias": np.zeros((128, 1))}, r"features\.5\.bias is \(128, 1\)"),
    ],
)
def test_another_network_is_refused_by_its_key(state, change, message):
    changed = {name: x for name, x in {**state, **change}.items() if x is not None}
    with pytest.raises(UserError, match=rf"not torchvision's VGG16.*: .*{message}\."):
        convert.vgg16(changed)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise OSError("disk full")

    path = tmp_path / "folder" / "x.npz"
    weights.write(path, {"a/b": np.arange(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        weights.write(path, {"a/b": np.arange(9), "c": Broken()})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_command_writes_what_read_vgg16_reads(state, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "read_state_dict", lambda path: state)
    path = tmp_path / "new" / "vgg16.npz"
    convert.main(["vgg16", "--from", "vgg16.pth", "--out", str(path)])
    assert capsys.readouterr().err == f"Wrote {path}\n"
    params = weights.read_vgg16(path)["params"]
    np.testing.assert_array_equal(params["conv5_3"]["bias"], state["features.28.bias"])


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        convert.main([str(arg) for arg in argv])
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_the_command_reports_what_a_user_got_wrong(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "vgg16.pth", tmp_path / "vgg16.npz"
    error = fails(capsys, "vgg16", "--from", source, "--out", tmp_path / "vgg16")
    assert error.startswith("Error: --out must end in .npz, not '") and error.count("\n") == 1
    error = fails(capsys, "vgg16", "--from", source, "--out", out)
    assert error == f"Error: There is no file '{source}': check --from.\n"
    source.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    error = fails(capsys, "vgg16", "--from", source, "--out", out)
    assert error.startswith("Error: This command") and "`pip install torch`" in error
    with pytest.raises(SystemExit) as exit_:
        convert.main([])
    assert exit_.value.code == 2
    assert not out.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_is_read_from_both_formats(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    kernel = torch.nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2))
    state = {"half": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3), "k": kernel}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    arrays = convert.read_state_dict(path)
    assert {name: (x.dtype, x.shape) for name, x in arrays.items()} == {
        "half": (np.float32, (2,)),
        "count": (np.int64, ()),
        "k": (np.float32, (2, 3, 2, 2)),
    }
    np.testing.assert_array_equal(arrays["k"], np.arange(24).reshape(2, 3, 2, 2))


class Malicious:
    """Unpickling it, which must not happen, creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_runs_code_is_refused_and_does_not_run_it(tmp_path):
    torch = pytest.importorskip("torch")
    path, proof = tmp_path / "x.pth", tmp_path / "ran"
    state = {"a": torch.zeros(1), "b": Malicious(proof)}
    for save in (
        lambda: path.write_bytes(pickle.dumps(state["b"], protocol=2)),
        lambda: torch.save(state, path),
        lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
    ):
        save()
        with pytest.raises(UserError, match=r"x\.pth is no checkpoint that can be read safely"):
            convert.read_state_dict(path)
    assert not proof.exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=not legacy)
        good = path.read_bytes()
        for data in (b"", b"hello", good[:30], good[:-50]):
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"x\.pth is no checkpoint .* damaged"):
                convert.read_state_dict(path)


@pytest.mark.parametrize(
    "content, message",
    [([1], "holds no state dict"), ({"epoch": 3}, "holds 'epoch', which is no tensor")],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        convert.read_state_dict(tmp_path / "x.pth")


def test_the_whole_path_from_a_checkpoint(state, tmp_path):
    torch = pytest.importorskip("torch")
    source, out = tmp_path / "vgg16.pth", tmp_path / "vgg16.npz"
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    torch.save(tensors, source, _use_new_zipfile_serialization=False)
    convert.main(["vgg16", "--from", str(source), "--out", str(out)])
    kernel = weights.read_vgg16(out)["params"]["conv4_2"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state["features.19.weight"])
