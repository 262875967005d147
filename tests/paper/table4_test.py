"""Table 4: every bottleneck trained once, and compared on the same images."""

import json

import numpy as np
import pytest

from binlatent.evaluation import report
from binlatent.experiment import resolve
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError


@pytest.mark.slow
def test_table_4(tiny_config, tiny_experiment, tmp_path, monkeypatch):
    sizes = {"autoencoder.codebook_size": 32, "autoencoder.num_channels": 3}
    experiment = tiny_experiment.change(sizes)
    text = bottlenecks.compare_bottlenecks(experiment, tmp_path)
    results = json.loads((tmp_path / "table4.json").read_text())
    assert (tmp_path / "table4.md").read_text() == text
    bits = {name: row["bit_rate"] for name, row in results.items()}
    assert bits == {
        "vq": 16 * 5,  # log2(32) bits per token
        "binary_as_vq": 16 * 5,
        "binary": 16 * 8,
        "real": 16 * 3 * 32,
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["VQ", "4×4×32"],
        ["Binary", "4×4×5"],
        ["Binary", "4×4×8"],
        ["Real value", "4×4×3"],
    ]
    any_of_them = BinaryLatentDiffusion.from_workdir(tmp_path / next(iter(results)))
    images, _ = report.test_images(any_of_them, 20)
    for name, row in zip(results, rows, strict=True):
        pipeline = BinaryLatentDiffusion.from_workdir(tmp_path / name)
        error = np.square(
            np.round(127.5 * (pipeline.reconstruct(images) + 1))
            - np.round(127.5 * (images.astype(np.float64) + 1))
        )
        psnr = 10 * np.log10(255**2 / np.mean(error, axis=(1, 2, 3)))
        found = [float(x) for x in row[3].split(" ± ")]
        np.testing.assert_allclose(found, [np.mean(psnr), np.std(psnr)], atol=0.02)
    # The second time nothing is trained, even from a folder with another vgg16.npz.
    monkeypatch.chdir(tmp_path / "vq")
    experiment = resolve(tiny_config).change(sizes)
    steps = (tmp_path / "vq" / "metrics.jsonl").read_text()
    assert bottlenecks.compare_bottlenecks(experiment, tmp_path) == text
    assert (tmp_path / "vq" / "metrics.jsonl").read_text() == steps
    # Rows with another budget or loss are refused.
    rate = 2 * experiment.autoencoder.train.learning_rate
    with pytest.raises(UserError, match="vq was trained with config.autoencoder.train = "):
        bottlenecks.compare_bottlenecks(
            experiment.change({"autoencoder.train.learning_rate": rate}), tmp_path
        )


def test_as_many_bits_as_the_codebook_has_is_one_row(tiny_experiment):
    experiment = tiny_experiment.change({"autoencoder.codebook_size": 2**8})
    assert experiment.autoencoder.bottleneck.bits == 8
    assert list(bottlenecks.variants(experiment)) == ["vq", "binary", "real"]
