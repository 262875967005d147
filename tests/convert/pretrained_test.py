"""Converts the authors' checkpoints to workdirs, uses and trains them, and exports them again.

The state dicts are those of tests/reference.py, which needs no PyTorch. The last test writes and
reads PyTorch's files if it is installed.
"""

import functools
import importlib
import shutil

import jax
import numpy as np
import pytest
import reference
from conftest import call_main
from PIL import Image

from binlatent import stages
from binlatent.convert import __main__ as convert
from binlatent.convert.workdirs import convert_autoencoder, convert_prior, export_workdir
from binlatent.data import masks
from binlatent.evaluation import report
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import state_dicts
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint


@pytest.fixture(scope="module", params=reference.AUTOENCODERS)
def any_autoencoder(request, tmp_path_factory):
    """A reference autoencoder's name, and its workdir."""
    workdir = tmp_path_factory.mktemp(request.param)
    convert_autoencoder(reference.state(request.param), workdir, image_size=32)
    return request.param, workdir


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A workdir with the autoencoder that fits the reference priors."""
    workdir = tmp_path_factory.mktemp("autoencoder")
    convert_autoencoder(reference.state("ae_c16"), workdir, image_size=32)
    return workdir


@pytest.fixture(scope="module")
def converted(autoencoder, tmp_path_factory):
    """Returns a function: the workdir of a reference prior with its autoencoder."""

    @functools.cache
    def workdir_of(name):
        workdir = tmp_path_factory.mktemp(name)
        convert_prior(reference.state(name), workdir, autoencoder=autoencoder, num_heads=4)
        return workdir

    return workdir_of


def test_a_converted_autoencoder_gives_the_reference_numbers(any_autoencoder):
    name, workdir = any_autoencoder
    model, io = BinaryLatentDiffusion.from_workdir(workdir), reference.io(name)
    with jax.default_matmul_precision("highest"):
        probs, decoded = model.encode_probs(io["image"]), model.decode(io["code"])
    np.testing.assert_allclose(probs, io["probs"], atol=2e-5)
    np.testing.assert_allclose(decoded, np.clip(io["decoded"], -1, 1), atol=2e-5)


def test_bfloat16_draws_from_the_same_distribution(converted):
    exact = BinaryLatentDiffusion.from_workdir(converted("prior_class"))
    experiment = exact.experiment.change({"dtype": "bfloat16"})
    half = BinaryLatentDiffusion(experiment, exact.autoencoder_params, exact.prior_params)
    both = (exact, half)
    codes, others = (x.sample_codes(20, jax.random.key(0), 3, steps=8) for x in both)
    assert 0 < np.mean(codes != others) < 0.05  # the uniforms are the same
    lengths = [x.code_lengths(codes, jax.random.key(1), 3) for x in both]
    assert np.mean(lengths[1]) == pytest.approx(np.mean(lengths[0]), rel=0.005)


def label_of(name):
    return {"prior_uncond": None, "prior_class": 3}.get(name, reference.io(name).get("label", 0))


@pytest.mark.parametrize("name", reference.PRIORS)
def test_a_converted_prior_samples_inpaints_and_measures(converted, name):
    model = BinaryLatentDiffusion.from_workdir(converted(name))
    assert model.experiment.prior.prior.pair == "balanced_plugin"
    assert model.experiment.sample.settings.threshold_last
    label = label_of(name)
    draw = dict(steps=4, guidance=0.0 if label is None else 2.0)
    codes = model.sample_codes(3, jax.random.key(0), label, **draw)
    assert codes.shape == (3, 8, 8, 16) and set(np.unique(codes)) == {0, 1}
    assert 0.2 < codes.mean() < 0.8
    # A checkpoint's config has lists in place of tuples; tuples are accepted again.
    narrow = model.sample_codes(3, jax.random.key(0), label, **draw, guidance_interval=(0.9, 1.0))
    assert narrow.shape == codes.shape
    if label is not None:
        plain = model.sample_codes(3, jax.random.key(0), **draw)
        assert np.any(plain != codes)
        one = label if np.ndim(label) == 0 else label[0]
        again = model.sample_codes(3, jax.random.key(0), one, **draw)
        np.testing.assert_array_equal(again[0], codes[0])
    images = reference.io("ae_c16")["image"]
    keep = masks.preset("left", 32, 32)
    one = label if np.ndim(label) == 0 else label[: len(images)]
    filled = model.inpaint(images, keep, jax.random.key(1), one, steps=4)
    np.testing.assert_array_equal(filled[:, keep], images[:, keep])
    bits = model.code_lengths(codes, jax.random.key(2), label, steps=4)
    assert np.all(bits > 0.5 * 8 * 8 * 16)  # a loose bound, as the weights are random


@pytest.mark.parametrize(
    "name, label, message",
    [
        ("prior_uncond", 1, "unconditional"),
        ("prior_class", 10, "between 0 and 9"),
        ("prior_class", np.zeros(768), r"takes classes as labels: one .* not an array .* \(768,\)"),
        ("prior_class", 0.5, "one name or integer, or 2 of them, not 0.5"),
        ("prior_text_token", 3, r"the features \(768,\) of a text .* not an .* int64 \(\)"),
        ("prior_text_token", np.zeros(5), r"\(768,\) of a text .*, or 2 of them, not .* \(5,\)"),
        ("prior_text_token", np.zeros((3, 768)), "or 2 of them, not an array of float64"),
        ("prior_text_token", "a lion", "not an array of <U6"),
        ("prior_text_cross", np.zeros((2, 32, 31)), r"\(tokens, 32\) of a text"),
        ("prior_text_cross", np.zeros((0, 32)), r"\(tokens, 32\) of a text"),
        ("prior_text_cross", np.full((1, 32), np.nan), "must be finite"),
        ("prior_text_cross", np.full((1, 32), 1e300), "must be finite"),
    ],
)
def test_a_label_of_another_kind_is_refused(converted, name, label, message):
    model = BinaryLatentDiffusion.from_workdir(converted(name))
    with pytest.raises(UserError, match=message):
        model.sample_codes(2, jax.random.key(0), label, steps=2)


def test_a_prior_is_only_written_beside_its_autoencoder(autoencoder, tmp_path, caplog):
    state = reference.state("prior_class")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="There is no autoencoder in .*--autoencoder"):
        convert_prior(state, out, autoencoder=tmp_path, num_heads=4)
    other = tmp_path / "other"
    convert_autoencoder(reference.state("ae_c24_genmul2"), other, image_size=32)
    with pytest.raises(UserError, match="has 64 tokens of 16 bits, but .* 8 x 8 tokens of 24"):
        convert_prior(state, out, autoencoder=other, num_heads=4)
    with pytest.raises(UserError, match="There is an autoencoder in .*other already"):
        convert_prior(state, other, autoencoder=autoencoder, num_heads=4)
    with pytest.raises(UserError, match="width must be a multiple of 4 and of"):
        convert_prior(state, out, autoencoder=autoencoder, num_heads=5)
    with pytest.raises(UserError, match="schedule is linear with 64 steps: omit --schedule"):
        convert_prior(state, out, autoencoder=autoencoder, num_heads=4, schedule="cos")
    assert not out.exists()
    convert_prior(state, out, autoencoder=autoencoder, num_heads=4)
    assert "was trained with another autoencoder" in caplog.text
    caplog.clear()
    with pytest.raises(UserError, match="There is a checkpoint of the prior in .*out already"):
        convert_prior(state, out, autoencoder=out, num_heads=4)
    # The copy of the embedding equals the autoencoder's: no warning.
    shutil.rmtree(out / "prior")
    embed = reference.state("ae_c16")["ae.quantize.embed.weight"]
    convert_prior({**state, "embedding_weight": embed}, out, autoencoder=out, num_heads=4)
    assert "another autoencoder" not in caplog.text


def config_in(workdir, stage):
    with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
        return checkpoints.meta()["config"]


def test_arguments_for_what_a_checkpoint_does_not_determine(autoencoder, tmp_path):
    state = reference.state("prior_uncond")
    state = {name: x for name, x in state.items() if not name.startswith("scheduler.")}
    for options, expected in (
        ({}, ("linear", 64, "flip", "balanced_plugin", 1)),
        (
            dict(schedule="cos", num_timesteps=100, target="z_0", num_heads=2),
            ("cos", 100, "z_0", "plain_mixture", 2),
        ),
        ({"pair": "plain_mixture"}, ("linear", 64, "flip", "plain_mixture", 1)),
    ):
        out = tmp_path / f"{len(options)}"
        convert_prior(state, out, autoencoder=autoencoder, **options)
        section = config_in(out, "prior")["prior"]
        names = ("schedule", "num_timesteps", "target", "pair")
        found = [section["bernoulli"][name] for name in names]
        assert (*found, section["network"]["num_heads"]) == expected


def test_flags_that_contradict_the_weights_are_refused(autoencoder, tmp_path):
    state = reference.state("ae_c16")
    with pytest.raises(UserError, match="--norm_first: the checkpoint has norm"):
        convert_autoencoder(state, tmp_path, image_size=32, norm_first=False)
    with pytest.raises(UserError, match="image_size, 34, must be a multiple of the downsampling"):
        convert_autoencoder(state, tmp_path, image_size=34)
    with pytest.raises(UserError, match="There is a checkpoint of the autoencoder in"):
        convert_autoencoder(state, autoencoder, image_size=32)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 images with features of texts beside them."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(20):
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{i:02}.png")
        np.save(folder / f"{i:02}.npy", rng.normal(size=(5, 32)))
    return folder


def fine_tuning(workdir, photos, **overrides):
    """The experiment of a workdir, for two training steps on other data."""
    config = importlib.import_module("binlatent.configs.workdir").get_config(str(workdir))
    tiny = {"batch_size": 4, "num_steps": 2, "warmup_steps": 1}
    tiny = {f"{stage}.train.{k}": x for stage in ("autoencoder", "prior") for k, x in tiny.items()}
    return resolve(config).change(
        {
            **tiny,
            "data.name": "folder",
            "data.path": str(photos),
            "autoencoder.loss.perceptual": 0.0,
            "sample.steps": 2,
            "sample.batch_size": 10,
            "evaluate.num_images": 2,
            **overrides,
        }
    )


def params_of(workdir, stage, step):
    with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
        assert checkpoints.latest_step() == step
    model = BinaryLatentDiffusion.from_workdir(workdir, prior=stage == "prior")
    return model.prior_params if stage == "prior" else model.autoencoder_params


@pytest.mark.slow
def test_a_converted_autoencoder_trains_further_with_its_discriminator(
    autoencoder, photos, tmp_path
):
    workdir = shutil.copytree(autoencoder, tmp_path / "workdir")
    before = params_of(workdir, "autoencoder", 0)
    state = stages.train_autoencoder(fine_tuning(workdir, photos), workdir)
    # The discriminator was trained from its own weights.
    theirs = reference.state("ae_c16")["disc.main.2.weight"].transpose(2, 3, 1, 0)
    moved = np.abs(np.asarray(state.discriminator["params"]["main_2"]["kernel"]) - theirs)
    assert 0 < moved.max() < 1e-3
    after = params_of(workdir, "autoencoder", 2)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prior_class", "prior_text_cross"])
def test_a_converted_prior_trains_further(converted, photos, tmp_path, name):
    workdir = shutil.copytree(converted(name), tmp_path / "workdir")
    experiment = fine_tuning(workdir, photos)
    if name == "prior_class":
        with pytest.raises(UserError, match="num_classes is 10, but the data has 0"):
            stages.train_prior(experiment, workdir)
        for i in range(10):
            (tmp_path / f"data/{i}").mkdir(parents=True)
            for j in range(2):
                shutil.copy(photos / f"{i + j:02}.png", tmp_path / f"data/{i}/{j}.png")
        experiment = experiment.change({"data.path": str(tmp_path / "data")})
    else:
        with pytest.raises(UserError, match="'text_cross': set config.texts.encoder if the images"):
            stages.train_prior(experiment, workdir)
        narrow = experiment.change({"data.texts": True, "prior.text_width": 31})
        with pytest.raises(UserError, match="text_width is 31, but .* have the width 32"):
            stages.train_prior(narrow, workdir)
        experiment = experiment.change({"data.texts": True})
    state = stages.train_prior(experiment, workdir)
    head = np.asarray(state.params["params"]["head"]["kernel"]).T
    moved = np.abs(head - reference.state(name)["_denoise_fn.head.weight"])
    assert 0 < moved.max() < 1e-3
    if name == "prior_text_cross":  # the text was used: its projection changed
        kernel = np.asarray(state.params["params"]["blocks_0"]["cross"]["kv"]["kernel"]).T
        theirs = reference.state(name)["_denoise_fn.blocks.0.cross.kv.weight"]
        assert np.abs(kernel - theirs).max() > 0


@pytest.mark.parametrize("name", reference.PRIORS)
def test_a_converted_workdir_is_exported_unchanged(converted, name):
    files, _ = export_workdir(converted(name))
    assert list(files) == ["binaryae_ema_1", "binaryae_1", "bld_ema_1", "bld_1"]
    for file, golden in (("binaryae_ema_1", "ae_c16"), ("bld_ema_1", name)):
        state = files[file]
        assert {k: list(x.shape) for k, x in state.items()} == reference.SHAPES[golden]
        for key, x in reference.state(golden).items():
            if "num_batches" not in key and key not in ("embedding_weight", "scheduler.cumbeta"):
                np.testing.assert_array_equal(state[key], x)
    # Their training loads this file into a model wrapped for several GPUs.
    assert set(files["bld_1"]) == {f"module.{key}" for key in reference.SHAPES[name]}
    embed = reference.state("ae_c16")["ae.quantize.embed.weight"]
    np.testing.assert_array_equal(files["bld_ema_1"]["embedding_weight"], embed)


def test_each_exported_file_has_its_own_weights(autoencoder, tmp_path):
    """One file has the EMA weights, the other the trained ones, after a training step."""
    workdir = shutil.copytree(autoencoder, tmp_path / "workdir")
    convert_prior(reference.state("prior_class"), workdir, autoencoder=workdir, num_heads=4)
    for stage in ("autoencoder", "prior"):
        with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
            meta = checkpoints.meta()
            spec = getattr(resolve(meta["config"]), stage)
            like = jax.eval_shape(functools.partial(spec.init_state, 0))
            state = checkpoints.restore(checkpoint.on_first_device(like))
        shifted = jax.tree.map(lambda x: x + 1, state.params)
        with checkpoint.Checkpoints(workdir / stage) as checkpoints:
            checkpoints.save(state.replace(step=state.step + 7, params=shifted), meta)
    files, _ = export_workdir(workdir)
    assert list(files) == ["binaryae_ema_7", "binaryae_7", "bld_ema_7", "bld_7"]
    key, theirs = "ae.quantize.proj.0.bias", reference.state("ae_c16")
    np.testing.assert_array_equal(files["binaryae_ema_7"][key], theirs[key])
    np.testing.assert_array_equal(files["binaryae_7"][key], theirs[key] + 1)
    key, theirs = "_denoise_fn.head.bias", reference.state("prior_class")
    np.testing.assert_array_equal(files["bld_ema_7"][key], theirs[key])
    np.testing.assert_array_equal(files["bld_7"][f"module.{key}"], theirs[key] + 1)


def test_training_the_autoencoder_further_is_refused_beside_a_prior(converted, photos):
    workdir = converted("prior_uncond")
    with pytest.raises(UserError, match="belongs to its autoencoder as it is: to train"):
        stages.train_autoencoder(fine_tuning(workdir, photos), workdir)


def test_images_without_the_labels_of_a_prior_are_judged_without(converted, photos):
    model = BinaryLatentDiffusion.from_workdir(converted("prior_class"))
    experiment = fine_tuning(converted("prior_class"), photos)
    params = model.autoencoder_params
    images, labels = report.test_images(BinaryLatentDiffusion(experiment, params), 2)
    assert labels is None  # a folder without classes
    result = report.prior_metrics(model, model.encode_probs(images), labels)
    assert np.isfinite(result["bce"])
    texts = {"data.texts": True, "prior.condition": "text_cross", "prior.text_width": 32}
    experiment = experiment.change(texts)
    _, labels = report.test_images(BinaryLatentDiffusion(experiment, params), 2)
    assert labels.shape == (2, 5, 32)
    experiment = experiment.change({"prior.condition": "text_token"})
    with pytest.raises(UserError, match=r"have the shape \(5, 32\), .* takes \(32,\)"):
        report.test_images(BinaryLatentDiffusion(experiment, params), 2)


def test_the_command_logs_hyperparameters_and_unused_tensors(tmp_path, monkeypatch, capsys):
    state = reference.state("ae_c16")
    monkeypatch.setattr(state_dicts, "read", lambda path: state)
    for name in ("binaryae_7.th", "binaryae_ema_7.th"):
        (tmp_path / name).touch()
    source, out = str(tmp_path / "binaryae_7.th"), str(tmp_path / "out")
    flags = ["--image_size", "32", "--signed", "--deterministic"]
    convert.main(["autoencoder", "--from", source, "--out", out, *flags])
    section = config_in(tmp_path / "out", "autoencoder")["autoencoder"]
    assert section["signed"] and section["deterministic"]
    said = capsys.readouterr().err
    assert "binaryae_ema_7.th in the same folder holds the EMA" in said
    assert "  autoencoder.attention_resolutions = (8,)\n" in said
    assert "not used: conv_out of equal widths (16), ae.generator.logsigma (4), num_batch" in said
    with pytest.raises(SystemExit):
        convert.main(["autoencoder", "--from", source, "--out", out])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "There is a checkpoint of the autoencoder in" in error


def test_features_of_a_text_are_a_flag(converted, tmp_path, capsys):
    features, out = tmp_path / "text.npy", tmp_path / "samples.png"
    np.save(features, reference.io("prior_text_cross")["label"][0])
    workdir = converted("prior_text_cross")
    flags = [f"--workdir={workdir}", "--mode=sample", "--num=3", "--steps=2", f"--out={out}"]
    assert call_main(*flags, f"--features={features}", "--guidance=3") == 0 and out.exists()
    capsys.readouterr()
    for asked, message in (
        ([f"--features={out}"], "is not a .npy file of numbers"),
        ([f"--features={features}", "--label=1"], "not both"),
        ([f"--features={tmp_path / 'none.npy'}"], "No such file"),
    ):
        assert call_main(*flags, *asked) == 1
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and message in errors


@pytest.mark.parametrize("name", [*reference.AUTOENCODERS, *reference.PRIORS])
def test_a_file_of_theirs_through_pytorch_and_back(name, autoencoder, tmp_path):
    torch = pytest.importorskip("torch")
    source, out = tmp_path / "x_ema_1.th", tmp_path / "out"
    state = reference.state(name)
    torch.save({key: torch.tensor(x) for key, x in state.items()}, source)
    command, flags, file = "autoencoder", ["--image_size", "32"], "binaryae_ema_1.th"
    if name in reference.PRIORS:
        command, file = "prior", "bld_ema_1.th"
        flags = ["--autoencoder", str(autoencoder), "--num_heads", "4"]
    convert.main([command, "--from", str(source), "--out", str(out), *flags])
    convert.main(["export", "--workdir", str(out), "--out", str(tmp_path / "theirs")])
    again = torch.load(tmp_path / "theirs" / "saved_models" / file, weights_only=True)
    assert {k: list(x.shape) for k, x in again.items()} == reference.SHAPES[name]
    for key, x in state.items():
        assert again[key].dtype == torch.tensor(x).dtype
        if "num_batches" not in key and key not in ("embedding_weight", "scheduler.cumbeta"):
            np.testing.assert_array_equal(again[key].numpy(), x)
