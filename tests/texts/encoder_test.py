"""The file of a text encoder, batching, cutting and scaling."""

import json
import sys

import encoders
import numpy as np
import pytest

from binlatent.convert import texts
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.texts import encoder as encoder_module
from binlatent.texts.encoder import TextEncoder


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    return texts.minilm(encoders.write_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def path(arrays, tmp_path):
    weights.write_npz(tmp_path / "x.npz", arrays)
    return tmp_path / "x.npz"


def test_an_encoder_has_the_hash_of_its_file(path):
    encoder = TextEncoder.load(path)
    assert encoder.name == "minilm" and encoder.sha256 == weights.sha256(path)
    assert (encoder.model.max_tokens, encoder.model.width) == (12, 24)


def test_few_programs_serve_many_texts(path):
    encoder = TextEncoder.load(path)
    draw = np.random.default_rng(0)
    before = encoder_module._apply._cache_size()
    for n in range(1, 9):
        found = encoder.encode(["red " * k for k in draw.integers(0, 11, n)])
        assert len(found.pooled) == n
    # The four devices take 4 or 8 texts.
    assert encoder_module._apply._cache_size() - before == 2


def test_no_texts(path):
    found = TextEncoder.load(path).encode([])
    assert [x.shape for x in found] == [(0, 24), (0, 0, 24), (0, 0)]


def test_more_texts_than_a_batch_keep_their_order(path, monkeypatch):
    encoder = TextEncoder.load(path)
    sentences = [text for i in range(13) for text in ("a " * (i % 7), "red apple " + "s" * i)]
    whole = encoder.encode(sentences)
    monkeypatch.setattr(encoder_module, "_TOKENS_AT_ONCE", 48)
    monkeypatch.setattr(encoder_module, "_SHORTEST", 4)
    found = encoder.encode(sentences)
    np.testing.assert_allclose(found.pooled, whole.pooled, atol=1e-6)
    np.testing.assert_allclose(found.tokens, whole.tokens, atol=1e-5)
    np.testing.assert_array_equal(found.mask, whole.mask)


def test_texts_that_are_cut_are_named(path, caplog):
    with caplog.at_level("WARNING"):
        found = TextEncoder.load(path).encode(["a red apple", "red " * 11, "apple " * 30])
    assert found.tokens.shape[1] == 12
    assert caplog.messages == [
        f"Cut at the 12 tokens that the encoder reads: {'red ' * 11!r}, and 1 other texts"
    ]
    # With a list, they are added to it, without a warning.
    caplog.clear()
    cut = ["before"]
    TextEncoder.load(path).encode(["apple " * 30, "a"], cut)
    assert cut == ["before", "apple " * 30] and not caplog.messages


def test_a_text_that_is_not_utf_8_is_refused(path):
    # How Python decodes the byte ff on the command line.
    with pytest.raises(UserError, match="A text for the text encoder is not valid UTF-8"):
        TextEncoder.load(path).encode(["a", "red \udcff"])


def test_features_are_scaled_for_a_prior_and_blank_texts_are_zeros(path):
    encoder = TextEncoder.load(path)
    sentences = ["a red apple", "", "red", " \n\t", "."]
    given = [0, 2, 4]
    pooled, tokens, mask = encoder.encode([sentences[i] for i in given])
    found = encoder.features(sentences, per_token=False)
    assert found.shape == (5, 24) and found.dtype == np.float32
    # MiniLM's vectors have length 1; scaled, their mean square is 1.
    np.testing.assert_allclose(found[given], pooled * 24**0.5, rtol=1e-6)
    np.testing.assert_allclose(np.square(found[given]).mean(axis=1), 1, rtol=1e-5)
    assert (found[[1, 3]] == 0).all()
    found = encoder.features(sentences, per_token=True)
    assert found.shape == (5, 5, 24) and found.dtype == np.float32
    np.testing.assert_array_equal(found[given], tokens)
    np.testing.assert_array_equal(np.any(found[given] != 0, axis=-1), mask)
    assert (found[[1, 3]] == 0).all()


def test_clips_features_are_not_scaled(tmp_path):
    weights.write_npz(tmp_path / "x.npz", texts.clip(encoders.write_clip(tmp_path / "clip")))
    encoder = TextEncoder.load(tmp_path / "x.npz")
    sentences = ["7 8 9", "11"]
    pooled, tokens, _ = encoder.encode(sentences)
    np.testing.assert_array_equal(encoder.features(sentences, per_token=False), pooled)
    np.testing.assert_array_equal(encoder.features(sentences, per_token=True), tokens)


@pytest.mark.parametrize("sentences", [[], ["", " "]])
def test_features_of_no_text_have_a_row_of_padding(path, sentences):
    encoder, n = TextEncoder.load(path), len(sentences)
    for per_token, shape in ((False, (n, 24)), (True, (n, 1, 24))):
        found = encoder.features(sentences, per_token)
        assert found.shape == shape and not found.any()


def test_a_missing_library_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="run `pip install 'binlatent\\[texts\\]'`"):
        TextEncoder.load(path)


def test_a_missing_file_is_named_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*convert minilm --from FILE\.whl"):
        TextEncoder.load(tmp_path / "x.npz")


def config(**changes):
    sizes = {"vocab_size": 10, "max_tokens": 12, "width": 24, "num_layers": 2, "num_heads": 3}
    content = {"encoder": "minilm", **sizes, "mlp_width": 40} | changes
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


KERNEL = "params/layer_1/mlp_in/kernel"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": None}, "its format is None, not 1"),
        ({"format": np.array(2)}, "its format is 2, not 1"),
        ({"config": None}, "it lacks config"),
        ({"tokenizer": None}, "it lacks tokenizer"),
        ({"config": np.frombuffer(b"{", np.uint8)}, "its config is damaged"),
        ({"config": np.frombuffer(b"\xff", np.uint8)}, "its config is damaged"),
        ({"config": np.frombuffer(b"[1]", np.uint8)}, r"its configuration is \[1\]"),
        ({"config": config(encoder=["clip"])}, "its configuration is"),
        ({"config": config(encoder="t5")}, "its configuration is"),
        ({"config": config(num_layers=10**12)}, "its configuration is"),
        ({"config": config(width="24")}, "its configuration is"),
        ({"config": config(num_heads=5)}, "its configuration is"),
        ({"config": config(num_layers=3)}, "it lacks params/layer_2/"),
        ({"config": config(num_layers=1)}, "it also holds params/layer_1/"),
        ({KERNEL: None}, f"it lacks {KERNEL}"),
        ({KERNEL: np.zeros((24, 41), np.float32)}, rf"{KERNEL} is float32 \(24, 41\), not"),
        ({KERNEL: np.zeros((24, 40))}, f"{KERNEL} is float64"),
        ({"extra": np.zeros(1)}, "it also holds extra"),
        ({"tokenizer": np.frombuffer(b"{}", np.uint8)}, "its tokenizer is damaged"),
        ({"tokenizer": np.zeros(3)}, "its tokenizer is damaged"),
        (
            {"config": config(vocab_size=11), "params/word_embeddings/embedding": (11, 24)},
            "its tokenizer has 10 tokens, and its embedding 11",
        ),
    ],
)
def test_another_file_is_refused(arrays, tmp_path, change, message):
    changed = {key: x for key, x in {**arrays, **change}.items() if x is not None}
    for key, x in changed.items():
        if isinstance(x, tuple):
            changed[key] = np.zeros(x, np.float32)
    weights.write_npz(tmp_path / "x.npz", changed)
    with pytest.raises(UserError, match=rf"x\.npz is not .* create it again, as {message}"):
        TextEncoder.load(tmp_path / "x.npz")


def test_a_cut_file_is_refused(path):
    good = path.read_bytes()
    for size in (0, 10, len(good) // 2, len(good) - 10):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"it is damaged or not an \.npz file"):
            TextEncoder.load(path)
