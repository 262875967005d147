"""The checkpoints of the authors' PyTorch code: their names and shapes, to ours and back.

https://github.com/ZeWang95/BinaryLatentDiffusion; its `*.th` files are state dicts. Our modules are
named as theirs, so a tensor's path in our trees says what it is called there.
"""

import itertools
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from binlatent.autoencoder.bottleneck import BOTTLENECKS, Binary
from binlatent.autoencoder.spec import AutoencoderSpec
from binlatent.priors.bernoulli import schedules
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.spec import PriorSpec
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State

# How the two differ in the order of a kernel's dimensions.
_CONVOLUTION = (2, 3, 1, 0)  # theirs is (out, in, height, width)
_LINEAR = (1, 0)  # theirs is (out, in)

_LEAVES = {
    **dict.fromkeys(("kernel", "scale", "embedding", "embed"), "weight"),
    **{"mean": "running_mean", "var": "running_var"},
}


class Tensor(NamedTuple):
    """A tensor of theirs that is one of ours.

    Fields:
      name, shape: there.
      axes: its dimensions in the order that they have here; here, some of 1 are left out.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _tensors(tree: Any, prefix: str, tensor: Callable[[str, str, tuple], Tensor]) -> dict:
    """Returns the tensor of theirs for each path "a/b"; `tensor` takes module, leaf, shape here."""
    tensors = {}
    for path, x in traverse_util.flatten_dict(tree, sep="/").items():
        *modules, leaf = path.split("/")
        if leaf == "embed":
            modules.append(leaf)  # a module of its own
        module = ".".join(re.sub(r"^(blocks|main|mlp)_(\d+)$", r"\1.\2", m) for m in modules)
        tensors[path] = tensor(f"{prefix}{module}".rstrip("."), leaf, tuple(x.shape))
    return tensors


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(axes))


def _plain(name: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, shape, tuple(range(len(shape))))


def _convolutional(module: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor of a module of convolutions; here a kernel of 1x1 may be (in, out)."""
    name = f"{module}.{_LEAVES.get(leaf, leaf)}"
    if leaf != "kernel":
        return _plain(name, shape)
    full = shape if len(shape) == 4 else (1, 1, *shape)
    return Tensor(name, tuple(full[i] for i in _inverse(_CONVOLUTION)), _CONVOLUTION)


def autoencoder_tensors(params: Any) -> dict[str, Tensor]:
    """Returns the tensor of theirs for each of an autoencoder's parameters, by its path.

    Args:
      params: {"encoder": ..., "bottleneck": ..., "decoder": ...}, arrays or their shapes.
    """
    modules = {
        "ae.bottleneck.proj": "ae.quantize.proj.0",
        "ae.bottleneck.embed": "ae.quantize.embed",
    }

    def tensor(module: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        module = modules.get(module, module.replace("ae.decoder", "ae.generator"))
        return _convolutional(module, leaf, shape)

    return _tensors(params, "ae.", tensor)


def discriminator_tensors(variables: Any) -> dict[str, Tensor]:
    """Returns the same for a discriminator's parameters and running statistics.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
    """

    def tensor(module: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        return _convolutional(f"disc.{module.split('.', 1)[1]}", leaf, shape)

    return _tensors(variables, "", tensor)


def prior_tensors(params: Any) -> dict[str, Tensor]:
    """Returns the same for a prior's parameters."""

    def tensor(module: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        name = f"{module}.{_LEAVES.get(leaf, leaf)}"
        if leaf == "kernel" and not module.endswith("tok_emb"):
            return Tensor(name, shape[::-1], _LINEAR)
        return _plain(name, (1, *shape) if leaf in ("pos_emb", "null_emb") else shape)

    return _tensors(params, "_denoise_fn.", tensor)


class Checkpoint:
    """A state dict of theirs that is used up name by name.

    Attributes:
      left: what has not been used yet.
    """

    def __init__(self, state: State, what: str):
        """Takes a state dict; `what` it should be of is for messages."""
        # Saved from several GPUs, all names have a prefix.
        wrapped = bool(state) and all(name.startswith("module.") for name in state)
        self.left = {
            name.removeprefix("module.") if wrapped else name: x for name, x in state.items()
        }
        self._wrong = f"The checkpoint is no {what} of the authors' code"

    def error(self, message: str) -> UserError:
        """Returns the error that says what is wrong with the checkpoint."""
        return UserError(f"{self._wrong}: {message}.")

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Returns the shape of a tensor that must be there and have so many dimensions."""
        if name not in self.left:
            raise self.error(f"it lacks {name}")
        shape = self.left[name].shape
        if len(shape) != ndim or not all(shape):
            raise self.error(f"the shape of {name} is {shape}, which should have {ndim} dimensions")
        return shape

    def children(self, prefix: str) -> Collection[str]:
        """Returns what follows a prefix in the names that have it."""
        return {name[len(prefix) :] for name in self.left if name.startswith(prefix)}

    def count(self, prefix: str) -> int:
        """Returns how many numbers follow a prefix, which must be 0, 1, ... without a gap."""
        numbers = {rest.split(".")[0] for rest in self.children(prefix)}
        numbers = {int(number) for number in numbers if number.isdecimal() and len(number) < 6}
        missing = next(i for i in itertools.count() if i not in numbers)
        if not numbers or missing < max(numbers):
            raise self.error(f"it lacks {prefix}{missing}")
        return missing

    def pop_tree(self, tree: Any, tensors: dict[str, Tensor]) -> Any:
        """Returns the arrays of a tree of ours, using them up.

        Args:
          tree: of shapes.
          tensors: those of theirs, by path.
        """
        arrays = {}
        for path, like in traverse_util.flatten_dict(tree, sep="/").items():
            name, shape, axes = tensors[path]
            if name not in self.left:
                raise self.error(f"it lacks {name}")
            x = self.left.pop(name)
            if x.shape != shape:
                raise self.error(f"the shape of {name} is {x.shape}, not {shape}")
            if x.dtype.kind != "f":
                raise self.error(f"{name} is of the type {x.dtype}, not of real numbers")
            if not np.isfinite(x).all():
                raise self.error(f"{name} is not finite")
            x = x.transpose(axes).reshape(like.shape)
            arrays[path] = np.ascontiguousarray(x, np.float32)
        return traverse_util.unflatten_dict(arrays, sep="/")

    def unused(self, patterns: dict[str, str]) -> dict[str, int]:
        """Returns how many of what is left are of each kind that is known to be of no use here.

        Args:
          patterns: what such names match, with what to call them.
        """
        counts = {}
        for name in sorted(self.left):
            kinds = [kind for pattern, kind in patterns.items() if re.fullmatch(pattern, name)]
            if not kinds:
                raise self.error(f"it also holds {name}")
            counts[kinds[0]] = counts.get(kinds[0], 0) + 1
        return counts


# What nothing here needs: see docs/pretrained.md.
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


# To ours


def read_autoencoder(checkpoint: Checkpoint, spec: AutoencoderSpec) -> tuple[Any, Any]:
    """Returns the variables of an autoencoder and of its discriminator, NumPy, float32.

    Args:
      checkpoint: used up, but for what is of no use.
      spec: of the model; without an adversarial loss there is no discriminator, and None.
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
    """Returns the variables of a prior, NumPy, float32; the checkpoint is used up."""
    like = jax.eval_shape(spec.init, jax.random.key(0))["params"]
    return {"params": checkpoint.pop_tree(like, prior_tensors(like))}


# And back


def _to_theirs(tree: Any, tensors: dict[str, Tensor]) -> State:
    state = {}
    for path, x in traverse_util.flatten_dict(tree, sep="/").items():
        name, shape, axes = tensors[path]
        x = np.asarray(x, np.float32).reshape([shape[i] for i in axes])
        state[name] = np.ascontiguousarray(x.transpose(_inverse(axes)))
    return state


def autoencoder_state(spec: AutoencoderSpec, params: Any, discriminator: Any) -> State:
    """Returns the state dict of an autoencoder as their code has it.

    Tensors that it has and never uses are 0; those of LPIPS are not there.

    Args:
      spec: of the model.
      params: the autoencoder's variables.
      discriminator: its {"params": ..., "batch_stats": ...}, or {} if there is none.
    """
    levels = spec.networks.autoencoder.encoder.levels
    if not isinstance(spec.bottleneck, Binary):
        name = next(key for key, x in BOTTLENECKS.items() if isinstance(spec.bottleneck, x))
        raise UserError(f"The authors' code has no bottleneck {name!r}, only binary.")
    if levels.patch != 1:
        raise UserError(
            f"The authors' code has no autoencoder.patch = {levels.patch}, so it cannot load this."
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
    for name in critic:
        if name.endswith(".running_mean"):
            counter = name.replace("running_mean", "num_batches_tracked")
            state[counter] = np.zeros((), np.int64)
    state |= critic
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}


def prior_state(spec: PriorSpec, params: Any, embed: np.ndarray) -> State:
    """Returns the state dict of a prior as their code has it.

    Args:
      spec: of the model.
      params: the prior's variables.
      embed: the autoencoder's (c, e), which theirs has a copy of.
    """
    prior = spec.prior
    if not isinstance(prior, BernoulliPrior):
        raise UserError(f"The authors' code has no prior of the kind {spec.kind}, only bernoulli.")
    if prior.target == "z_s":
        raise UserError('The authors\' code cannot sample a prior of the target "z_s".')
    state = _to_theirs(params["params"], prior_tensors(params["params"]))
    keep = schedules.keep_schedule(prior.curve, prior.num_timesteps)
    beta = np.append(1.0, keep[1:] / keep[:-1])
    buffers = {"k_final": keep, "b_final": (1 - keep) / 2, "beta": beta, "cumbeta": keep}
    state |= {f"scheduler.{name}": x.astype(np.float32) for name, x in buffers.items()}
    return state | {"embedding_weight": np.asarray(embed, np.float32)}
