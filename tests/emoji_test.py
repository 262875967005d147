"""The captions of emoji, and their config."""

import json
import subprocess
import sys

import pytest

from binlatent.configs import emoji64
from binlatent.data.folder import list_images
from binlatent.experiment import resolve

PERSON = {
    "name": "MAN: BLOND HAIR",
    "short_names": ["blond-haired-man", "man_blond"],
    "category": "People & Body",
    "subcategory": "person",
}


def rows():
    """Twenty names, of which the first has two images of its own in three tones."""
    plain = [
        {"name": f"THING {i}", "short_names": [f"thing-{i}"], "image": f"{i:02}.png"}
        | {"category": "Objects", "subcategory": "tool"}
        for i in range(1, 20)
    ]
    return [PERSON | {"image": "00.png"}, *plain]


def write(folder, layout, content):
    (folder / layout).mkdir(parents=True)
    names = [row["image"] for row in content]
    names += [x["image"] for row in content for x in row.get("skin_variations", {}).values()]
    for name in names:
        (folder / layout / name).touch()
    (folder / "emoji.json").write_text(json.dumps(content))
    command = [sys.executable, "launch/emoji_captions.py", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(x) for x in (folder / "captions.jsonl").read_text().splitlines()]
    return {line["file"].rpartition("/")[2]: line for line in lines}


@pytest.fixture
def prepared(tmp_path):
    toned = [
        PERSON | {"image": "a.png", "skin_tones": "1F3FB"},
        PERSON | {"image": "b.png", "skin_tones": "1F3FF-1F3FC"},
    ]
    return write(tmp_path / "prepared", "google", rows() + toned)


@pytest.fixture
def package(tmp_path):
    first, *others = rows()
    tones = {"1F3FB": {"image": "a.png"}, "1F3FF-1F3FC": {"image": "b.png"}}
    content = [first | {"skin_variations": tones}, *others]
    return write(tmp_path / "package", "img/google/64", content)


def test_both_layouts_have_the_same_captions(prepared, package):
    assert {name: line["caption"] for name, line in prepared.items()} == {
        name: line["caption"] for name, line in package.items()
    }
    assert len(prepared) == 22


def test_phrasings_name_the_skin_tone(prepared):
    assert prepared["00.png"]["caption"] == [
        "man, blond hair",
        "an emoji of man, blond hair",
        "blond haired man",
        "man blond",
        "people and body, person, man, blond hair",
    ]
    light, two = (prepared[name]["caption"] for name in ("a.png", "b.png"))
    assert light[2] == "blond haired man, light skin tone"
    assert two[0] == "man, blond hair, dark and medium-light skin tone"


def test_a_tenth_of_the_names_is_held_out_with_all_variants(prepared, package, tmp_path):
    for lines in (prepared, package):
        assert len({line["split"] for name, line in lines.items() if name in "00a.pngb.png"}) == 1
        names = {line["caption"][0].partition(", ")[0] for line in lines.values()}
        held_out = [line for line in lines.values() if line["split"] == "test"]
        assert len(names) == 20
        assert len({line["caption"][0].partition(", ")[0] for line in held_out}) == 2


def test_the_table_is_what_the_config_reads(package, tmp_path):
    config = emoji64.get_config()
    config.data.path = str(tmp_path / "package")
    data = resolve(config).data
    listed = [list_images(data.path, split, data.table) for split in ("train", "test")]
    assert sum(len(x.files) for x in listed) == len(package)
    assert all(len(captions) >= 3 for x in listed for captions in x.captions())


def test_the_code_of_the_config():
    assert resolve(emoji64.get_config()).autoencoder.code_shape == (8, 8, 48)
