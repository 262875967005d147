"""Sets of images and statistics in the files that evaluators exchange."""

import numpy as np
import pytest
from PIL import Image

from binlatent.evaluation import exchange
from binlatent.evaluation.metrics.feature_metrics import Gaussian
from binlatent.evaluation.networks.features import Features
from binlatent.runtime.errors import UserError


def pictures(seed, n=5, size=(12, 16)):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def joined(images, batch_size):
    batches = list(images.batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    return np.concatenate(batches)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_folders_and_batches_hold_the_same_images(tmp_path, batch_size):
    images = pictures(0)
    folder = exchange.open_set(save(tmp_path / "images", images))
    np.savez(tmp_path / "adm.npz", arr_0=images, arr_1=np.arange(5))
    batch = exchange.open_set(tmp_path / "adm.npz")
    for found in (folder, batch):
        assert found.count == 5 and found.protocol["size"] == "12x16"
        np.testing.assert_array_equal(joined(found, batch_size), images)


def test_written_batches_are_what_numpy_reads(tmp_path):
    images = pictures(1, 7)
    parts = [images[:3], images[3:]]
    exchange.write_batch(tmp_path / "x.npz", parts, np.arange(7))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    grey = images[..., :1]
    exchange.write_batch(tmp_path / "grey.npz", [grey], None)
    with np.load(tmp_path / "grey.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.repeat(grey, 3, axis=-1))


def test_size_crops_squares(tmp_path):
    images = pictures(2, 2, (12, 20))
    found = exchange.open_set(save(tmp_path / "images", images), 12)
    np.testing.assert_array_equal(joined(found, 2), images[:, :, 4:16])
    assert "centre square" in found.protocol["transform"]


def test_statistics_come_back(tmp_path):
    random = np.random.default_rng(3)
    pool, spatial = random.normal(size=(9, 4)), random.normal(size=(9, 6))
    gaussians = {
        name: Gaussian(x.mean(axis=0), np.cov(x.T))
        for name, x in (("pool", pool), ("spatial", spatial))
    }
    path = tmp_path / "deep" / "statistics.npz"
    exchange.write_statistics(path, Features(9, gaussians, pool, None), {"images": "here"})
    with np.load(path, allow_pickle=False) as file:  # as pytorch-fid and ADM read it
        np.testing.assert_array_equal(file["mu"], gaussians["pool"].mean)
        np.testing.assert_array_equal(file["sigma_s"], gaussians["spatial"].covariance)
    found, protocol = exchange.read_statistics(path)
    assert found.count == 9 and found.logits is None and protocol == {"images": "here"}
    np.testing.assert_array_equal(found.pool, pool)
    np.testing.assert_array_equal(found.gaussians["spatial"].mean, gaussians["spatial"].mean)
    assert exchange.holds_statistics(path) and not exchange.holds_images(path)


def test_statistics_of_others(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    found, protocol = exchange.read_statistics(tmp_path / "fid.npz")
    assert (found.count, found.pool, protocol) == (0, None, {})
    assert list(found.gaussians) == ["pool"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"sigma": np.eye(4)}, "lacks mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shapes"),
        ({"mu": np.zeros(4), "sigma": np.full((4, 4), np.nan)}, "not finite"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(2)}, "lacks mu_s or sigma_s"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [-0.5, 1.0]])}, "not symmetric"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu is <U1"),
        ({"mu": np.zeros(2) * 1j, "sigma": np.eye(2)}, "mu is complex128"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "negative variances"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((3, 4))}, "mu has 2 entries"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "logits": np.zeros(3)}, "logits is float64"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "protocol": np.array("{")}, "statistics"),
    ],
)
def test_damaged_statistics(tmp_path, arrays, text):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=text):
        exchange.read_statistics(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (pictures(0).astype(np.float32), "float32"),
        (pictures(0)[..., :2], "arr_0 is uint8"),
        (pictures(0)[:0], "arr_0 is uint8"),
        (pictures(0)[0], "arr_0 is uint8"),
        (np.asfortranarray(pictures(0)), "by columns"),
    ],
)
def test_batches_of_something_else(tmp_path, array, text):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match=text):
        exchange.open_set(tmp_path / "x.npz")


def test_cut_batch(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pictures(0, 50))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[5000] ^= 255  # in the images, so that the archive's checksum is wrong
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="ends after"):
        list(exchange.open_set(tmp_path / "x.npz").batches(8))
    (tmp_path / "y.npz").write_bytes(content[:3000])
    with pytest.raises(UserError, match=r"y\.npz is not a valid \.npz file"):
        exchange.open_set(tmp_path / "y.npz")


def test_several_sizes(tmp_path):
    save(tmp_path, pictures(0))
    Image.fromarray(pictures(1, 1, (9, 9))[0]).save(tmp_path / "zoo.png")
    with pytest.raises(UserError, match=r"000\.png is 16x12, zoo\.png 9x9\. Resize them"):
        list(exchange.open_set(tmp_path).batches(2))
    assert joined(exchange.open_set(tmp_path, 8), 4).shape == (6, 8, 8, 3)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        exchange.open_set(tmp_path)
    with pytest.raises(UserError, match="no folder or"):
        exchange.open_set(tmp_path / "missing")
    save(tmp_path, pictures(0))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*bad\.png"):
        list(exchange.open_set(tmp_path).batches(2))


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("broken", [0, 3])
def test_others_stand_in_for_a_share_that_cannot_be_read(tmp_path, broken, size):
    images = pictures(3, 5, (12, 12))
    save(tmp_path, images)
    file = tmp_path / f"{broken:03}.png"
    file.unlink()
    file.symlink_to(tmp_path / "moved.png")
    found = exchange.open_set(tmp_path, size, max_broken=0.2)
    images[broken] = images[broken + 1]
    np.testing.assert_array_equal(joined(found, 2), images)
    assert found.count == 5 and found.num_unreadable() == 1
    with pytest.raises(UserError, match=r"1 of 5 images cannot .* more than KEY = 0\.1 allows"):
        list(exchange.open_set(tmp_path, size, max_broken=0.1, key="KEY").batches(2))
    exact = r"there is no image .*; metrics of pairs need every image"
    with pytest.raises(UserError, match=exact):
        list(exchange.open_set(tmp_path, size).batches(2))


def test_caches_of_torch_fidelity(tmp_path):
    torch = pytest.importorskip("torch")
    pool = np.random.default_rng(4).normal(size=(9, 4)).astype(np.float32)
    torch.save(torch.from_numpy(pool), tmp_path / "x-inception-v3-compat-features-2048.pt")
    found, _ = exchange.read_statistics(tmp_path / "x-inception-v3-compat-features-2048.pt")
    np.testing.assert_array_equal(found.pool, pool)
    np.testing.assert_allclose(found.gaussians["pool"].covariance, np.cov(pool.T.astype(float)))
    assert found.count == 9
    exchange.write_statistics(tmp_path / "stat.pt", found, {})
    theirs = torch.load(tmp_path / "stat.pt", weights_only=False)
    assert (theirs["mu"].dtype, theirs["sigma"].dtype) == (np.float32, np.float64)
    again, _ = exchange.read_statistics(tmp_path / "stat.pt")
    assert again.count == 0 and again.pool is None
    covariances = (x.gaussians["pool"].covariance for x in (again, found))
    np.testing.assert_array_equal(*covariances)


def test_other_files_of_torch_are_refused_and_not_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"mu": Hostile(), "sigma": 1}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"nothing")
    torch.save({"mean": torch.zeros(3)}, tmp_path / "z.pt")
    for name in "xyz":
        with pytest.raises(UserError, match="not a torch-fidelity cache"):
            exchange.read_statistics(tmp_path / f"{name}.pt")
    assert not (tmp_path / "touched").exists()
