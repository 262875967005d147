"""The samples of report.json: which, how many, and the reason if they are not judged."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from binlatent.data.splits import load_images, open_split
from binlatent.evaluation import reference, report
from binlatent.evaluation.networks.features import Network


@pytest.fixture
def drawn(tiny_experiment, monkeypatch):
    """A pipeline that returns noise, the list of its draws, and a switch of the judge."""
    labels = load_images(open_split(tiny_experiment.data, "test"), 20)[1]
    numbers, judge = [], SimpleNamespace(right=True)

    def judged(images, batch_size):
        named = np.resize(labels + (not judge.right), len(images)) % 10
        return {"pool": images[:, 14, :5, 0].astype(np.float32), "logits": np.eye(10)[named]}

    def sample(num, key, labels, **options):
        numbers.append((num, options))
        return np.random.default_rng(num).uniform(-1, 1, (num, 28, 28, 1)).astype(np.float32)

    network = Network("classifier", 5, judged, {"name": "pixels"})
    monkeypatch.setattr(reference, "classifier", lambda *_: network)
    values = {"evaluate.num_samples": 30, "sample.batch_size": 20, "data.num_classes": 10}
    pipeline = SimpleNamespace(
        experiment=tiny_experiment.change(values),
        num_classes=10,
        autoencoder_params={"x": np.zeros(1)},
        sample=sample,
        encode_probs=lambda x: (x + 1) / 2,
        decode=lambda codes: codes,
    )
    return pipeline, numbers, judge


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_without_guidance_samples_are_drawn_once(drawn, tmp_path, guidance):
    pipeline, numbers, _ = drawn
    pipeline.experiment = pipeline.experiment.change({"sample.guidance": guidance})
    found = report.sample_metrics(pipeline, tmp_path, seconds := {})
    assert numbers == [(30, {})] + [(30, {"guidance": 0.0})] * (guidance > 0)
    names = {"accuracy", "frechet_distance"}
    assert names <= set(found) and found["num_samples"] == 30 and found["guidance"] == guidance
    unguided = {name for name in found if name.endswith("_unguided")}
    assert unguided == ({f"{name}_unguided" for name in names} if guidance else set())
    assert list(seconds) == ["sampling"]


def test_a_classifier_near_chance_costs_one_batch_of_samples(drawn, tmp_path):
    pipeline, numbers, judge = drawn
    judge.right = False
    found = report.sample_metrics(pipeline, tmp_path, seconds := {})
    assert numbers == [(20, {})] and found["num_timed"] == 20 and list(seconds) == ["sampling"]
    assert "cannot judge samples" in found["unjudged"]
    assert not {"num_samples", "accuracy", "frechet_distance"} & set(found)


def test_without_classes_the_log_says_what_judges_samples(
    drawn, untrained_workdir, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(report, "measure", lambda *_: ({}, {}))  # of other sections
    workdir = shutil.copytree(untrained_workdir, tmp_path / "workdir")
    pipeline, numbers, _ = drawn
    pipeline.experiment = pipeline.experiment.change({"data.num_classes": 0})
    with caplog.at_level(logging.INFO):
        found = report.report(pipeline, workdir)
    assert "samples" not in found and not numbers
    assert "report.json has no samples section" in caplog.text
    assert "--mode=evaluate --metrics=fid" in caplog.text
