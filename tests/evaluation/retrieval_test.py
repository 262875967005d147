"""Retrieval: ranks of real images, the choice of candidates, and the metric of a workdir."""

import itertools
import json
import shutil

import encoders
import jax
import numpy as np
import pytest
from PIL import Image

from binlatent.convert import texts
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import quality
from binlatent.evaluation.metrics.retrieval_metrics import Choice, different, retrieval
from binlatent.evaluation.networks.features import Network
from binlatent.evaluation.samples import Samples
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for


def brute_force(real, drawn, candidates):
    """The shares of own images that are nearest, and among the nearest five, one by one."""
    first, five = 0, 0
    for x, row in zip(drawn.astype(float), candidates, strict=True):
        cosines = [y @ x / np.sqrt((y @ y) * (x @ x)) for y in real[row].astype(float)]
        as_near = sum(cosine >= cosines[0] for cosine in cosines[1:])
        first, five = first + (as_near == 0), five + (as_near < 5)
    return first / len(drawn), five / len(drawn)


def draw_rows(random, m, n, c):
    """Candidates, (n, c) of m, all different in a row."""
    return np.stack([random.permutation(m)[:c] for _ in range(n)])


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_retrieval_is_that_of_brute_force(noise):
    random = np.random.default_rng(0)
    real = random.normal(size=(150, 20)).astype(np.float32)
    candidates = draw_rows(random, 150, 200, 30)
    drawn = real[candidates[:, 0]] + noise * random.normal(size=(200, 20)).astype(np.float32)
    found = retrieval(real, drawn, candidates)
    assert found == pytest.approx(brute_force(real, drawn, candidates), abs=1e-12)
    assert found[0] <= found[1]
    # The cosine does not depend on lengths.
    lengths = random.uniform(0.1, 10, (200, 1))
    assert retrieval(real, drawn * lengths, candidates) == pytest.approx(found, abs=1e-12)


def test_the_same_features_are_always_found():
    random = np.random.default_rng(0)
    real = random.uniform(size=(120, 1_280)).astype(np.float32)
    candidates = draw_rows(random, 120, 50, 100)
    assert retrieval(real, real[candidates[:, 0]], candidates) == (1.0, 1.0)


def test_random_features_find_their_own_by_chance():
    random = np.random.default_rng(0)
    n, c = 4_000, 100
    real, drawn = random.normal(size=(500, 8)), random.normal(size=(n, 8))
    for found, expected in zip(
        retrieval(real, drawn, draw_rows(random, 500, n, c)), (1 / c, 5 / c), strict=True
    ):
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize(
    ("copies", "expected"), [(0, (1, 1)), (1, (0, 1)), (4, (0, 1)), (5, (0, 0))]
)
def test_ties_count_against(copies, expected):
    random = np.random.default_rng(0)
    real = random.uniform(size=(100, 1_280)).astype(np.float32)
    real[random.permutation(99)[:copies] + 1] = real[0]  # at any place in the row
    drawn = real[:1] + 0.01 * random.uniform(size=(1, 1_280))
    assert retrieval(real, drawn, np.arange(100)[None]) == expected


def test_features_that_are_no_direction_find_nothing():
    real = np.random.default_rng(0).normal(size=(10, 4))
    for value in (0.0, np.nan):
        assert retrieval(real, np.full((1, 4), value), np.arange(10)[None]) == (0.0, 0.0)


def test_others_differ_from_an_image_and_from_each_other():
    captions = [("a", "b"), ("c", "b"), ("d",), ("d", "e"), ("f", "a"), ("g", "d")]
    assert different(captions, 0, [5, 4, 3, 2, 1, 0], 9) == [5, 3]
    assert different(captions, 0, [2, 3, 5], 9) == [2, 5]
    assert different(captions, 0, [2, 3, 5], 1) == [2]
    assert different(captions, 2, range(6), 9) == [0, 1, 4]


def test_candidates_are_drawn_at_random_and_always_the_same():
    captions = [(f"{i // 2}", f"of {i // 6}", f"no. {i}") for i in range(600)]  # 300, in groups
    choice = Choice.of(captions, 200, "train")
    assert choice.candidates.shape == (200, 100)
    assert len(set(choice.own)) == 200
    np.testing.assert_array_equal(choice.candidates[:, 0], choice.own)
    for i, row in enumerate(choice.candidates):
        assert len({captions[j][0] for j in row}) == 100
        assert all(set(captions[row[0]]).isdisjoint(captions[j]) for j in row[1:])
        other = choice.own[choice.shuffled[i]]
        assert set(captions[row[0]]).isdisjoint(captions[other])
    # Each is drawn equally often: 200 * 99 / 600 times, within five standard deviations.
    counts = np.bincount(choice.candidates[:, 1:].ravel(), minlength=600)
    assert np.abs(counts - 33).max() < 5 * np.sqrt(33)
    again = Choice.of(captions, 50, "train")
    np.testing.assert_array_equal(again.candidates, choice.candidates[:50])
    assert len(set(choice.shuffled)) > 100


def test_fewer_than_a_hundred_images_are_all_candidates():
    captions = [(f"{i}",) for i in range(12)]
    choice = Choice.of(captions, 5_000, "test")
    assert sorted(choice.own) == list(range(12))
    assert all(sorted(row) == list(range(12)) for row in choice.candidates)
    captions[3:] = [("3",)] * 9
    assert Choice.of(captions, 5_000, "test").candidates.shape == (12, 4)


@pytest.mark.parametrize("captions", [[("a",)] * 4, [("a", "b"), ("c", "b")], [("a",)]])
def test_captions_that_are_all_the_same_are_refused(captions):
    with pytest.raises(
        UserError, match="in the split 'test' none differs from '[ac]': raise --num"
    ):
        Choice.of(captions, 10, "test")


WORDS = ["a", "red", "apple", "hund", "."]  # of the small encoder
CAPTIONS = [" ".join(words) for words in itertools.permutations(WORDS, 2)]
COUNTS = {"train": 12, "test": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned images of both splits, and the text encoder."""
    path, captions = tmp_path_factory.mktemp("captioned"), iter(CAPTIONS)
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for i in range(count):
            file = path / "images" / split / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(file)
            file.with_suffix(".txt").write_text(f"{next(captions)}\n{split} {i}\n")
    (path / "images" / "train" / "00.txt").unlink()  # one without a caption
    weights.write_npz(path / "minilm.npz", texts.minilm(encoders.write_bert(path / "bert")))
    return path


@pytest.fixture
def network(monkeypatch):
    """Features are random projections of pixels: other networks need weights or training."""
    directions = np.random.default_rng(0).normal(size=(28 * 28, 32))
    network = Network(
        *("efficientnet", 32, lambda images, _: {"pool": images.reshape(-1, 28 * 28) @ directions}),
        {"name": "projections"},
    )
    monkeypatch.setattr(quality, "network", lambda experiment, workdir: network)
    return network


@pytest.fixture
def pipeline(folder, tiny_config, request):
    """A pipeline with random parameters, and a prior with the condition of the test."""
    tiny_config.data.update(name="folder", path=str(folder / "images"), num_classes=0)
    tiny_config.texts.update(encoder="minilm", weights=str(folder / "minilm.npz"))
    tiny_config.prior.update(condition=request.param, text_width=encoders.BERT["width"])
    experiment = resolve(tiny_config)
    random = np.random.default_rng(0)
    # Untrained, all samples would be nearly equal.
    params = [
        jax.tree.map(
            lambda x: 0.2 * random.normal(size=x.shape).astype(np.float32),
            jax.eval_shape(spec.init, jax.random.key(0)),
        )
        for spec in (experiment.autoencoder, experiment.prior)
    ]
    return BinaryLatentDiffusion(experiment, *params)


def read_split(folder, split):
    """The images and first captions of a split, in the order of its files."""
    files = sorted(file for file in (folder / "images" / split).rglob("*.txt"))
    captions = [file.read_text().splitlines()[0] for file in files]
    images = np.stack([np.asarray(Image.open(x.with_suffix(".png"))) for x in files])[..., None]
    return images, captions


@pytest.mark.parametrize("pipeline", ["text_token"], indirect=True)
def test_retrieval_of_a_workdir(pipeline, network, folder, tmp_path):
    values, protocol = quality.measure(
        pipeline, tmp_path, ["retrieval"], num=10, seed=3, guidance=2.0
    )
    # Directly: each image of a split is a candidate of all others, the own one first.
    expected = {}
    for split, num in (("train", 10), ("test", 8)):
        images, captions = read_split(folder, split)
        own = np.random.default_rng(0).permutation(len(images))[:num]
        rows = [[i, *(j for j in range(len(images)) if j != i)] for i in own]
        drawn = pipeline.sample(
            num, key_for(3, "evaluate"), prompt=[captions[i] for i in own], guidance=2.0
        )
        rebuilt = to_uint8(pipeline.reconstruct(to_float(images)))
        real, found, ceiling = (
            network.apply(x, 20)["pool"] for x in (images, to_uint8(drawn), rebuilt[own])
        )
        for kind, x in (("", found), ("_reconstructions", ceiling)):
            shares = brute_force(real, x, np.array(rows))
            expected |= {
                f"retrieval_{split}_top{k}{kind}": s for k, s in zip((1, 5), shares, strict=True)
            }
        assert protocol["retrieval"][f"{split}_captions"] == num
        assert protocol["retrieval"][f"{split}_candidates"] == len(images)
    shuffled = {f"{name}_shuffled" for name in expected if "recon" not in name}
    assert set(values) == set(expected) | shuffled
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert set(quality.METRICS["retrieval"].titles) == set(values)
    told = protocol["retrieval"]
    assert (told["guidance"], told["seed"], told["distance"]) == (2.0, 3, "cosine")
    assert protocol["network"]["name"] == "projections"
    (path,) = (tmp_path / "evaluation").glob("*.json")
    assert json.loads(path.read_text())["metrics"] == values


@pytest.mark.parametrize("pipeline", ["text_cross"], indirect=True)
def test_what_is_drawn_from_a_caption_is_compared_with_its_own_image(
    pipeline, network, folder, tmp_path, monkeypatch
):
    """A perfect prior always finds its own; with shuffled captions it finds the other's."""
    known = [read_split(folder, split) for split in COUNTS]
    images, captions = (np.concatenate(x) for x in zip(*known, strict=True))
    labels = pipeline.text_features(list(captions))

    def sample(num, keys, asked, **options):
        assert len(keys) == num == len(asked) and options == {"steps": 2}
        places = [np.argmin([np.abs(x - y).max() for y in labels]) for x in asked]
        return to_float(images[places])

    monkeypatch.setattr(pipeline, "sample", sample)
    values, _ = quality.measure(pipeline, tmp_path, ["retrieval"], num=20, keep="png", steps=2)
    for split in COUNTS:
        assert values[f"retrieval_{split}_top1"] == values[f"retrieval_{split}_top5"] == 1
        assert values[f"retrieval_{split}_top1_shuffled"] == 0
        assert values[f"retrieval_{split}_top5_reconstructions"] < 1
    assert len(list((tmp_path / "evaluation").rglob("png/*.png"))) == 11 + 8
    # Nothing is drawn again.
    monkeypatch.setattr(pipeline, "sample", None)
    again, _ = quality.measure(pipeline, tmp_path, ["retrieval"], num=20, keep="png", steps=2)
    assert again == values


@pytest.mark.parametrize("pipeline", ["text_token"], indirect=True)
def test_samples_of_changed_captions_are_drawn_anew(
    pipeline, network, folder, tmp_path, monkeypatch
):
    """Those of `retrieval`, and those of all other metrics."""
    drawn = []
    monkeypatch.setattr(
        pipeline,
        "sample",
        lambda num, *rest, **more: drawn.append(num) or np.zeros((num, 28, 28, 1), np.float32),
    )
    images = shutil.copytree(folder / "images", tmp_path / "images")
    pipeline.experiment = pipeline.experiment.change({"data.path": str(images)})

    def measure():
        drawn.clear()
        Samples(pipeline, network, tmp_path, 6)
        quality.measure(pipeline, tmp_path, ["retrieval"], num=3)
        return drawn

    assert measure() == [6, 3, 3]
    assert measure() == []
    (images / "train" / "01.txt").write_text("apple apple apple")
    assert measure() == [6, 3]


@pytest.mark.parametrize("pipeline", ["text_token"], indirect=True)
def test_what_retrieval_cannot_measure_is_said_first(
    tiny_experiment, pipeline, network, folder, tmp_path, monkeypatch
):
    with pytest.raises(
        UserError, match="retrieval draws images from captions, and this prior takes no"
    ):
        quality.check(tiny_experiment, ["retrieval"], 10)
    monkeypatch.setattr(pipeline, "sample", None)
    with pytest.raises(UserError, match="of 1 in the split 'train' none differs"):
        quality.measure(pipeline, folder, ["retrieval"], num=1)
    without = shutil.copytree(folder / "images", tmp_path, dirs_exist_ok=True)
    for file in without.rglob("*.txt"):
        file.unlink()
    pipeline.experiment = pipeline.experiment.change({"data.path": str(without)})
    with pytest.raises(UserError, match="needs captions, and no image of the split 'train' has"):
        quality.measure(pipeline, folder, ["retrieval"])
