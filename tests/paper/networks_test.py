"""Parts of the prior's network: rows are trained and measured once, also after a kill."""

import json
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from binlatent.benchmark import flops
from binlatent.evaluation import report
from binlatent.evaluation.judge import Judge
from binlatent.paper import __main__ as plots
from binlatent.paper import networks, runs
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.dit import DiT
from binlatent.priors.transformer import Transformer
from binlatent.runtime.keys import key_for
from binlatent.training.checkpoint import Checkpoints

TWO_STEPS = [
    *("--config.prior.train.num_steps=2", "--config.prior.network.num_layers=0"),
    *("--config.checkpoint_every=1", "--config.log_every=1"),
]


@pytest.fixture(scope="module")
def workdir(untrained_workdir, tmp_path_factory):
    """A workdir that has an autoencoder at first; codes and the classifier are made once."""
    path = tmp_path_factory.mktemp("networks")
    shutil.copytree(untrained_workdir / "autoencoder", path / "autoencoder")
    return path


def command(workdir, *flags):
    """Runs the command; returns its text and its JSON."""
    plots.main(["networks", f"--workdir={workdir}", *flags])
    text = (workdir / "networks.md").read_text()
    return text, json.loads((workdir / "networks.json").read_text())


def test_a_row_is_the_released_network_with_a_part_or_dit_without_one():
    titles = [title for title, _ in networks.ROWS.values()]
    assert len(set(titles)) == len(titles) == 1 + 4 + 1 + 4
    released, whole = networks.ROWS["released"][1], networks.ROWS["dit"][1]
    assert released["network.name"] == "released" and whole["network.name"] == "dit"
    for name, (_, key, value) in networks.PARTS.items():
        assert networks.ROWS[name][1] == released | {"network.name": "dit", key: value}
        assert networks.ROWS[f"without_{name}"][1] == whole | {key: released[key]}
        assert whole[key] == value != released[key]


def test_a_row_is_resolved_to_its_network(tiny_experiment):
    experiment = tiny_experiment.change({"prior.kind": "absorbing", "prior.network.name": "dit"})
    found = {name: networks.row_experiment(experiment, name, 5) for name in networks.ROWS}
    assert {(own.seed, own.prior.kind, own.prior.cache_codes) for own in found.values()} == {
        (5, "bernoulli", True)
    }
    priors = {name: own.prior.prior for name, own in found.items()}
    assert type(priors["released"].network) is Transformer
    assert type(priors["without_rotary"].network) is DiT
    assert priors["dit"].network == DiT(16, 1, 2, "class", num_classes=10)


def test_a_killed_command_goes_on_and_a_finished_row_is_read(workdir, monkeypatch, capsys):
    monkeypatch.setattr(networks, "STEPS", (8, 64))  # T is 8
    flags = ["--seeds=3", "--num=20", *TWO_STEPS]
    folder = workdir / "networks" / "2_steps"

    def killed_after(cls, name, count):
        """Runs the command, and kills it after a number of calls of a method."""
        method, calls = getattr(cls, name), []

        def call(*arguments, **keywords):
            result = method(*arguments, **keywords)
            calls.append(arguments)
            if len(calls) == count:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(cls, name, call)
            command(workdir, "--rows=swiglu", *flags)
        assert end.value.code == 130

    killed_after(Checkpoints, "save", 1)
    killed_after(Judge, "sample_quality", 1)
    assert "The prior resumes at step 1" in capsys.readouterr().err
    (path,) = folder.glob("results_*.jsonl")
    before = path.read_text()
    _, content = command(workdir, "--rows=swiglu", *flags)
    assert path.read_text().startswith(before)
    assert list(content["protocol"]["floors"]) == ["real", "reconstructions"]

    # Each number belongs to the prior in its folder.
    ((found,),) = (row["seeds"] for row in content["rows"])
    pipeline = BinaryLatentDiffusion.from_workdir(folder / "swiglu_3")
    prior = pipeline.experiment.prior.prior
    assert type(prior.network) is DiT
    assert found["steps"] == pipeline.experiment.prior.train.num_steps == 2
    test = report.HeldOut.read(pipeline)
    expected = report.likelihood_metrics(pipeline, test.probs, test.labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(pipeline.prior_params))
    assert found["flops"] == flops.count_prior_step(prior)
    speeds = [
        entry["images_per_second"]
        for line in (folder / "swiglu_3" / "metrics.jsonl").read_text().splitlines()
        if "images_per_second" in (entry := json.loads(line))
    ]
    assert found["seconds"] == pytest.approx(2 * 8 / np.median(speeds))
    judge = Judge(pipeline.experiment.change({"seed": 0}), workdir)
    options = {"steps": 8, "guidance": 0.0, "temperature": 1.0}
    quality = judge.sample_quality(pipeline, key_for(3, "networks, test"), 20, **options)
    assert found["samples"] == [pytest.approx({"sampling_steps": 8, **quality}, rel=1e-4)]

    # Numbers of another row in the file are used as they are, without its prior.
    numbers = runs.read_rows(path)
    other = {("released", *row[1:]): x | {"steps": 7} for row, x in numbers.items()}
    runs.write_rows(path, numbers | other)
    shutil.rmtree(folder / "swiglu_3")
    _, both = command(workdir, "--rows=released,swiglu", *flags)
    assert both["rows"][1:] == content["rows"] and both["rows"][0]["title"] == "released"
    assert both["rows"][0]["seeds"][0]["steps"] == 7
    assert not (folder / "released_3").exists() and not (folder / "swiglu_3").exists()


def test_priors_of_texts_share_the_features_and_their_encoder(tmp_path):
    for name, encoder, names in (
        ("a", "", {"autoencoder", "codes"}),
        ("b", "clip", {"autoencoder", "codes", "texts", "clip.npz"}),
    ):
        workdir, own = tmp_path / name, SimpleNamespace(texts=SimpleNamespace(encoder=encoder))
        (workdir / "autoencoder").mkdir(parents=True)
        (workdir / "clip.npz").touch()
        runs.link_shared(own, workdir, workdir / "networks" / "x")
        found = {path.name: path.resolve() for path in (workdir / "networks" / "x").iterdir()}
        assert found == {shared: (workdir / shared).resolve() for shared in names}


def test_steps_are_decided_once(workdir, tiny_experiment, monkeypatch):
    stages_timed = []

    def seconds_a_step(stage):
        stages_timed.append(stage)
        return 0.4 if len(stages_timed) == 1 else 0.08

    monkeypatch.setattr(networks, "seconds_a_step", seconds_a_step)
    experiment = tiny_experiment.change({"prior.cache_codes": True})
    folder = workdir / "networks" / "2_seconds"
    inputs = experiment, workdir, folder
    assert networks._decide_steps(*inputs, ["released"], 2) == {"released": 5}
    # A command that continues keeps them.
    both = networks._decide_steps(*inputs, ["released", "qk_norm"], 2)
    assert both == {"released": 5, "qk_norm": 25}
    assert len(stages_timed) == 2 and stages_timed[0].train.batch_size == 8


def test_a_step_is_timed_without_what_compiles():
    pauses = iter([0.5, 0.3, *[0.002] * networks._TIMED])

    def step(state, batch, index):
        time.sleep(next(pauses))
        return state + 1, {"step": state}

    batches = iter([{"label": np.zeros(jax.local_device_count())}] * (networks._TIMED + 2))
    stage = SimpleNamespace(state=np.zeros(()), step=step, batches=batches)
    assert 0.002 <= networks.seconds_a_step(stage) < 0.1


def test_the_table_shows_what_was_measured():
    def seed(x):
        samples = [
            {"sampling_steps": steps, "accuracy": x, "frechet_distance": 10 * x + steps}
            for steps in (4, 64)
        ]
        numbers = {"parameters": 12_345, "flops": 6.6e7, "steps": 1_700, "seconds": 100 * x}
        return {"seed": 0, **numbers, "bits_per_dim": x, "bits_per_image": 384 * x} | {
            "samples": samples
        }

    row = {"row": "x", "title": "X", "seeds": [seed(0.5), seed(0.7)]}
    protocol = {"steps": 1_700, "seconds": None, "batch_size": 128, "samples": 1_000}
    protocol |= {"images": 500, "network": "inception", "floors": {"real": 2.5}}
    protocol |= {"devices": 2, "device": "TPU v4", "jax": "0.12"}
    content = {"rows": [row], "protocol": protocol}
    text = networks.networks_text(content)
    titles, _, cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:5]]
    spread = np.std([0.5, 0.7], ddof=1)
    assert dict(zip(titles, cells, strict=True)) == {
        **{"network": "X", "parameters": "12,345", "GFLOP": "0.066", "steps": "1,700"},
        "seconds of training": f"60.0 ± {100 * spread:.1f}",
        "bits per dimension": f"0.6000 ± {spread:.4f}",
        "accuracy, 4 steps": f"60.0% ± {spread:.1%}",
        "accuracy, 64 steps": f"60.0% ± {spread:.1%}",
        "Frechet distance, 4 steps": f"10.00 ± {10 * spread:.2f}",
        "Frechet distance, 64 steps": f"70.00 ± {10 * spread:.2f}",
    }
    assert "1,700 steps of training" in text and "compared by inception with at most 500" in text
    assert "2.5 for real images of the other split" in text
    protocol |= {"seconds": 900, "steps": None}
    assert "Parts of the network, 900 seconds of training" in networks.networks_text(content)


@pytest.mark.parametrize(
    "flag, code, message",
    [
        ("--rows=released,gan", 2, "'gan' is not one of released, adaln"),
        ("--seconds=0", 2, "'0' is not a positive integer"),
        ("--kinds=bernoulli", 2, "--kinds is for table5, not for networks"),
        ("--config.prior.bernoulli.target=z_s", 1, 'needs the target "flip" or "z_0"'),
        ("--config.evaluate.network=efficientnet", 1, "--config.evaluate.weights=FILE"),
    ],
)
def test_wrong_flags_are_one_sentence(untrained_workdir, tmp_path, capsys, flag, code, message):
    (tmp_path / "autoencoder").symlink_to(untrained_workdir / "autoencoder")
    with pytest.raises(SystemExit) as end:
        command(tmp_path, "--config.evaluate.weights=none.npz", flag)
    assert end.value.code == code and message in capsys.readouterr().err
    assert not (tmp_path / "networks").exists()
