"""Small text encoders in the layouts of Hugging Face and of OpenAI."""

import json

import drawn
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from binlatent.runtime import state_dicts

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "##s", "hund", "."]
BERT = {"width": 24, "num_layers": 2, "num_attention_heads": 3, "mlp": 40, "positions": 12}
CLIP = {"num_attention_heads": 4, "hidden_act": "quick_gelu"}


def bert_state():
    """The tensors of a small BERT, drawn by name."""
    d, mlp = BERT["width"], BERT["mlp"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), d),
        "embeddings.position_embeddings.weight": (BERT["positions"], d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm": (d,),
        "pooler.dense": (d, d),
    }
    for i in range(BERT["num_layers"]):
        for name, shape in {
            **{f"attention.self.{x}": (d, d) for x in ("query", "key", "value")},
            "attention.output.dense": (d, d),
            "attention.output.LayerNorm": (d,),
            "intermediate.dense": (mlp, d),
            "output.dense": (d, mlp),
            "output.LayerNorm": (d,),
        }.items():
            shapes[f"encoder.layer.{i}.{name}"] = shape
    state = {"embeddings.position_ids": np.arange(BERT["positions"])[None]}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            state[name] = drawn.tensor(name, shape)
        else:
            state[f"{name}.weight"] = drawn.tensor(f"{name}.weight", shape)
            state[f"{name}.bias"] = drawn.tensor(f"{name}.bias", shape[:1])
    return state


def bert_tokenizer():
    """The text of its tokenizer.json, which pads and cuts, as MiniLM's does."""
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(5)
    return tokenizer.to_str()


def write_bert(folder, state=None, config=None, tokenizer=None):
    """Writes a snapshot of the small BERT; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state or bert_state(), folder / "model.safetensors")
    heads = {"num_attention_heads": BERT["num_attention_heads"]}
    config = {"model_type": "bert", "hidden_act": "gelu"} | heads | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer or bert_tokenizer())
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def clip_state():
    """The tensors of tests/data/clip_openai.pt by Hugging Face's names."""
    renamed = {}
    for name, x in state_dicts.read("tests/data/clip_openai.pt").items():
        name = name.replace("transformer.resblocks.", "text_model.encoder.layers.")
        for theirs, ours in {
            "ln_final": "text_model.final_layer_norm",
            "positional_embedding": "text_model.embeddings.position_embedding.weight",
            "token_embedding": "text_model.embeddings.token_embedding",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
            "attn.out_proj": "self_attn.out_proj",
        }.items():
            name = name.replace(theirs, ours)
        if "attn.in_proj_" in name:
            for part, y in zip("qkv", (x[:64], x[64:128], x[128:]), strict=True):
                renamed[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = y
        elif name == "text_projection":
            renamed["text_projection.weight"] = x.T
        elif name != "logit_scale":
            renamed[name] = x
    return {name: np.ascontiguousarray(x) for name, x in renamed.items()}


def clip_tokenizer_file(folder):
    """Writes a tokenizer.json whose word 7 is the token 7, of 118, a start and an end."""
    words = [*map(str, range(118)), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, vocab[word]) for word in words[-2:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{words[-2]} $A {words[-1]}", special_tokens=special
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder / "tokenizer.json"


def write_clip(folder, state=None, config=None):
    """Writes a snapshot of the small CLIP, with an image's tensor; returns its folder."""
    clip_tokenizer_file(folder)
    images = {"vision_model.post_layernorm.bias": np.zeros(3, np.float32)}
    state = (clip_state() if state is None else state) | images
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"text_config": CLIP | (config or {})}))
    return folder
