"""Broken links and vanishing files: every reader of a folder counts one unreadable image."""

import os

import numpy as np
import pytest
from PIL import Image

from binlatent.data import sources, walk
from binlatent.data.splits import Data, open_split
from binlatent.runtime.errors import UserError


def write_images(path, count=20):
    """Writes constant greyscale images, 000.png, ...; 003.png is a broken link."""
    path.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path / f"{i:03}.png")
    (path / "003.png").unlink()
    (path / "003.png").symlink_to(path.parent / "moved.png")


def opened(path, max_broken=0.1, **more):
    return open_split(Data("folder", str(path), 4, 1, max_broken=max_broken, **more), "train")


def values(source):
    return [int(source.examples[i]["image"][0, 0, 0]) for i in range(len(source.examples))]


def test_another_image_replaces_the_broken_link_which_is_counted(tmp_path, caplog):
    write_images(tmp_path / "images")
    source = opened(tmp_path / "images")
    assert values(source) == [1, 2, 4, *range(4, 10), *range(11, 20)]  # every tenth is a test image
    assert source.examples.num_unreadable == 1
    assert caplog.text.count("there is no image") == 1 and "003.png" in caplog.text
    with pytest.raises(UserError, match="1 of 18 images cannot be read, more than"):
        values(opened(tmp_path / "images", max_broken=0.01))


def test_the_stamp_changes_when_a_file_comes_back(tmp_path):
    write_images(tmp_path / "images")
    files = opened(tmp_path / "images").files
    before = sources.stamp(files)
    assert sources.stamp(files) == before
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "moved.png")
    assert sources.stamp(files) != before
    (tmp_path / "moved.png").unlink()
    assert sources.stamp(files) == before


@pytest.mark.parametrize("broken", [1, 4])
def test_an_image_whose_text_is_a_broken_link_is_unreadable_too(tmp_path, broken):
    write_images(tmp_path / "images")
    for i in range(20):
        np.save(tmp_path / "images" / f"{i:03}.npy", np.full(3, float(i)))
    text = tmp_path / "images" / f"{broken:03}.npy"  # of the first training image, or another
    text.unlink()
    text.symlink_to(tmp_path / "moved.npy")
    source = opened(tmp_path / "images", max_broken=0.2, texts=True)
    expected = {1: [2, 2, 4, *range(4, 10)], 4: [1, 2, 5, 5, *range(5, 10)]}[broken]
    expected += range(11, 20)
    assert values(source) == expected
    assert [x["label"][0] for x in map(source.examples.read, range(18))] == expected


def test_a_folder_that_vanishes_during_the_walk_is_left_out_and_named(
    tmp_path, monkeypatch, caplog
):
    write_images(tmp_path / "images" / "a")
    write_images(tmp_path / "images" / "b")
    for folder in (tmp_path, tmp_path / "images", *(tmp_path / "images").iterdir()):
        os.utime(folder, (0, 0))  # long ago, so that the walk is kept
    stat = os.stat

    def vanished(path, **options):
        if str(path).endswith("b"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **options)

    monkeypatch.setattr(walk, "_KEPT_FILES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(walk.os, "stat", vanished)
        found = walk.find_images(str(tmp_path / "images"), keep=True)
    assert [os.path.relpath(file, tmp_path / "images/a") for file in found] == [
        f"{i:03}.png" for i in range(20)
    ]
    assert f"The images in {tmp_path}/images/b are left out: No such file" in caplog.text
    # The folder comes back with the same times.
    assert len(walk.find_images(str(tmp_path / "images"), keep=True)) == 40
