"""BERT's features, against a reference in float64."""

import math

import encoders
import numpy as np
import pytest

from binlatent.convert import texts
from binlatent.runtime import weights
from binlatent.texts.encoder import TextEncoder

# With the small tokenizer, "Äpple" is unknown, and so are rests of words.
TEXTS = ["a red apple", "", "Red APPLES.", "Hund", "a a a a a a a a a a", "Äpple ?"]
IDS = [[2, 4, 5, 6, 3], [2, 3], [2, 5, 6, 7, 9, 3], [2, 8, 3], [2, *[4] * 10, 3], [2, 1, 1, 3]]
IDS[-1][1] = 6  # without the accent it is "apple"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    source = encoders.write_bert(folder / "theirs")
    weights.write_npz(folder / "ours.npz", texts.minilm(source))
    return TextEncoder.load(folder / "ours.npz")


def reference(ids):
    """Returns the vectors of one text and of its tokens, without padding."""
    state = {name: x.astype(float) for name, x in encoders.bert_state().items()}

    def dense(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    x = state["embeddings.word_embeddings.weight"][ids]
    x = x + state["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + state["embeddings.token_type_embeddings.weight"][0])
    for i in range(encoders.BERT["num_layers"]):
        name = f"encoder.layer.{i}"
        q, k, v = (dense(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        heads = []
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        y = dense(f"{name}.attention.output.dense", np.concatenate(heads, axis=-1))
        x = norm(f"{name}.attention.output.LayerNorm", x + y)
        y = dense(f"{name}.output.dense", gelu(dense(f"{name}.intermediate.dense", x)))
        x = norm(f"{name}.output.LayerNorm", x + y)
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean), x


def test_features_of_texts_of_several_lengths(encoder):
    found = encoder.encode(TEXTS)
    assert found.tokens.shape == (6, 12, 24) and found.pooled.shape == (6, 24)
    for i, ids in enumerate(IDS):
        pooled, tokens = reference(ids)
        np.testing.assert_array_equal(found.mask[i], np.arange(12) < len(ids))
        np.testing.assert_allclose(found.pooled[i], pooled, atol=1e-6)
        np.testing.assert_allclose(found.tokens[i, : len(ids)], tokens, atol=1e-5)
        assert (found.tokens[i, len(ids) :] == 0).all()


def test_a_text_does_not_depend_on_others_in_its_batch(encoder):
    together = encoder.encode(TEXTS).pooled
    for text, pooled in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.encode([text]).pooled[0], pooled, atol=1e-6)
