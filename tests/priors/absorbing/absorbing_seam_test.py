"""The absorbing diffusion by the common interface: commands, figures and the benchmark."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from conftest import call_main, tiny_flags, untrained_pipeline
from matplotlib import pyplot as plt
from PIL import Image
from updates import check_same_params_and_metrics, prior_parts, run

from binlatent.benchmark import flops, workloads
from binlatent.evaluation import pictures
from binlatent.experiment import resolve
from binlatent.paper import figures
from binlatent.pipeline import BinaryLatentDiffusion

GUIDED = {"prior.kind": "absorbing", "sample.guidance_schedule": "rising"}


@pytest.fixture
def experiment(tiny_experiment):
    return tiny_experiment.change(GUIDED)


@pytest.fixture(scope="module")
def flags(digits_dir):
    return [*tiny_flags(digits_dir), *(f"--config.{key}={value}" for key, value in GUIDED.items())]


@pytest.fixture(scope="module")
def workdir(flags, trained_workdir, tmp_path_factory):
    """The output of `--mode=all` with an absorbing prior and an existing autoencoder."""
    workdir = tmp_path_factory.mktemp("absorbing")
    shutil.copytree(trained_workdir / "autoencoder", workdir / "autoencoder")
    assert call_main(*flags, f"--workdir={workdir}") == 0
    return workdir


def test_one_and_four_devices_make_the_same_update(experiment):
    parts = prior_parts(experiment, optax.sgd(0.5))
    one, four = run(parts, 1), run(parts, 4)
    check_same_params_and_metrics(one, four)
    before = jax.device_get(parts.state.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[0], before)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_the_main_job_trains_evaluates_and_draws_all_pictures(workdir):
    for name in ("samples", "reconstructions", "inpainting", "trajectory"):
        assert len(np.unique(np.asarray(Image.open(workdir / f"{name}.png")))) > 2
    written = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "loss" in line] == [2, 4, 6]
    assert "accuracy" in written[0] and "bce" in written[-1]
    report = json.loads((workdir / "report.json").read_text())
    # After few steps bits are nearly fair; both numbers estimate the same bound.
    assert report["prior"]["bits_per_dim"] == pytest.approx(1, abs=0.05)
    assert report["prior"]["bce"] == pytest.approx(np.log(2), abs=0.03)
    assert report["samples"]["steps"] == 4


def test_the_commands_take_its_options(flags, workdir, tmp_path):
    def size(*asked):
        out = tmp_path / "out.png"
        assert call_main(*flags, f"--workdir={workdir}", f"--out={out}", *asked) == 0
        return Image.open(out).size

    confident = ("--option=order=confidence", "--option=score=likelihood", "--option=revise=True")
    assert size("--mode=sample", "--steps=16", "--num=3", "--label=7", *confident)[0] > 60
    assert size("--mode=inpaint", "--num=2", "--guidance=2", "--option=order_temperature=0.5")
    assert size("--mode=vary", "--strength=0.2", "--temperature=0.5")


def test_what_does_not_fit_is_one_sentence(flags, workdir, capsys, monkeypatch):
    def refused(*asked):
        assert call_main(*flags, f"--workdir={workdir}", "--mode=sample", *asked) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.delattr(pictures, "test_images")  # no image is read
    assert "between 1 and 16, the number of units of a code" in refused("--steps=17")
    assert "divides the 8 bits of a token; got '3'" in refused("--config.prior.absorbing.unit=3")
    assert "prior.absorbing.unit is token there and 4 here" in refused(
        "--config.prior.absorbing.unit=4"
    )
    assert "There is no sampling option 'corrector_steps'" in refused("--option=corrector_steps=1")


def test_the_pipeline_gives_codes_lengths_and_the_way(workdir):
    model, key = BinaryLatentDiffusion.from_workdir(workdir), jax.random.key(0)
    codes = model.sample_codes(5, key, 3, steps=7)
    np.testing.assert_array_equal(codes[:2], model.sample_codes(2, key, 3, steps=7))
    passed = model.trajectory(5, key, 3, steps=7)
    np.testing.assert_array_equal(passed.z_t[:, -1], codes == 1)
    assert passed.hidden[:, 0].all() and not passed.hidden[:, -1].any()
    for options in ({}, {"steps": 7}):
        lengths = model.code_lengths(codes, key, 3, **options)
        assert lengths.shape == (5,) and np.all(np.abs(lengths / 128 - 1) < 0.1)


def test_figures_measure_it_to_one_unit_a_call(experiment, tmp_path):
    experiment = experiment.change({"data.num_classes": 0})
    model = untrained_pipeline(experiment)
    plt.switch_backend("agg")
    steps, bits = figures.steps_figure(model, tmp_path).axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [4, 8, 16])
    np.testing.assert_allclose(bits, 1, rtol=1e-5)  # the untrained network gives 1/2
    title = figures.temperature_figure(model).axes[0].get_title()
    assert title == "4 steps, guidance 0"
    plt.close("all")


def test_a_sample_costs_its_calls_of_the_network(tiny_config):
    experiment = resolve(tiny_config).change({**GUIDED, "data.num_classes": 10})
    prior, model = experiment.prior.prior, experiment.autoencoder.networks.autoencoder
    with_label, without = (
        flops.count_network(prior.network, prior.code_shape, labelled) for labelled in (True, False)
    )
    # Rising guidance is 0 at the first of four calls.
    expected = 4 * with_label + 3 * without + flops.count_decoding(model, prior.code_shape)
    assert workloads.sample_work(experiment, 8, 2).flops == 2 * expected
    constant = experiment.change({"sample.guidance_schedule": "constant"})
    work = workloads.sample_work(constant, 8, 2)
    assert work.xla_flops == 4 * work.programs[0].flops + work.programs[1].flops
    assert work.call().shape == (8, 28, 28, 1)
