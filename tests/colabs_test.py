"""Each notebook runs from top to bottom at tiny size, and is saved with its outputs.

`python tests/colabs_test.py NAME [VARIABLE=VALUE ...]` runs colabs/NAME.ipynb in full and saves
it with its outputs. The values replace those of its cell of sizes for that run only.
"""

import base64
import json
import os
import re
import sys
from pathlib import Path

import encoders
import nbclient
import nbformat
import numpy as np
import pytest
from conftest import TINY, xla_flags
from PIL import Image

from binlatent import BinaryLatentDiffusion
from binlatent.convert import __main__ as convert

COLABS = Path("colabs")
NOTEBOOKS = (
    "inpainting_and_likelihood",
    "pretrained",
    "quickstart",
    "text_to_image",
    "your_images",
)
STEPS = {"autoencoder_steps": 2, "prior_steps": 2}
# Of any data and any shape of code.
NETWORKS = {
    key: value
    for key, value in TINY.items()
    if key.startswith(("autoencoder.", "prior.network", "prior.train", "sample.", "evaluate."))
    and not key.endswith(("num_bits", "num_steps"))
}


def read(name):
    return nbformat.read(COLABS / f"{name}.ipynb", as_version=4)


def parameters_of(notebook):
    """The number of the cell that has the sizes."""
    (number,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    return number


def execute(notebook, lines, **environment):
    """Runs a notebook, in place, with lines of code after its cell of sizes."""
    extra = nbformat.v4.new_code_cell("\n".join(lines))
    notebook.cells.insert(parameters_of(notebook) + 1, extra)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    resources = {"metadata": {"path": str(COLABS)}}
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources=resources, coalesce_streams=True
    )
    try:
        client.execute(env={**os.environ, "PATH": path, **environment})
    finally:
        notebook.cells.remove(extra)
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.fixture(scope="module")
def run(no_tensorflow):
    """Runs a notebook with other sizes, which must be variables of its cell of sizes."""

    def run(name, **sizes):
        notebook, names = read(name), {}
        exec(notebook.cells[parameters_of(notebook)].source, names)
        assert set(sizes) <= set(names)
        lines = [f"{size} = {value!r}" for size, value in sizes.items()]
        path = no_tensorflow["PYTHONPATH"]
        return execute(notebook, lines, PYTHONPATH=path, XLA_FLAGS=xla_flags(1))

    return run


def pictures_in(outputs):
    return sum("image/png" in output.get("data", ()) for output in outputs)


def text_of(outputs):
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def quickstart(run, digits_dir, tmp_path_factory):
    """The outputs and the workdir of the quickstart, and its overrides of the config."""
    workdir = tmp_path_factory.mktemp("quickstart")
    overrides = {**NETWORKS, "autoencoder.num_bits": 10, "data.path": digits_dir}
    return run("quickstart", workdir=str(workdir), overrides=overrides, **STEPS), workdir, overrides


@pytest.mark.slow
def test_quickstart(quickstart):
    outputs, workdir, _ = quickstart
    assert pictures_in(outputs) == 9
    assert (workdir / "sevens.png").exists()


@pytest.mark.slow
def test_inpainting_and_likelihood(run, quickstart):
    _, workdir, overrides = quickstart
    sizes = {"num_images": 60, "num_classified": 5, "workdir": str(workdir)}
    outputs = run("inpainting_and_likelihood", overrides=overrides, **sizes, **STEPS)
    assert pictures_in(outputs) >= 8
    assert "The prior is trained: 2 steps" in text_of(outputs)


@pytest.mark.slow
def test_your_images(run, tmp_path):
    sizes = {"workdir": str(tmp_path), "num_examples": 60}
    outputs = run("your_images", overrides=NETWORKS, **sizes, **STEPS)
    assert pictures_in(outputs) == 5
    text = text_of(outputs)
    assert "refused: " in text and "too coarse" in text and "nothing is compressed" in text


@pytest.mark.slow
def test_text_to_image(run, tmp_path):
    rng, emoji, workdir = np.random.default_rng(0), tmp_path / "emoji", tmp_path / "workdir"
    emoji.mkdir()
    lines = []
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(emoji / f"{i}.png")
        split = "train" if i % 4 else "test"
        lines.append({"file": f"{i}.png", "caption": ["a red apple", "hund"], "split": split})
    (emoji / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = encoders.write_bert(tmp_path / "bert")
    workdir.mkdir()
    convert.main(["minilm", "--from", str(source), "--out", str(workdir / "minilm.npz")])
    sizes = {"workdir": str(workdir), "emoji": str(emoji), "num": 1}
    outputs = run("text_to_image", overrides=NETWORKS, **sizes, **STEPS)
    assert pictures_in(outputs) == 8


@pytest.mark.slow
def test_pretrained_with_stand_ins(run, digits_dir, tmp_path):
    overrides = {**NETWORKS, "data.path": digits_dir}
    places = {name: str(tmp_path / name) for name in ("workdir", "standin_workdir")}
    outputs = run("pretrained", overrides=overrides, num=2, **places, **STEPS)
    assert pictures_in(outputs) == 3
    models = [BinaryLatentDiffusion.from_workdir(place) for place in places.values()]
    converted, standin = (model.experiment.prior.prior.target for model in models)
    assert converted == standin == "flip"


def test_the_notebooks_begin_alike():
    """The cells that install and report the accelerator are the same."""
    assert {path.stem for path in COLABS.glob("*.ipynb")} == set(NOTEBOOKS)
    setups = {tuple(cell.source for cell in read(name).cells[1:4]) for name in NOTEBOOKS}
    assert len(setups) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_saved_with_its_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not re.search("/(root|home|Users)/", json.dumps(outputs))
    files = [
        base64.b64decode(x.data["image/png"]) for x in outputs if "image/png" in x.get("data", ())
    ]
    assert files and sum(map(len, files)) <= 1_500_000


def save(name, *lines):
    """Runs a notebook and saves it with its outputs."""
    notebook = read(name)
    execute(notebook, lines)
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.execution_count = number + 1
        cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]  # warnings
        if "originals" in cell.metadata.get("tags", ()):  # pictures of the data set itself
            cell.outputs = []
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)  # the same picture as the PNG
            if "execution_count" in output:
                output.execution_count = number + 1
    notebook.metadata.language_info = {"name": "python"}
    (COLABS / f"{name}.ipynb").write_text(nbformat.writes(notebook, indent=1) + "\n")


if __name__ == "__main__":
    save(*sys.argv[1:])
