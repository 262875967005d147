"""Commands that convert feature networks."""

import sys

import drawn
import numpy as np
import pytest
from flax import traverse_util

from binlatent.autoencoder import lpips
from binlatent.convert import __main__ as convert
from binlatent.convert import published
from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime import state_dicts


@pytest.fixture(scope="module")
def state():
    return drawn.vgg16_state()


def test_the_command_writes_what_read_vgg16_reads(state, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state_dicts, "read", lambda path: state)
    path = tmp_path / "new" / "vgg16.npz"
    convert.main(["vgg16", "--from", "vgg16.pth", "--out", str(path)])
    assert capsys.readouterr().err == f"Wrote {path}\n"
    params = lpips.read_vgg16(path)["params"]
    np.testing.assert_array_equal(params["conv5_3"]["bias"], state["features.28.bias"])


@pytest.mark.parametrize("network", ["inception", "efficientnet_lite0"])
def test_the_command_writes_variables_with_statistics(network, tmp_path, monkeypatch):
    monkeypatch.setattr(state_dicts, "read", lambda path: drawn.state(network))
    path = tmp_path / "x.npz"
    convert.main([network, "--from", "x.pth", "--out", str(path)])
    variables = getattr(published_weights, f"read_{network}")(path)
    arrays = getattr(published, network)(drawn.state(network))
    assert variables.keys() == {"params", "batch_stats"}
    flat = traverse_util.flatten_dict(variables, sep="/")
    assert flat.keys() == arrays.keys()
    assert all(np.array_equal(flat[name], arrays[name]) for name in arrays)


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        convert.main([str(arg) for arg in argv])
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_the_command_reports_mistakes_of_users(tmp_path, monkeypatch, capsys):
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


def test_the_whole_path_from_a_checkpoint(state, tmp_path):
    torch = pytest.importorskip("torch")
    source, out = tmp_path / "vgg16.pth", tmp_path / "vgg16.npz"
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    torch.save(tensors, source, _use_new_zipfile_serialization=False)
    convert.main(["vgg16", "--from", str(source), "--out", str(out)])
    kernel = lpips.read_vgg16(out)["params"]["conv4_2"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state["features.19.weight"])
