"""Maps names and shapes of the authors' PyTorch checkpoints to ours and back.

https://github.com/ZeWang95/BinaryLatentDiffusion; its `*.th` files are state dicts. Our modules
have the authors' names, so that a tensor's path in our trees gives its name in their checkpoints.
"""

import collections
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from binlatent.autoencoder.bottleneck import BOTTLENECKS, Binary
from binlatent.autoencoder.spec import AutoencoderSpec
from binlatent.priors import schedules
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.dit import DiT
from binlatent.priors.spec import PriorSpec
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State

# From the order of PyTorch's dimensions to ours.
_CONVOLUTION = (2, 3, 1, 0)  # from (out, in, height, width)
_LINEAR = (1, 0)  # from (out, in)

LEAVES = {  # PyTorch's names of our leaves
    **dict.fromkeys(("kernel", "scale", "embedding", "embed"), "weight"),
    **{"mean": "running_mean", "var": "running_var"},
}


class Tensor(NamedTuple):
    """A tensor in the authors' checkpoint that corresponds to one of ours."""

    name: str  # in their checkpoint
    shape: tuple[int, ...]  # in their checkpoint
    axes: tuple[int, ...]  # transposes their tensor to ours, which may lack dimensions of size 1


def _tensors(tree: Any, rename: Callable[[str], str], kernel: tuple) -> dict[str, Tensor]:
    """Returns the authors' tensor for each path of a tree; `rename` maps our modules to theirs."""
    tensors = {}
    for path, x in traverse_util.flatten_dict(tree, sep="/").items():
        *modules, leaf = path.split("/")
        if leaf == "embed":
            modules.append(leaf)  # a module of its own
        module = ".".join(re.sub(r"^(blocks|main|mlp)_(\d+)$", r"\1.\2", m) for m in modules)
        extra = 1 if leaf in ("pos_emb", "null_emb") else 0
        axes = tuple(range(len(x.shape) + extra))
        if leaf == "kernel" and module != "tok_emb":
            axes = kernel
        # 1x1 kernels of the package may be (in, out).
        full = (1,) * (len(axes) - len(x.shape)) + tuple(x.shape)
        shape = tuple(full[i] for i in np.argsort(axes))
        tensors[path] = Tensor(f"{rename(module)}.{LEAVES.get(leaf, leaf)}", shape, axes)
    return tensors


def autoencoder_tensors(params: Any) -> dict[str, Tensor]:
    """Returns the authors' tensor for each parameter of an autoencoder, by path.

    Args:
      params: {"encoder": ..., "bottleneck": ..., "decoder": ...}, arrays or their shapes.
    """
    bottleneck = {"bottleneck.proj": "quantize.proj.0", "bottleneck.embed": "quantize.embed"}

    def rename(module: str) -> str:
        return f"ae.{bottleneck.get(module, re.sub('^decoder', 'generator', module))}"

    return _tensors(params, rename, _CONVOLUTION)


def discriminator_tensors(variables: Any) -> dict[str, Tensor]:
    """Returns the same for a discriminator's {"params": ..., "batch_stats": ...}."""
    return _tensors(variables, lambda module: f"disc.{module.split('.', 1)[1]}", _CONVOLUTION)


def prior_tensors(params: Any) -> dict[str, Tensor]:
    """Returns the same for a prior's parameters."""
    return _tensors(params, lambda module: f"_denoise_fn.{module}".rstrip("."), _LINEAR)


class Checkpoint:
    """A state dict of the authors; reading a tensor removes it from `left`."""

    def __init__(self, state: State, what: str):
        """Takes a state dict; `what`, such as "prior", is for error messages."""
        # In checkpoints saved from several GPUs, all names have a prefix.
        wrapped = bool(state) and all(name.startswith("module.") for name in state)
        prefix = "module." if wrapped else ""
        self.left = {name.removeprefix(prefix): x for name, x in state.items()}
        self._wrong = f"The checkpoint does not fit the authors' {what}"

    def error(self, message: str) -> UserError:
        """Returns an error about the checkpoint."""
        return UserError(f"{self._wrong}: {message}.")

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Returns the shape of a tensor, which must exist and have `ndim` dimensions."""
        if name not in self.left:
            raise self.error(f"it lacks {name}")
        shape = self.left[name].shape
        if len(shape) != ndim or not all(shape):
            raise self.error(f"the shape of {name} is {shape}, but must have {ndim} dimensions")
        return shape

    def children(self, prefix: str) -> set[str]:
        """Returns the rest of all names that start with a prefix."""
        return {name[len(prefix) :] for name in self.left if name.startswith(prefix)}

    def count(self, prefix: str) -> int:
        """Returns how many numbers follow a prefix; they must be 0, 1, ... without a gap."""
        numbers = {rest.split(".")[0] for rest in self.children(prefix)}
        numbers = {int(number) for number in numbers if number.isdecimal() and len(number) < 6}
        missing = next(i for i in itertools.count() if i not in numbers)
        if not numbers or missing < max(numbers):
            raise self.error(f"it lacks {prefix}{missing}")
        return missing

    def pop_tree(self, tree: Any, tensors: dict[str, Tensor]) -> Any:
        """Returns arrays for a tree of shapes, and removes their tensors from the checkpoint."""
        arrays = {}
        for path, like in traverse_util.flatten_dict(tree, sep="/").items():
            name, shape, axes = tensors[path]
            if name not in self.left:
                raise self.error(f"it lacks {name}")
            x = self.left.pop(name)
            if x.shape != shape:
                raise self.error(f"the shape of {name} is {x.shape}, not {shape}")
            if x.dtype.kind != "f":
                raise self.error(f"{name} has the type {x.dtype}, not that of real numbers")
            if not np.isfinite(x).all():
                raise self.error(f"{name} has a NaN or infinity")
            arrays[path] = np.ascontiguousarray(x.transpose(axes).reshape(like.shape), np.float32)
        return traverse_util.unflatten_dict(arrays, sep="/")

    def unused(self, patterns: dict[str, str]) -> dict[str, int]:
        """Counts the remaining tensors, which must all be known to be unused here, by kind.

        Args:
          patterns: from regular expressions of names to names of kinds.
        """
        kinds = []
        for name in sorted(self.left):
            matching = (kind for pattern, kind in patterns.items() if re.fullmatch(pattern, name))
            kinds.append(next(matching, None))
            if kinds[-1] is None:
                raise self.error(f"it also holds {name}")
        return collections.Counter(kinds)


# Tensors that are not used here: see docs/pretrained.md.
AUTOENCODER_UNUSED = {
    r"ae\.generator\.logsigma\.(0|2)\.(weight|bias)": "ae.generator.logsigma",
    r"perceptual\..*": "perceptual",
    r"ae\.(encoder|generator)\.blocks\.\d+\.conv_out\.(weight|bias)": "conv_out of equal widths",
    r"disc\..*\.num_batches_tracked": "num_batches_tracked",
}
PRIOR_UNUSED = {
    r"scheduler\.(k_final|b_final|beta|cumbeta)": "scheduler",
    r"embedding_weight": "embedding_weight",
}


def read_autoencoder(checkpoint: Checkpoint, spec: AutoencoderSpec) -> tuple[Any, Any]:
    """Returns the variables of an autoencoder and its discriminator, NumPy, float32.

    The discriminator is None if the spec has none. Only unused tensors remain in the checkpoint.
    """
    like = jax.eval_shape(spec.init, jax.random.key(0))["params"]
    params = {"params": checkpoint.pop_tree(like, autoencoder_tensors(like))}
    discriminator = spec.networks.discriminator
    if discriminator is None:
        return params, None
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), np.float32)
    like = jax.eval_shape(discriminator.init, jax.random.key(0), image)
    return params, checkpoint.pop_tree(like, discriminator_tensors(like))


def read_prior(checkpoint: Checkpoint, spec: PriorSpec) -> Any:
    """Returns the variables of a prior, NumPy, float32."""
    like = jax.eval_shape(spec.init, jax.random.key(0))["params"]
    return {"params": checkpoint.pop_tree(like, prior_tensors(like))}


def _to_theirs(tree: Any, tensors: dict[str, Tensor]) -> State:
    state = {}
    for path, x in traverse_util.flatten_dict(tree, sep="/").items():
        name, shape, axes = tensors[path]
        x = np.asarray(x, np.float32).reshape([shape[i] for i in axes])
        state[name] = np.ascontiguousarray(x.transpose(np.argsort(axes)))
    return state


def autoencoder_state(spec: AutoencoderSpec, params: Any, discriminator: Any) -> State:
    """Returns the state dict of an autoencoder for the authors' code.

    Tensors that their code never uses are 0; those of LPIPS are left out. `discriminator` is
    {"params": ..., "batch_stats": ...}, or {} without one.
    """
    levels = spec.networks.autoencoder.encoder.levels
    if not isinstance(spec.bottleneck, Binary):
        name = next(key for key, x in BOTTLENECKS.items() if isinstance(spec.bottleneck, x))
        raise UserError(f"The authors' code has only the bottleneck binary, not {name!r}.")
    if levels.patch != 1:
        raise UserError(
            f"The authors' code has no autoencoder.patch = {levels.patch}: it cannot load this."
        )
    state = _to_theirs(params["params"], autoencoder_tensors(params["params"]))
    unused = {}
    for name, x in state.items():
        module = name.removesuffix(".conv2.weight")
        if module != name and f"{module}.conv_out.weight" not in state:
            unused[f"{module}.conv_out.weight"] = (len(x), len(x), 1, 1)
            unused[f"{module}.conv_out.bias"] = (len(x),)
    width, channels = levels.width(0), spec.image_shape[2]
    unused |= {
        "ae.generator.logsigma.0.weight": (width, width, 3, 3),
        "ae.generator.logsigma.0.bias": (width,),
        "ae.generator.logsigma.2.weight": (channels, width, 1, 1),
        "ae.generator.logsigma.2.bias": (channels,),
    }
    critic = _to_theirs(discriminator, discriminator_tensors(discriminator))
    means = [name for name in critic if name.endswith(".running_mean")]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in means]
    state |= critic | {name: np.zeros((), np.int64) for name in counters}
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}


def prior_state(spec: PriorSpec, params: Any, embed: np.ndarray) -> State:
    """Returns the state dict of a prior, with a copy of the autoencoder's `embed`, (c, e)."""
    prior = spec.prior
    if not isinstance(prior, BernoulliPrior):
        raise UserError(f"The authors' code has only the prior bernoulli, not {spec.kind}.")
    if prior.target == "z_s":
        raise UserError('The authors\' code cannot sample a prior with the target "z_s".')
    if isinstance(prior.network, DiT):
        raise UserError('The authors\' code has no network "dit", so it cannot load this.')
    state = _to_theirs(params["params"], prior_tensors(params["params"]))
    keep = schedules.keep_schedule(prior.curve, prior.num_timesteps)
    beta = np.append(1.0, keep[1:] / keep[:-1])
    buffers = {"k_final": keep, "b_final": (1 - keep) / 2, "beta": beta, "cumbeta": keep}
    state |= {f"scheduler.{name}": x.astype(np.float32) for name, x in buffers.items()}
    return state | {"embedding_weight": np.asarray(embed, np.float32)}
