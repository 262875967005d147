"""The command line: what users get wrong ends in one sentence and a code, never a traceback."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from binlatent import build, main
from binlatent.runtime.weights import fingerprint
from binlatent.training.checkpoint import Checkpoints
from binlatent.training.state import create_state

CONFIG = "--config=configs/digits.py"


def run_main(*flags):
    """Runs `python -m binlatent.main` and returns its code and output."""
    command = [sys.executable, "-m", "binlatent.main", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def workdir(tmp_path, tiny_config):
    """A workdir with checkpoints of untrained networks."""
    tiny_config.data.num_classes = 10
    encoder = ""
    for i, (stage, init) in enumerate(
        [("autoencoder", build.init_autoencoder), ("prior", build.init_prior)]
    ):
        optimizer = build.optimizer(tiny_config[stage].train)
        params = init(tiny_config, jax.random.key(i))
        with Checkpoints(tmp_path / stage, 1) as checkpoints:
            state = create_state(jax.random.key(0), params, optimizer)
            config = tiny_config.to_dict()
            meta = {"config": config, "data": {}, "source": "", "encoder": encoder, "seconds": 1.0}
            checkpoints.save(state, meta)
        if stage == "autoencoder":
            encoder = fingerprint([params["params"][room] for room in ("encoder", "bottleneck")])
    return tmp_path


def test_bad_usage_and_bad_input_end_in_one_sentence(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    wd = f"--workdir={tmp_path / 'run'}"
    folder = "--config.data.name=folder"
    two = ("--num_processes=2",)
    for name, text in (
        *(("json", '{"a": true}'), ("null", "\0"), ("no_config", "")),
        ("number", "def get_config():\n    return 3\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    cases = [
        (
            (CONFIG, wd, "--config.prior.train.num_step=5"),
            2,
            "'num_step'. Did you mean \"num_steps\"",
        ),
        ((CONFIG, wd, "--config.prior.train.num_steps=many"), 2, "'many' is no whole number"),
        ((CONFIG, wd, "--config.sample.guidance=much"), 2, "'much' is no number"),
        ((CONFIG, wd, "--config.data.flip=maybe"), 2, "'maybe' is neither true nor false"),
        ((CONFIG, wd, "--stepps=4"), 2, "Did you mean: steps"),
        (("--config=configs/ffhq256.py:realesed", wd), 2, "paper or :released, not :realesed"),
        ((wd, "--mode=table4"), 2, "--mode=table4 needs --config"),
        ((CONFIG, wd, "--mode=table4", "--out=a.png"), 1, "for one picture's mode"),
        ((CONFIG, wd, "--config.autoencoder.bottleneck=vq"), 1, "The prior is over bits"),
        (("--config=configs/ffhq256.py", wd), 1, "There is no file 'vgg16.npz'"),
        ((CONFIG, wd, "--mode=sing"), 2, "--mode=sing"),
        ((CONFIG, wd, "sample"), 2, "argument 'sample'"),
        ((CONFIG,), 2, "--workdir"),
        ((wd,), 2, "--mode=all needs --config"),
        ((wd, "--mode=evaluate", "--num=5"), 2, "--mode=evaluate with --metrics"),
        ((wd, "--mode=evaluate", "--metrics=fid", "--label=3"), 2, "--label is for --mode="),
        (("--config=configs/nothing.py", wd), 1, "no config file configs/nothing.py"),
        (("--config=configs/nothing.py", "--config.seed=1", wd), 2, "No such file or directory"),
        ((wd, "--mode=sample"), 1, "There is no workdir"),
        ((f"--workdir={empty}", "--mode=sample"), 1, "run --mode=train_autoencoder first"),
        ((CONFIG, wd, "--config.data.name=digitz"), 1, "digits"),
        ((CONFIG, wd, folder, f"--config.data.path={empty}"), 1, "no image"),
        ((CONFIG, wd, folder, f"--config.data.path={empty}/no"), 1, "no"),
        ((CONFIG, wd, "--config.prior.train.accumulate=3"), 1, "each in 3 parts (accumulate)"),
        ((CONFIG, wd, "--config.dtype=float64"), 1, "float32 or bfloat16, not 'float64'"),
        ((CONFIG, wd, "--config.data.image_size=30"), 1, "image_size is 30"),
        ((CONFIG, wd, "--config.checkpoint_every=0"), 1, "checkpoint_every must be at least 1"),
        ((CONFIG, wd, "--config.seed=-1"), 1, "seed must be between"),
        ((CONFIG, wd, "--config.prior.target=x"), 1, "one of flip, z_0, z_s; got 'x'"),
        ((CONFIG, wd, "--config.prior.target=z_s"), 1, "evidence needs the target"),
        ((CONFIG, wd, "--config.prior.schedule=given"), 1, "config.prior.keep, k_0 to k_T"),
        ((CONFIG, wd, "--config.prior.vlb_weight=-1"), 1, "vlb_weight must be at least 0"),
        ((CONFIG, wd, "--config.prior.num_timesteps=8"), 1, "between 1 and 8, the number of"),
        ((CONFIG, wd, "--config.sample.guidance_shape=x"), 1, "shape must be one of constant"),
        ((CONFIG, wd, "--option=knwon=kept"), 1, "no sampling option 'knwon'"),
        ((wd, "--mode=sample", "--mask=top"), 2, "--mask is for --mode=inpaint"),
        ((CONFIG, wd, "--num_processes=2"), 2, "--coordinator, --num_processes, --process_id go"),
        ((CONFIG, wd, "--coordinator=host", *two, "--process_id=0"), 2, "must be HOST:PORT"),
        ((CONFIG, wd, "--coordinator=host:1", *two, "--process_id=2"), 2, "less than --num_proc"),
        ((wd, "--config=README.md"), 2, "README.md, line "),
        ((wd, f"--config={tmp_path}/json.py"), 2, "json.py, line 1: NameError: name 'true'"),
        ((wd, f"--config={tmp_path}/null.py"), 2, "the file is not Python: "),
        ((wd, f"--config={tmp_path}/no_config.py"), 2, "a file with a function get_config() is"),
        ((wd, f"--config={tmp_path}/number.py"), 1, "must return an ml_collections.ConfigDict"),
        ((wd, "--mode=reconstruct", "--steps=3"), 2, "--steps is for --mode=all or sample"),
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: run_main(*case[0]), cases))
    for (flags, code, message), (got, output) in zip(cases, results, strict=True):
        assert got == code, (flags, output)
        assert message in output, (flags, output)
        assert "Traceback" not in output, (flags, output)
        if code == 1:
            sentence = [line for line in output.splitlines() if line.startswith("Error: ")]
            assert len(sentence) == 1, (flags, output)


class Flags:
    """Parses a command line for `main` in this process."""

    def __init__(self, *flags):
        self.argv = ["binlatent.main", *flags]

    def __enter__(self):
        main.FLAGS.unparse_flags()
        main.FLAGS(self.argv)

    def __exit__(self, *_):
        for name in (
            *("num", "steps", "temperature", "guidance", "label", "out", "config"),
            *("image", "mask", "strength", "option", "seed", "features"),
        ):
            main.FLAGS[name].unparse()


def call_main(*flags):
    with Flags(*flags):
        main.main(["binlatent.main"])


def test_sample_writes_the_asked_number_of_digits(workdir, tmp_path):
    out = tmp_path / "seven.png"
    options = ("--mode=sample", "--num=7", "--label=7", "--steps=2", "--seed=3", f"--out={out}")
    call_main(f"--workdir={workdir}", *options, "--temperature=0.8", "--guidance=2")
    first = np.asarray(Image.open(out))
    factor = first.shape[0] // 32
    assert first.shape == (32 * factor, (7 * 30 + 2) * factor)
    call_main(f"--workdir={workdir}", *options, "--temperature=0.8", "--guidance=2", "--seed=4")
    assert np.any(np.asarray(Image.open(out)) != first)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--label=10",), "between 0 and 9; got 10"),
        (("--steps=0",), "between 1 and 8"),
        (("--steps=9",), "between 1 and 8"),
        (("--num=0",), "at least 1"),
        (("--out=x.txt",), "ends in .png"),
        (("--temperature=nan",), "above 0"),
        (("--temperature=-1",), "above 0"),
        (("--option=known",), "must be --option=NAME=VALUE"),
        (("--option=knwon=kept",), "no sampling option 'knwon'"),
        (("--option=corrector_steps=1.5",), "corrector_steps must be like 0, not 1.5"),
    ],
)
def test_wrong_sampling_flags_exit_with_one(workdir, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        call_main(f"--workdir={workdir}", "--mode=sample", *flags)
    assert exit.value.code == 1
    assert message in capsys.readouterr().err


def test_reconstruct_and_inpaint_write_their_pictures(workdir):
    call_main(f"--workdir={workdir}", "--mode=reconstruct", "--num=4")
    assert Image.open(workdir / "reconstructions.png").size[0] >= 4 * 30 + 2
    call_main(f"--workdir={workdir}", "--mode=inpaint", "--num=2", "--steps=2")
    picture = Image.open(workdir / "inpainting.png")  # a row a preset: image, given, two results
    factor = picture.size[0] // (4 * 30 + 2)
    assert picture.size == ((4 * 30 + 2) * factor, (7 * 30 + 2) * factor)


def test_ones_own_image_is_inpainted_and_varied(workdir, tmp_path, capsys):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    values = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(values).save(image)
    Image.fromarray(np.pad(np.full((28, 56), 255, np.uint8), ((28, 0), (0, 0)))).save(mask)
    own = (f"--workdir={workdir}", f"--image={image}", "--steps=2", "--num=3", "--label=4")
    call_main(*own, "--mode=inpaint", f"--mask={mask}")
    picture = np.asarray(Image.open(workdir / "inpainting.png"))
    factor = picture.shape[0] // 32
    picture = picture[::factor, ::factor]
    assert picture.shape == (32, 5 * 30 + 2)
    cells = [picture[2:30, 2 + 30 * i : 30 + 30 * i] for i in range(5)]
    for cell in cells[1:]:
        np.testing.assert_array_equal(cell[:14], cells[0][:14])  # what the mask keeps
    assert np.all(cells[1][14:] == 128)
    assert np.any(cells[2][14:] != cells[3][14:])
    call_main(*own, "--mode=inpaint", f"--mask={mask}", "--option=keep_pixels=False")
    decoded = np.asarray(Image.open(workdir / "inpainting.png"))[::factor, ::factor]
    assert np.any(decoded[2:16, 62:90] != cells[2][:14])
    call_main(*own, "--mode=vary", "--strength=0.2", f"--out={tmp_path / 'varied.png'}")
    assert Image.open(tmp_path / "varied.png").size == (4 * (4 * 30 + 2), 4 * 32)

    for flags, message in (
        (("--mode=inpaint",), "--image needs --mask: a file, or one of centre"),
        (("--mode=inpaint", "--mask=nothing.png"), "There is no image 'nothing.png'"),
        (("--mode=vary", "--strength=2"), "above 0 and at most 1; got 2"),
    ):
        with pytest.raises(SystemExit) as exit:
            call_main(*own, *flags)
        assert exit.value.code == 1 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call_main(f"--workdir={workdir}", "--mode=inpaint", "--mask=middle")
    assert "none of centre" in capsys.readouterr().err


def test_evaluate_writes_the_report(workdir):
    call_main(f"--workdir={workdir}", "--mode=evaluate")
    report = json.loads((workdir / "report.json").read_text())
    assert report["seconds"]["prior"] == 1.0 and 0 <= report["samples"]["accuracy"] <= 1
    # The untrained prior takes every bit for fair.
    bits = 4 * 4 * 8
    np.testing.assert_allclose(report["prior"]["bits_per_dim"], 1, atol=0.05)
    np.testing.assert_allclose(
        report["prior"]["bits_per_image"], bits * report["prior"]["bits_per_dim"]
    )


def test_evaluate_measures_what_is_asked_for(workdir, capsys):
    call_main(
        *(f"--workdir={workdir}", "--mode=evaluate", "--metrics=psnr,fid"),
        *("--num=10", "--steps=2", "--keep=png"),
    )
    (path,) = (workdir / "evaluation").glob("*.json")
    result = json.loads(path.read_text())
    assert result["protocol"]["samples"]["steps"] == 2
    assert len(list((workdir / "evaluation").glob("samples_*/png/*.png"))) == 10
    words = (line.split() for line in capsys.readouterr().err.splitlines())
    shown = {line[0]: line[1] for line in words if len(line) > 1}
    for title, name in (("PSNR", "psnr"), ("FD-classifier", "fd_classifier")):
        assert float(shown[title]) == pytest.approx(result["metrics"][name], rel=1e-5)


def test_a_config_for_another_model_is_refused(workdir, capsys):
    with pytest.raises(SystemExit):
        call_main(f"--workdir={workdir}", "--mode=sample", CONFIG)
    assert "autoencoder.num_bits is 8 there and 24 here" in capsys.readouterr().err


def test_importing_the_package_leaves_tensorflow_alone():
    code = "import sys, binlatent.main; print('tensorflow' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
