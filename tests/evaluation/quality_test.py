"""A workdir's samples: drawn once in shards, measured, and described by a protocol."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import held, untrained_params
from PIL import Image

from binlatent import stages
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_uint8
from binlatent.evaluation import comparison, quality, reference, report, samples
from binlatent.evaluation.judge import Judge
from binlatent.evaluation.metrics.feature_metrics import Statistics, frechet_distance
from binlatent.evaluation.networks.features import Network
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.training import checkpoint

FD = ("fd_classifier", "fd_classifier_real", "fd_classifier_reconstructions")
PR = ("precision_classifier", "recall_classifier")


@pytest.fixture
def pipeline(tiny_config):
    tiny_config.data.num_classes = 10
    experiment = resolve(tiny_config)
    random = np.random.default_rng(1)
    # Untrained, all samples would be nearly equal.
    params = [
        jax.tree.map(
            lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32),
            jax.device_get(untrained_params(stage)),
        )
        for stage in (experiment.autoencoder, experiment.prior)
    ]
    return BinaryLatentDiffusion(experiment, *params)


def change(pipeline, **evaluate):
    """Changes keys of `config.evaluate`."""
    values = {f"evaluate.{name}": value for name, value in evaluate.items()}
    pipeline.experiment = pipeline.experiment.change(values)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(samples, "_SHARD", 8)


def draw(pipeline, folder, num=20, **more):
    return samples.Samples(pipeline, None, folder, num, **{"images": True, **more})


def test_samples_are_those_of_their_seed_and_class(pipeline, tmp_path, small_shards):
    found = draw(pipeline, tmp_path, seed=3)
    np.testing.assert_array_equal(found.labels(), np.arange(20) % 10)
    images = found.images()
    assert len(images) == 20
    # For any shards, up to rounding: sums of kernels depend on the batch size.
    expected = to_uint8(pipeline.sample(20, key_for(3, "evaluate"), np.arange(20) % 10))
    difference = np.stack([images[i] for i in range(20)]).astype(int) - expected
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 0.001
    assert found.protocol["labels"] == "balanced, 10 classes in turn"
    assert found.protocol["steps"] == 4 and found.protocol["count"] == 20


def test_only_what_is_missing_is_drawn(pipeline, tmp_path, small_shards, monkeypatch):
    first = draw(pipeline, tmp_path)
    before = {path.name: path.read_bytes() for path in first.folder.glob("*.np[yz]")}
    assert len(before) == 6
    drawn = []
    sample = pipeline.sample
    monkeypatch.setattr(
        pipeline,
        "sample",
        lambda num, *rest, **more: drawn.append(num) or sample(num, *rest, **more),
    )
    (first.folder / "0000008_8.npz").unlink()  # as if killed before it
    (first.folder / "0000016_4.npz.unfinished").touch()
    second = draw(pipeline, tmp_path)
    assert drawn == [8] and second.folder == first.folder
    assert {name: (second.folder / name).read_bytes() for name in before} == before
    # More samples: whole shards are used again. Other settings: other samples.
    draw(pipeline, tmp_path, 24)
    assert drawn == [8, 8]
    assert draw(pipeline, tmp_path, 2, options={"temperature": 0.5}).folder != first.folder


def test_two_processes_do_not_draw_the_same_samples(pipeline, tmp_path, small_shards):
    found = draw(pipeline, tmp_path)
    with held(found.folder / ".lock") as other:
        draw(pipeline, tmp_path)  # all are there
        (found.folder / "0000008_8.npz").unlink()
        with pytest.raises(UserError, match=f"are being drawn already, by process {other.pid} on"):
            draw(pipeline, tmp_path)
    draw(pipeline, tmp_path)


@pytest.mark.parametrize("keep", ["png", "npz"])
def test_samples_are_kept(pipeline, tmp_path, small_shards, keep):
    found = draw(pipeline, tmp_path, keep=keep, images=keep == "png")
    images = found.images()
    if keep == "png":
        files = sorted((found.folder / "png").iterdir())
        stored = [np.asarray(Image.open(file)) for file in files]
        assert files[7].name == "0000007.png"
        np.testing.assert_array_equal(np.stack(stored), np.concatenate(images.parts)[..., 0])
        return
    path = found.write_batch()
    assert path.name == "samples_20x28x28x3.npz"
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"][..., :1], np.concatenate(images.parts))
        np.testing.assert_array_equal(file["arr_1"], np.arange(20) % 10)


def test_labels_of_the_data(pipeline, tmp_path, small_shards):
    change(pipeline, labels="data")
    found = draw(pipeline, tmp_path, 40)
    examples = open_split(pipeline.experiment.data, "train").examples
    order = np.random.default_rng(0).permutation(len(examples))
    expected = [examples[int(i)]["label"] for i in order[:40]]
    np.testing.assert_array_equal(found.labels(), expected)


def test_all_metrics_of_a_workdir(pipeline, tmp_path, monkeypatch):
    names = ["fid", "kid", "is", "pr", "dc", "cas", "psnr", "ssim", "codes", "prior", "bound"]
    values, protocol = quality.measure(pipeline, tmp_path, names, num=30, temperature=0.7)
    assert set(values) >= {
        *("fd_classifier", "kd_classifier", "kd_classifier_std", "score_classifier"),
        *("precision_classifier", "recall_classifier", "density_classifier"),
        *("coverage_classifier", "cas_top1", "cas_top5", "psnr", "psnr_std", "ssim"),
        *("bit_rate", "dead_bits", "bce", "bits_per_image", "bits_per_dim"),
    }
    assert "fid" not in values and all(np.isfinite(list(values.values())))
    # The distance computed directly: all 4,500 training images, and the samples.
    found = samples.Samples(
        pipeline, None, tmp_path / "x", 30, options={"temperature": 0.7}, images=True
    )
    train_images, _ = load_images(open_split(pipeline.experiment.data, "train"), 10_000)
    network = reference.network(pipeline.experiment, tmp_path)
    a, b = (
        Statistics.of(network.apply(x, 500)["pool"]).gaussian
        for x in (train_images, np.concatenate(found.images().parts))
    )
    assert values["fd_classifier"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    assert protocol["reference"]["count"] == len(train_images)
    assert protocol["samples"]["temperature"] == 0.7
    assert len(protocol["network"]["weights"]) == 16
    stored = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")]
    assert stored == [{"metrics": values, "protocol": json.loads(json.dumps(protocol))}]
    assert list(protocol["metrics"]) == ["kid", "is", "pr", "dc", "floors"]
    assert protocol["metrics"]["floors"] == (
        "real: 30 images; reconstructions: 30 images, codes: drawn from B(y), seed 0"
    )
    # Its floors: 30 test images in place of the samples, and test images and reconstructions.
    test_images, _ = load_images(open_split(pipeline.experiment.data, "test"), 30)
    c = Statistics.of(network.apply(test_images, 500)["pool"]).gaussian
    assert values["fd_classifier_real"] == pytest.approx(frechet_distance(a, c), rel=1e-3)
    (path,) = (tmp_path / "evaluation").glob("reconstructions_*/0000000_30.npz")
    d = Statistics.of(np.load(path)["pool"]).gaussian
    expected = pytest.approx(frechet_distance(c, d), rel=1e-3)
    assert values["fd_classifier_reconstructions"] == expected
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["stage"] == "evaluation" and logged[-1]["psnr"] == values["psnr"]
    # Features of the reference and of the samples are not computed again.
    monkeypatch.setattr(comparison, "features_of", None)
    monkeypatch.setattr(pipeline, "sample", None)
    again, _ = quality.measure(pipeline, tmp_path, ["fid"], num=30, temperature=0.7)
    assert again == {name: values[name] for name in FD}
    # Metrics with one protocol are in one file.
    quality.measure(pipeline, tmp_path, ["pr"], num=30, temperature=0.7)
    stored = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*.json")]
    expected = {name: values[name] for name in (*FD, *PR)}
    assert sorted(len(x["metrics"]) for x in stored) == [5, len(values)]
    assert expected in [x["metrics"] for x in stored]


def test_changed_images_are_judged_again(pipeline, tmp_path):
    """Other images with the same names do not get the features of the old ones."""
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(4):
                image = random.integers(0, 256, (28, 28), np.uint8)
                Image.fromarray(image).save(folder / split / str(label) / f"{i}.png")
    values = {"data.name": "folder", "data.path": str(folder)}
    pipeline.experiment = pipeline.experiment.change(values)
    first, protocol = quality.measure(pipeline, tmp_path, ["fid"])
    assert quality.measure(pipeline, tmp_path, ["fid"])[0] == first
    for file in folder.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file)) // 2).save(file)
    second, changed = quality.measure(pipeline, tmp_path, ["fid"])
    assert second["fd_classifier"] != first["fd_classifier"]
    assert changed["reference"]["fingerprint"] == protocol["reference"]["fingerprint"]
    assert changed["reference"]["pixels"] != protocol["reference"]["pixels"]


def test_damaged_files_of_before(pipeline, tmp_path):
    first, _ = quality.measure(pipeline, tmp_path, ["fid"])
    folder = tmp_path / "evaluation"
    for pattern in ("reference_*.npz", "*.json"):
        for path in folder.glob(pattern):
            path.write_bytes(path.read_bytes()[:100])
    assert quality.measure(pipeline, tmp_path, ["fid"])[0] == pytest.approx(first)
    for made, anew in (("reconstructions", "made"), ("samples", "drawn")):
        (path,) = folder.glob(f"{made}_*/*.npz")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match=rf"\.npz is damaged: delete it, and it is {anew} anew"):
            quality.measure(pipeline, tmp_path, ["fid"])


def test_references_that_do_not_do_are_refused_before_any_drawing(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "sample", None)
    path = tmp_path / "x.npz"
    change(pipeline, reference=str(path))
    np.savez(path, mu=np.zeros(128), sigma=np.eye(128))
    with pytest.raises(UserError, match="the reference has only their statistics"):
        quality.measure(pipeline, tmp_path, ["kid"])
    np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(UserError, match="has 9 features and the images have 128"):
        quality.measure(pipeline, tmp_path, ["fid"])
    np.savez(path, arr_0=np.zeros((20, 32, 32, 1), np.uint8))
    with pytest.raises(UserError, match="are 32x32, but the model's are 28x28: set config.eval"):
        quality.measure(pipeline, tmp_path, ["fid"])
    np.savez(path, arr_0=np.zeros((20, 28, 28, 3), np.uint8))
    with pytest.raises(
        UserError, match="classifier takes images with 1 channel.s., and these have 3"
    ):
        quality.measure(pipeline, tmp_path, ["fid"])


@pytest.mark.parametrize(
    ("names", "num", "text"),
    [
        (["fdi"], 20, "no metric 'fdi'"),
        (["cas"], 5, "--num=5 is not enough"),
        (["sfid"], 20, "needs the network inception"),
        (["is"], 5, "--num=5 is not enough"),
        (["lpips"], 20, "no file .* with VGG16's weights for LPIPS: download (?!.* train).*vgg16="),
    ],
)
def test_what_cannot_be_measured_is_said_first(pipeline, tmp_path, names, num, text):
    with pytest.raises(UserError, match=text):
        quality.measure(pipeline, tmp_path, names, num=num)
    assert not list(tmp_path.iterdir())


def test_what_the_prior_or_the_data_has_not(pipeline, tmp_path):
    change(pipeline, network="inception", weights=str(tmp_path / "none.npz"))
    with pytest.raises(UserError, match=r"none\.npz"):
        quality.measure(pipeline, tmp_path, ["fid"])
    without = BinaryLatentDiffusion(pipeline.experiment, pipeline.autoencoder_params)
    for metric in ("bound", "prior", "fid"):
        with pytest.raises(UserError, match="has no prior yet"):
            quality.measure(without, tmp_path, [metric])


@pytest.mark.parametrize("reference_of", ["train", "folder"])
def test_a_broken_link_among_the_reference_is_counted(tmp_path, tiny_experiment, reference_of):
    folder, pool = tmp_path / "images", np.random.default_rng(0).normal(size=(30, 4))
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(1).integers(0, 256, (20, 28, 28), np.uint8)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    (folder / "03.png").unlink()
    (folder / "03.png").symlink_to(tmp_path / "moved.png")
    names = {"train": "train", "folder": str(folder)}
    values = {"data.name": "folder", "data.path": str(folder), "data.max_broken": 0.1}
    values |= {"evaluate.reference": names[reference_of], "data.num_classes": 0}
    experiment = tiny_experiment.change(values)
    network = Network("efficientnet", 4, lambda x, _: {"pool": pool[: len(x)]}, {"name": "x"})
    count = {"train": 18, "folder": 20}[reference_of]
    for _ in range(2):  # for a split, the second is read from the workdir
        found, protocol = reference.reference(experiment, network, tmp_path / "run")
        assert found.count == protocol["count"] == count and protocol["unreadable"] == 1
    with pytest.raises(UserError, match="more than config.data.max_broken = 0.01 allows"):
        experiment = experiment.change({"data.max_broken": 0.01})
        reference.reference(experiment, network, tmp_path / "other")
    if reference_of == "train":
        test = report.HeldOut.read(SimpleNamespace(experiment=experiment))
        assert len(test.images) == 2 and test.source.examples.num_unreadable == 0


def test_a_folder_is_brought_to_the_size_of_the_model(tiny_experiment, tmp_path):
    folder, seen = tmp_path / "images", []
    folder.mkdir()
    for i, size in enumerate([(40, 60, 3), (64, 30, 3), (28, 28, 3)] * 2):
        image = np.random.default_rng(i).integers(0, 256, size, np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")

    def apply(images, _):
        seen.extend(images)
        return {"pool": np.random.default_rng(0).normal(size=(len(images), 4))}

    values = {"data.name": "folder", "data.path": str(folder), "evaluate.reference": str(folder)}
    experiment = tiny_experiment.change(values | {"data.num_classes": 0})
    network = Network("efficientnet", 4, apply, {"name": "x"})
    _, protocol = reference.reference(experiment, network, tmp_path)
    assert (protocol["count"], protocol["size"]) == (6, "28x28")
    assert protocol["transform"].startswith("centre square")
    # The same images as of a split of that folder, with the model's one channel.
    split = open_split(experiment.data, "train"), open_split(experiment.data, "test")
    known = [source.examples[i]["image"] for source in split for i in range(len(source.examples))]
    assert seen[0].shape == (28, 28, 1)
    for image in known:
        assert any(np.array_equal(image, other) for other in seen)


def test_an_interrupted_reference_goes_on(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_SHARD", 100)
    judged = []

    def mean_colour(images, batch_size):
        judged.append(len(images))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return {"pool": images.reshape(len(images), 4, -1).mean(axis=2, dtype=np.float32)}

    network = Network("efficientnet", 4, mean_colour, {"name": "x"})
    with pytest.raises(KeyboardInterrupt):
        reference.features_of_split(tiny_experiment, network, tmp_path, "test", 450)
    found, protocol = reference.features_of_split(tiny_experiment, network, tmp_path, "test", 450)
    assert judged == [100, 100, 100, 100, 100, 50]  # the first two only once
    source = open_split(tiny_experiment.data, "test")
    images, _ = load_images(source, 450)
    np.testing.assert_allclose(found.pool, images.reshape(450, 4, -1).mean(axis=2), rtol=1e-5)
    assert protocol["pixels"] == hashlib.sha256(images).hexdigest()[:16]
    assert [path.suffix for path in (tmp_path / "evaluation").iterdir()] == [".npz"]


@pytest.mark.parametrize("exact", [0, 1, 2])
def test_an_exact_reconstruction_is_left_out_of_the_psnr(tiny_experiment, exact, caplog, tmp_path):
    class Reconstructed(report.HeldOut):
        def reconstructions(self):
            wrong = self.images + np.uint8(5)
            wrong[:exact] = self.images[:exact]
            yield self.images, wrong

    pipeline = SimpleNamespace(experiment=tiny_experiment)
    test = Reconstructed(pipeline, np.full((2, 16, 16, 1), 100, np.uint8))
    values, settings = report.measure(pipeline, test, ["psnr", "ssim"])
    expected = {0: 20 * np.log10(255 / 5), 1: 20 * np.log10(255 / 5), 2: np.inf}[exact]
    assert values["psnr"] == pytest.approx(expected)
    assert ("psnr_std" in values) == (exact < 2)
    assert (f"{exact} of 2 pairs are identical" in caplog.text) == bool(exact)
    assert ("psnr" in settings) == bool(exact)


def test_metrics_while_training_and_the_report(tiny_config, trained_workdir, tmp_path, monkeypatch):
    tiny_config.evaluate.every = 3
    tiny_config.evaluate.metrics = ("fid", "pr")
    tiny_config.evaluate.classifier_images = 400  # with fewer it would be near chance
    experiment = resolve(tiny_config)
    shutil.copytree(trained_workdir / "autoencoder", tmp_path / "autoencoder")
    stages.train_prior(experiment, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    judged = {line["step"]: line for line in lines if "fd_classifier" in line}
    assert list(judged) == [3, 6] and judged[3]["stage"] == "prior"
    assert judged[3]["fd_classifier"] != judged[6]["fd_classifier"]
    assert not list((tmp_path / "evaluation").glob("samples_*"))
    # The last ones are those of the checkpoint's EMA weights.
    model = BinaryLatentDiffusion.from_workdir(tmp_path)
    values, _ = quality.measure(model, tmp_path, ["fid"])
    assert values["fd_classifier"] == pytest.approx(judged[6]["fd_classifier"], rel=1e-6)
    assert checkpoint.exists(tmp_path, "prior")
    # report.json has the numbers of --metrics, and uses the existing classifier.
    monkeypatch.setattr(reference, "train_classifier", None)
    found = report.report(model, tmp_path)
    values, _ = quality.measure(model, tmp_path, ["psnr", "ssim", "codes", "prior", "bound"])
    assert found["autoencoder"] | found["prior"] == values
    distances = [name for name in found["samples"] if name.startswith("frechet_distance")]
    ends = ["", "_unguided", "_real", "_reconstructions"]
    assert distances == [f"frechet_distance{end}" for end in ends]
    assert "unjudged" not in found["samples"]
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert Judge(model.experiment, tmp_path).accuracy == found["samples"]["classifier_accuracy"]
