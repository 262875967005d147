"""Figures from the command line, on an untrained tiny prior."""

import jax
import numpy as np
import pytest
from conftest import untrained_pipeline
from matplotlib import pyplot as plt
from PIL import Image

from binlatent.data.splits import load_images, open_split
from binlatent.evaluation import reference
from binlatent.evaluation.judge import Judge
from binlatent.evaluation.metrics.feature_metrics import Statistics, frechet_distance
from binlatent.paper import __main__ as plots
from binlatent.paper import figures
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError


@pytest.fixture(autouse=True)
def close_figures():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_schedules_are_drawn_from_their_values(tmp_path, capsys):
    figure = figures.schedules_figure(num_timesteps=8)
    assert [axis.get_title() for axis in figure.axes] == ["linear", "cos", "sigmoid"]
    one, zero = (line.get_ydata() for line in figure.axes[0].lines)
    np.testing.assert_allclose(one, 1 - np.arange(9) / 16)
    np.testing.assert_allclose(zero, np.arange(9) / 16)
    plots.main(["schedules", f"--out={tmp_path / 'a.png'}"])
    assert Image.open(tmp_path / "a.png").size[0] > 1000


@pytest.mark.parametrize("name", ["temperature", "guidance"])
def test_rows_share_their_noise(tiny_experiment, name):
    model = untrained_pipeline(tiny_experiment.change({"prior.bernoulli.evidence": False}))
    figure = {"temperature": figures.temperature_figure, "guidance": figures.guidance_figure}[name]
    axis = figure(model).axes[0]
    other = {"temperature": "guidance 0", "guidance": "temperature 1"}[name]
    assert axis.get_title() == f"4 steps, {other}"
    values = figures.TEMPERATURES if name == "temperature" else figures.GUIDANCES
    assert [float(label.get_text()) for label in axis.get_yticklabels()] == list(values)
    sheet = axis.images[0].get_array()
    assert sheet.shape == (len(values) * 30 + 2, 10 * 30 + 2)
    # The untrained prior gives 1/2 at any temperature, so the same noise gives equal rows.
    np.testing.assert_array_equal(sheet[2:30], sheet[32:60])
    # With a trained prior the rows differ.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), model.prior_params
    )
    model = BinaryLatentDiffusion(model.experiment, model.autoencoder_params, params)
    sheet = figure(model).axes[0].images[0].get_array()
    assert np.any(sheet[2:30] != sheet[-30:-2])


def test_steps_are_those_of_the_paper_and_their_quality_is_measured(tiny_experiment, tmp_path):
    figure = figures.steps_figure(untrained_pipeline(tiny_experiment), tmp_path)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["bits per dimension (upper bound)", "accuracy", "Frechet distance"]
    steps, bits = figure.axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [4, 8])  # to the T of the tiny config
    np.testing.assert_allclose(bits, 1, atol=0.1)  # for the untrained prior bits are fair
    # The floors of the distance are horizontal lines.
    assert not figure.axes[1].lines[1:]
    _, *lines = figure.axes[2].lines
    assert [line.get_label() for line in lines] == ["real images", "reconstructions"]
    judge = Judge(tiny_experiment, tmp_path)
    network = reference.network(tiny_experiment, tmp_path)
    train, _ = load_images(open_split(tiny_experiment.data, "train"), 20)
    sets = (network.apply(x, 20)["pool"] for x in (judge.images, train))
    expected = frechet_distance(*(Statistics.of(x).gaussian for x in sets))
    np.testing.assert_allclose(lines[0].get_ydata(), expected, rtol=1e-3)


def test_without_classes_the_bound_is_drawn_and_guidance_is_refused(tiny_experiment, tmp_path):
    model = untrained_pipeline(tiny_experiment.change({"data.num_classes": 0}))
    assert len(figures.steps_figure(model, tmp_path).axes) == 1
    assert not list(tmp_path.iterdir())  # no classifier
    with pytest.raises(UserError, match="unconditional"):
        figures.guidance_figure(model)


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["temperature"], 2, "needs --workdir"),
        (["portrait"], 2, "invalid choice"),
        (["schedules", "--out=x.txt"], 1, "must end in .png, .pdf or .svg"),
        (["steps", "--workdir=nowhere"], 1, "There is no workdir nowhere"),
        (["table1"], 2, "needs --workdir"),
        (["table4", "--workdir=nowhere"], 1, "There is no workdir nowhere"),
        (["table6", "--workdir=x", "--out=x.png"], 1, "must end in .md"),
        (["table6", "--workdir=x", "--by=lpips"], 2, "--by is for neighbours, not for table6"),
        (["neighbours", "--workdir=x", "--num=0"], 2, "'0' is not a positive integer"),
        (["neighbours", "--workdir=x", "--by=eye"], 2, "invalid choice"),
        (["neighbours", "--workdir=x", "--steps=4"], 2, "--steps is for table6"),
        (["schedules", "--seed=1"], 2, "not for schedules"),
        (["schedules", "--config.seed=1"], 2, "reads no config: leave out config.seed=1"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        plots.main(flags)
    assert exit.value.code == code and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_figure_takes_changes_of_the_config(untrained_workdir, tmp_path, monkeypatch, capsys):
    drawn = []
    item = plots.ITEMS["neighbours"]
    item = plots.Item(lambda pipeline, *_: drawn.append(pipeline) or plt.figure())
    monkeypatch.setitem(plots.ITEMS, "neighbours", item)
    flags = ["neighbours", f"--workdir={untrained_workdir}", f"--out={tmp_path / 'a.png'}"]
    own = ["--config.evaluate.network=efficientnet", f"--config.evaluate.weights={tmp_path}/b.npz"]
    plots.main([*flags, *own])
    evaluate = drawn[0].experiment.evaluate
    assert (evaluate.network, evaluate.weights) == ("efficientnet", f"{tmp_path}/b.npz")
    assert drawn[0].num_classes == 10 and drawn[0].has_prior
    for change, message in (
        ("evaluate.network=eye", "config.evaluate.network must be"),
        ("evaluate.nets=eye", "The config has no key evaluate.nets"),
        ("prior.network.width=32", "does not fit the trained prior"),
    ):
        with pytest.raises(SystemExit) as end:
            plots.main([*flags, f"--config.{change}"])
        assert end.value.code == 1 and message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        plots.main(["schedules", f"--out={tmp_path / 'file' / 'a.png'}"])
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.startswith("Error: ") and "file" in error
