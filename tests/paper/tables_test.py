"""Tables of a workdir: from results written by the test, and Table 6 on a tiny prior."""

import json
import os

import jax
import numpy as np
import pytest
from conftest import untrained_pipeline

from binlatent.paper import __main__ as plots
from binlatent.paper import bottlenecks, tables
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError


@pytest.fixture
def pipeline(tiny_experiment):
    return untrained_pipeline(tiny_experiment)


def change(pipeline, **values):
    """Gives the pipeline another experiment; "__" is a dot in a key."""
    values = {name.replace("__", "."): value for name, value in values.items()}
    pipeline.experiment = pipeline.experiment.change(values)


def samples_of(pipeline, **settings):
    """Returns the protocol of samples of a pipeline's weights."""
    return {
        "weights": f"EMA, {weights.fingerprint(pipeline.prior_params)}",
        "autoencoder": weights.fingerprint(pipeline.autoencoder_params),
        **{"seed": 0, "labels": "balanced", "steps": 16, "temperature": 0.8, "guidance": 2.0},
        **{"count": 50_000, **settings},
    }


def write(workdir, age, metrics, **protocol):
    """Writes a result of a given age in seconds."""
    path = workdir / "evaluation" / f"{age}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics, "protocol": protocol}))
    os.utime(path, (1e9 - age, 1e9 - age))


def cells(text):
    """Returns a Markdown table as one dictionary per row."""
    titles, rule, *rows = [line.strip("|\n ").split(" | ") for line in text.splitlines()]
    assert set(rule) == {"---"} and all(len(row) == len(titles) for row in rows)
    return [dict(zip(titles, row, strict=True)) for row in rows]


TRAIN = {"network": {"network": "x"}, "reference": {"images": "digits", "split": "train"}}


@pytest.mark.parametrize("content", [None, "{", '{"metrics": 1}'])
def test_what_is_no_result_is_named(tmp_path, content):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "a.json").write_text('{"metrics": {"fid": 1.0}, "protocol": {}}')
    assert tables.stored_results(tmp_path) == [{"metrics": {"fid": 1.0}, "protocol": {}}]
    if content is None:
        (folder / "b.json").symlink_to(tmp_path / "moved.json")
    else:
        (folder / "b.json").write_text(content)
    with pytest.raises(UserError, match="b.json is not a result of an evaluation: delete it"):
        tables.stored_results(tmp_path)


def test_table1_has_a_row_for_each_sampler(pipeline, tmp_path):
    fast, slow = samples_of(pipeline), samples_of(pipeline, steps=64, count=1_000)
    write(tmp_path, 9, {"fid": 99.0, "precision": 0.9, "recall": 0.9}, samples=fast, **TRAIN)
    write(tmp_path, 8, {"fid": 4.96, "precision": 0.66, "recall": 0.48}, samples=slow, **TRAIN)
    write(tmp_path, 7, {"is": 162.32, "is_std": 1.5}, samples=slow, network={"network": "x"})
    write(tmp_path, 6, {"cas_top1": 0.6507, "cas_top5": 0.856}, samples=slow, cas={"epochs": 1})
    write(tmp_path, 5, {"fid": 8.21}, samples=fast, jax="newer", **TRAIN)
    write(tmp_path, 4, {"fid": 1.0}, samples=samples_of(pipeline, weights="EMA, old"), **TRAIN)
    write(tmp_path, 3, {"psnr": 20.0, "psnr_std": 1.0}, **{"test images": {}})
    text, rows = tables.table1(pipeline, tmp_path)
    count = f"{sum(np.size(x) for x in jax.tree.leaves(pipeline.prior_params)):,}"
    both = {"temperature": "0.8", "guidance": "2.0", "parameters": count}
    missing = dict.fromkeys(["IS", "precision", "recall", "CAS top-1", "CAS top-5"], "-")
    assert cells(text) == [
        {"steps": "16", "samples": "50,000", "FID": "8.21", **missing, **both},
        {
            **{"steps": "64", "samples": "1,000", "FID": "4.96", "IS": "162.3 ± 1.5"},
            **{"precision": "0.660", "recall": "0.480"},
            **{"CAS top-1": "65.07%", "CAS top-5": "85.60%", **both},
        },
    ]
    assert text.splitlines()[0] == (
        "| steps | temperature | guidance | samples | FID | IS | precision | recall | CAS top-1 "
        "| CAS top-5 | parameters |"
    )
    assert [row["metrics"]["fid"] for row in rows] == [8.21, 4.96]
    assert rows[0]["protocol"]["jax"] == "newer" and rows[1]["metrics"]["cas_top1"] == 0.6507


def test_table1_names_the_distance_and_tells_rows_apart(pipeline, tmp_path):
    change(pipeline, data__num_classes=0)
    for age in (0, 1):
        samples = samples_of(pipeline, labels="none", seed=age)
        metrics = {"fd_effnet": 10.5 + age, "precision_effnet": 0.5}
        write(tmp_path, age, metrics, samples=samples, **TRAIN)
    write(tmp_path, 2, {"fid": 3.0}, samples=samples, **TRAIN | {"network": {"network": "y"}})
    found = cells(tables.table1(pipeline, tmp_path)[0])
    # Table 2's columns need classes; without classes there is no guidance.
    assert "CAS top-1" not in found[0] and found[0]["guidance"] == "-"
    shown = [(row["seed"], row["FD-EffNet"], row["precision effnet"], row["FID"]) for row in found]
    assert shown == [("0", "10.5", "0.500", "-"), ("1", "11.5", "0.500", "-"), ("1", "-", "-", "3")]


def test_floors_stand_below_table1_once(pipeline, tmp_path):
    floors = {"fid_real": 3.15, "fid_reconstructions": 41.5}
    for age, count in enumerate((10_000, 10_000, 500)):
        samples = samples_of(pipeline, seed=age, count=count)
        metrics = {"fid": 60.0 + age, **(floors if count > 500 else {"fid_real": 9.0})}
        write(tmp_path, age, metrics, samples=samples, **TRAIN)
    table, *below = tables.table1(pipeline, tmp_path)[0].split("\n\n")
    assert [row["FID"] for row in cells(table)] == ["60", "61", "62"]
    assert [line.strip() for line in below] == [
        "To compare with 10,000 samples: FID of real images 3.15, FID of reconstructions 41.5.",
        "To compare with 500 samples: FID of real images 9.",
    ]


def test_table4_is_of_the_most_images_of_the_autoencoder(pipeline, tmp_path):
    own = {"autoencoder": weights.fingerprint(pipeline.autoencoder_params)}
    old = {"psnr": 9.0, "psnr_std": 1.0, "ssim": 0.5, "ssim_std": 0.1, "lpips": 1.0, "lpips_std": 1}
    new = {"psnr": 24.021, "psnr_std": 2.11, "ssim": 0.75, "ssim_std": 0.06}
    more = {"ssim": 0.3, "ssim_std": 0.1, "lpips": 0.2, "lpips_std": 0.02}
    write(tmp_path, 3, more, **{"test images": own | {"count": 500}})
    write(tmp_path, 2, new, **{"test images": own | {"count": 500}})
    write(tmp_path, 1, old, **{"test images": own | {"count": 20}})
    write(tmp_path, 0, old, **{"test images": {"autoencoder": "another", "count": 500}})
    text, (row,) = bottlenecks.table4_row(pipeline, tmp_path)
    # 28 pixels in patches of 7 are 4 x 4 tokens, of 8 bits in the tiny config.
    assert cells(text) == [
        {
            **{"method": "Binary", "size": "4×4×8", "bits per image": "128"},
            **{"images": "500", "PSNR": "24.02 ± 2.11"},
            **{"SSIM": "0.750 ± 0.060", "LPIPS": "0.200 ± 0.020"},
        }
    ]
    assert row["metrics"] == more | new and row["bits"] == 128
    for bottleneck, bits in (("vq", 16 * 10), ("real", 32 * 16 * 6)):
        sizes = {"autoencoder__codebook_size": 1_024, "autoencoder__num_channels": 6}
        change(pipeline, autoencoder__bottleneck=bottleneck, **sizes)
        assert bottlenecks.table4_row(pipeline, tmp_path)[1][0]["bits"] == bits


def test_table6_times_one_sample_after_another(pipeline, monkeypatch):
    calls, clock = [], [0.0]

    def sample(num, key, label, steps):
        calls.append((num, label, steps))
        clock[0] += 100.0 if len(calls) in (1, 5) else len(calls) ** 2  # compilation takes long

    monkeypatch.setattr(pipeline, "sample", sample)
    monkeypatch.setattr(tables.time, "perf_counter", lambda: clock[0])
    text, rows = tables.table6(pipeline, num=3, steps=[2, 8, 64])
    assert calls == [(1, i, steps) for steps in (2, 8) for i in range(4)]  # T is 8
    assert [row["steps"] for row in rows] == [2, 8]
    np.testing.assert_allclose([row["seconds"] for row in rows], [29 / 3, 149 / 3])
    assert [row["median"] for row in rows] == [9, 49]
    first = cells(text)[0]
    assert first["s/sample"] == "9.67" and first["device"] == "4 x cpu" and first["samples"] == "3"
    assert first["batch"] == "1 per device, the same sample on all 4"
    with pytest.raises(UserError, match="at most 8"):
        tables.table6(pipeline)


def test_the_command_writes_table6(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots.BinaryLatentDiffusion, "from_workdir", lambda *_, **__: pipeline)
    plots.main(["table6", f"--workdir={tmp_path}", "--num=2", "--steps=1,4"])
    rows = json.loads((tmp_path / "table6.json").read_text())
    assert [row["steps"] for row in rows] == [1, 4]
    assert all(0 < row["median"] < 10 and 0 < row["seconds"] < 10 for row in rows)
    text = (tmp_path / "table6.md").read_text()
    assert text == capsys.readouterr().out
    found = cells(text)
    assert list(found[0]) == [
        *("steps", "s/sample", "median", "samples", "guidance", "parameters", "dtype"),
        *("device", "batch", "JAX"),
    ]
    assert found[1]["JAX"] == jax.__version__ and found[1]["guidance"] == "1"


@pytest.mark.parametrize("make", [tables.table1, bottlenecks.table4_row])
def test_without_results_the_command_is_named(pipeline, tmp_path, make):
    wanted = "fid,is,pr" if make is tables.table1 else "psnr,ssim"
    with pytest.raises(UserError, match=f"no results .* --mode=evaluate .*--metrics={wanted}` fir"):
        make(pipeline, tmp_path)
    write(tmp_path, 0, {"fid": 1.0}, samples=samples_of(pipeline, weights="EMA, old"), **TRAIN)
    write(tmp_path, 1, {"psnr": 1.0, "psnr_std": 1.0}, **{"test images": {"count": 3}})
    with pytest.raises(UserError, match=f"do not belong to .*--metrics={wanted}` again"):
        make(pipeline, tmp_path)
    (tmp_path / "evaluation" / "0.json").write_text("[]")
    with pytest.raises(UserError, match=r"0\.json is not a result"):
        make(pipeline, tmp_path)
