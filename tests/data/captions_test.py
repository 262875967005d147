"""Captions of the images in a folder, and random captions in batches."""

import json
import os

import grain
import numpy as np
import pytest
from PIL import Image

from binlatent.data import classes, loader
from binlatent.data.codes import open_codes, write_codes
from binlatent.data.decoded import locate
from binlatent.data.sources import Source
from binlatent.data.splits import Data, open_split
from binlatent.runtime.errors import UserError


@pytest.fixture(autouse=True)
def warn_again():
    classes.warn_once.cache_clear()


def write_images(path, count):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path / f"{i:02}.png")


def open_folder(path, split="train", **options):
    return open_split(Data("folder", str(path), 4, 1, **options), split)


def test_lines_of_a_text_file_beside_an_image_are_its_captions(tmp_path):
    write_images(tmp_path, 10)  # the first is a test image
    contents = {
        0: b"held out",
        1: b"a red apple\n\n  \tan apple,  red \n",
        2: b"\xef\xbb\xbfof Windows\r\nwith \xc3\xa4\r\n",
        3: b"without an end",
        4: b" \n\n",
        5: b"",
        7: b"old\rMac",
    }
    for i, content in contents.items():
        (tmp_path / f"{i:02}.txt").write_bytes(content)
    assert open_folder(tmp_path).captions() == [
        ("a red apple", "an apple, red"),
        ("of Windows", "with ä"),
        ("without an end",),
        *((), (), ()),
        ("old", "Mac"),
        *((), ()),
    ]
    assert open_folder(tmp_path, "test").captions() == [("held out",)]


def test_captions_follow_the_images_into_classes_and_splits(tmp_path):
    for split, name in (("train", "b"), ("train", "a"), ("test", "b"), ("test", "a")):
        write_images(tmp_path / split / name, 2)
        for i in range(2):
            (tmp_path / split / name / f"{i:02}.txt").write_text(f"{split} {name} {i}")
    for split in ("train", "test"):
        expected = [(f"{split} {name} {i}",) for name in "ab" for i in range(2)]
        assert open_folder(tmp_path, split).captions() == expected


@pytest.mark.parametrize(
    "content", [b"caf\xe9", "a".encode("utf-16"), "ab".encode("utf-16-le"), None]
)
def test_text_in_another_encoding_counts_as_missing_with_a_warning(tmp_path, caplog, content):
    write_images(tmp_path, 3)
    (tmp_path / "01.txt").write_text("fine")
    if content is None:
        os.mkfifo(tmp_path / "02.txt")  # reading from it would block
    else:
        (tmp_path / "02.txt").write_bytes(content)
    assert open_folder(tmp_path).captions() == [("fine",), ()]
    assert ("02.txt'. They must be UTF-8 text" in caplog.text) == (content is not None)
    assert caplog.text.count("UTF-8") <= 1


def test_captions_are_read_when_called_and_once(tmp_path):
    write_images(tmp_path, 3)
    source = open_folder(tmp_path)
    (tmp_path / "01.txt").write_text("written after it was opened")
    assert source.captions()[0] == ("written after it was opened",)
    (tmp_path / "01.txt").write_text("later")
    assert source.captions()[0] == ("written after it was opened",)
    assert open_folder(tmp_path).captions()[0] == ("later",)


def test_fingerprints_do_not_depend_on_captions(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "t.csv").write_text("file,caption\n00.png,a\n01.png,b\n")
    before = [open_folder(tmp_path, table=table).fingerprint for table in ("", "t.csv")]
    (tmp_path / "01.txt").write_text("new")
    (tmp_path / "t.csv").write_text("file,caption\n00.png,c\n01.png,d\n")
    after = [open_folder(tmp_path, table=table).fingerprint for table in ("", "t.csv")]
    assert after == before


def captions_of(path, name, content):
    """The captions in a table of training images 00, 01, ..."""
    (path / name).write_text(content)
    return open_folder(path, table=name).captions()


def test_columns_of_a_table_are_captions(tmp_path, caplog):
    write_images(tmp_path, 4)
    (tmp_path / "00.txt").write_text("not used beside a column of captions")
    csv = 'file,split,Caption, CAPTION_2 ,caption_long\n00.png,train,a,"b, c",\n'
    csv += '01.png,train,"[""d"", "" "", ""e""]",f,[g\n02.png,train,"two\nlines",,[]\n'
    csv += "03.png,train,,,\n"
    expected = [("a", "b, c"), ("d", "e", "f", "[g"), ("two lines",), ()]
    assert captions_of(tmp_path, "t.csv", csv) == expected
    lines = [
        {"file": "00.png", "split": "train", "caption": "a", "caption_2": "b, c"},
        {"file": "01.png", "split": "train", "caption": ["d", " ", "e"], "Captions": ["f", "[g"]},
        {"file": "02.png", "split": "train", "caption": "two\nlines", "caption_2": None},
        {"file": "03.png", "split": "train"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert captions_of(tmp_path, "t.jsonl", text) == expected
    # In JSON lines, a string with a JSON list is an ordinary text.
    text = json.dumps({"file": "00.png", "split": "train", "caption": '["d"]'})
    assert captions_of(tmp_path, "t.jsonl", text) == [('["d"]',)]
    assert "not used" not in caplog.text


def test_a_table_without_captions_uses_text_files_beside_the_images(tmp_path):
    write_images(tmp_path / "deep", 2)
    (tmp_path / "deep" / "01.txt").write_text("beside")
    content = "file,split\ndeep/01.png,train\ndeep/00.png,train\n"
    assert captions_of(tmp_path, "t.csv", content) == [("beside",), ()]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("t.jsonl", "5", r"line 1 of '.*t\.jsonl' has in the column 'caption' the value 5, which"),
        ("t.jsonl", '["a", 5]', r"the value \['a', 5\], which is neither a text nor a list"),
        ("t.jsonl", '{"a": "b"}', "neither a text nor a list of texts"),
        ("t.jsonl", r'"\ud800"', "neither a text nor a list of texts"),
        ("t.csv", '"[""a"", ""b"', "neither a text nor a list of texts: columns whose names start"),
        ("t.csv", '"[""a"", 5]"', "neither a text nor a list of texts"),
        ("t.csv", "a red, round apple", "line 1 .* has more cells than the header: put double"),
    ],
)
def test_a_damaged_caption_is_a_one_line_error(tmp_path, name, value, message):
    write_images(tmp_path, 1)
    line = f"file,split,caption\n00.png,train,{value}\n"
    if name == "t.jsonl":
        line = f'{{"file": "00.png", "split": "train", "caption": {value}}}\n'
    (tmp_path / name).write_text(line)
    source = open_folder(tmp_path, table=name)  # an autoencoder does not read captions
    with pytest.raises(UserError, match=message):
        source.captions()


def test_empty_cells_behind_the_header_are_left_out(tmp_path):
    write_images(tmp_path, 1)
    content = "file,split,caption\n00.png,train,apple,, \n"
    assert captions_of(tmp_path, "t.csv", content) == [("apple",)]


# The loader


class Captioned:
    """24 images; image i has i % 3 + 2 captions, and the label is the caption's number."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, position=0.5, choice=0.0):
        image = np.full((2, 2, 1), index, np.uint8)
        image[:, 0] = 100 + index  # shows which images are mirrored
        label = np.float32([int(choice * (index % 3 + 2)), position])
        return {"image": image, "label": label}


def drawn(count=100, state=None, num_threads=0, seed=0, shard=(0, 1), batch=12, **options):
    """Returns image numbers, whether they are mirrored, captions' numbers and positions."""
    source = Source(Captioned())
    batches = loader.train_batches(source, batch, seed, num_threads, shard, **options)
    if state is not None:
        batches.set_state(state)
    parts = [next(batches) for _ in range(count)]
    pixels = np.rint(np.concatenate([x["image"] for x in parts])[:, 0, :, 0] * 127.5 + 127.5)
    label = np.concatenate([x["label"] for x in parts])
    columns = pixels.min(axis=1), pixels[:, 0] < 100, label[:, 0], label[:, 1]
    return np.stack(columns, axis=1), batches.get_state()


def test_each_caption_of_an_image_is_drawn_equally_often():
    found, _ = drawn(count=400, random_caption=True)
    for captions in (2, 3, 4):
        of_those = found[found[:, 0] % 3 + 2 == captions, 2]
        counts = np.bincount(of_those.astype(int), minlength=captions)
        n, p = len(of_those), 1 / captions
        assert len(counts) == captions and n == 1_600
        assert np.abs(counts - n * p).max() < 4 * np.sqrt(n * p * (1 - p))
    assert (drawn()[0][:, 2] == 0).all()  # without random captions, the first


@pytest.mark.parametrize("names", ["", "crop", "flip", "crop flip", "crop flip caption", "caption"])
def test_the_position_is_drawn_first_and_the_caption_last(names):
    names = names.split()
    found, _ = drawn(count=20, **{f"random_{name}": True for name in names})
    # The same random stream, computed here.
    dataset = grain.MapDataset.range(24).seed(0).shuffle().repeat()
    dataset = dataset.random_map(lambda index, random: (index, random.random(len(names))))
    for row, (index, draws) in zip(found, dataset, strict=False):
        draw = dict(zip(names, draws, strict=True))
        caption = int(draw.get("caption", 0) * (index % 3 + 2))
        expected = index, draw.get("flip", 1) < 0.5, caption, np.float32(draw.get("crop", 0.5))
        assert tuple(row) == expected


def test_captions_depend_on_the_place_in_the_stream():
    options = dict(random_caption=True, random_flip=True, random_crop=True)
    _, state = drawn(count=7, **options)
    expected, _ = drawn(count=10, state=state, **options)
    whole, _ = drawn(count=17, num_threads=3, **options)
    np.testing.assert_array_equal(whole[7 * 12 :], expected)
    shares = [drawn(17, shard=(i, 2), batch=6, **options)[0].reshape(17, 6, 4) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1).reshape(-1, 4), whole)
    assert np.any(drawn(count=17, seed=1, **options)[0][:, 2] != whole[:, 2])


# Replacements


def test_codes_store_which_image_replaced_another(tmp_path):
    write_images(tmp_path / "images", 12)
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    (tmp_path / "images" / "11.png").write_bytes(b"no image")
    data = Data("folder", str(tmp_path / "images"), 4, 1, max_broken=0.5)
    source = open_split(data, "train")  # without the two test images
    expected = [0, 1, 3, 3, 4, 5, 6, 7, 8, 0]
    folder = write_codes(
        *(source, tmp_path / "codes"),
        encoder="e",
        encode_probs=lambda images: np.repeat((images[:, :2, :2] + 1) / 2, 8, axis=-1),
        code_shape=(2, 2, 8),
        data=data,
        batch_size=4,
    )
    codes = open_codes(folder, "e").examples
    for examples in (source.examples, codes):
        assert [locate(examples, i)[0] for i in range(10)] == expected
    values = [int(codes[i]["probs"][0, 0, 0]) for i in range(10)]
    assert values == [int(source.examples[i]["image"][0, 0, 0]) for i in range(10)]
    assert [number for number, _ in map(lambda i: locate(Captioned(), i), range(3))] == [0, 1, 2]
