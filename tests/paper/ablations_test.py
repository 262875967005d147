"""The ablations' runs and tables, on one variant of the tiny config."""

import json
import re

import numpy as np
import pytest

from binlatent import stages
from binlatent.experiment import of_checkpoint, resolve
from binlatent.paper import ablations, runs
from binlatent.training.checkpoint import Checkpoints


def test_every_row_names_a_variant_and_a_sampler():
    for caption, rows in ablations.TABLES.items():
        assert len({label for label, _, _ in rows}) == len(rows), caption
        for _, variant, sampler in rows:
            assert variant in ablations.VARIANTS
            assert sampler in {"", *ablations.SAMPLERS, *ablations.INPAINTERS}
    assert not set(ablations.SAMPLERS) & set(ablations.INPAINTERS)
    named = {variant for rows in ablations.TABLES.values() for _, variant, _ in rows}
    assert named == set(ablations.VARIANTS)


def test_variants_change_what_they_say(tiny_experiment):
    experiment = tiny_experiment.change({"prior.train.num_steps": 100})
    changed = ablations.variant_of(experiment, "flip, quarter", 5)
    assert changed.seed == 5 and not changed.prior.prior.evidence
    assert changed.prior.train.num_steps == 25 and experiment.prior.train.num_steps == 100
    for variant in ablations.VARIANTS:
        ablations.variant_of(experiment, variant, 0)


@pytest.mark.slow
def test_a_variant_is_trained_once_measured_and_tabulated(tiny_config, tmp_path):
    tiny_config.prior.bernoulli.num_timesteps = 16
    experiment = resolve(tiny_config)
    stages.train_autoencoder(experiment, tmp_path)
    results = ablations.measure_rows(experiment, tmp_path, 1, ["lambda 0"])
    values = results["lambda 0", "", 0]
    assert set(values) == {"bits_per_image", "bits_per_dim", "accuracy", "frechet_distance"}
    # After few steps a prior with evidence is little better than fair bits.
    assert 0.7 < values["bits_per_dim"] < 1.1
    with Checkpoints.open(tmp_path / "6_steps" / "lambda_0_0", "prior") as checkpoints:
        trained = of_checkpoint(checkpoints.newest(Checkpoints.meta), tmp_path)
    assert trained.prior.prior.vlb_weight == 0
    lines = (tmp_path / "6_steps" / "results.jsonl").read_text().splitlines()
    ablations.measure_rows(experiment, tmp_path, 1, ["lambda 0"])  # nothing is left to do
    assert (tmp_path / "6_steps" / "results.jsonl").read_text().splitlines() == lines

    assert set(results["floors", "", 0]) == {"real", "reconstructions"}
    text = ablations.markdown_tables(results, seeds=1)
    assert len(re.findall(r"compare with: [\d.]+ for real images of the other split", text)) == 1
    assert f"| 0 | {values['bits_per_dim']:.4f} | {values['accuracy']:.1%} |" in text


def test_tables_show_means_and_spreads(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [
        {
            "row": ["z_0", "", seed],
            "values": {"bits_per_dim": x, "accuracy": x, "frechet_distance": 1},
        }
        for seed, x in enumerate((0.5, 0.6, 0.7))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ablations.markdown_tables(runs.read_rows(path), seeds=3)
    spread = np.std([0.5, 0.6, 0.7], ddof=1)
    assert f"| z_0 | 0.6000 ± {spread:.4f} | 60.0% ± 10.0% | 1.00 ± 0.00 |" in text
    assert text.count("###") == 1  # no table without a row
