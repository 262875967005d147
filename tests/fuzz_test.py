"""Files that are damaged or hostile: a result or a one-line error, never a traceback.

FUZZ=1000 pytest tests/fuzz_test.py tries 1,000 cases per test.
"""

import io
import json
import os
import struct

import numpy as np
import pytest
from array_record.python import array_record_module
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from binlatent.configs import digits
from binlatent.data import codes, folder, images, masks
from binlatent.data.images import UnreadableImage
from binlatent.experiment import of_checkpoint, resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import weights
from binlatent.runtime.devices import replicate
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint
from binlatent.training.checkpoint import Checkpoints

# Of decoders, which say what is odd about a file.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES = int(os.environ.get("FUZZ", "60"))
fuzz = settings(
    max_examples=CASES,
    deadline=10_000,  # ms: no case may hang
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def said(error):
    """Asserts that an error is something to show to a user."""
    text = str(error)
    assert text and len(text) < 2_000 and "\n" not in text and "Traceback" not in text


@st.composite
def damaged(draw, whole):
    """Bytes with a few of them changed, lost, added or repeated."""
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 6))):
        # Most of what a reader trusts stands at the beginning.
        limit = draw(st.sampled_from([64, len(content)]))
        start = draw(st.integers(0, min(limit, len(content))))
        end = min(start + draw(st.sampled_from([1, 1, 2, 4, 16, 1_000])), len(content))
        how = draw(st.integers(0, 4))
        if how == 0:
            del content[start:end]
        elif how == 1:
            content[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif how == 2:
            extreme = draw(st.sampled_from([b"\0", b"\xff", b"\x7f\xff", b"\x80"]))
            content[start:end] = (extreme * (end - start))[: end - start]
        elif how == 3:
            content[start:start] = draw(st.binary(max_size=8))
        else:
            content[start:start] = content[start:end]
    return bytes(content)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, float("nan"), float("inf"), 1e-300])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "a\0b", "", "__class__", "x" * 5_000]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw, content):
    """A JSON object of which a few entries are lost, added or something else."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(0, 3))):
        place = content
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or draw(st.integers(0, 9)) == 0:
                break
            place = place[key]
        how = draw(st.integers(0, 9))
        if how == 0:
            del place[key]
            if not place:
                break
        elif how == 1:
            place[draw(st.text(max_size=6))] = draw(JSON)
        else:
            place[key] = draw(JSON)
    return content


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encoded_images():
    """Small images of all kinds, as files."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 4), np.uint8)
    colour, alpha = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x112] = 6
    return [
        encoded(colour, "PNG"),
        encoded(alpha, "PNG"),
        encoded(deep, "PNG"),
        encoded(colour.convert("P"), "PNG"),
        encoded(colour, "JPEG", exif=exif),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour.convert("CMYK"), "JPEG"),
        encoded(colour, "WEBP"),
        encoded(colour, "TIFF", compression="tiff_lzw"),
        encoded(colour, "BMP"),
        encoded(colour, "PPM"),
        encoded(colour, "GIF", save_all=True, append_images=[colour.rotate(90)]),
        *([encoded(colour, "AVIF")] if "AVIF" in images.FORMATS else []),
    ]


IMAGES = encoded_images()


@fuzz
@given(content=damaged(IMAGES) | st.binary(max_size=200))
def test_bytes_of_images(content):
    try:
        image = images.read_image(io.BytesIO(content), 12, 3)
        assert image.shape == (12, 12, 3) and image.dtype == np.uint8
    except UnreadableImage as error:
        said(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two classes of images, and more files beside it."""
    path = tmp_path_factory.mktemp("fuzz")
    for i in range(6):
        file = path / "images" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(IMAGES[0])
    (path / "image.png").write_bytes(IMAGES[0])
    return path


MASK = np.zeros((20, 24), np.uint8)
MASK[4:9, 4:9] = 255


@fuzz
@given(content=damaged([encoded(Image.fromarray(MASK), "PNG"), *IMAGES]))
def test_masks(place, content):
    path = place / "mask.png"
    path.write_bytes(content)
    try:
        mask = masks.read_mask(str(path), str(place / "image.png"), 12)
        assert mask.shape == (12, 12) and mask.dtype == bool and not mask.all()
    except UserError as error:
        said(error)


FILES = [os.path.join("ab"[i % 2], f"{i}.png") for i in range(6)]


def check_listing(root, table=""):
    try:
        for split in ("train", "test"):
            listing = folder.list_images(str(root), split, table)
            assert len(listing.files) == len(listing.labels) == len(listing.texts) > 0
            assert all(0 <= label < max(len(listing.classes), 1) for label in listing.labels)
            yield from listing.files
    except UserError as error:
        said(error)


@fuzz
@given(data=st.data())
def test_kept_walks(place, data):
    root = place / "images"
    times = {name: (root / name).stat().st_mtime_ns for name in (".", "a", "b")}
    whole = {"files": FILES, "changed": times}
    text = data.draw(
        changed(whole).map(json.dumps)
        | JSON.map(json.dumps)
        | st.lists(st.text(max_size=12) | JSON).map(lambda x: json.dumps(whole | {"files": x}))
        | damaged([json.dumps(whole).encode()]).map(lambda x: x.decode("latin-1"))
    )
    (root / ".binlatent_index.json").write_text(text, "latin-1", "backslashreplace")
    os.utime(root, ns=(times["."], times["."]))
    for file in check_listing(root):
        assert os.path.normpath(file).startswith(f"{root}{os.sep}")
        try:
            images.read_image(file, 12, 1)
        except UnreadableImage as error:
            said(error)


LINES = [{"file": file, "label": file[0], "split": "train", "text": ""} for file in FILES]
CSV = "file,label,split,text\n" + "".join(",".join(line.values()) + "\n" for line in LINES)
JSONL = "".join(json.dumps(line) + "\n" for line in LINES)


@fuzz
@given(content=damaged([CSV.encode()]) | st.binary(), line=st.text())
def test_tables_of_commas(place, content, line):
    (place / "images" / "table.csv").write_bytes(content + line.encode("utf-8", "replace"))
    list(check_listing(place / "images", "table.csv"))


@fuzz
@given(
    content=damaged([JSONL.encode()]) | st.binary(),
    lines=st.lists(st.sampled_from(LINES).flatmap(changed) | JSON, max_size=4),
)
def test_tables_of_json(place, content, lines):
    lines = "".join(f"{json.dumps(line)}\n" for line in lines)
    (place / "images" / "table.jsonl").write_bytes(content + b"\n" + lines.encode())
    list(check_listing(place / "images", "table.jsonl"))


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


NPY = [as_npy(np.ones(5)), as_npy(np.ones((2, 3), np.float16)), as_npy(np.array([{}], object))]


@fuzz
@given(content=damaged(NPY))
def test_features_of_texts(place, content):
    path = place / "text.npy"
    path.write_bytes(content)
    try:
        features = folder._read_features(str(path))
        assert features.dtype == np.float32 and np.isfinite(features).all()
    except UserError as error:
        said(error)


@fuzz
@given(data=st.data())
def test_weights(place, data):
    like = {"a": np.ones((2, 3), np.float32), "b/c": np.zeros(70, np.float32)}
    file = io.BytesIO()
    np.savez(file, **like)
    path = place / "vgg16.npz"
    path.write_bytes(data.draw(damaged([file.getvalue(), *NPY])))
    try:
        arrays = weights.read_npz(path, "vgg16", like)
        assert {name: x.shape for name, x in arrays.items()} == {"a": (2, 3), "b/c": (70,)}
    except UserError as error:
        said(error)


INFO = {
    "encoder": "e",
    "code_shape": [2, 2, 3],
    "label_type": "<i4",
    "label_shape": [],
    "num_classes": 4,
    "count": 5,
    "data": {"source": "s"},
}


@pytest.fixture(scope="module")
def shard(place):
    """The bytes of five codes in ArrayRecord."""
    path = place / "codes" / "codes-00000-of-00001.array_record"
    path.parent.mkdir()
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for i in range(5):
        writer.write(struct.pack("<i", i % 4) + bytes(range(12 * i, 12 * i + 12)))
    writer.close()
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_codes(place, shard, data):
    path = place / "codes"
    info = data.draw(st.just(json.dumps(INFO)) | (changed(INFO) | JSON).map(json.dumps))
    (path / "info.json").write_text(info)
    records = shard if data.draw(st.booleans()) else data.draw(damaged([shard]))
    (path / "codes-00000-of-00001.array_record").write_bytes(records)
    try:
        source = codes.open_codes(path, "e")
        for i in range(len(source.examples)):
            example = source.examples[i]
            assert example["probs"].dtype == np.uint8 and example["probs"].ndim == 3
    except UserError as error:
        said(error)


CONFIG = digits.get_config().unlock()
CONFIG.update_from_flattened_dict(TINY)
CONFIG = json.loads(json.dumps(CONFIG.to_dict()))
META = {"config": CONFIG, "data": None, "source": "", "encoder": "", "seconds": 0.0}


@fuzz
@given(content=changed(CONFIG))
def test_configs(content):
    try:
        of_checkpoint({"config": content}, "x")
    except UserError as error:
        said(error)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with an autoencoder that has not learned anything."""
    path = tmp_path_factory.mktemp("workdir")
    state = resolve(CONFIG).autoencoder.init_state(0)
    with Checkpoints(path / "autoencoder") as checkpoints:
        checkpoints.save(replicate(state), META)
    return path


@settings(fuzz, max_examples=max(CASES // 10, 1), deadline=60_000)
@given(data=st.data())
def test_workdirs(workdir, data):
    path = workdir / "autoencoder" / "0" / "meta" / "metadata"
    stored = json.loads(path.read_text())
    meta = data.draw(changed(CONFIG).map(lambda config: META | {"config": config}) | changed(META))
    # Whoever can write the one can write the other.
    stored["content"] = meta
    stored["fingerprints"]["meta"] = checkpoint._fingerprint_of_json(meta)
    path.write_text(json.dumps(stored))
    try:
        pipeline = BinaryLatentDiffusion.from_workdir(workdir)
        assert pipeline.code_shape == (4, 4, 8)
    except UserError as error:
        said(error)
