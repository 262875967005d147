"""Cached features of captions, and examples with them as labels."""

import json
import re

import encoders
import numpy as np
import pytest
from conftest import held

from binlatent.convert import texts
from binlatent.data import classes, loader
from binlatent.data.decoded import DecodedImages
from binlatent.data.images import EncodedImages
from binlatent.data.sources import Source
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.texts import cache
from binlatent.texts.cache import write_features
from binlatent.texts.captioned import check_captions, with_captions
from binlatent.texts.encoder import TextEncoder

# Six images with five distinct captions of 3 to 7 tokens, including start and end.
CAPTIONS = [
    ("a red apple", "apple"),
    ("red",),
    (),
    ("a red apple", "a apple . red .", "red"),
    ("a hund",),
    ("apple",),
]
TEXTS = ["a red apple", "apple", "red", "a apple . red .", "a hund"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    weights.write_npz(path / "x.npz", texts.minilm(encoders.write_bert(path / "bert")))
    return TextEncoder.load(path / "x.npz")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three shards for the five captions, which are encoded one by one."""
    monkeypatch.setattr(cache, "_SHARD", 2)
    monkeypatch.setattr(cache, "_AT_ONCE", 1)
    classes.warn_once.cache_clear()


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded, in order."""
    found, features = [], TextEncoder.features

    def counted(self, texts, *arguments):
        found.extend(texts)
        return features(self, texts, *arguments)

    monkeypatch.setattr(TextEncoder, "features", counted)
    return found


@pytest.mark.parametrize("per_token", [False, True])
def test_a_caption_has_the_encoders_features(tmp_path, encoder, encoded, per_token):
    features = write_features(CAPTIONS, tmp_path, encoder, per_token)
    assert sorted(encoded) == sorted(TEXTS) and len(features) == 5  # each caption once
    # Seven tokens: start, end, and five of the longest caption.
    assert features.shape == ((7, 24) if per_token else (24,))
    pooled, tokens, mask = encoder.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        expected = tokens[i][mask[i]] if per_token else pooled[i] * 24**0.5
        found = features[text]
        assert found.dtype == np.float32 and found.shape == expected.shape
        # float16 has 11 bits; results of different batches differ by rounding.
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-4)
    with pytest.raises(KeyError):
        features["another"]


def test_padding_takes_no_space_on_disk(tmp_path, encoder):
    write_features([("red",), ("red " * 10,)], tmp_path, encoder, True)
    (path,) = tmp_path.glob("*/rows-*.npy")
    assert np.load(path).shape == (3 + 12, 24) and np.load(path).dtype == np.float16


def test_a_cache_serves_again_and_in_any_order(tmp_path, encoder, encoded, monkeypatch):
    monkeypatch.setattr(cache, "_SHARD", 100)
    monkeypatch.setattr(cache, "_AT_ONCE", 100)
    many = [*CAPTIONS, *((f"apple {i}",) for i in range(50))]
    first = write_features(many, tmp_path, encoder, True)
    count = len(encoded)
    second = write_features(many[::-1], tmp_path, encoder, True)
    assert len(encoded) == count and len(list(tmp_path.iterdir())) == 1
    for text in TEXTS:
        np.testing.assert_array_equal(first[text], second[text])


def test_other_captions_encoders_or_features_have_another_folder(tmp_path, encoder):
    others = [(CAPTIONS, encoder, False), (CAPTIONS[:3], encoder, False), (CAPTIONS, encoder, True)]
    # Joined, these captions would be equal.
    others += [([("a", "b c")], encoder, False), ([("a b", "c")], encoder, False)]
    for number, (captions, of, per_token) in enumerate(others, start=1):
        write_features(captions, tmp_path, of, per_token)
        assert len(list(tmp_path.iterdir())) == number
    path = tmp_path / "x.npz"
    state = encoders.bert_state()
    state["embeddings.LayerNorm.bias"] = state["embeddings.LayerNorm.bias"] + 1
    weights.write_npz(path, texts.minilm(encoders.write_bert(tmp_path / "bert", state)))
    write_features(CAPTIONS, tmp_path / "folders", TextEncoder.load(path), False)
    (made,) = (tmp_path / "folders").iterdir()
    assert not (tmp_path / made.name).exists()


def test_writing_resumes_after_a_kill(tmp_path, encoder, encoded, monkeypatch):
    whole = write_features(CAPTIONS, tmp_path / "whole", encoder, True)
    encoded.clear()
    writes, save = [], np.save

    def killed(file, array):
        writes.append(array)
        if len(writes) == stop:
            raise KeyboardInterrupt
        save(file, array)

    monkeypatch.setattr(np, "save", killed)
    # Before each of the six files of the three shards, and before info.json.
    for stop in range(1, 8):
        writes.clear()
        with monkeypatch.context() as patch:
            if stop == 7:
                patch.setattr(cache, "write_json", killed)
            with pytest.raises(KeyboardInterrupt):
                write_features(CAPTIONS, tmp_path / str(stop), encoder, True)
        (folder,) = (tmp_path / str(stop)).iterdir()
        assert not (folder / "info.json").exists()
        encoded.clear()
        writes[:] = [None] * 100
        found = write_features(CAPTIONS, tmp_path / str(stop), encoder, True)
        shards = (stop - 1) // 2
        assert len(encoded) == 5 - min(2 * shards, 5)  # complete shards are not encoded again
        for text in TEXTS:
            np.testing.assert_array_equal(found[text], whole[text])


def test_a_missing_shard_is_written_again(tmp_path, encoder, encoded):
    before = write_features(CAPTIONS, tmp_path, encoder, False)
    expected = [before[text] for text in TEXTS]
    (folder,) = tmp_path.iterdir()
    (folder / "rows-00001-of-00003.npy").unlink()
    (folder / "info.json").unlink()
    encoded.clear()
    after = write_features(CAPTIONS, tmp_path, encoder, False)
    assert len(encoded) == 2
    np.testing.assert_array_equal([after[text] for text in TEXTS], expected)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def of_another_width(path):
    np.save(path, np.load(path)[:, :-1])


def of_another_type(path):
    np.save(path, np.load(path).astype(np.float32))


def backwards(path):
    np.save(path, np.load(path)[::-1])


@pytest.mark.parametrize(
    "name, damage",
    [
        ("rows-00001-of-00003.npy", cut_short),
        ("rows-00001-of-00003.npy", of_another_width),
        ("rows-00001-of-00003.npy", of_another_type),
        ("rows-00001-of-00003.npy", lambda path: path.unlink()),
        ("ends-00001-of-00003.npy", cut_short),
        ("ends-00001-of-00003.npy", backwards),
        ("info.json", cut_short),
        ("info.json", lambda path: path.write_text("[]")),
        ("info.json", lambda path: path.write_text(json.dumps({"width": 23}))),
    ],
)
def test_a_damaged_cache_is_a_one_line_error(tmp_path, encoder, name, damage):
    write_features(CAPTIONS, tmp_path, encoder, True)
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    message = f"features of captions in {re.escape(str(folder))} are damaged .*delete that folder"
    with pytest.raises(UserError, match=message):
        write_features(CAPTIONS, tmp_path, encoder, True)


def test_two_processes_do_not_write_the_same_features(tmp_path, encoder):
    write_features(CAPTIONS, tmp_path, encoder, False)
    (folder,) = tmp_path.iterdir()
    (folder / "info.json").unlink()
    with (
        held(folder / ".lock") as other,
        pytest.raises(UserError, match=f"are being written already, by .*{other.pid} on"),
    ):
        write_features(CAPTIONS, tmp_path, encoder, False)
    write_features(CAPTIONS, tmp_path, encoder, False)


def test_captions_that_are_cut_are_counted_once(tmp_path, encoder, caplog):
    captions = [(f"{'red ' * (9 + i)}apple",) for i in range(5)]  # 12 to 16 tokens
    write_features(captions, tmp_path, encoder, False)
    (message,) = [text for text in caplog.messages if "tokens" in text]
    assert message.startswith("4 of 5 captions are cut at the 12 tokens that the encoder reads, ")


def test_features_beyond_float16_are_refused(tmp_path, encoder, monkeypatch):
    for value in (7e4, np.nan, np.inf):
        broken = np.full((1, 24), value, np.float32)
        monkeypatch.setattr(TextEncoder, "features", lambda *_, x=broken: x)
        with pytest.raises(UserError, match="a NaN, an infinity or a number too large for float16"):
            write_features(CAPTIONS, tmp_path, encoder, False)


def test_many_captions_are_in_at_most_256_shards():
    for count in (0, 1, 2, 511, 512, 513, 1_000_001):
        parts = cache._parts(count)
        assert [i for part in parts for i in (part[0], part[-1] + 1)] == sorted(
            [x for part in parts for x in (part.start, part.stop)]
        )
        assert sum(map(len, parts)) == count and len(parts) <= 256
        assert len({len(part) for part in parts[:-1]}) <= 1


# Examples


def images(broken=(), captions=CAPTIONS, **options):
    """Small images whose value is their number; some cannot be read."""

    def read(index):
        # A PGM image of 4 x 2 pixels.
        content = b"no image" if index in broken else b"P5 4 2 255\n" + bytes([index] * 8)
        file = tmp / f"{index}.pgm"
        file.write_bytes(content)
        return str(file), f"{index}", 9

    tmp = options.pop("tmp")
    encoded = EncodedImages(len(captions), (), read, "", [])
    examples = DecodedImages(encoded, 2, 1, keep=True, max_broken=0.5)
    return Source(examples, fingerprint="f", captions=lambda: captions, **options)


@pytest.mark.parametrize("per_token", [False, True])
def test_labels_are_the_features_of_captions(tmp_path, encoder, per_token):
    source = images(tmp=tmp_path)
    features = write_features(CAPTIONS, tmp_path / "texts", encoder, per_token)
    captioned = with_captions(source, features)
    assert len(captioned.examples) == 6 and captioned.fingerprint == "f"
    for i, captions in enumerate(CAPTIONS):
        first = captioned.examples[i]
        assert (first["image"] == i).all() and first["label"].dtype == np.float32
        assert first["label"].shape == ((7, 24) if per_token else (24,))
        for j, text in enumerate(captions):
            for choice in (j / len(captions), (j + 0.999) / len(captions)):
                label = captioned.examples.read(i, 0.5, choice)["label"]
                expected = features[text]
                np.testing.assert_array_equal(label[: len(expected)], expected)
                assert not label[len(expected) :].any()
            if j == 0:
                np.testing.assert_array_equal(first["label"], captioned.examples.read(i)["label"])
    for choice in (0.0, 0.7):
        assert not captioned.examples.read(2, choice=choice)["label"].any()
    assert captioned.examples[-1]["label"].any()
    with pytest.raises(IndexError):
        captioned.examples[6]


def test_a_replacement_image_has_its_own_captions(tmp_path, encoder):
    source = images(broken=(4, 5), tmp=tmp_path)
    features = write_features(CAPTIONS, tmp_path / "texts", encoder, False)
    captioned = with_captions(source, features)
    for i in (4, 5):
        example = captioned.examples.read(i, 0.5, 0.6)
        assert (example["image"] == 0).all()
        np.testing.assert_array_equal(example["label"], features["apple"])
    assert captioned.examples.num_unreadable == 2


def test_codes_have_captions_too(tmp_path, encoder):
    class Codes:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"probs": np.full((2, 2, 8), index, np.uint8), "label": 0}

        def locate(self, index, position=0.5):
            return (0 if index == 5 else index), self[index]  # the first replaces the last

    features = write_features(CAPTIONS, tmp_path, encoder, False)
    source = with_captions(Source(Codes(), captions=lambda: CAPTIONS), features)
    assert source.examples.num_unreadable == 0
    batches = loader.train_batches(source, 6, seed=0, num_threads=0, random_caption=True)
    seen = set()
    for _ in range(40):
        batch = next(batches)
        assert batch["probs"].dtype == np.uint8 and batch["label"].dtype == np.float32
        for probs, label in zip(batch["probs"], batch["label"], strict=True):
            index = int(probs[0, 0, 0])
            own = CAPTIONS[0 if index == 5 else index]
            found = [text for text in own if np.array_equal(features[text], label)]
            assert found or not own and not label.any()
            seen.update((index, text) for text in found)
    assert len(seen) == sum(map(len, CAPTIONS)) + 1


def test_images_without_captions_are_counted_and_named(tmp_path, caplog):
    files = tuple(f"{i}.png" for i in range(6))
    report = tmp_path / "made" / "bad_files.txt"
    for _ in range(2):
        check_captions(images(tmp=tmp_path, files=files), 1 / 6, report)
    assert report.read_text() == "there is no caption of the image '2.png'\n"
    (message,) = [text for text in caplog.messages if "no caption" in text]
    assert message.startswith(f"1 of 6 images have no caption; {report} names them; ")


@pytest.mark.parametrize(
    "captions, max_broken, message",
    [
        (CAPTIONS, 0.1, "1 of 6 images have no caption, the first is number 2, more than"),
        (CAPTIONS[:3], 0.3, "1 of 3 .* than config.data.max_broken = 0.3 allows: raise that"),
        ([()] * 4, 1.0, "4 of 4 images have no caption"),
        (None, 1.0, "6 of 6 images have no caption"),
    ],
)
def test_too_many_images_without_captions_stop_the_run(tmp_path, captions, max_broken, message):
    source = images(captions=captions or CAPTIONS, tmp=tmp_path)
    if captions is None:
        source = Source(source.examples)
    with pytest.raises(UserError, match=message):
        check_captions(source, max_broken)
