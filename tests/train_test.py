"""Training end to end on the tiny config: resuming, interruption, failure, and what is left."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import call_main, held, tiny_flags
from PIL import Image

from binlatent import stages
from binlatent.data import codes
from binlatent.data.sources import Source
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float
from binlatent.evaluation import quality, report
from binlatent.paper import bottlenecks
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.devices import replicate
from binlatent.runtime.errors import UserError
from binlatent.training import loop
from binlatent.training.checkpoint import Checkpoints
from binlatent.training.logbook import Logbook
from binlatent.training.state import updates_made

from_workdir = BinaryLatentDiffusion.from_workdir


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def start(workdir, digits_dir, *flags, env=None):
    """Starts `python -m binlatent.main` on the tiny config in another process."""
    command = [sys.executable, "-m", "binlatent.main", *tiny_flags(digits_dir)]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def wait_for(path, seconds=180):
    """Waits until a file or folder exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def trained(trained_workdir, tmp_path_factory):
    """A copy of the workdir of both tiny stages, trained by the main job in one go; its output."""
    workdir = shutil.copytree(trained_workdir, tmp_path_factory.mktemp("trained") / "workdir")
    return workdir, (workdir / "output.txt").read_text()


def test_main_job_leaves_the_pictures_and_the_report(trained):
    workdir, output = trained
    for name in ("samples", "reconstructions", "inpainting", "trajectory"):
        assert re.search(f"^Wrote .*/{name}.png$", output, re.MULTILINE)
        picture = np.asarray(Image.open(workdir / f"{name}.png"))
        assert picture.ndim == 2 and len(np.unique(picture)) > 2
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["autoencoder"]) == {
        *("psnr", "psnr_std", "ssim", "ssim_std"),
        *("bit_rate", "mean_bit_entropy", "dead_bits", "duplicate_bits"),
    }
    assert report["autoencoder"]["bit_rate"] == 4 * 4 * 8
    assert 0 < report["prior"]["bce"] < 1
    # A classifier of 40 images is near chance and is not used.
    assert {"unjudged", "classifier_accuracy"} <= set(report["samples"])
    assert not {"accuracy", "frechet_distance", "accuracy_unguided"} & set(report["samples"])
    assert report["samples"]["steps"] == 4 and "num_samples" not in report["samples"]
    assert report["samples"]["num_timed"] == 20  # a batch
    assert {"autoencoder", "prior", "sampling"} == set(report["seconds"])
    assert report["device"] == "4 x cpu"


def test_a_strict_parser_reads_all_json_of_a_run(trained):
    def refuse(word):  # NaN, Infinity
        raise ValueError(word)

    workdir, _ = trained
    paths = [*workdir.rglob("*.json"), *workdir.rglob("*.jsonl")]
    paths += workdir.glob("*/*/meta/metadata")
    names = {path.name for path in paths}
    assert {"report.json", "metrics.jsonl", "info.json", "metadata", "classes.json"} <= names
    for path in paths:
        text = path.read_text()
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line, parse_constant=refuse)


def test_metrics_and_previews_are_written(trained):
    workdir, output = trained
    written = lines(workdir)
    losses = [x for x in written if x["stage"] == "prior" and "loss" in x]
    assert [x["step"] for x in losses] == [2, 4, 6]
    assert {"flip_accuracy", "images_per_second", "data_wait"} <= set(losses[0])
    assert {"grad_norm", "param_norm", "learning_rate"} <= set(losses[0])
    assert all(0 <= x["data_wait"] < 1 for x in losses)
    # The closed form of a warm-up of 2 steps and a cosine over 4, after 1, 3 and 5 of them.
    rates = [0.5, (1 + np.cos(np.pi / 4)) / 2, (1 + np.cos(3 * np.pi / 4)) / 2]
    np.testing.assert_allclose([x["learning_rate"] / 4e-3 for x in losses], rates, rtol=1e-4)
    assert any("psnr" in x for x in written) and any("bce" in x for x in written)
    assert (workdir / "figures" / "autoencoder_preview_0000006.png").exists()
    assert (workdir / "figures" / "prior_preview_0000006.png").exists()
    assert list((workdir / "tensorboard" / "prior").glob("events*"))
    # Plain lines with speed, loss and time left, each once, where there is no terminal.
    line = [x for x in output.splitlines() if x.startswith("prior 4/6")]
    assert len(line) == 1
    assert all(word in line[0] for word in ("loss", "images_per_second", "left"))


def test_only_the_last_checkpoints_are_kept(trained):
    with Checkpoints(trained[0] / "prior", 3) as checkpoints:
        assert checkpoints.all_steps() == [2, 4, 6]


def test_a_finished_stage_is_not_trained_again(trained, digits_dir, capsys):
    workdir, _ = trained
    before = lines(workdir)
    flags = (*tiny_flags(digits_dir), f"--workdir={workdir}", "--mode=train_autoencoder")
    assert call_main(*flags) == 0
    assert "The autoencoder is trained: 6 steps" in capsys.readouterr().err
    assert lines(workdir) == before


def restored(workdir, stage, experiment):
    """The whole state of a stage's newest checkpoint, and where in the data it was."""
    spec = {"autoencoder": experiment.autoencoder, "prior": experiment.prior}[stage]
    with Checkpoints(workdir / stage, alone=True) as checkpoints:
        state = checkpoints.restore(replicate(spec.init_state(experiment.seed)))
        return state.replace(key=jax.random.key_data(state.key)), checkpoints.meta()["data"]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    trained, digits_dir, tiny_experiment, no_tensorflow, tmp_path
):
    # Stage 1 is there; torture_test kills while it is trained. Stage 2 is killed as soon as it has
    # a checkpoint.
    shutil.copytree(trained[0] / "autoencoder", tmp_path / "autoencoder")
    process = start(tmp_path, digits_dir, env=no_tensorflow)
    wait_for(tmp_path / "prior" / "2")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = start(tmp_path, digits_dir, env=no_tensorflow)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert re.search("^The prior resumes at step [24] in", output, re.MULTILINE), output
    whole, whole_data = restored(trained[0], "prior", tiny_experiment)
    resumed, resumed_data = restored(tmp_path, "prior", tiny_experiment)
    assert int(resumed.step) == 6
    assert_same(whole, resumed)
    assert whole_data == resumed_data
    assert (tmp_path / "samples.png").read_bytes() == (trained[0] / "samples.png").read_bytes()
    # Without TensorFlow nothing is missing but the files of TensorBoard.
    assert output.count("TensorBoard files are not written") == 1
    assert not list((tmp_path / "tensorboard").rglob("events*"))


@pytest.mark.slow
def test_sigterm_saves_first_and_exits_with_its_code(digits_dir, tmp_path, no_tensorflow):
    flags = ("--config.autoencoder.train.num_steps=100000", "--config.checkpoint_every=100000")
    process = start(tmp_path, digits_dir, "--mode=train_autoencoder", *flags, env=no_tensorflow)
    wait_for(tmp_path / "metrics.jsonl")
    while not (tmp_path / "metrics.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    with Checkpoints(tmp_path / "autoencoder") as checkpoints:
        saved = checkpoints.latest_step()
    assert saved is not None, output
    assert saved >= 2 and f"is saved at step {saved}" in output


def test_sigterm_before_the_first_step_exits_with_its_code(digits_dir, tmp_path, no_tensorflow):
    process = start(tmp_path, digits_dir, "--mode=train_autoencoder", env=no_tensorflow)
    assert "4500 training images" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert re.search("^(Terminated|Interrupted): ", output, re.MULTILINE)
    assert "Traceback" not in output


class Poisoned:
    """Batches of which some hold a NaN."""

    def __init__(self, batches, *steps):
        self.batches, self.steps, self.count = batches, steps, 0

    def __next__(self):
        self.count += 1
        batch = next(self.batches)
        if self.count in self.steps:
            batch["image"][0, 0, 0, 0] = np.nan
        return batch

    def get_state(self):
        return self.batches.get_state()


def train_poisoned(experiment, workdir, *steps):
    """Trains an autoencoder; the images of these steps hold a NaN."""
    stage = stages.setup_autoencoder(experiment, workdir)
    stage = stage._replace(batches=Poisoned(stage.batches, *steps))
    return loop.train(stage, experiment.run, workdir)


def test_a_non_finite_loss_stops_with_the_step_and_the_last_good_checkpoint(
    tiny_experiment, tmp_path
):
    sentence = (
        r"is nan at step 5; the last finite metrics: step 4, .*loss [\d.]+.*checkpoint of step 4"
    )
    with pytest.raises(UserError, match=sentence):
        train_poisoned(tiny_experiment, tmp_path, 5)
    with Checkpoints(tmp_path / "autoencoder") as checkpoints:
        assert checkpoints.latest_step() == 4


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted_on_demand(
    tiny_experiment, tmp_path, caplog
):
    experiment = tiny_experiment.change({"on_nonfinite": "skip"})
    state = train_poisoned(experiment, tmp_path, 2, 3, 4)
    written = {x["step"]: x for x in lines(tmp_path) if "skipped" in x}
    assert {step: x["skipped"] for step, x in written.items()} == {2: 1, 4: 2, 6: 0}
    # Where all were skipped there is nothing to average.
    assert "loss" in written[2] and "loss" not in written[4] and "loss" in written[6]
    assert re.search(
        r"Skipped 2 of the last 2 steps: \w+ is nan at step 3; the last .* step 1", caplog.text
    )
    assert int(state.step) == 6 and updates_made(state) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
    # Of the updates that were made, as the closed form of the warm-up, and the decay after it.
    peak = experiment.autoencoder.train.learning_rate
    rates = [0, peak * 0.5, peak, peak * (1 + np.cos(np.pi / 4)) / 2]
    for step, updates in ((2, 1), (4, 1), (6, 3)):
        np.testing.assert_allclose(written[step]["learning_rate"], rates[updates - 1], rtol=1e-5)


@pytest.mark.slow
def test_debug_nans_names_the_operation_and_its_line(tiny_experiment, trained, tmp_path):
    experiment = tiny_experiment.change({"debug_nans": True})
    with pytest.raises(FloatingPointError, match=r"\(nan\) encountered in reshape") as error:
        train_poisoned(experiment, tmp_path, 3)
    assert any(entry.name == "space_to_depth" for entry in error.traceback)
    # Until then it has made the same steps as without.
    (line,) = [x for x in lines(tmp_path) if "loss" in x]
    debugged = line["loss"], line["grad_norm"]
    line = lines(trained[0])[0]
    np.testing.assert_allclose((line["loss"], line["grad_norm"]), debugged, rtol=1e-4)
    assert not jax.config.jax_debug_nans


def test_means_are_of_the_finite_steps_and_told_with_the_last_of_them():
    nan, inf = float("nan"), float("inf")
    window = [{"loss": 1.0}, {"loss": nan, "grad_norm": inf}, {"loss": 3.0, "new": 5.0}]
    means, finite = loop._means(window, 12, None, {}, skip=True)
    assert means == {"loss": 2.0, "new": 5.0, "skipped": 1}
    assert finite == {"step": 12, "loss": 3.0, "new": 5.0}
    with pytest.raises(UserError, match="grad_norm is inf at step 11; .*: step 10, loss 1.*start"):
        loop._means(window, 12, None, {}, skip=False)
    before = {"step": 7, "loss": 0.25}
    with pytest.raises(UserError, match="inf at step 8; .*: step 7, loss 0.25. .* of step 6"):
        loop._means([{"loss": inf}], 8, 6, before, skip=False)
    assert loop._means([{"loss": inf}], 8, 6, before, skip=True) == ({"skipped": 1}, before)


def test_a_damaged_checkpoint_is_set_aside_and_training_ends_the_same(
    trained, tiny_experiment, digits_dir, tmp_path, caplog
):
    whole, _ = restored(trained[0], "autoencoder", tiny_experiment)
    folder = shutil.copytree(trained[0] / "autoencoder", tmp_path / "autoencoder")
    files = (folder / "6" / "ema_params").rglob("*")
    largest = max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    # Who only reads takes the one before, and leaves the folder as it is.
    pipeline = from_workdir(tmp_path)
    assert f"{folder}/6 " in caplog.text and "step 4 is used instead" in caplog.text
    shutil.copytree(folder, tmp_path / "copy" / "autoencoder")
    shutil.rmtree(tmp_path / "copy" / "autoencoder" / "6")
    assert_same(pipeline.autoencoder_params, from_workdir(tmp_path / "copy").autoencoder_params)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6"]

    # The data has been moved: it is the same.
    moved = tmp_path / "moved"
    moved.symlink_to(digits_dir)
    caplog.clear()
    experiment = tiny_experiment.change({"data.path": str(moved)})
    again = stages.train_autoencoder(experiment, tmp_path)
    assert "images or labels differ" not in caplog.text
    assert f"{folder}/6 was renamed to 6.damaged" in caplog.text
    assert_same(whole.replace(key=None), again.replace(key=None))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6", "6.damaged"]
    caplog.clear()
    assert_same(from_workdir(tmp_path).autoencoder_params, whole.ema_params)
    assert "damaged" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["5m"], indirect=True)
def test_a_full_disk_stops_training_in_a_sentence(digits_dir, tmp_path, small_disk, no_tensorflow):
    # Two tiny checkpoints fit, of 2 MB each; a third does not.
    flags = ("--mode=train_autoencoder", "--config.keep_checkpoints=100")
    process = start(small_disk, digits_dir, *flags, env=no_tensorflow)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0], output
    assert "Traceback" not in output
    with Checkpoints(small_disk / "autoencoder") as checkpoints:
        step = checkpoints.latest_step()
        assert step in (2, 4) and step < 6
    pipeline = from_workdir(small_disk)
    assert np.isfinite(jax.tree.leaves(pipeline.autoencoder_params)[0]).all()


def test_resuming_with_another_model_names_the_difference(trained, tiny_experiment):
    experiment = tiny_experiment.change({"autoencoder.num_bits": 16})
    with pytest.raises(UserError, match="autoencoder.num_bits is 8 there and 16 here"):
        stages.train_autoencoder(experiment, trained[0])


def test_a_second_process_is_refused_where_one_trains(trained, tiny_experiment, tmp_path):
    shutil.copytree(trained[0], workdir := tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    lock = workdir / ".training.lock"
    calls = (
        lambda: stages.train_autoencoder(tiny_experiment, workdir),
        lambda: stages.train_prior(tiny_experiment, workdir),
        lambda: bottlenecks.compare_bottlenecks(tiny_experiment, workdir),
    )
    with held(lock) as other:
        sentence = f"{workdir} is being trained already, by process {other.pid} on "
        for call in calls:
            with pytest.raises(UserError, match=sentence):
                call()
        # Who only reads is let in; so are the other processes of the one run.
        from_workdir(workdir)
        quality.measure(from_workdir(workdir), workdir, ["codes"])
        with mock.patch.object(jax, "process_index", lambda: 1), stages.alone_in(workdir):
            pass
    after = {path: path.read_bytes() for path in before if path.name != "metrics.jsonl"}
    assert all(before[path] == after[path] for path in after if path != lock)
    assert [x["stage"] for x in lines(workdir)][-1] == "evaluation"
    stages.train_prior(tiny_experiment, workdir)


def test_resuming_with_more_steps_goes_on(trained, tiny_experiment, tmp_path, caplog):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(workdir / "prior")
    values = {"autoencoder.train.num_steps": 8, "seed": 5, "autoencoder.train.ema_decay": 0.5}
    values |= {"log_every": 1, "prior.train.learning_rate": 0.5}
    experiment = tiny_experiment.change(values)
    state = stages.train_autoencoder(experiment, workdir)
    told = [text for text in caplog.messages if "continues with changes" in text]
    assert told == [
        "Training of the autoencoder continues with changes: config.seed was 0 and is 5; "
        "config.autoencoder.train.ema_decay was 0.99 and is 0.5; "
        "config.autoencoder.train.num_steps was 6 and is 8."
    ]
    assert int(state.step) == 8
    steps = [x["step"] for x in lines(workdir) if "loss" in x and x["stage"] == "autoencoder"]
    assert steps == [2, 4, 6, 7, 8]


def test_other_data_is_refused_before_it_is_prepared(trained, tiny_experiment, tmp_path):
    experiment = tiny_experiment.change({"data.name": "mnist", "data.path": str(tmp_path)})
    for train in (stages.train_autoencoder, stages.train_prior):
        with pytest.raises(UserError, match="config.data.name = 'digits', not 'mnist'"):
            train(experiment, trained[0])
    assert not any(tmp_path.iterdir())


def test_a_prior_of_another_autoencoder_is_refused(
    trained, untrained_workdir, tiny_experiment, tmp_path
):
    shutil.copytree(trained[0] / "prior", tmp_path / "prior")
    shutil.copytree(untrained_workdir / "autoencoder", tmp_path / "autoencoder")
    for use in (
        lambda: stages.train_prior(tiny_experiment, tmp_path),
        lambda: from_workdir(tmp_path),
    ):
        with pytest.raises(UserError, match="trained for another autoencoder"):
            use()


def test_loaded_images_are_spread_over_the_source():
    examples = [{"image": np.full((2, 2, 1), i, np.uint8), "label": i // 10} for i in range(30)]
    images, labels = load_images(Source(examples, ("a", "b", "c")), 4)
    assert images[:, 0, 0, 0].tolist() == [0, 9, 19, 29] and labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("asked, given", [(-1, 10), (0, 0), (10, 10), (7, None)])
def test_number_of_classes_must_be_that_of_the_data(tiny_experiment, asked, given):
    source = Source(examples=[], classes=tuple(map(str, range(10))))
    experiment = tiny_experiment.change({"data.num_classes": asked})
    if given is None:
        with pytest.raises(UserError, match="is 7, but the data has 10 classes"):
            stages.with_classes(experiment, source)
    else:
        assert stages.with_classes(experiment, source).data.num_classes == given


def test_a_step_is_saved_before_its_metrics_are_written(
    trained, tiny_experiment, tmp_path, monkeypatch
):
    def record(self, step, metrics, seconds_left=None):
        raise UserError(f"full at step {step}")

    monkeypatch.setattr(Logbook, "record", record)
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(workdir / "prior")
    experiment = tiny_experiment.change({"log_every": 100, "checkpoint_every": 2})
    with pytest.raises(UserError, match="full at step 2"):
        stages.train_prior(experiment, workdir)
    with Checkpoints(workdir / "prior") as checkpoints:
        assert checkpoints.latest_step() == 2


def test_the_prior_learns_from_codes_that_lie_elsewhere(trained, tiny_experiment, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(workdir / "prior")
    folder = stages.write_codes(tiny_experiment, workdir)
    pipeline = from_workdir(workdir)
    written = codes.open_codes(folder, pipeline.encoder_fingerprint)
    source = open_split(tiny_experiment.data, "train")
    assert len(written.examples) == len(source.examples) == 4500 and written.num_classes == 10
    images, labels = load_images(source, 500)
    places = np.linspace(0, 4499, 500).astype(int)
    examples = [written.examples[int(i)] for i in places]
    got = np.stack([example["probs"] for example in examples])
    assert got.dtype == np.uint8 and got.shape == (500, 4, 4, 8)
    # Rounding adds at most half a 255th, and next to nothing to what is drawn.
    error = got / 255 - pipeline.encode_probs(to_float(images)).astype(np.float64)
    assert np.abs(error).max() < 0.5 / 255 + 1e-6 and abs(error.mean()) < 1e-4
    assert [example["label"] for example in examples] == labels.tolist()

    elsewhere = shutil.move(folder, tmp_path / "elsewhere")
    changes = {"prior.cache_codes": False, "prior.codes": str(elsewhere)}
    experiment = tiny_experiment.change({**changes, "prior.train.num_steps": 2})
    state = stages.train_prior(experiment, workdir)
    assert int(state.step) == 2 and not any((workdir / "codes").iterdir())
    with pytest.raises(UserError, match="Codes on disk .* are made without random crops"):
        experiment.change({"data.flip": True})


@pytest.mark.slow
def test_an_unlabelled_folder_trains_and_samples(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 24, 3), np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    flags = (*tiny_flags(folder), "--config.data.name=folder", "--config.data.channels=3")
    flags += ("--config.data.image_size=14", "--config.prior.cache_codes=False")
    flags += ("--config.autoencoder.train.num_steps=2", "--config.prior.train.num_steps=2")
    assert call_main(*flags, f"--workdir={tmp_path / 'run'}") == 0
    picture = Image.open(tmp_path / "run" / "samples.png")
    assert picture.mode == "RGB"
    assert "samples" not in json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.slow
def test_classes_have_names_from_the_folder_to_the_picture(tmp_path, capsys):
    images, workdir = tmp_path / "images", tmp_path / "run"
    noise = np.random.default_rng(0).integers(0, 256, (13, 14, 14), np.uint8)
    for i, image in enumerate(noise):
        (folder := images / str(i % 12)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    flags = (*tiny_flags(images), "--config.data.name=folder", "--config.data.image_size=14")
    flags += ("--config.autoencoder.train.num_steps=2", "--config.prior.train.num_steps=2")
    flags += (f"--workdir={workdir}",)
    assert call_main(*flags) == 0
    names, told = [str(i) for i in range(12)], capsys.readouterr().err
    assert "12 training images, 12 classes: 0 '0', 1 '1', 2 '2'" in told
    assert "11 of 12 classes of" in told and "There is only one test image" in told
    assert json.loads((workdir / "classes.json").read_text()) == names
    pipeline = BinaryLatentDiffusion.from_workdir(workdir)
    assert pipeline.class_names == tuple(names)
    for stage in ("autoencoder", "prior"):
        with Checkpoints.open(workdir, stage) as checkpoints:
            assert checkpoints.meta()["classes"] == names
    # By one test image no classifier is better than chance; the pictures are there.
    judged = json.loads((workdir / "report.json").read_text())["samples"]
    assert "unjudged" in judged and not {"accuracy", "frechet_distance"} & set(judged)
    assert (workdir / "samples.png").exists() and (workdir / "inpainting.png").exists()
    assert call_main(f"--workdir={workdir}", "--mode=sample", "--label=11", "--num=2") == 0
    assert call_main(f"--workdir={workdir}", "--mode=sample", "--label=dog") == 1
    assert "There is no class 'dog'" in capsys.readouterr().err

    (images / "11").rename(images / "1 1")
    capsys.readouterr()
    for more in ((*flags, "--config.prior.train.num_steps=4"), (f"--workdir={workdir}",)):
        mode = "train_prior" if len(more) > 1 else "evaluate"
        assert call_main(*more, f"--mode={mode}") == 1
        sentence = capsys.readouterr().err
        assert "trained with 12 classes, 0 '0'" in sentence and "have 12, 0 '0'" in sentence
        assert "differ from number 2 on" in sentence


def test_what_fails_in_a_report_costs_nothing_else(trained_workdir, tmp_path, monkeypatch):
    workdir = shutil.copytree(trained_workdir, tmp_path / "run")
    (workdir / "report.json").unlink()
    (workdir / "samples.png").unlink(missing_ok=True)

    def fail(*_):
        raise UserError("no judge today")

    monkeypatch.setattr(report, "sample_metrics", fail)
    with pytest.raises(UserError, match="no judge today"):
        report.report(BinaryLatentDiffusion.from_workdir(workdir), workdir)
    written = json.loads((workdir / "report.json").read_text())
    assert written["failed"] == {"samples": "no judge today"}
    assert written["autoencoder"]["psnr"] > 0 and written["prior"]["bits_per_image"] > 0
