"""CLIP's features of texts, compared with PyTorch's, and its tokenizer.

tests/data/clip_io.npz has PyTorch's features for the random weights of tests/data/clip_openai.pt.
"""

import gzip
import random
import re
import unicodedata
import zipfile

import encoders
import numpy as np
import pytest
from tokenizers import Tokenizer

from binlatent.convert import merges, texts
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.texts.encoder import TextEncoder


def load(folder, arrays):
    weights.write_npz(folder / "clip.npz", arrays)
    return TextEncoder.load(folder / "clip.npz")


@pytest.fixture(scope="module", params=["openai", "huggingface"])
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "huggingface":
        return load(folder, texts.clip(encoders.write_clip(folder)))
    tokenizer = encoders.clip_tokenizer_file(folder)
    return load(folder, texts.clip("tests/data/clip_openai.pt", tokenizer, num_heads=4))


def test_features_of_both_layouts(encoder):
    io = np.load("tests/data/clip_io.npz")
    lengths = io["ids"].argmax(axis=1) + 1
    rows = zip(io["ids"], lengths, strict=True)
    found = encoder.encode([" ".join(map(str, row[1 : end - 1])) for row, end in rows])
    np.testing.assert_array_equal(found.mask.sum(axis=1), lengths)
    np.testing.assert_allclose(found.pooled, io["embedding"], atol=1e-5)
    hidden = io["hidden"][:, : lengths.max()] * found.mask[..., None]
    np.testing.assert_allclose(found.tokens, hidden, atol=1e-5)


def test_a_longer_text_keeps_its_end(encoder, caplog):
    with caplog.at_level("WARNING"):
        cut, whole = encoder.encode(["5 " * 50, "5 " * 18]).pooled
    np.testing.assert_array_equal(cut, whole)
    assert caplog.messages == [
        "Cut at the 20 tokens that the encoder reads: "
        "'5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 5 ...'"
    ]


def reference_tokens(text, pairs):
    """Returns a text's tokens as OpenAI's code does, without most of its repairs."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(order)}
    words = [letters[byte] for byte in order]
    words += [f"{word}</w>" for word in words] + ["".join(pair) for pair in pairs]
    number = {word: i for i, word in enumerate(words)}
    for typographic, plain in zip("‘’“”", "''\"\"", strict=True):
        text = text.replace(typographic, plain)
    text = unicodedata.normalize("NFC", re.sub(r"\s+", " ", text)).strip().lower()
    tokens = [len(words)]
    # Without the library regex: a word is one digit, a run of letters or a run of other characters.
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+", text):
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda x: rank(x, pairs))
            if best not in pairs:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 2 if both else 1
            parts = merged
        tokens += [number[part] for part in parts]
    return [*tokens, len(words) + 1]


def rank(pair, pairs):
    return pairs.index(pair) if pair in pairs else len(pairs)


PAIRS = [
    *(("a", "p"), ("p", "l"), ("ap", "pl"), ("e", "d</w>"), ("r", "ed</w>"), ("appl", "e</w>")),
    *(("a", "n"), ("an", "a"), ("n", "a</w>"), ("ana", "na</w>"), ("an", "an"), ("Ã", "¼</w>")),
    *(("!", "!</w>"), ("'", "s</w>"), ("b", "ana"), ("ð", "Ł"), ("p", "p"), ("pp", "l")),
]
SENTENCES = [
    *("a red apple", "", "A  RED\n Apple!!", "banana's 2024", "grün ü u\u0308", "😀 an emoji"),
    *(
        "it's they’re",
        "“Red” ‘apple’",
        "appleapple ana nana banana",
        "_red_ (red)",
        "日本の旗",
        "red-apple's",
    ),
]


def merges_text(pairs):
    return "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""])


def test_tokens_from_merges_are_those_of_clip(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    # OpenAI's file has more merges than CLIP uses.
    path.write_bytes(gzip.compress(merges_text([*PAIRS, ("q", "q"), ("z", "z")]).encode()))
    text = merges.read_tokenizer(path, 512 + len(PAIRS) + 2)
    tokenizer = Tokenizer.from_str(text)
    draw = random.Random(0)
    drawn = ["".join(draw.choices("aaapplered n'!", k=20)) for _ in range(50)]
    for sentence in [*SENTENCES, *drawn]:
        expected = reference_tokens(sentence, PAIRS)
        assert tokenizer.encode(sentence).ids == expected, sentence
    (tmp_path / "merges.txt").write_text(merges_text(PAIRS))
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.write(path, "open_clip/bpe_simple_vocab_16e6.txt.gz")
    for name in ("merges.txt", "x.whl"):
        assert merges.read_tokenizer(tmp_path / name, 512 + len(PAIRS) + 2) == text


@pytest.mark.parametrize("size", [0, 1, 40, 140])
@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt", "x.whl"])
def test_another_file_of_merges_is_refused(tmp_path, name, size):
    good = gzip.compress(merges_text(PAIRS).encode()) if name.endswith("gz") else b"red apple\n"
    (tmp_path / name).write_bytes((good * 20)[:size])
    with pytest.raises(UserError, match=rf"{name} is not a file of CLIP's merges"):
        merges.read_tokenizer(tmp_path / name, 512 + len(PAIRS) + 2)
