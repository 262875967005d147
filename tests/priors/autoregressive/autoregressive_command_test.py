"""The commands with an autoregressive prior: each works, or its error explains why not."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import call_main, tiny_flags
from PIL import Image

from binlatent.benchmark import __main__ as benchmark
from binlatent.data import masks
from binlatent.evaluation import pictures
from binlatent.paper import figures
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError

NO_STEPS = "An autoregressive prior always takes one step per token"


@pytest.fixture(scope="module")
def flags(digits_dir):
    constant = "--config.prior.train.decay=constant"  # whatever num_steps is
    return [*tiny_flags(digits_dir), "--config.prior.kind=autoregressive", constant]


@pytest.fixture(scope="module")
def workdir(flags, untrained_workdir, tmp_path_factory):
    """Six steps on an untrained autoencoder, the last two by a second command."""
    workdir = tmp_path_factory.mktemp("autoregressive")
    shutil.copytree(untrained_workdir / "autoencoder", workdir / "autoencoder")
    asked = (*flags, f"--workdir={workdir}", "--mode=train_prior")
    assert call_main(*asked, "--config.prior.train.num_steps=4") == 0
    assert call_main(*asked) == 0
    return workdir


@pytest.fixture(scope="module")
def pipeline(workdir):
    return BinaryLatentDiffusion.from_workdir(workdir)


def test_training_goes_on_bitwise(flags, workdir, pipeline, tmp_path):
    for name in ("autoencoder", "codes"):
        shutil.copytree(workdir / name, tmp_path / name)
    assert call_main(*flags, f"--workdir={tmp_path}", "--mode=train_prior") == 0
    at_once = BinaryLatentDiffusion.from_workdir(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, pipeline.prior_params, at_once.prior_params)
    written = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in written if "loss" in line]
    # Codes of an untrained encoder are nearly fair coins.
    assert len(losses) == 3 and np.abs(np.array(losses) - np.log(2)).max() < 0.1


def test_another_head_is_refused(flags, workdir, capsys):
    asked = (*flags, f"--workdir={workdir}", "--mode=sample")
    assert call_main(*asked, "--config.prior.autoregressive.head=independent") == 1
    assert "autoregressive.head is joint there and independent here" in capsys.readouterr().err
    assert call_main(*asked, "--config.prior.autoregressive.head=both") == 1
    assert 'head must be "independent" or "joint", not \'both\'' in capsys.readouterr().err


def test_pictures_are_drawn_all_but_those_it_has_not(workdir, pipeline, tmp_path):
    assert pictures.of_all(pipeline) == ["sample", "reconstruct", "inpaint"]
    asked = (f"--workdir={workdir}", f"--out={tmp_path / 'a.png'}")
    options = ("--temperature=0.5", "--guidance=2")
    assert call_main(*asked, "--mode=sample", "--num=10", "--label=7", *options) == 0
    assert call_main(*asked, "--mode=inpaint", "--num=2", *options) == 0
    width, height = Image.open(tmp_path / "a.png").size
    assert 7 * width == pytest.approx(4 * height, rel=0.1)  # both images and two completions
    for draw in (figures.temperature_figure, figures.guidance_figure):
        draw(pipeline).savefig(tmp_path / "figure.png")


def test_evaluation_says_that_the_length_is_exact(workdir, pipeline):
    assert call_main(f"--workdir={workdir}", "--mode=evaluate", "--metrics=prior,bound") == 0
    (path,) = (workdir / "evaluation").glob("*.json")
    result = json.loads(path.read_text())
    assert "codes drawn, exact," in result["protocol"]["test images"]["bound"]
    # Equal up to other draws of the codes.
    nats = result["metrics"]["bits_per_dim"] * np.log(2)
    assert result["metrics"]["bce"] == pytest.approx(nats, rel=0.02)


def test_completion_keeps_the_upper_half_and_others_are_refused(workdir, pipeline, capsys):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 28, 28, 1)).astype(np.float32)
    keep = masks.preset("bottom", 28, 28)
    result = pipeline.inpaint(images, keep, jax.random.key(0), 3)
    np.testing.assert_array_equal(result[:, :14], images[:, :14])
    assert np.any(result != pipeline.inpaint(images, keep, jax.random.key(1), 3))
    assert call_main(f"--workdir={workdir}", "--mode=inpaint", "--mask=left") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "can only complete an image" in line and "--mask=bottom" in line


def test_steps_are_refused_with_the_reason(flags, workdir, pipeline, capsys):
    for given in (flags, []):
        asked = (*given, f"--workdir={workdir}", "--mode=sample", "--steps=4")
        assert call_main(*asked) == 1
        assert NO_STEPS in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match=NO_STEPS):
        figures.steps_figure(pipeline, workdir)
    with pytest.raises(UserError, match=NO_STEPS):
        list(benchmark.measure_speeds("sample", pipeline.experiment, [1], [4]))


@pytest.mark.parametrize("name", ["train_prior", "network", "sample"])
def test_the_benchmark_has_its_rows(pipeline, name):
    (row,) = benchmark.measure_speeds(name, pipeline.experiment, [2], [], repeats=1)
    assert row["seconds"] > 0 and row["steps"] is None
