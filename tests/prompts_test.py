"""From a folder of captioned images to pictures of prompts, by the commands that users type."""

import json
import shutil

import encoders
import jax
import numpy as np
import pytest
from conftest import TINY, call_main
from PIL import Image

from binlatent.configs.workdir import get_config as load_workdir_config
from binlatent.convert import texts
from binlatent.experiment import of_checkpoint, resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.texts.encoder import TextEncoder
from binlatent.training.checkpoint import Checkpoints

CAPTIONS = ["a red apple", "a red hund", "red apples.", "a hund"]  # words of the small encoder
CONDITIONS = ["text_token", "text_cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images with a text file each, the first with two captions, and the text encoder."""
    path = tmp_path_factory.mktemp("captioned")
    (path / "images").mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.full((28, 28, 3), 60 * i, np.uint8)
        Image.fromarray(pixels).save(path / "images" / f"{i}.png")
        lines = [caption, "a"] if i == 0 else [caption]
        (path / "images" / f"{i}.txt").write_text("\n".join(lines))
    arrays = texts.minilm(encoders.write_bert(path / "bert"))
    weights.write_npz(path / "minilm.npz", arrays)
    return path


def given_flags(folder, condition, **changes):
    values = TINY | {
        "data.name": "folder",
        "data.path": folder / "images",
        "data.channels": 3,
        "texts.encoder": "minilm",
        "texts.weights": folder / "minilm.npz",
        "prior.condition": condition,
        "prior.train.num_steps": 12,
        "prior.train.learning_rate": 0.05,
        "sample.guidance": 1.0,
    }
    return ["--config=digits", *(f"--config.{k}={x}" for k, x in (values | changes).items())]


@pytest.fixture(scope="module")
def workdirs(folder):
    """A trained workdir for each condition, of one autoencoder."""
    for condition in CONDITIONS:
        workdir = folder / condition
        mode = "all" if condition == CONDITIONS[0] else "train_prior"
        if mode != "all":
            shutil.copytree(folder / CONDITIONS[0] / "autoencoder", workdir / "autoencoder")
        flags = [*given_flags(folder, condition), f"--workdir={workdir}", f"--mode={mode}"]
        assert not call_main(*flags)
    return {condition: folder / condition for condition in CONDITIONS}


@pytest.fixture(params=CONDITIONS)
def workdir(workdirs, request):
    return workdirs[request.param]


@pytest.fixture
def pipeline(workdir):
    return BinaryLatentDiffusion.from_workdir(workdir)


def predictions(pipeline, num=2, **asked):
    """The predictions p_0 of the prior while sampling, by default without guidance."""
    options = {"guidance": 0.0} | asked
    return pipeline.trajectory(num, jax.random.key(0), **options).p_0


def test_a_run_ends_with_samples_of_held_out_captions(workdirs):
    workdir = workdirs["text_token"]
    assert (workdir / "prompts.txt").read_text().splitlines() == [CAPTIONS[0]]
    with Image.open(workdir / "samples.png") as picture:
        width, height = picture.size
    # Eight images of 28 pixels and their gaps in a row, enlarged to at least 400 pixels.
    assert width == 2 * (8 * 30 + 2) and height > 2 * (28 + 4)
    report = json.loads((workdir / "report.json").read_text())
    assert 0 < report["prior"]["bits_per_dim"] < 20


def test_the_checkpoint_knows_its_text_encoder(workdir, folder):
    with Checkpoints.open(workdir, "prior") as checkpoints:
        config = checkpoints.meta()["config"]
    sha256 = weights.sha256(folder / "minilm.npz")
    weights_path = str(folder / "minilm.npz")
    assert config["texts"] == {"encoder": "minilm", "weights": weights_path, "sha256": sha256}
    assert config["prior"]["text_width"] == 24


def test_a_prompt_is_its_features(pipeline, folder):
    per_token = pipeline.experiment.prior.conditioning.kind == "text_cross"
    features = TextEncoder.load(folder / "minilm.npz").features(["a hund"], per_token)
    found = predictions(pipeline, prompt="a hund")
    np.testing.assert_array_equal(found, predictions(pipeline, label=features[0]))
    assert np.abs(found - predictions(pipeline, prompt="red apples.")).max() > 1e-4
    assert np.abs(found - predictions(pipeline)).max() > 1e-4


def test_a_prompt_for_each_sample(pipeline):
    """Texts of different lengths in one batch give the same results as alone."""
    found = predictions(pipeline, prompt=["a", "a red red red hund"])
    for i, prompt in enumerate(["a", "a red red red hund"]):
        alone = predictions(pipeline, prompt=prompt)
        np.testing.assert_allclose(found[i], alone[i], atol=1e-5)


def test_a_blank_prompt_is_no_text(pipeline):
    without = predictions(pipeline)
    np.testing.assert_allclose(predictions(pipeline, prompt=" "), without, atol=1e-6)
    mixed = predictions(pipeline, prompt=["a hund", ""])
    np.testing.assert_allclose(mixed[1], without[1], atol=1e-5)


def test_guidance_goes_against_a_negative_prompt(pipeline):
    def logit(**asked):
        p_0 = predictions(pipeline, temperature=1.0, **asked)[:, 0].astype(np.float64)
        return np.log(p_0 / (1 - p_0))

    towards, against, without = logit(prompt="a hund"), logit(prompt="red"), logit()
    for negative, other in (({"negative_prompt": "red"}, against), ({}, without)):
        found = logit(prompt="a hund", guidance=2.0, **negative)
        np.testing.assert_allclose(found, 3 * towards - 2 * other, atol=1e-3)


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"prompt": "a", "label": np.zeros(24)}, "Give only one of a label"),
        ({"prompt": ["a", "a", "a"]}, "Give one prompt, a string, or 2, one per sample"),
        ({"prompt": 7}, "Give one prompt, a string, or 2, one per sample"),
        ({"prompt": "a", "negative_prompt": "red", "guidance": 0}, "needs a guidance above 0"),
        ({"negative_prompt": "red", "guidance": 1}, "A negative prompt needs a prompt"),
    ],
)
def test_wrong_prompts_are_refused(workdirs, asked, sentence):
    pipeline = BinaryLatentDiffusion.from_workdir(workdirs["text_token"])
    with pytest.raises(UserError, match=sentence):
        pipeline.sample(2, jax.random.key(0), **asked)


def test_a_prior_of_classes_takes_no_prompt(untrained_workdir):
    pipeline = BinaryLatentDiffusion.from_workdir(untrained_workdir)
    with pytest.raises(UserError, match="A prompt is for a prior of texts; .* classes"):
        pipeline.sample(1, jax.random.key(0), prompt="a red apple")


def test_prompts_by_flags(workdir, tmp_path):
    """Prompts of flags and of a file have a row each; equal prompts give equal pictures."""
    (tmp_path / "prompts.txt").write_text("\n red apples. \r\n\n", encoding="utf-8-sig")
    flags = [f"--workdir={workdir}", "--mode=sample", "--num=3", f"--out={tmp_path / 'a.png'}"]
    prompts = ["--prompt=a hund", "--prompt=red", f"--prompts={tmp_path / 'prompts.txt'}"]
    assert not call_main(*flags, *prompts)
    assert not call_main(*flags[:3], f"--out={tmp_path / 'b.png'}", "--prompt=a hund")
    sheets = []
    for name in ("a.png", "b.png"):
        pixels = np.asarray(Image.open(tmp_path / name))
        factor = pixels.shape[1] // (3 * 30 + 2)  # enlarged to 400 pixels
        sheets.append(pixels[::factor, ::factor])
    three, one = sheets
    assert three.shape[1] == one.shape[1] == 3 * 30 + 2
    assert three.shape[0] - 2 == 3 * (one.shape[0] - 2)
    np.testing.assert_array_equal(three[: 2 + 28], one[: 2 + 28])


def test_inpainting_and_variations_of_a_prompt(workdir, folder, tmp_path):
    image = folder / "images" / "1.png"
    flags = [f"--workdir={workdir}", f"--image={image}", "--num=2", "--prompt=a hund"]
    out = tmp_path / "a.png"
    assert not call_main(*flags, "--mode=inpaint", "--mask=left", f"--out={out}")
    assert out.exists()
    assert not call_main(*flags, "--mode=vary", "--negative_prompt=red", f"--out={out}")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"\n \n", "has no prompt"),
        (b"\xff\xfe\xfa", "is not text in UTF-8"),
        (None, "There is no file"),
    ],
)
def test_a_wrong_file_of_prompts_is_named(workdirs, tmp_path, capsys, content, sentence):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    flags = [f"--workdir={workdirs['text_token']}", "--mode=sample"]
    assert call_main(*flags, f"--prompts={tmp_path / 'p.txt'}") == 1
    assert sentence in capsys.readouterr().err


def test_several_prompts_of_one_image_are_refused(workdirs, folder, capsys):
    flags = [f"--workdir={workdirs['text_token']}", f"--image={folder / 'images' / '1.png'}"]
    assert call_main(*flags, "--mode=vary", "--prompt=a", "--prompt=red") == 1
    assert "Give one prompt for all images, not 2" in capsys.readouterr().err


def test_a_long_prompt_is_cut_with_a_warning(workdirs, caplog):
    pipeline = BinaryLatentDiffusion.from_workdir(workdirs["text_token"])
    with caplog.at_level("WARNING"):
        pipeline.sample(1, jax.random.key(0), prompt="red " * 30)
    assert "Cut at the 12 tokens that the encoder reads" in caplog.text


def test_the_text_encoder_is_found_in_the_workdir_or_named(workdirs, folder, tmp_path):
    workdir = shutil.copytree(workdirs["text_token"], tmp_path / "copied")
    weights_path = folder / "minilm.npz"
    aside = weights_path.rename(folder / "aside.npz")
    try:
        pipeline = BinaryLatentDiffusion.from_workdir(workdir)
        with pytest.raises(UserError, match=r"convert minilm --from FILE.*copied"):
            pipeline.sample(1, jax.random.key(0), prompt="a")
        shutil.copyfile(aside, workdir / "minilm.npz")
        pipeline.sample(1, jax.random.key(0), prompt="a")
        other = texts.minilm(encoders.write_bert(tmp_path / "bert"))
        other["params/word_embeddings/embedding"] = other["params/word_embeddings/embedding"] + 1
        weights.write_npz(workdir / "minilm.npz", other)
        pipeline = BinaryLatentDiffusion.from_workdir(workdir)
        with pytest.raises(UserError, match="is not the text encoder that the prior"):
            pipeline.sample(1, jax.random.key(0), prompt="a")
    finally:
        aside.rename(weights_path)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"prior.condition": "class"}, "is for a prior of texts: set config.prior.condition"),
        ({"data.texts": True}, "set one of the two"),
        ({"texts.encoder": ""}, "set config.texts.encoder if the images have captions"),
        ({"prior.text_width": 7}, "text_width is 7, but the features of the texts have the width"),
        ({"data.name": "digits"}, "Captions are read from folders only"),
    ],
)
def test_what_does_not_fit_is_refused(
    workdirs, folder, digits_dir, tmp_path, capsys, changes, sentence
):
    source = workdirs["text_token"] / "autoencoder"
    shutil.copytree(source, tmp_path / "run" / "autoencoder")
    flags = [f"--workdir={tmp_path / 'run'}", "--mode=train_prior"]
    if "data.name" in changes:
        changes = changes | {"data.path": digits_dir}
    condition = changes.pop("prior.condition", "text_token")
    assert call_main(*given_flags(folder, condition, **changes), *flags) == 1
    assert sentence in capsys.readouterr().err


def test_training_does_not_go_on_with_another_text_encoder(workdirs, folder, tmp_path, capsys):
    workdir = shutil.copytree(workdirs["text_token"], tmp_path / "run")
    other = texts.minilm(encoders.write_bert(tmp_path / "bert"))
    other["params/word_embeddings/embedding"] = other["params/word_embeddings/embedding"] + 1
    weights.write_npz(tmp_path / "other.npz", other)
    changes = {"texts.weights": tmp_path / "other.npz", "prior.train.num_steps": 14}
    flags = [f"--workdir={workdir}", "--mode=train_prior"]
    assert call_main(*given_flags(folder, "text_token", **changes), *flags) == 1
    assert "texts.sha256 is" in capsys.readouterr().err


def test_too_many_images_without_captions_stop_the_run(folder, tmp_path, capsys):
    """Refused before any training, with the names of images without captions."""
    images = shutil.copytree(folder / "images", tmp_path / "images")
    (images / "2.txt").unlink()
    given = given_flags(folder, "text_token", **{"data.path": images})
    assert call_main(*given, f"--workdir={tmp_path / 'run'}") == 1
    assert "more than config.data.max_broken = 0.01 allows" in capsys.readouterr().err
    assert repr(str(images / "2.png")) in (tmp_path / "run" / "bad_files.txt").read_text()
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_a_missing_text_encoder_stops_the_run_before_any_training(folder, tmp_path, capsys):
    given = given_flags(folder, "text_cross", **{"texts.weights": tmp_path / "none.npz"})
    assert call_main(*given, f"--workdir={tmp_path / 'run'}") == 1
    assert "There is no file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_training_on_with_other_captions_is_told(workdirs, folder, tmp_path, capsys):
    images = shutil.copytree(folder / "images", tmp_path / "images")
    (images / "2.txt").write_text("a red red hund")
    workdir = shutil.copytree(workdirs["text_token"], tmp_path / "run")
    changes = {"data.path": images, "prior.train.num_steps": 14}
    flags = [f"--workdir={workdir}", "--mode=train_prior"]
    assert not call_main(*given_flags(folder, "text_token", **changes), *flags)
    told = "The images or labels differ from those that training of the prior began with"
    assert told in capsys.readouterr().err


def test_an_autoencoder_does_not_fix_the_width_of_texts(workdirs, tmp_path):
    """It may come from a run whose config asked for other texts."""
    workdir = shutil.copytree(workdirs["text_token"], tmp_path / "run")
    with Checkpoints(workdir / "autoencoder", 1) as checkpoints:
        meta = checkpoints.newest(Checkpoints.meta)
        experiment = of_checkpoint(meta, workdir)
        state = checkpoints.restore(experiment.autoencoder.init_state(0))
    meta = meta | {"config": experiment.change({"prior.text_width": 768}).config}
    shutil.rmtree(workdir / "autoencoder")
    with Checkpoints(workdir / "autoencoder", 1) as checkpoints:
        checkpoints.save(state, meta)
    given = resolve(load_workdir_config(str(workdir)))
    pipeline = BinaryLatentDiffusion.from_workdir(workdir, given)
    assert pipeline.experiment.prior.conditioning.text_width == 24
