"""Table 5: priors trained once on one autoencoder's codes, tuned, measured and tabulated."""

import json
import shutil

import jax
import pytest

from binlatent.evaluation import report
from binlatent.evaluation.judge import Judge
from binlatent.paper import __main__ as plots
from binlatent.paper import runs, table5
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.settings import with_options
from binlatent.runtime.keys import key_for


@pytest.fixture
def workdir(untrained_workdir, tmp_path):
    """A workdir with an autoencoder only."""
    shutil.copytree(untrained_workdir / "autoencoder", tmp_path / "autoencoder")
    return tmp_path


def cells(text):
    """Returns the tables of a text, with one dictionary per row."""
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    found = []
    for table in tables:
        titles, _, *rows = [line.strip("|\n ").split(" | ") for line in table.splitlines()]
        found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


def command(workdir, *flags):
    """Runs the command; returns its text and its JSON."""
    plots.main(["table5", f"--workdir={workdir}", *flags])
    text = (workdir / "table5.md").read_text()
    return text, json.loads((workdir / "table5.json").read_text())


def test_a_prior_is_trained_once_tuned_and_measured(workdir, monkeypatch, capsys):
    monkeypatch.setattr(table5, "STEPS", (8,))  # T, so that there is one row
    monkeypatch.setattr(table5, "BATCHES", (4,))
    monkeypatch.setattr(table5, "GRID", {"temperature": (0.5, 1.0), "guidance": (0.0, 1.0)})
    flags = ["--kinds=bernoulli", "--seeds=3", "--num=30", "--config.prior.network.num_layers=0"]
    text, content = command(workdir, *flags)
    assert capsys.readouterr().out == text
    (row,), (sweep,) = content["rows"], content["sweeps"]

    # Samples are drawn with the best point of the sweep.
    points = {
        (x["options"]["temperature"], x["options"]["guidance"]): x["frechet_distance"]
        for x in sweep["points"]
    }
    assert set(points) == {(0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0)}
    tau, w = min(points, key=points.get)
    assert sweep["best"] == {"temperature": tau, "guidance": w}
    assert row["options"] == {"steps": 8, "temperature": tau, "guidance": w}

    # Floors use as many images as samples: 30, also for the sweep.
    for name in ("floors", "floors_of_sweep"):
        assert list(content["protocol"][name]) == ["real", "reconstructions"]
    made = sorted(path.name for path in workdir.glob("evaluation/reconstructions_*/*.npz"))
    assert made == ["0000000_30.npz"]

    # Each number belongs to the prior in its folder.
    folder = workdir / "table5" / "6_steps" / "bernoulli_3"
    pipeline = BinaryLatentDiffusion.from_workdir(folder)
    experiment = pipeline.experiment
    assert experiment.prior.prior.target == "z_0" and experiment.prior.cache_codes
    test = report.HeldOut.read(pipeline)
    expected = report.likelihood_metrics(pipeline, test.probs, test.labels)
    judge = Judge(experiment.change({"seed": 0}), workdir)
    key = key_for(3, "table 5, test")
    expected |= judge.sample_quality(pipeline, key, 30, **row["options"])
    assert row["seeds"] == [pytest.approx({"seed": 3, **expected}, rel=1e-4)]
    assert row["parameters"] == sum(x.size for x in jax.tree.leaves(pipeline.prior_params))
    assert row["exact"] is False and row["network_calls"] == [8, 8 if w else 0]
    assert list(row["seconds"]) == ["4"]
    assert all(0 < seconds < 10 for seconds in row["seconds"].values())

    # Without classes there is no accuracy.
    unlabelled = experiment.change({"data.num_classes": 0})
    params = unlabelled.prior.init(jax.random.key(0))
    unlabelled = BinaryLatentDiffusion(unlabelled, pipeline.autoencoder_params, params)
    assert set(judge.sample_quality(unlabelled, key, 8)) == {"frechet_distance"}

    # The second time nothing is trained or measured, so no prior is needed.
    shutil.rmtree(folder / "prior")
    assert command(workdir, *flags) == (text, content)
    assert not (folder / "prior").exists()


def test_rows_of_another_budget_are_not_compared(workdir, untrained_workdir, capsys):
    folder = workdir / "table5" / "6_steps" / "bernoulli_0"
    shutil.copytree(untrained_workdir / "prior", folder / "prior")
    with pytest.raises(SystemExit) as end:
        command(workdir, "--config.prior.train.batch_size=16")
    assert end.value.code == 1
    assert "was trained with config.prior." in capsys.readouterr().err


def test_the_table_shows_what_was_measured():
    about = {"variant": "x", "title": "X", "sampler": {"order": "random"}}
    seeds = [
        {"seed": seed, "bits_per_dim": x, "accuracy": x, "frechet_distance": 10 * x}
        for seed, x in enumerate((0.5, 0.6, 0.7))
    ]
    row = {
        **about,
        **{"parameters": 12_345, "seconds": {1: 0.25, 64: 0.001}, "seeds": seeds},
        "options": {"order": "random", "steps": 8, "temperature": 0.8, "guidance": 1.0},
        **{"exact": False, "network_calls": (8, 7)},
    }
    exact = row | {"options": {}, "sampler": {}, "exact": True, "network_calls": (0, 1)}
    points = [
        {"options": {"temperature": t, "guidance": w}, "frechet_distance": t + w}
        for t, w in ((0.8, 0.0), (0.8, 1.0), (1.2, 0.0))
    ]
    sweep = {**about, "points": points, "best": {"temperature": 0.8, "guidance": 0.0}}
    protocol = {"steps": 1_700, "batch_size": 128, "samples": 1_000, "swept": 300, "images": 500}
    protocol |= {"devices": 2, "device": "TPU v4", "jax": "0.12"}
    content = {"rows": [row, exact], "sweeps": [sweep], "protocol": protocol}
    text = table5.text_of(content)
    rows, (swept,) = cells(text)
    same = {
        **{"prior": "X", "parameters": "12,345", "bits per dimension": "0.6000 ± 0.1000"},
        **{"s/sample, batch 1": "0.25", "s/sample, batch 64": "0.001"},
        **{"accuracy": "60.0% ± 10.0%", "Frechet distance": "6.00 ± 1.00"},
    }
    first = {"sampling": "order random", "which is": "bound", "network calls": "8 + 7"}
    first |= {"temperature": "0.8", "guidance": "1"}
    second = {"sampling": "-", "which is": "exact", "network calls": "1"}
    second |= {"temperature": "-", "guidance": "-"}
    assert rows == [same | first, same | second]
    shown = {"0.8, 0": "**0.80**", "0.8, 1": "1.80", "1.2, 0": "1.20", "1, 0.5": "-"}
    assert swept.items() >= shown.items() and swept["sampling"] == "order random"
    assert "compare with" not in text
    protocol |= {"floors": {"real": 2.5}, "floors_of_sweep": {"real": 3.5, "reconstructions": 0.5}}
    told = table5.text_of(content)
    assert "values. Frechet distances to compare with: 3.5 for real images of the other" in told
    assert told.endswith("; 0.5 for test images and their reconstructions.\n")
    assert "1,700 steps of 128 codes" in text and "2 x TPU v4" in text and "300 samples" in text


def test_rows_are_of_4_8_16_and_all_calls(tiny_experiment):
    # A code is 4 x 4 tokens of 8 bits.
    steps = {
        "bernoulli": [4, 8],
        "absorbing_token": [4, 8, 16],
        "absorbing_bit": [4, 8, 16, 128],
        "absorbing_groups": [4, 8, 16, 32],
        "autoregressive_independent": [None],
        "autoregressive_joint": [None],
    }
    assert steps.keys() == table5.VARIANTS.keys()
    experiment = tiny_experiment.change({"sample.steps": 8, "prior.bernoulli.target": "flip"})
    for name, variant in table5.VARIANTS.items():
        own = table5.variant_experiment(experiment, name, 5)
        prior = own.prior.prior
        assert own.seed == 5 and own.prior.cache_codes
        assert own.prior.train == experiment.prior.train  # an equal budget
        assert prior.exact == name.startswith("autoregressive")
        orders = {sampler.get("order") for sampler in variant.samplers}
        assert orders == ({"random", "confidence"} if "absorbing" in name else {None})
        for sampler in variant.samplers:
            rows = table5.samplings(prior, sampler)
            assert [row.get("steps") for row in rows] == steps[name]
            for options in (*rows, *table5.sweep_points(prior, True, sampler)):
                settings = with_options(prior, own.sample.settings, {"guidance": 0.0} | options)
                guided = options.get("guidance", 0) > 0
                calls = options.get("steps", 1)
                assert prior.network_calls(settings, True) == (calls, calls if guided else 0)


def test_a_sampler_is_swept_by_the_options_that_it_takes(tiny_experiment):
    prior = table5.variant_experiment(tiny_experiment, "bernoulli", 0).prior.prior  # T is 8
    assert table5.samplings(prior, {}) == [{"steps": 4}, {"steps": 8}]
    pairs = [(x["temperature"], x["guidance"]) for x in table5.sweep_points(prior, True, {})]
    temperatures, guidances = table5.GRID["temperature"], table5.GRID["guidance"]
    assert pairs == [(t, w) for t in temperatures for w in guidances]
    unlabelled = table5.sweep_points(prior, False, {"pair": "plain_mixture"})
    fixed = {"pair": "plain_mixture", "steps": 8, "guidance": 0.0}
    assert unlabelled == [fixed | {"temperature": t} for t in temperatures]


def test_an_older_workdirs_config_is_filled_up_and_flags_change_it(tiny_experiment, monkeypatch):
    older = tiny_experiment.config
    del older["prior"]["bernoulli"]["stratified"], older["sample"]["corrector_size"]
    monkeypatch.setattr(type(tiny_experiment), "config", older)
    made = runs.base_experiment(tiny_experiment, ["prior.train.num_steps=7", "dtype=bfloat16"])
    assert made.content["sample"]["corrector_size"] == 0.1
    assert made.prior.train.num_steps == 7 and made.dtype.name == "bfloat16"
    assert made.autoencoder.code_shape == (4, 4, 8)


@pytest.mark.parametrize(
    "flag, code, message",
    [
        ("--kinds=gan", 2, "'gan' is not one of bernoulli"),
        ("--seeds=1,1", 2, "'1,1' has equal seeds"),
        (
            "--config.prior.train.steps=1",
            1,
            "The config has no key prior.train.steps, or 1 does not",
        ),
        ("--config.seed=x", 1, "The config has no key seed, or 'x' does not have the type"),
        ("--steps=4", 2, "--steps is for table6, not for table5"),
    ],
)
def test_wrong_flags_are_one_sentence(workdir, capsys, flag, code, message):
    with pytest.raises(SystemExit) as end:
        command(workdir, flag)
    assert end.value.code == code and message in capsys.readouterr().err
    assert not (workdir / "table5").exists()
