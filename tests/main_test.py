"""The command line: users' mistakes print one line and exit with a code, without a traceback."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import call_main, parse_main
from PIL import Image

import binlatent
from binlatent import BinaryLatentDiffusion, main
from binlatent.data.transforms import to_uint8
from binlatent.runtime import usage
from binlatent.runtime.keys import key_for

CONFIG = "--config=configs/digits.py"


def run_python(*arguments):
    """Runs Python in a new process; returns its code, output and errors."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def workdir(untrained_workdir, tmp_path):
    """A workdir with checkpoints of untrained networks."""
    return shutil.copytree(untrained_workdir, tmp_path / "workdir")


def test_processes_end_with_a_sentence_and_a_code(tmp_path):
    wd = f"--workdir={tmp_path / 'run'}"
    code, _, errors = run_python("-m", "binlatent.main", CONFIG, wd, "--config.data.name=digitz")
    assert code == 1 and errors.startswith("Error: ") and errors.count("\n") == 1, errors
    code, _, errors = run_python("-m", "binlatent", CONFIG, wd, "--stepps=4")
    assert code == 2 and errors.startswith("Bad usage: ") and errors.count("\n") == 1, errors


def test_help_lists_modes_flags_and_how_to_set_keys(capsys):
    for flag in ("--help", "-h", "--helpfull"):
        assert call_main(flag) == 0
        output = capsys.readouterr().out
        assert "--config.KEY=VALUE" in output and "--config.prior.train.num_steps=5000" in output
        common, *parts = output.split("\n\n--mode=")
        assert [part.partition(":")[0] for part in parts] == list(main.MODES)
        assert all(f"    --{name}: " in common for name in ("workdir", "mode", "config"))
        for (name, mode), part in zip(main.MODES.items(), parts, strict=True):
            assert mode.does in part
            starts = (line.partition(":")[0].strip() for line in part.splitlines())
            flags = [start.removeprefix("--") for start in starts if start.startswith("--")]
            assert flags == [x for x, flag in main._FLAGS.items() if name in flag.modes], name


def test_the_examples_of_the_help_are_commands(capsys):
    call_main("--help")
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split()[4:] for line in lines if "Example: python -m binlatent.main" in line]
    modes = []
    for flags in examples:
        parse_main(*flags)
        modes.append(main.FLAGS.mode)
    assert modes == list(main.MODES)


def test_version(capsys):
    assert call_main("--version") == 0
    assert capsys.readouterr().out == f"binlatent {binlatent.__version__}\n"


def test_configs_go_by_name(tmp_path):
    names = usage.config_names()
    assert {"default", "digits", "ffhq256"} <= set(names) and "__init__" not in names
    for given in (("--config=digits",), ("--config", "digits"), ("-config=digits",)):
        _, *arguments = usage.with_config_paths(["binlatent", *given, "--mode=all"])
        assert arguments[-2].partition("=")[2] or arguments[0] == "--config"
        assert arguments[-2].endswith("configs/digits.py") and arguments[-1] == "--mode=all"
    released = usage.with_config_paths(["--config=ffhq256:released"])
    assert released[0].endswith("configs/ffhq256.py:released")
    own = ["--config=own.py", "--config=./own", f"--config={tmp_path}/a.py:b", "--mode=digits"]
    assert usage.with_config_paths(own) == own


# Commands, which may use files of `bad_files`; exit code, and a part of the message.
REFUSED = [
    ("--config.prior.train.num_step=5", 2, "'num_step'. Did you mean \"num_steps\""),
    ("--config.prior.train.num_steps=many", 2, "'many' is not a whole number"),
    ("--config.sample.guidance=much", 2, "'much' is not a number"),
    ("--config.data.flip=maybe", 2, "'maybe' is neither true nor false"),
    ("--config.sample.guidance_shape=x", 2, "--config has no key"),
    ("--stepps=4", 2, "Did you mean: steps"),
    ("--mode=table4 --out=a.png", 2, "--out is for --mode=sample or inpaint"),
    ("--mode=sing", 2, "--mode=sing is not one of all, train_autoencoder"),
    ("sample", 2, "argument 'sample'"),
    ("--num=0", 2, "--num must be at least 1, not 0"),
    ("--mode=sample --out=x.txt", 2, "ends in .png"),
    ("--num_processes=2", 2, "--coordinator, --num_processes and --process_id must"),
    ("--coordinator=host --num_processes=2 --process_id=0", 2, "must be HOST:PORT"),
    ("--coordinator=host:1 --num_processes=2 --process_id=2", 2, "less than --num_proc"),
    ("--config.autoencoder.bottleneck=vq", 1, "A prior needs bits"),
    ("--config.data.name=digitz", 1, "digits"),
    ("--config.data.name=folder --config.data.path={files}/empty", 1, "no image"),
    ("--config.data.name=folder --config.data.path={files}/empty/no", 1, "no"),
    ("--config.prior.train.accumulate=3", 1, "each in 3 parts (accumulate)"),
    ("--config.dtype=float64", 1, '"float32" or "bfloat16", not \'float64\''),
    ("--config.data.image_size=30", 1, "image_size, 30, must be a multiple"),
    ("--config.checkpoint_every=0", 1, "checkpoint_every must be at least 1"),
    ("--config.seed=-1", 1, "seed must be between"),
    ("--config.prior.bernoulli.target=x", 1, "one of flip, z_0, z_s; got 'x'"),
    ("--config.prior.bernoulli.target=z_s", 1, "evidence needs the target"),
    ("--config.prior.bernoulli.schedule=given", 1, "config.prior.bernoulli.keep, k_0 to k_T"),
    ("--config.prior.bernoulli.vlb_weight=-1", 1, "vlb_weight must be at least 0"),
    ("--config.prior.bernoulli.num_timesteps=8", 1, "between 1 and 8, the number of"),
    ("--config.data.num_classes=0 --guidance=1", 1, "guidance has no effect"),
    ("--config.prior.kind=gaussian", 1, "kind must be one of bernoulli, "),
    ("--option=knwon=kept", 1, "no sampling option 'knwon' (did you mean 'known'?)"),
]
REFUSED_WITHOUT_DIGITS = [
    ("--config=configs/ffhq256.py:realesed", 2, ":released or :modern, not :realesed"),
    ("--config=digits:nothing", 2, "this config has no variants"),
    ("--config=digitz", 2, "--config=digitz is neither a file nor one of bedrooms256, "),
    (
        "--config=configs/ffhq256.py",
        1,
        "train without it: --config.autoencoder.loss.perceptual=0",
    ),
    ("--config=configs/nothing.py", 1, "no config file configs/nothing.py"),
    ("--config=configs/nothing.py --config.seed=1", 2, "No such file or directory"),
    ("--config={files}/workdir.py:runs/x", 1, "write --config=workdir:runs/x."),
    ("--config={files}/workdir.py:runs/x --config.seed=1", 2, "write --config=workdir:runs/x"),
    ("--config=README.md", 2, "README.md, line "),
    ("--config={files}/json.py", 2, "json.py, line 1: NameError: name 'true'"),
    ("--config={files}/null.py", 2, "null bytes"),
    ("--config={files}/no_config.py", 2, "it must define a function get_config()"),
    ("--config={files}/number.py", 1, "must return an ml_collections.ConfigDict"),
    ("--mode=all", 2, "--mode=all needs --config: --config=digits, or a file"),
    ("--mode=sample --workdir={files}/empty --config.sample.steps=4", 2, "has no checkpoint"),
    ("--mode=table4", 2, "--mode=table4 needs --config"),
    ("--mode=evaluate --num=5", 2, "--num needs --metrics"),
    ("--mode=evaluate --metrics=fid --label=3", 2, "--label is for --mode="),
    ("--mode=evaluate --metrics=fid --keep=zip", 2, "--keep=zip is not one of none, png, npz"),
    ("--mode=sample --mask=top", 2, "--mask is for --mode=inpaint"),
    ("--mode=reconstruct --steps=3", 2, "--steps is for --mode=all or sample"),
    ("--mode=sample", 1, "There is no workdir"),
    ("--mode=sample --workdir={files}/empty", 1, "--mode=train_autoencoder`"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that are not configs, and an empty folder."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    for name, text in (
        *(("json", '{"a": true}'), ("null", "\0"), ("no_config", "")),
        ("number", "def get_config():\n    return 3\n"),
    ):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    "command, code, message",
    [(f"{CONFIG} {flags}", *rest) for flags, *rest in REFUSED] + REFUSED_WITHOUT_DIGITS,
)
def test_bad_usage_and_bad_input_are_refused(bad_files, tmp_path, capsys, command, code, message):
    flags = command.format(files=bad_files).split()
    # Exceptions other than SystemExit, which would print a traceback, propagate.
    assert call_main(f"--workdir={tmp_path / 'run'}", *flags) == code
    output = capsys.readouterr().err
    start = "Bad usage: " if code == 2 else "Error: "
    (sentence,) = [line for line in output.splitlines() if line.startswith(start)]
    assert message in sentence
    assert not (tmp_path / "run" / "autoencoder").exists()  # before any training


def test_a_workdir_is_needed(capsys):
    assert call_main("--mode=sample", "--config.sample.steps=4") == 2
    assert "--workdir=DIR is required" in capsys.readouterr().err
    assert call_main(CONFIG) == 2
    assert "--workdir=DIR is required" in capsys.readouterr().err


def test_sample_writes_the_asked_number_of_digits(workdir, tmp_path):
    out = tmp_path / "seven.png"
    options = ("--mode=sample", "--num=7", "--label=7", "--steps=2", "--seed=3", f"--out={out}")
    assert call_main(f"--workdir={workdir}", *options, "--temperature=0.8", "--guidance=2") == 0
    first = np.asarray(Image.open(out))
    factor = first.shape[0] // 32
    assert first.shape[0] == 32 * factor
    assert first.shape[1] > (7 * 30 + 2) * factor  # the class is beside the digits
    assert (
        call_main(f"--workdir={workdir}", *options, "--temperature=0.8", "--guidance=2", "--seed=4")
        == 0
    )
    assert np.any(np.asarray(Image.open(out)) != first)
    # A single image is written as it is, so that it can be the --image of another command.
    one = ("--mode=sample", "--num=1", "--label=7", "--steps=2", "--seed=3", f"--out={out}")
    assert call_main(f"--workdir={workdir}", *one) == 0
    pipeline = BinaryLatentDiffusion.from_workdir(workdir)
    drawn = pipeline.sample(1, key_for(3, "sample"), label=7, steps=2)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), to_uint8(drawn)[0, ..., 0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--label=10",), "between 0 and 9; got 10"),
        (("--steps=0",), "between 1 and 8"),
        (("--steps=9",), "between 1 and 8"),
        (("--steps=9", "--option=steps=2"), "between 1 and 8"),  # --steps wins
        (("--temperature=nan",), "above 0"),
        (("--temperature=-1",), "above 0"),
        (("--option=known",), "must have the form --option=NAME=VALUE"),
        (("--option=knwon=kept",), "no sampling option 'knwon'"),
        (("--option=corrector_steps=1.5",), "corrector_steps must be like 0, not 1.5"),
    ],
)
def test_wrong_sampling_options_exit_with_one(workdir, capsys, flags, message):
    assert call_main(f"--workdir={workdir}", "--mode=sample", *flags) == 1
    assert message in capsys.readouterr().err


def test_reconstruct_and_inpaint_write_their_pictures(workdir):
    assert call_main(f"--workdir={workdir}", "--mode=reconstruct", "--num=4") == 0
    assert Image.open(workdir / "reconstructions.png").size[0] >= 4 * 30 + 2
    assert call_main(f"--workdir={workdir}", "--mode=inpaint", "--num=2", "--steps=2") == 0
    picture = Image.open(workdir / "inpainting.png")  # rows: image, known part, results
    factor = picture.size[1] // (7 * 30 + 2)
    assert picture.size[1] == (7 * 30 + 2) * factor
    assert picture.size[0] > (4 * 30 + 2) * factor  # classes are beside the rows


def test_ones_own_image_is_inpainted_varied_and_reconstructed(workdir, tmp_path, capsys):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    values = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(values).save(image)
    Image.fromarray(np.pad(np.full((28, 56), 255, np.uint8), ((28, 0), (0, 0)))).save(mask)
    own = (f"--workdir={workdir}", f"--image={image}", "--steps=2", "--num=3", "--label=4")
    assert call_main(*own, "--mode=inpaint", f"--mask={mask}") == 0
    picture = np.asarray(Image.open(workdir / "inpainting_image.png"))
    factor = picture.shape[0] // 32
    picture = picture[::factor, ::factor]
    title = picture.shape[1] - (5 * 30 + 2)  # the width of the class beside the row
    assert picture.shape[0] == 32 and title > 0
    picture = picture[:, title:]
    cells = [picture[2:30, 2 + 30 * i : 30 + 30 * i] for i in range(5)]
    for cell in cells[1:]:
        np.testing.assert_array_equal(cell[:14], cells[0][:14])  # kept by the mask
    assert np.all(cells[1][14:] == 128)
    assert np.any(cells[2][14:] != cells[3][14:])
    assert call_main(*own, "--mode=inpaint", f"--mask={mask}", "--option=keep_pixels=False") == 0
    decoded = np.asarray(Image.open(workdir / "inpainting_image.png"))[::factor, ::factor]
    assert np.any(decoded[2:16, title:][:, 62:90] != cells[2][:14])
    assert call_main(*own, "--mode=vary", "--strength=0.2", f"--out={tmp_path / 'varied.png'}") == 0
    width, height = Image.open(tmp_path / "varied.png").size
    assert height % 32 == 0 and width > height // 32 * (4 * 30 + 2)

    for flags, message in (
        (("--mode=inpaint",), "--image needs --mask: a file, or one of centre"),
        (
            ("--mode=inpaint", "--mask=nothing.png"),
            "--mask=nothing.png is neither a file nor one of centre, top",
        ),
        (("--mode=vary", "--strength=2"), "above 0 and at most 1; got 2"),
    ):
        assert call_main(*own, *flags) == 1 and message in capsys.readouterr().err
    assert call_main(f"--workdir={workdir}", "--mode=inpaint", "--mask=middle") == 1
    assert "not one of centre" in capsys.readouterr().err
    # The picture has the image, cropped as for the model, above its reconstruction.
    own = (f"--workdir={workdir}", "--mode=reconstruct", f"--image={image}")
    assert call_main(*own) == 0
    picture = np.asarray(Image.open(workdir / "reconstructions_image.png"))
    factor = picture.shape[1] // 32
    picture = picture[::factor, ::factor]
    assert picture.shape == (2 * 30 + 2, 32)
    np.testing.assert_array_equal(picture[2:30, 2:30], cells[0])
    assert call_main(*own, "--num=2") == 2 and "--num counts test" in capsys.readouterr().err
    # None of them replaces a picture of test images.
    names = {path.stem for path in workdir.glob("*.png")}
    assert names == {"inpainting_image", "reconstructions_image"}


def test_evaluate_writes_the_report(workdir):
    assert call_main(f"--workdir={workdir}", "--mode=evaluate") == 0
    report = json.loads((workdir / "report.json").read_text())
    assert report["seconds"]["prior"] == 1.0 and "accuracy" not in report["samples"]
    assert "cannot judge samples" in report["samples"]["unjudged"]
    # For the untrained prior all bits are fair.
    bits = 4 * 4 * 8
    np.testing.assert_allclose(report["prior"]["bits_per_dim"], 1, atol=0.05)
    np.testing.assert_allclose(
        report["prior"]["bits_per_image"], bits * report["prior"]["bits_per_dim"]
    )


def test_evaluate_measures_what_is_asked_for(workdir, capsys):
    asked = ("--metrics=psnr,fid", "--num=10", "--steps=2", "--keep=png")
    assert call_main(f"--workdir={workdir}", "--mode=evaluate", *asked) == 0
    (path,) = (workdir / "evaluation").glob("*.json")
    result = json.loads(path.read_text())
    assert result["protocol"]["samples"]["steps"] == 2
    assert len(list((workdir / "evaluation").glob("samples_*/png/*.png"))) == 10
    lines = (line.partition("  ") for line in capsys.readouterr().err.splitlines())
    shown = {title: number.split() for title, _, number in lines}
    for title, name in (
        ("PSNR", "psnr"),
        ("FD-classifier", "fd_classifier"),
        ("FD-classifier of real images", "fd_classifier_real"),
    ):
        assert float(shown[title][0]) == pytest.approx(result["metrics"][name], rel=1e-5)


def test_a_config_for_another_model_is_refused(workdir, capsys):
    assert call_main(f"--workdir={workdir}", "--mode=sample", CONFIG) == 1
    assert "autoencoder.num_bits is 8 there and 24 here" in capsys.readouterr().err


def test_importing_the_command_leaves_tensorflow_alone():
    code = "import sys, binlatent.main; print('tensorflow' in sys.modules)"
    assert run_python("-c", code)[:2] == (0, "False\n")
