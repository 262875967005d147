"""Cached codes, with a plain function as the encoder."""

from pathlib import Path

import numpy as np
import pytest
from conftest import held

from binlatent.data import codes, loader
from binlatent.data.sources import Source
from binlatent.data.splits import Data
from binlatent.runtime.errors import UserError

DATA = Data("folder", "", 4, 1)
SHAPE = (2, 2, 8)


class Images:
    def __init__(self, count, label=int):
        self.count, self.label = count, label

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        range(self.count)[index]
        return {"image": np.full((4, 4, 1), index % 256, np.uint8), "label": self.label(index)}


def probabilities(images):
    """An encoder: (n, 4, 4, 1) in [-1, 1] -> (n, 2, 2, 8) in [0, 1]."""
    mean = (np.asarray(images, np.float32).mean(axis=(1, 2, 3)) + 1) / 2
    return np.broadcast_to(mean[:, None, None, None] ** 2, (len(mean), *SHAPE))


def write(folder, images, encode_probs=probabilities, data=DATA, encoder="e", **changes):
    source = Source(images, tuple(map(str, range(10))), **({"fingerprint": "f"} | changes))
    options = dict(encoder=encoder, encode_probs=encode_probs, code_shape=SHAPE)
    return codes.write_codes(source, Path(folder), **options, data=data, batch_size=20)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(codes, "_SHARD", 50)


def test_two_processes_do_not_write_the_same_codes(tmp_path):
    target = write(tmp_path, Images(60))
    (target / "info.json").unlink()
    with (
        held(target / ".lock") as other,
        pytest.raises(UserError, match=f"are being written already, by .*{other.pid} on"),
    ):
        write(tmp_path, Images(60))
    assert write(tmp_path, Images(60)) == target
    with held(target / ".lock"):  # complete codes are only read
        assert write(tmp_path, Images(60)) == target


def test_codes_are_the_encoders_probabilities(tmp_path):
    sizes = set()

    def encode_probs(images):
        sizes.add(len(images))
        return probabilities(images)

    source = codes.open_codes(write(tmp_path, Images(130), encode_probs), "e")
    assert sizes == {20}  # the last batch of each shard is padded
    assert len(source.examples) == 130 and source.num_classes == 10 and source.fingerprint == "f"
    for i in 2 * [*range(130)]:  # from files first, then from memory
        example = source.examples[i]
        assert example["probs"].dtype == np.uint8 and example["probs"].shape == SHAPE
        # Rounding to 255ths adds an error of at most half a 255th.
        np.testing.assert_allclose(example["probs"] / 255, (i / 255) ** 2, atol=0.5 / 255 + 1e-6)
        assert example["label"] == i
    batch = next(loader.train_batches(source, 7, seed=0))
    assert batch["probs"].dtype == np.uint8 and batch["label"].dtype == np.int32


def test_features_of_texts_stay_beside_codes(tmp_path):
    images = Images(7, lambda index: np.full((2, 3), index / 7, np.float32))
    source = codes.open_codes(write(tmp_path, images), "e")
    np.testing.assert_array_equal(source.examples[5]["label"], images[5]["label"], strict=True)


def test_writing_resumes_after_an_interruption(tmp_path):
    encoded = []

    def interrupted(images):
        encoded.append(len(images))
        if len(encoded) == 5:  # in the second of three shards
            raise KeyboardInterrupt
        return probabilities(images)

    images = Images(130)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, images, interrupted)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="no complete codes in .*: create them with --mode=encode"):
        codes.open_codes(folder, "e")
    assert write(tmp_path, images, interrupted) == folder
    assert len(encoded) == 5 + 3 + 2  # both missing shards
    assert write(tmp_path, images, interrupted) == folder and len(encoded) == 10
    resumed = codes.open_codes(folder, "e").examples
    whole = codes.open_codes(write(tmp_path / "whole", images), "e").examples
    for i in range(130):
        np.testing.assert_array_equal(resumed[i]["probs"], whole[i]["probs"])


def test_codes_of_another_encoder_or_other_images_are_not_used(tmp_path):
    folder = write(tmp_path, Images(7))
    with pytest.raises(UserError, match="were made by another encoder than this workdir's"):
        codes.open_codes(folder, "another")
    others = [
        write(tmp_path, Images(7), encoder="another"),
        write(tmp_path, Images(7), fingerprint="g"),
        write(tmp_path, Images(7), data=Data("folder", "", 8, 1)),
    ]
    assert len({folder, *others}) == 4
    # A damaged `info.json`, or one with other content.
    for content in ("", "[]", "{}", (folder / "info.json").read_text().replace("<i4", "O")):
        (others[0] / "info.json").write_text(content)
        with pytest.raises(UserError, match="no complete codes"):
            codes.open_codes(others[0], "e")
    # The codes do not depend on the folder or on training's crops.
    assert write(tmp_path, Images(7), data=Data("folder", "elsewhere", 4, 1, flip=True)) == folder


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_full_disk_is_a_one_line_error(small_disk, monkeypatch):
    monkeypatch.setattr(codes, "_SHARD", 4_096)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="The codes could not be written to .*No space left on dev"):
        write(small_disk, Images(4_000), lambda images: rng.random((len(images), *SHAPE)))
