"""What all commands have in common: help, seeds, paths, and advice that works as it is printed."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import call_main, parse_main, write_checkpoints
from PIL import Image

from binlatent import experiment as experiments
from binlatent import main, stages
from binlatent.autoencoder import lpips
from binlatent.configs import default
from binlatent.convert import __main__ as convert
from binlatent.data import folder
from binlatent.evaluation import __main__ as evaluation
from binlatent.evaluation.networks import weights as network_weights
from binlatent.experiment import resolve
from binlatent.paper import __main__ as paper
from binlatent.paper import ablations, tables
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import keys, usage
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints

PACKAGE = Path(main.__file__).parent


def code_of(function, *arguments):
    """The code with which a command of argparse ends."""
    with pytest.raises(SystemExit) as end:
        function([str(argument) for argument in arguments])
    return end.value.code or 0


def test_help_exits_with_zero(capsys):
    for function in (evaluation.main, convert.main, paper.main, ablations.main):
        assert code_of(function, "--help") == 0
    assert code_of(convert.main, "vgg16", "--help") == 0
    assert call_main("--help") == 0
    assert "usage" in capsys.readouterr().out
    line = [sys.executable, "-m", "binlatent.benchmark", "--help"]  # whose flags are absl's too
    result = subprocess.run(line, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "--repeats" in result.stdout


@pytest.mark.parametrize("seed", [2**32, 10**20, -1])
def test_seeds_that_jax_would_change_are_refused(tmp_path, capsys, seed):
    given = ("--config=digits", f"--workdir={tmp_path / 'x'}")
    assert call_main(*given, f"--seed={seed}") == 2
    assert f"--seed must be between 0 and 4294967295, not {seed}" in capsys.readouterr().err
    assert call_main(*given, f"--config.seed={seed}") == 1
    assert f"seed must be between 0 and 4294967295, not {seed}" in capsys.readouterr().err
    assert code_of(paper.main, "steps", f"--workdir={tmp_path}", f"--seed={seed}") == 2
    assert f"must be between 0 and 4294967295, not '{seed}'" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"seed must be between 0 and 4294967295, not {seed}"):
        keys.key_for(seed, "sample")
    assert keys.key_for(keys.MAX_SEED, "sample") != keys.key_for(0, "sample")


def test_center_is_centre():
    config = default.get_config()
    config.data.crop, config.autoencoder.discriminator.augment = "center", ("color",)
    found = resolve(config)
    assert found.data.crop == found.config["data"]["crop"] == "centre"
    assert found.autoencoder.objective.augment == ("colour",)


# Paths


def test_flags_of_the_main_command_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("--workdir=~/x", "--mode=inpaint", "--image=~/a.png", "--out=~/b.png")
    parse_main(*flags, "--mask=~/m.png", "--features=~/t.npy")
    found = [main.FLAGS[name].value for name in ("workdir", "image", "out", "mask", "features")]
    files = ["x", "a.png", "b.png", "m.png", "t.npy"]
    assert found == [f"{tmp_path}/{file}" for file in files]
    (config,) = usage.with_config_paths(["--config=~/a.py:b"])
    assert config == f"--config={tmp_path}/a.py:b"
    parse_main("--workdir=x", "--mode=inpaint", "--mask=centre")
    assert (main.FLAGS.workdir, main.FLAGS.mask) == ("x", "centre")


PATH_FLAGS = {  # by command, with what else the flag needs
    paper.main: ({"workdir", "out"}, ["steps"]),
    ablations.main: ({"workdir"}, []),
    evaluation.main: (
        {"reference", "images", "weights", "vgg16", "out", "tensorboard", "write_statistics"},
        [],
    ),
}
CONVERT = {name: ({"from", "out"}, [name]) for name in ("vgg16", "minilm", "autoencoder")}
CONVERT |= {"prior": ({"from", "out", "autoencoder", "text_encoder"}, ["prior"])}
CONVERT |= {"clip": ({"from", "out", "tokenizer"}, ["clip"])}
CONVERT |= {"export": ({"workdir", "out"}, ["export"])}


def test_addresses_are_refused_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for function, (names, start) in [
        *PATH_FLAGS.items(),
        *((convert.main, x) for x in CONVERT.values()),
    ]:
        for name in names:
            assert code_of(function, *start, f"--{name}=gs://bucket/x") == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert f"argument --{name}: gs://bucket/x is not a local path" in error
    for flags in (
        ["--workdir=s3://b/x", "--config=digits"],
        *(
            ["--workdir=x", "--mode=inpaint", f"--{name}=s3://b/x"]
            for name in ("image", "mask", "out")
        ),
        ["--workdir=x", "--config=s3://b/x.py"],
        ["--workdir=x", "--config=workdir:s3://b/x"],
    ):
        assert call_main(*flags) == 2
        assert "s3://b/x" in (error := capsys.readouterr().err)
        assert error.startswith("Bad usage: ") and "is not a local path" in error
    assert not list(tmp_path.iterdir())


def test_an_address_is_no_workdir_of_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for train in (stages.train_autoencoder, stages.train_prior):
        with pytest.raises(UserError, match="^workdir: gs://b/x is not a local path"):
            train(resolve(default.get_config()), "gs://b/x")
    assert not list(tmp_path.iterdir())


def test_every_path_of_a_command_of_argparse_is_expanded(monkeypatch):
    """No flag takes a bare Path, and all that are expanded are tested above."""
    parsers = []
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self) or sys.exit()
    )
    for function in (evaluation.main, convert.main, paper.main, ablations.main):
        code_of(function)
    found = []
    for parser in parsers:
        for action in parser._actions:
            children = (
                action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
            )
            parsers += children
            if getattr(action.type, "__name__", "") in ("Path", "path_argument"):
                found.append((parser.prog, action.option_strings[0], action.type.__name__))
    assert {kind for _, _, kind in found} == {"path_argument"}
    tested = [*PATH_FLAGS.values(), *CONVERT.values()]
    assert {flag.lstrip("-") for _, flag, _ in found} == set().union(
        *(names for names, _ in tested)
    )


@pytest.mark.parametrize("name", experiments.PATHS)
def test_paths_in_configs_are_absolute(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def resolved(path, of="folder"):
        config = default.get_config()
        config.update_from_flattened_dict({name: path, "data.name": of})
        content = resolve(config).config
        for key in name.split("."):
            content = content[key]
        return content

    assert resolved("a/b") == str(tmp_path / "a" / "b")
    assert resolved("../x") == str(tmp_path.parent / "x")
    assert resolved("~/x") == str(tmp_path / "home" / "x")
    assert resolved("") == ""
    with pytest.raises(UserError, match=f"config.{name}: gs://b/x is not a local path"):
        resolved("gs://b/x")
    if name == "data.path":  # TFDS reads buckets itself
        assert resolved("gs://b/x", of="imagenet2012") == "gs://b/x"
        with pytest.raises(UserError, match="gs://b/x is not a local path"):
            resolved("gs://b/x", of="lmdb")
    if name == "evaluate.reference":
        assert (resolved("train"), resolved("test")) == ("train", "test")


def test_what_a_config_says_beside_its_paths_is_the_same_anywhere(tmp_path, monkeypatch):
    """Benchmark rows, and the configs of several processes, are compared without paths."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        config = default.get_config()
        config.data.path = "photos"
        found.append(resolve(config))
    assert found[0].data.path == str(tmp_path / "a" / "photos") != found[1].data.path
    assert found[0].without_paths == found[1].without_paths
    config.data.image_size = 128
    assert resolve(config).without_paths != found[0].without_paths


def images_below(path):
    values = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    path.mkdir(parents=True)
    for i, image in enumerate(values):
        Image.fromarray(image).save(path / f"{i:02}.png")


def test_data_named_from_another_folder_and_moved(tiny_experiment, tmp_path, monkeypatch, capsys):
    """A relative path holds elsewhere; once it does not, the advice is a command that works."""
    images_below(tmp_path / "a" / "photos")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    values = {"data.name": "folder", "data.path": "photos", "data.num_classes": 0}
    write_checkpoints(tmp_path / "run", tiny_experiment.change(values))
    monkeypatch.chdir(tmp_path / "b")
    flags = ["--workdir=../run", "--mode=reconstruct", "--num=2"]
    assert call_main(*flags) == 0
    first = (tmp_path / "run" / "reconstructions.png").read_bytes()
    (tmp_path / "a" / "photos").rename(tmp_path / "b" / "pictures")
    capsys.readouterr()
    assert call_main(*flags) == 1
    (advice,) = re.findall(r"set (--config\S+)=DIR", capsys.readouterr().err)
    (tmp_path / "run" / "reconstructions.png").unlink()
    assert call_main(*flags, f"{advice}=pictures") == 0
    assert (tmp_path / "run" / "reconstructions.png").read_bytes() == first
    # Where a config is needed, the advice is a flag that works.
    flags = ["--workdir=../run", "--mode=train_autoencoder"]
    for given in ([f"{advice}=pictures"], []):
        assert call_main(*flags, *given) == 2
        error = capsys.readouterr().err
        assert f"{advice if given else flags[1]} needs --config: --config=workdir:../run" in error
    own = re.search(r"--config=workdir:\S+", error)[0]
    assert (
        parse_main(*flags, own, "--config.sample.steps=3") and main.FLAGS.config.sample.steps == 3
    )


def test_a_run_that_goes_on_says_that_its_images_have_moved(tiny_experiment, tmp_path, caplog):
    images_below(tmp_path / "a")
    values = {"data.name": "folder", "data.path": str(tmp_path / "a"), "data.num_classes": 0}
    first = stages.setup_autoencoder(tiny_experiment.change(values), tmp_path / "run")
    meta = first.meta | {"data": {}}
    (tmp_path / "a").rename(tmp_path / "b")
    values["data.path"] = str(tmp_path / "b")
    second = stages.setup_autoencoder(tiny_experiment.change(values), tmp_path / "run")
    caplog.clear()
    with caplog.at_level("INFO"):
        second.tell_changes(meta)
    moved = f"The images were moved from '{tmp_path / 'a'}' to '{tmp_path / 'b'}'"
    assert caplog.messages == [f"{moved}. The autoencoder continues on the same images."]
    caplog.clear()
    second.tell_changes(meta | {"source": "of other names"})
    assert "differ from those that training of the autoencoder began with" in caplog.text
    assert "moved" not in caplog.text


# Advice


def messages():
    """Some of the messages that print a whole command."""
    for raising in (
        lambda: lpips.read_vgg16("my weights.npz"),
        lambda: network_weights.read_inception("my weights.npz"),
        lambda: network_weights.read_efficientnet_lite0("x.npz"),
        lambda: Checkpoints.open(Path("runs/x"), "prior"),
        lambda: BinaryLatentDiffusion.prior_params.fget(argparse.Namespace(has_prior=False)),
        lambda: convert.workdirs.convert_prior({}, Path("x"), autoencoder=Path("y")),
    ):
        with pytest.raises(UserError) as error:
            raising()
        yield str(error.value)
    for older in (False, True):
        yield str(tables.no_results(Path("my runs"), older, "fid,psnr"))


def test_commands_in_messages_are_commands():
    found = []
    for message in messages():
        commands = re.findall(r"`python -m (binlatent\.\w+) (.*?)`", message)
        assert commands, message
        for name, rest in commands:
            words = shlex.split(rest.replace("CONFIG", "digits"))
            if name == "binlatent.convert":
                convert._parser().parse_args(words)
            else:
                assert name == "binlatent.main"
                assert len(parse_main(*words)) == 1
            found.append(name)
    assert len(found) == 8


def text_of(node):
    """The text of a string in the code, with {} for what is filled in; None of another node."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "{}" for part in node.values)
    return None


def raised_texts():
    """Yields the file and text of each message that is raised or ends a command."""
    ends = ("UserError", "UnreadableImage", "bad_usage", "error", "ArgumentTypeError")
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                for argument in node.args[:1] if name in ends else []:
                    if text := text_of(argument):
                        yield path.relative_to(PACKAGE).as_posix(), text


def flags_of(command):
    """The flags of a command."""
    if command == "main":
        return {*main._FLAGS, "config"}
    file = PACKAGE / {"ablations": "paper/ablations.py"}.get(command, f"{command}/__main__.py")
    defines = r"(?:flag|add_argument|DEFINE_\w+|define_path)\(\s*\"(?:--)?([\w.]+)\""
    more = {f"config.{key}" for key in experiments.PATHS} if command == "paper" else set()
    return {*re.findall(defines, file.read_text()), *more}


# Files of messages for other commands than their room's, or than the main one where it has none.
OF_FILES = {"paper/ablations.py": "ablations", "runtime/state_dicts.py": "convert"}
OF_FILES |= {"evaluation/exchange.py": "evaluation"}
OF_FILES |= {f"evaluation/{name}.py": "main" for name in ("comparison", "pictures", "quality")}
OF_FILES |= {"evaluation/metrics/retrieval_metrics.py": "main"}


def test_flags_in_messages_are_flags_of_their_command():
    names = ("main", "evaluation", "benchmark", "convert", "paper", "ablations")
    known = {name: flags_of(name) for name in names}
    assert {"repeats", "out", "config"} <= known["benchmark"] and "size" in known["evaluation"]
    keys = default.get_config()
    checked = 0
    for file, text in raised_texts():
        room = file.split("/")[0]
        own = OF_FILES.get(file, room if room in known else "main")
        named = re.search(r"binlatent\.(main|evaluation|benchmark|convert|paper)\b", text)
        flags = known[named[1] if named else own]
        for flag in re.findall(r"--([a-z](?:[\w.]*\w)?)", text.replace("--no-deps", "")):
            checked += 1
            if flag.startswith("config."):
                value = keys
                for key in flag.split(".")[1:]:
                    value = value[key]
            else:
                assert flag in flags, (file, text)
    assert checked > 60


def test_every_command_that_reads_images_takes_the_advice_of_the_reader(tmp_path, capsys):
    with pytest.raises(UserError, match="set --config.data.path=DIR"):
        folder.list_images(str(tmp_path / "none"), "train")
    for function, start in ((paper.main, ["steps"]), (ablations.main, [])):
        assert (
            code_of(
                function,
                *start,
                f"--workdir={tmp_path / 'x'}",
                "--config.data.path=/y",
                "--nonsense",
            )
            == 2
        )
        error = capsys.readouterr().err
        assert "--nonsense" in error and "data.path" not in error.splitlines()[-1]
