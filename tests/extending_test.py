"""A user's own parts, as in docs/extending.md: all commands work, or explain why not."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, call_main
from flax import linen as nn
from PIL import Image

from binlatent.autoencoder import bottleneck
from binlatent.data import codes
from binlatent.evaluation import pictures
from binlatent.evaluation.report import HeldOut
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.conditions import Condition
from binlatent.priors.kinds import KINDS
from binlatent.priors.prior import Known
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import sample_keys

# Enough for frequencies to be learned.
TRAIN = {
    "prior.train.batch_size": 200,
    "prior.train.accumulate": 1,
    "prior.train.num_steps": 200,
    "prior.train.learning_rate": 0.1,
    "prior.train.ema_decay": 0.95,
    "evaluate.num_images": 500,
    "log_every": 100,
    "preview_every": 200,
    "checkpoint_every": 200,
}
CLASSES = np.arange(10)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The flag of the config in docs/extending.md, which imports tests/independent_bits.py."""
    path = tmp_path_factory.mktemp("own") / "my_config.py"
    block = re.search("```python\n(.*?)```", Path("docs/extending.md").read_text(), re.DOTALL)
    path.write_text(block[1])
    yield f"--config={path}"
    KINDS.pop("independent", None)


@pytest.fixture(scope="module")
def flags(config, digits_dir):
    values = {**TINY, **TRAIN, "data.path": digits_dir}
    return [config, *(f"--config.{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def workdir(flags, trained_workdir, tmp_path_factory):
    """The output of `--mode=all` with such a prior and an existing autoencoder."""
    workdir = tmp_path_factory.mktemp("independent")
    shutil.copytree(trained_workdir / "autoencoder", workdir / "autoencoder")
    assert call_main(*flags, f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture(scope="module")
def pipeline(workdir):
    return BinaryLatentDiffusion.from_workdir(workdir)


@pytest.fixture(scope="module")
def frequencies(workdir, pipeline):
    """The frequency of 1 of each bit in a class of training images, (10, h, w, c), by y."""
    (folder,) = (workdir / "codes").iterdir()
    examples = codes.open_codes(folder, pipeline.encoder_fingerprint).examples
    read = [examples[i] for i in range(len(examples))]
    probs, labels = (np.stack([x[name] for x in read]) for name in ("probs", "label"))
    return np.stack([(probs[labels == c] / 255).mean(axis=0) for c in CLASSES])


def learned(pipeline):
    """The learned frequencies, float64, one row per class and one for no class."""
    return 1 / (1 + np.exp(-np.float64(pipeline.prior_params["logits"])))


def lengths(bits, p):
    """-log2 p(bits), as it is defined."""
    return -np.sum(np.log2(np.where(bits == 1, p, 1 - p)), axis=(1, 2, 3))


def test_the_file_is_short():
    assert len(Path("tests/independent_bits.py").read_text().splitlines()) <= 60


def test_the_main_job_trains_evaluates_and_draws_all_but_a_trajectory(workdir):
    for name in ("samples", "reconstructions", "inpainting"):
        assert len(np.unique(np.asarray(Image.open(workdir / f"{name}.png")))) > 2
    assert not (workdir / "trajectory.png").exists()
    written = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [100, 200]  # and none without numbers
    assert written[1]["bce"] < written[0]["bce"] < np.log(2)


def test_it_learns_the_frequencies_of_each_class(pipeline, frequencies):
    p = learned(pipeline)
    np.testing.assert_allclose(p[:10], frequencies, atol=0.08)
    assert np.abs(p[:10] - frequencies).mean() < 0.02
    np.testing.assert_allclose(p[10], frequencies.mean(axis=0), atol=0.08)  # of dropped labels


def test_the_report_has_the_exact_length_of_codes(workdir, pipeline, frequencies):
    report = json.loads((workdir / "report.json").read_text())
    # The mean over draws of a test code from y of -log2 p, by the frequencies of training images.
    test = HeldOut.read(pipeline)
    p = frequencies[test.labels]
    expected = -np.sum(test.probs * np.log2(p) + (1 - test.probs) * np.log2(1 - p), axis=(1, 2, 3))
    assert report["prior"]["bits_per_image"] == pytest.approx(expected.mean(), rel=0.01)
    # It is nearly the entropy of the frequencies.
    entropy = -np.sum(frequencies * np.log2(frequencies), axis=(1, 2, 3))
    entropy -= np.sum((1 - frequencies) * np.log2(1 - frequencies), axis=(1, 2, 3))
    assert report["prior"]["bits_per_image"] == pytest.approx(entropy.mean(), rel=0.02)
    assert set(report["prior"]) == {"bits_per_image", "bits_per_dim"}
    assert report["samples"]["temperature"] == 0.8 and "steps" not in report["samples"]


def test_code_lengths_are_those_of_the_definition(pipeline):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (30, *pipeline.code_shape)).astype(np.float32)
    labels, key = rng.integers(0, 10, 30), jax.random.key(0)
    p = learned(pipeline)
    found = pipeline.code_lengths(bits, key, labels)
    np.testing.assert_allclose(found, lengths(bits, p[labels]), rtol=1e-5)
    np.testing.assert_allclose(pipeline.code_lengths(bits, key), lengths(bits, p[10]), rtol=1e-5)


def test_the_protocol_of_a_bound_says_that_it_is_exact(flags, workdir, capsys):
    asked = ("--mode=evaluate", "--metrics=prior,bound")
    assert call_main(*flags, f"--workdir={workdir}", *asked) == 0
    (path,) = (workdir / "evaluation").glob("*.json")
    result = json.loads(path.read_text())
    report = json.loads((workdir / "report.json").read_text())
    assert result["metrics"] == report["prior"]
    assert "codes drawn, exact," in result["protocol"]["test images"]["bound"]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_learned_frequencies(pipeline, temperature):
    found = pipeline.sample_codes(2_000, jax.random.key(0), 3, temperature=temperature)
    assert set(np.unique(found)) == {0, 1}
    p = 1 / (1 + np.exp(-np.float64(pipeline.prior_params["logits"][3]) / temperature))
    deviations = (found.mean(axis=0) - p) / np.sqrt(p * (1 - p) / 2_000)
    assert np.abs(deviations).max() < 5 and 0.8 < np.std(deviations) < 1.2


def test_inpainting_keeps_known_bits_and_draws_the_others(pipeline):
    prior, settings = pipeline.experiment.prior.prior, pipeline.settings({"temperature": 1.0})
    mask = np.random.default_rng(0).integers(0, 2, (1_000, *pipeline.code_shape))
    keys, condition = sample_keys(jax.random.key(0), 1_000), Condition(np.full(1_000, 3))
    known = Known(np.ones(mask.shape, np.float32), mask.astype(np.float32))
    found = np.asarray(prior.sample(pipeline.prior_params, keys, condition, settings, known))
    assert np.all(found[mask == 1] == 1)
    counts = (mask == 0).sum(axis=0)
    drawn, p = (found * (mask == 0)).sum(axis=0) / counts, learned(pipeline)[3]
    assert np.abs((drawn - p) / np.sqrt(p * (1 - p) / counts)).max() < 5
    images = HeldOut.read(pipeline).images[:4] / np.float32(127.5) - 1
    keep = np.arange(28)[:, None] < np.full(28, 14)
    result = pipeline.inpaint(images, keep, jax.random.key(0), 3)
    np.testing.assert_array_equal(result[:, :14], images[:, :14])
    assert np.any(result[:, 14:] != pipeline.inpaint(images, keep, jax.random.key(1), 3)[:, 14:])


def test_the_command_samples_and_inpaints(flags, workdir, tmp_path):
    asked = (*flags, f"--workdir={workdir}", f"--out={tmp_path / 'a.png'}", "--num=3")
    assert call_main(*asked, "--mode=sample", "--label=7", "--temperature=0.5") == 0
    assert Image.open(tmp_path / "a.png").size[0] > Image.open(tmp_path / "a.png").size[1]
    assert call_main(*asked, "--mode=inpaint", "--option=keep_pixels=False") == 0


def test_what_it_cannot_do_is_refused_in_a_sentence(flags, workdir, capsys, monkeypatch):
    def refused(*asked):
        assert call_main(*flags, f"--workdir={workdir}", *asked) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.delattr(pictures, "test_images")  # no image is read
    assert "kind IndependentBits has no vary" in refused("--mode=vary")
    assert "no sampling option 'steps': the options are keep_pixels, temp" in refused("--steps=3")
    assert "config.prior.independent.penalty must be between 0 and 1, not 2.0" in refused(
        "--config.prior.independent.penalty=2.0"
    )
    # Without the config nothing registers the kind.
    monkeypatch.delitem(KINDS, "independent")
    assert call_main(f"--workdir={workdir}", "--mode=sample") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: The config in ") and "give --config with the file" in line


def test_a_bottleneck_from_outside_is_one_of_the_choices(tiny_config, monkeypatch):
    class Shifted(bottleneck.Binary):
        """Bits whose probabilities are moved by a constant."""

        shift: float = 0.0

        def setup(self):
            self.proj = nn.Dense(self.num_bits, bias_init=nn.initializers.constant(self.shift))
            self.embed = self.param(
                "embed", nn.initializers.normal(), (self.num_bits, self.embedding_width)
            )

    monkeypatch.setitem(bottleneck.BOTTLENECKS, "shifted", Shifted)
    with tiny_config.unlocked():
        tiny_config.autoencoder.update({"bottleneck": "shifted", "shift": 2.0})
    experiment = resolve(tiny_config).with_classes(10)
    experiment.autoencoder.check_bits()
    params = experiment.autoencoder.init(jax.random.key(0))
    assert np.all(params["params"]["bottleneck"]["proj"]["bias"] == 2)
    images = np.zeros((2, 28, 28, 1), np.float32)
    assert BinaryLatentDiffusion(experiment, params).encode(images).shape == (2, 4, 4, 8)
    tiny_config.autoencoder.bottleneck = "bent"
    with pytest.raises(
        UserError, match='must be "binary", "vq", "real" or "shifted", not \'bent\''
    ):
        resolve(tiny_config)
