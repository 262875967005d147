"""The interface of priors, which training, sampling and evaluation use.

A kind of prior is a frozen dataclass of its config; parameters are passed to each call. To add a
kind, write a subclass of `Prior`, a row in `kinds.KINDS` and a section of the config. The fields
that the subclass adds are the keys of that section (docs/extending.md).

Dimensions: n batch, h w latent grid, c bits.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from binlatent.priors.conditions import Condition
from binlatent.priors.dit import DiT
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError

Array = jax.Array

NETWORKS = ("released", "dit")


class Known(NamedTuple):
    """Known bits (inpainting), both fields (n, h, w, c); `bits` matter only where `mask` is 1."""

    bits: Array
    mask: Array  # 1 where a bit is known, 0 where it is drawn


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample: the keys of `config.sample` that a kind uses; each kind adds its own fields.

    Fields:
      keep_pixels: whether inpainting returns known pixels unchanged, or decoded.
    """

    keep_pixels: bool = True


@dataclasses.dataclass(frozen=True)
class Prior:
    """A kind of prior over codes (n, h, w, c).

    Class attributes:
      Settings: the options of its sampler, a frozen dataclass.
      exact: whether `code_lengths` is exact; otherwise it is an upper bound.
      trained: the fields on which trained parameters depend.
      ranges: smallest and largest values of numeric fields.
      lacks: options of other kinds' samplers that this kind lacks, each with an error message.

    Fields:
      code_shape: (h, w, c).
      network: of `config.prior.network`; None if the kind uses none.

    Optional methods, see `optional`:
      trajectory(params, keys, condition, settings) -> an object with `z_t`, bool
        (n, S + 1, h, w, c): the states of the sampler, of which the last is the sample.
      vary(params, keys, condition, settings, bits, strength) -> bits near the given ones, (n, h, w,
        c); the strength is in (0, 1].
    """

    Settings: ClassVar[type] = Settings
    exact: ClassVar[bool] = False
    trained: ClassVar[tuple[str, ...]] = ()
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}
    lacks: ClassVar[dict[str, str]] = {}

    code_shape: tuple[int, int, int]
    network: nn.Module | None

    @classmethod
    def make_network(
        cls,
        code_shape: tuple[int, int, int],
        section: Mapping[str, Any],
        *,
        name: str = "released",
        dit: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> nn.Module:
        """Returns the network of the prior.

        Args:
          code_shape: (h, w, c).
          section: the kind's section of the config.
          name: one of `NETWORKS`.
          dit: fields of "dit" only; None for its defaults.
          **fields: other keys of `config.prior.network`, the condition and the dtype.
        """
        del code_shape, section
        return DiT(**(dit or {}), **fields) if name == "dit" else Transformer(**fields)

    @property
    def max_steps(self) -> int | None:
        """The largest number of sampling steps; None for no limit."""
        return None

    def init(self, key: Array, label: jax.ShapeDtypeStruct | None) -> Any:
        """Returns fresh parameters.

        Args:
          key: a typed PRNG key.
          label: shape and type of the label of one image, None without a condition.
        """
        code = jax.ShapeDtypeStruct((1, *self.code_shape), jnp.float32)
        return self.network.lazy_init(key, code, jax.ShapeDtypeStruct((1,), jnp.float32), label)

    def draw_noise(self, keys: Array, n: int) -> Any:
        """Draws all random numbers of the loss of a batch.

        Args:
          keys: (2,) typed PRNG keys.
          n: images of the batch.

        Returns:
          A tree of arrays with first axis n, so that a batch can be split into parts.
        """
        del keys, n
        return ()

    def loss(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of a batch of codes and scalar metrics, including `loss`."""
        raise NotImplementedError

    def image_metrics(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> dict[str, Array]:
        """Returns metrics of test images, (n,) each, for reports during training."""
        del params, bits, condition, noise
        return {}

    def check_settings(self, settings: Any) -> Any:
        """Returns the settings to use; refuses settings that do not fit this prior."""
        return settings

    def check_known(self, mask: np.ndarray) -> None:
        """Refuses masks of known bits that `sample` does not support; see `Known`."""
        del mask

    def sample(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: Any,
        known: Known | None = None,
    ) -> Array:
        """Draws codes, float32 in {0, 1}, (n, h, w, c).

        Args:
          params: parameters.
          keys: (n,) typed PRNG keys, one per sample; the same key gives the same code.
          condition: of all samples; None for no condition.
          settings: a `Settings` object.
          known: known bits, or None; the mask must pass `check_known`.
        """
        raise NotImplementedError

    def code_lengths(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        bits: Array,
        settings: Any,
        num_draws: int,
    ) -> Array:
        """Returns -log2 p(code), or an upper bound on it, in bits per image, (n,).

        Args:
          params, keys, condition: as in `sample`.
          bits: codes in {0, 1}, (n, h, w, c).
          settings: of the sampler whose bound is computed; None for the tightest bound.
          num_draws: how many draws of noise a bound averages over.
        """
        raise NotImplementedError

    def network_calls(self, settings: Any, labelled: bool) -> tuple[int, int]:
        """Returns the number of network calls per sample with the label, and without it."""
        raise UserError(f"A {name_of(self)} does not count its network calls.")


def check_temperature(temperature: float) -> None:
    """Refuses a temperature tau that is not positive and finite."""
    if not 0 < temperature < math.inf:
        raise UserError(f"The temperature must be above 0 and finite; got {temperature}.")


def name_of(prior: Prior) -> str:
    """Returns the name of a kind of prior for messages."""
    return f"prior of the kind {type(prior).__name__}"


def has(prior: Prior, method: str) -> bool:
    """Returns whether a kind of prior has an optional method."""
    return hasattr(prior, method)


def optional(prior: Prior, method: str) -> Callable:
    """Returns an optional method of a prior; a kind without it is refused."""
    if not has(prior, method):
        raise UserError(f"A {name_of(prior)} has no {method}: use another mode or another prior.")
    return getattr(prior, method)
