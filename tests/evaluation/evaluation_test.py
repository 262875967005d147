"""`python -m binlatent.evaluation`: two sets of images, and no model."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import metrics as skimage_metrics

from binlatent.evaluation import __main__ as evaluation
from binlatent.evaluation import exchange
from binlatent.evaluation.metrics.feature_metrics import Statistics, frechet_distance
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime import weights


@pytest.fixture(scope="module")
def effnet(tmp_path_factory):
    """Weights of EfficientNet-lite0, drawn."""
    random, arrays = np.random.default_rng(0), {}
    for name, like in published_weights.efficientnet_lite0_shapes().items():
        x = random.normal(size=like.shape)
        if len(like.shape) > 1:
            x *= np.sqrt(2 / np.prod(like.shape[:-1]))
        elif name.endswith(("scale", "var")):
            x = 1 + 0.1 * np.abs(x)
        else:
            x *= 0.1
        arrays[name] = x.astype(like.dtype)
    path = tmp_path_factory.mktemp("weights") / "effnet.npz"
    weights.write_npz(path, arrays)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of pictures, a batch of the same ones brighter, and both as arrays."""
    path = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(1)
    coarse = random.integers(0, 200, (16, 4, 4, 3), np.uint8)
    real = coarse.repeat(8, axis=1).repeat(8, axis=2)
    (path / "real" / "deeper").mkdir(parents=True)
    for i, image in enumerate(real):
        Image.fromarray(image).save(path / "real" / "deeper" / f"{i:03}.png")
    generated = real + random.integers(0, 50, real.shape, np.uint8)
    np.savez(path / "generated.npz", arr_0=generated)
    return path, real, generated


def run(capsys, *flags):
    """Runs the command; returns its exit code, what it printed, and its errors."""
    code = 0
    try:
        evaluation.main(list(map(str, flags)))
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, err


def test_two_sets_their_statistics_and_the_protocol(capsys, sets, effnet, tmp_path):
    path, real, generated = sets
    network = ("--network=efficientnet", f"--weights={effnet}", "--batch_size=8")
    code, out, err = run(
        *(capsys, f"--reference={path / 'real'}", f"--images={path / 'generated.npz'}", *network),
        "--metrics=fid,pr,dc,is,psnr,ssim",
        f"--out={tmp_path / 'x.json'}",
        f"--write_statistics={tmp_path / 'real.npz'}",
    )
    assert code == 0, err
    result = json.loads((tmp_path / "x.json").read_text())
    values, protocol = result["metrics"], result["protocol"]
    judge = features.published("efficientnet", effnet)
    a, b = (Statistics.of(judge.apply(x, 8)["pool"]).gaussian for x in (real, generated))
    assert values["fd_effnet"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert "FD-EffNet" in out and "FID" not in out
    assert "There are 16 reference images and " in err and " generated images for 1280" in err
    assert values["psnr"] == pytest.approx(
        np.mean(
            [
                skimage_metrics.peak_signal_noise_ratio(*pair)
                for pair in zip(real, generated, strict=True)
            ]
        ),
        rel=1e-6,
    )
    assert len(protocol["reference"]["pixels"]) == 16  # as the features are of them
    assert protocol["reference"]["count"] == 16 and protocol["images"]["size"] == "32x32"
    assert protocol["network"]["weights"] == weights.sha256(effnet)
    # The written statistics replace the folder, so no reference images are needed.
    code, _, err = run(
        *(capsys, f"--reference={tmp_path / 'real.npz'}", f"--images={path / 'generated.npz'}"),
        *(*network, "--metrics=fid,pr", f"--out={tmp_path / 'y.json'}"),
    )
    assert code == 0, err
    again = json.loads((tmp_path / "y.json").read_text())["metrics"]
    for name in again:
        assert again[name] == pytest.approx(values[name], rel=1e-9)
    # Two files of statistics need no network; their metrics have the network's names.
    two = [f"--reference={tmp_path / 'real.npz'}", f"--images={tmp_path / 'real.npz'}"]
    code, out, err = run(capsys, *two, "--metrics=fid")
    assert code == 0, err
    assert out.startswith("FD-EffNet ") and abs(float(out.split()[1])) < 1e-3
    code, _, err = run(capsys, *two, "--metrics=fid", "--network=inception")
    assert code == 1 and "from the network 'efficientnet': leave --network out" in err
    # Statistics of other weights, or of unknown ones, are refused.
    known, made_by = exchange.read_statistics(tmp_path / "real.npz")
    made_by["network"]["weights"] = "other"
    exchange.write_statistics(tmp_path / "other.npz", known, made_by)
    code, _, err = run(capsys, two[0], f"--images={tmp_path / 'other.npz'}", "--metrics=fid")
    assert code == 1 and "from different networks or weights" in err
    np.savez(tmp_path / "bare.npz", mu=known.gaussians["pool"].mean, sigma=np.eye(1280))
    bare = f"={tmp_path / 'bare.npz'}"
    code, _, err = run(capsys, f"--reference{bare}", f"--images{bare}", "--metrics=fid")
    assert code == 1 and "have 1280 features, but the network inception has 2048" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--reference={real}", "--images={real}"), "There is no file 'inception.npz'"),
        (("--images={real}", "--metrics=fid"), "Give a reference"),
        (("--reference={none}", "--images={real}"), "There is no folder or .npz file"),
        (("--reference={real}", "--images={real}", "--metrics=fdi"), "There is no metric 'fdi'"),
        (("--reference={real}", "--images={real}", "--out=x.txt"), "'x.txt' must end in .json"),
        (("--reference={real}", "--images={batch}", "--metrics=psnr", "--size=8"), "--size is for"),
        (("--reference={cut}", "--images={real}", "--metrics=psnr"), "cut.npz is not a valid .npz"),
    ],
)
def test_errors_are_a_sentence(capsys, sets, tmp_path, flags, text):
    path, _, _ = sets
    (tmp_path / "cut.npz").write_bytes((path / "generated.npz").read_bytes()[:900])
    places = {
        "real": path / "real",
        "batch": path / "generated.npz",
        "none": tmp_path / "none",
        "cut": tmp_path / "cut.npz",
    }
    code, out, err = run(capsys, *(flag.format(**places) for flag in flags))
    assert code == 1 and not out
    assert err.startswith("Error: ") and text in err and len(err.strip().splitlines()) == 1


def test_pairs_need_as_many_images(capsys, sets, tmp_path):
    path, real, _ = sets
    np.savez(tmp_path / "fewer.npz", arr_0=real[:5])
    code, _, err = run(
        *(capsys, f"--reference={path / 'real'}", f"--images={tmp_path / 'fewer.npz'}"),
        "--metrics=psnr",
    )
    assert code == 1 and "16 images of 32x32" in err and "5 of 32x32" in err


def test_identical_grey_and_differently_named_pairs(capsys, tmp_path):
    grey = np.random.default_rng(2).integers(0, 200, (3, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    colour = np.repeat(grey, 3, axis=-1)
    colour[1:] += 10
    np.savez(tmp_path / "colour.npz", arr_0=colour)
    pair = (f"--reference={tmp_path / 'grey.npz'}", f"--images={tmp_path / 'colour.npz'}")
    code, out, err = run(capsys, *pair, "--metrics=psnr", f"--out={tmp_path / 'x.json'}")
    assert code == 0 and "1 of 3 pairs are identical: their psnr is infinite" in err
    content = json.loads((tmp_path / "x.json").read_text())
    values = content["metrics"]
    assert values["psnr"] == pytest.approx(20 * np.log10(255 / 10)) and values["psnr_std"] < 1e-9
    assert content["protocol"]["psnr"].startswith("1 of 3 pairs are identical")
    assert "psnr: 1 of 3 pairs are identical" in out
    same = f"--images={tmp_path / 'grey.npz'}"
    code, _, _ = run(capsys, pair[0], same, "--metrics=psnr", f"--out={tmp_path / 'x.json'}")
    assert code == 0
    assert json.loads((tmp_path / "x.json").read_text())["metrics"] == {"psnr": None}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(colour[i]).save(tmp_path / name / f"{name if i else ''}{i}.png")
    folders = (f"--reference={tmp_path / 'a'}", f"--images={tmp_path / 'b'}")
    code, _, err = run(capsys, *folders, "--metrics=ssim")
    assert code == 0 and "for example, a1 is compared with b1" in err


def test_a_broken_link_is_refused_counted_or_named(capsys, sets, effnet, tmp_path):
    path, real, _ = sets
    for i, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / f"{i:03}.png")
    (tmp_path / "005.png").unlink()
    (tmp_path / "005.png").symlink_to(tmp_path / "moved.png")
    both = (f"--reference={path / 'real'}", f"--images={tmp_path}", "--network=efficientnet")
    both += (f"--weights={effnet}", "--batch_size=8")
    code, _, err = run(capsys, *both, "--metrics=fid")
    assert code == 1 and "1 of 16 images cannot be read" in err
    assert "more than --max_broken = 0 allows" in err and "there is no image" in err
    out = tmp_path / "result.json"
    code, text, err = run(capsys, *both, "--metrics=fid", "--max_broken=0.1", f"--out={out}")
    assert code == 0 and "1 of the 16 images in" in err and "unreadable 1" in text
    protocol = json.loads(out.read_text())["protocol"]
    assert protocol["images"]["unreadable"] == 1 and "unreadable" not in protocol["reference"]
    code, _, err = run(capsys, *both, "--metrics=psnr", "--max_broken=0.1")
    assert code == 1 and "metrics of pairs need every image" in err


def test_usage(capsys):
    code, _, err = run(capsys, "--metrics=fid")
    assert code == 2 and "give --images" in err
    assert jax.device_count() == 4
