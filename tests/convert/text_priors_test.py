"""The authors' priors of texts with a text encoder, from their files to images for prompts."""

import importlib
import shutil

import encoders
import jax
import numpy as np
import pytest
import reference
from conftest import call_main
from PIL import Image

from binlatent import stages
from binlatent.convert import __main__ as convert
from binlatent.convert import texts
from binlatent.convert.workdirs import convert_autoencoder, convert_prior, export_workdir
from binlatent.experiment import resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints

CONDITIONS = ("text_token", "text_cross")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The file of a small CLIP, with width 48 for a text and 64 for a token."""
    folder = tmp_path_factory.mktemp("clip")
    weights.write_npz(folder / "clip.npz", texts.clip(encoders.write_clip(folder)))
    return folder / "clip.npz"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("autoencoder")
    convert_autoencoder(reference.state("ae_c16"), workdir, image_size=32)
    return workdir


@pytest.fixture(scope="module")
def workdirs(autoencoder, clip, tmp_path_factory):
    """One workdir per condition, with the text encoder."""
    found = {}
    for condition in CONDITIONS:
        found[condition] = tmp_path_factory.mktemp(condition)
        state = reference.prior_of_clip(f"prior_{condition}")
        convert_prior(state, found[condition], autoencoder=autoencoder, text_encoder=clip)
    return found


@pytest.fixture(scope="module")
def golden():
    """Prompts, and PyTorch's features of them with the small CLIP."""
    io = np.load("tests/data/clip_io.npz")
    lengths = io["ids"].argmax(axis=1) + 1
    rows = zip(io["ids"], lengths, strict=True)
    prompts = [" ".join(map(str, row[1 : end - 1])) for row, end in rows]
    within = np.arange(lengths.max()) < lengths[:, None]
    hidden = io["hidden"][:, : lengths.max()] * within[..., None]
    return prompts, {"text_token": io["embedding"], "text_cross": hidden}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_prompts_reach_the_prior_as_pytorch_s_features(workdirs, golden, condition):
    """The features are not scaled, as in the training of the published prior."""
    model = BinaryLatentDiffusion.from_workdir(workdirs[condition])
    prompts, features = golden[0], golden[1][condition]
    np.testing.assert_allclose(model.text_features(prompts), features, atol=1e-5)
    draw = dict(guidance=10.0, steps=3, temperature=1.0)
    codes = model.sample_codes(5, jax.random.key(0), prompt=prompts, **draw)
    expected = model.sample_codes(5, jax.random.key(0), features, **draw)
    assert np.mean(codes != expected) < 1e-3  # rounding errors may flip some bits
    shifted = model.sample_codes(5, jax.random.key(0), prompt=prompts[1:] + prompts[:1], **draw)
    assert np.all(np.mean(codes != shifted, axis=(1, 2, 3)) > 0.01)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_checkpoint_determines_encoder_and_width(workdirs, clip, condition):
    with Checkpoints.open(workdirs[condition], "prior") as checkpoints:
        config = checkpoints.meta()["config"]
    expected = {"encoder": "clip", "weights": str(clip), "sha256": weights.sha256(clip)}
    assert config["texts"] == expected
    assert config["prior"]["text_width"] == {"text_token": 48, "text_cross": 64}[condition]


def test_a_workdir_with_a_text_encoder_is_exported_unchanged(workdirs):
    files, flags = export_workdir(workdirs["text_token"])
    for key, x in reference.prior_of_clip("prior_text_token").items():
        if key not in ("embedding_weight", "scheduler.cumbeta"):
            np.testing.assert_array_equal(files["bld_ema_1"][key], x)
    assert "--dataset laion" in flags and "--cross" not in flags


@pytest.mark.parametrize(
    "name, message",
    [
        ("prior_uncond", r"takes no texts: leave out --text_encoder"),
        ("prior_class", r"takes no texts: leave out --text_encoder"),
        ("prior_text_token", r"takes 768 numbers for a text, .* in .*clip\.npz gives 48"),
        ("prior_text_cross", r"takes 32 numbers for each token of a text, .* gives 64"),
    ],
)
def test_a_text_encoder_that_does_not_fit_is_refused(autoencoder, clip, tmp_path, name, message):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        convert_prior(reference.state(name), out, autoencoder=autoencoder, text_encoder=clip)
    assert not out.exists()


def test_an_encoder_can_be_added_after_the_conversion(autoencoder, clip, tmp_path, capsys):
    source, workdir = tmp_path / "bld_ema_1.th", tmp_path / "run"
    reference.write(source, reference.prior_of_clip("prior_text_token"))
    command = ["prior", "--from", source, "--autoencoder", autoencoder, "--out", workdir]
    convert.main([str(word) for word in command])
    assert "Prompts need a text encoder" in capsys.readouterr().err
    out = tmp_path / "drawn.png"
    flags = [f"--workdir={workdir}", "--mode=sample", "--num=1", "--steps=2", f"--out={out}"]
    assert call_main(*flags, "--prompt=7 8") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    advice = [f"--config=configs/workdir.py:{workdir}", "--config.texts.encoder=clip"]
    assert " ".join(advice) in error
    advice += [f"--config.texts.weights={clip}", "--config.data.texts=False"]
    assert call_main(*flags, "--prompt=7 8", *advice) == 0 and out.exists()


@pytest.mark.slow
def test_it_trains_further_with_captions(workdirs, tmp_path):
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"{i} {i + 1}\n")
    workdir = shutil.copytree(workdirs["text_token"], tmp_path / "workdir")
    config = resolve(importlib.import_module("binlatent.configs.workdir").get_config(str(workdir)))
    train = {"batch_size": 4, "num_steps": 2, "warmup_steps": 1, "learning_rate": 0.01}
    changes = {f"prior.train.{key}": value for key, value in train.items()}
    changes |= {"data.name": "folder", "data.path": str(images), "sample.steps": 2}
    changes |= {"sample.batch_size": 4, "evaluate.num_images": 2}
    state = stages.train_prior(config.change(changes), workdir)
    theirs = reference.prior_of_clip("prior_text_token")["_denoise_fn.cls_embedding.weight"].T
    moved = np.abs(np.asarray(state.params["params"]["cls_embedding"]["kernel"]) - theirs)
    assert 1e-4 < moved.max() < 0.1
    model = BinaryLatentDiffusion.from_workdir(workdir)
    assert model.sample_codes(1, jax.random.key(0), prompt="3 4", steps=2).shape == (1, 8, 8, 16)
