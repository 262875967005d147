"""Converts published text encoders from the names of Hugging Face and OpenAI to ours."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from binlatent.convert import merges
from binlatent.convert.snapshots import read_snapshot
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State
from binlatent.texts import encoder
from binlatent.texts.bert import Bert
from binlatent.texts.clip import ClipText
from binlatent.texts.tokenizer import load_tokenizer

# Values that a configuration must have, if it has the key: others mean other networks.
_BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_POOLING = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}

# Our names of modules and theirs; within layers, relative to the layer.
_BERT_POSITIONS = "embeddings.position_embeddings.weight"
_BERT_PARTS = "embeddings.token_type_embeddings.weight"
_BERT_LAYER = "encoder.layer."
_BERT_MODULES = {
    "word_embeddings": "embeddings.word_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    **{f"attention/{x}": f"attention.self.{x}" for x in ("query", "key", "value")},
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_CLIP_POSITIONS = "text_model.embeddings.position_embedding.weight"
_CLIP_LAYER = "text_model.encoder.layers."
_CLIP_MODULES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "final_norm": "text_model.final_layer_norm",
    "projection": "text_projection",
    "norm_1": "layer_norm1",
    "norm_2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "attention/out": "self_attn.out_proj",
    **{f"attention/{x}": f"self_attn.{x[0]}_proj" for x in ("query", "key", "value")},
}
_OPENAI_LAYER = "transformer.resblocks."
# From OpenAI's names to Hugging Face's.
_OPENAI = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": _CLIP_POSITIONS,
    "ln_final": "text_model.final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}

# The tower of images, scales, and position ids.
_CLIP_LEFT_OUT = (
    r"(vision_model|visual)\.|visual_projection\.|logit_scale$|.*\.position_ids$|"
    r"(input_resolution|context_length|vocab_size)$"
)


def minilm(source: str | Path) -> State:
    """Converts all-MiniLM-L6-v2, or another BERT with mean pooling from sentence-transformers.

    Args:
      source: its folder, the file model.safetensors, or a wheel or zip file of the folder.
    """
    found = read_snapshot(source, r"pooler\.|.*\.position_ids$")
    state, wrong = dict(found.state), f"{source} is not MiniLM, such as all-MiniLM-L6-v2:"
    _check_config(found.config, _BERT, wrong)
    _check_config(found.pooling, _POOLING, wrong)
    vocab_size, width = _shape(state, "embeddings.word_embeddings.weight", wrong)
    max_tokens, _ = _shape(state, _BERT_POSITIONS, wrong, width)
    _shape(state, _BERT_PARTS, wrong, width)
    mlp_width, _ = _shape(state, f"{_BERT_LAYER}0.intermediate.dense.weight", wrong)
    num_heads = _num_heads(found.config.get("num_attention_heads", 12), width, wrong)
    depth = _depth(state, _BERT_LAYER)
    model = Bert(vocab_size, max_tokens, width, depth, num_heads, mlp_width)
    # Texts have one segment, so its embedding is added to that of every position.
    extra = {"params/position_embeddings": state.pop(_BERT_POSITIONS) + state.pop(_BERT_PARTS)[:1]}
    params = _convert(state, model, extra, _BERT_LAYER, _BERT_MODULES, wrong)
    if found.tokenizer is None:
        raise UserError(f"{source} has no tokenizer.json beside the weights: download it too.")
    return _packed("minilm", model, params, found.tokenizer, wrong)


def clip(source: str | Path, tokenizer: Path | None = None, num_heads: int | None = None) -> State:
    """Converts CLIP's text tower from the layout of Hugging Face or OpenAI.

    Args:
      source: a folder, the file model.safetensors, or OpenAI's .pt (TorchScript or state dict).
      tokenizer: a tokenizer.json or OpenAI's merges; default: tokenizer.json beside the weights.
      num_heads: of attention; default: as in config.json, or heads of width 64.
    """
    found = read_snapshot(source, _CLIP_LEFT_OUT)
    wrong = f"{source} is not CLIP, such as ViT-L/14:"
    theirs = "positional_embedding" in found.state
    state = _from_openai(found.state, wrong) if theirs else dict(found.state)
    # A config.json beside OpenAI's file belongs to another model.
    config = {} if theirs else found.config.get("text_config", found.config)
    if not isinstance(config, dict):
        raise UserError(f"{wrong} text_config in config.json is {config!r}.")
    _check_config(config, _CLIP, wrong)
    vocab_size, width = _shape(state, "text_model.embeddings.token_embedding.weight", wrong)
    max_tokens, _ = _shape(state, _CLIP_POSITIONS, wrong, width)
    mlp_width, _ = _shape(state, f"{_CLIP_LAYER}0.mlp.fc1.weight", wrong)
    pooled_width, _ = _shape(state, "text_projection.weight", wrong)
    if num_heads is None:
        num_heads = config.get("num_attention_heads", max(width // 64, 1))
    heads = _num_heads(num_heads, width, wrong)
    depth = _depth(state, _CLIP_LAYER)
    model = ClipText(vocab_size, max_tokens, width, depth, heads, mlp_width, pooled_width)
    extra = {"params/position_embedding": state.pop(_CLIP_POSITIONS)}
    params = _convert(state, model, extra, _CLIP_LAYER, _CLIP_MODULES, wrong)
    if tokenizer is None and found.tokenizer is None:
        raise UserError(
            "There is no tokenizer.json beside the weights: set --tokenizer=FILE to OpenAI's "
            "bpe_simple_vocab_16e6.txt.gz, or to a wheel that contains it (`pip download --no-deps "
            "open_clip_torch`)."
        )
    text = merges.read_tokenizer(tokenizer, vocab_size) if tokenizer else found.tokenizer
    return _packed("clip", model, params, text, wrong)


def _packed(name: str, model: nn.Module, params: State, tokenizer: str, wrong: str) -> State:
    try:
        last = load_tokenizer(tokenizer, model).encode("").ids[-1]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{wrong} {error}.") from error
    if name == "clip" and last != model.vocab_size - 1:
        raise UserError(f"{wrong} its tokenizer ends a text with {last}, not with its last token.")
    return encoder.pack(name, model, params, tokenizer)


def _from_openai(state: State, wrong: str) -> State:
    """Returns OpenAI's tensors under the names of Hugging Face.

    Hugging Face has separate tensors of queries, keys and values, and transposes the projection.
    """
    renamed = {}
    for name, x in state.items():
        layer = re.match(re.escape(_OPENAI_LAYER) + r"(\d+)\.(.+)", name)
        prefix, rest = (f"{_CLIP_LAYER}{layer[1]}.", layer[2]) if layer else ("", name)
        module, _, leaf = rest.rpartition(".")
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            leaf = rest.removeprefix("attn.in_proj_")
            if not x.ndim or len(x) % 3:
                raise UserError(f"{wrong} the shape of {name} is {x.shape}.")
            for part, y in zip("qkv", np.split(x, 3), strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.{leaf}"] = y
        elif rest == "text_projection":
            renamed["text_projection.weight"] = x.T
        else:
            whole = _OPENAI.get(rest) or f"{_OPENAI.get(module, module)}.{leaf}"
            renamed[f"{prefix}{whole}"] = x
    return renamed


def _check_config(config: dict[str, Any], wanted: dict[str, Any], wrong: str) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{wrong} its configuration has {key} = {config[key]}, not {value}.")


def _shape(state: State, name: str, wrong: str, width: int | None = None) -> tuple[int, int]:
    """Returns the shape of a matrix that must exist and have the width, if given."""
    if name not in state:
        raise UserError(f"{wrong} it lacks {name}.")
    x = state[name]
    if x.ndim != 2 or not x.size or x.shape[1] != (width or x.shape[1]):
        raise UserError(f"{wrong} the shape of {name} is {x.shape}.")
    return x.shape


def _num_heads(num_heads: Any, width: int, wrong: str) -> int:
    if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise UserError(f"{wrong} {num_heads} heads do not divide its width, {width}.")
    return num_heads


def _depth(state: State, prefix: str) -> int:
    """Returns the number of layers; `_convert` finds gaps between them."""
    layers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in state)
    return len({match[1] for match in layers if match})


def _convert(
    state: State, model: nn.Module, known: State, prefix: str, modules: dict[str, str], wrong: str
) -> State:
    """Returns a model's parameters from `known` and `state`, whose tensors must all be used."""
    leaves = {"bias": "bias"} | dict.fromkeys(("kernel", "scale", "embedding"), "weight")
    left, params = dict(state), {}
    for ours, like in encoder.text_shapes(model).items():
        if ours in known:
            x, name = known[ours], ours
        else:
            module, _, leaf = ours.removeprefix("params/").rpartition("/")
            layer = re.match(r"layer_(\d+)/(.+)", module)
            name = f"{prefix}{layer[1]}.{modules[layer[2]]}" if layer else modules[module]
            name = f"{name}.{leaves[leaf]}"
            if name not in left:
                raise UserError(f"{wrong} it lacks {name}.")
            x = left.pop(name)
            x = x.T if leaf == "kernel" else x
        if x.shape != like.shape:
            raise UserError(f"{wrong} the shape of {name} does not fit the other tensors.")
        params[ours] = np.ascontiguousarray(x, np.float32)
    if left:
        raise UserError(f"{wrong} it also holds {min(left)}.")
    return params
