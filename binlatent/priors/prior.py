"""The seam of the priors: what training, sampling and evaluation know of a kind of prior.

A kind is a frozen dataclass of what its config fixes; parameters come with each call. To add one:
a folder with a subclass of `Prior`, a row in `kinds.KINDS`, a section of the config. The fields of
the subclass, beside those here, are the keys of that section (docs/extending.md).

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
    """Bits that are given (inpainting), both (n, h, w, c); of `bits` those under the mask count."""

    bits: Array
    mask: Array  # 1 where a bit is known, 0 where it is to be drawn


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample: the keys of `config.sample` that a kind takes; a kind adds fields of its own.

    Fields:
      keep_pixels: whether inpainting's known pixels come back as they were, or decoded.
    """

    keep_pixels: bool = True


@dataclasses.dataclass(frozen=True)
class Prior:
    """A kind of prior over codes (n, h, w, c).

    Class attributes:
      Settings: the options of its sampler, a frozen dataclass.
      exact: whether `code_lengths` is exact; otherwise it is an upper bound.
      trained: its fields that fix what trained parameters mean.
      ranges: the least and the most that its fields may be, of those that are numbers.
      lacks: options of other kinds' samplers that it has none of, each with the sentence that says
        why.

    Fields:
      code_shape: (h, w, c).
      network: of `config.prior.network`, for those that use it.

    Optional methods, which not every kind has; see `optional`:
      trajectory(params, keys, condition, settings) -> an object with `z_t`, bool
        (n, S + 1, h, w, c), the codes on the way, the last one the sample.
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
        """Returns the network of such a prior.

        Args:
          code_shape: (h, w, c).
          section: the kind's own of the config.
          name: of `NETWORKS`.
          dit: fields that "dit" has beside those of "released"; None for its defaults.
          **fields: the others of `config.prior.network`, with the condition and the dtype.
        """
        del code_shape, section
        return DiT(**(dit or {}), **fields) if name == "dit" else Transformer(**fields)

    @property
    def max_steps(self) -> int | None:
        """Most sampling steps that can be asked for, None for any number."""
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
        """Draws all that the loss of a batch draws.

        Args:
          keys: (2,) typed PRNG keys.
          n: images of the batch.

        Returns:
          A tree of arrays whose first axis is n, so that a batch can be taken in parts.
        """
        del keys, n
        return ()

    def loss(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of a batch of codes and its metrics, scalars, among them `loss`."""
        raise NotImplementedError

    def image_metrics(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> dict[str, Array]:
        """Returns what is reported of test images while a prior is trained, (n,) each."""
        del params, bits, condition, noise
        return {}

    def check_settings(self, settings: Any) -> Any:
        """Returns settings as they are used; refuses what does not fit this prior."""
        return settings

    def check_known(self, mask: np.ndarray) -> None:
        """Refuses known bits that `sample` cannot take; the mask is as of `Known`."""
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
          keys: (n,) typed PRNG keys, one a sample; the same key gives the same code.
          condition: of all samples; None for none.
          settings: of `Settings`.
          known: bits that are given, which `check_known` lets pass.
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
          params, keys, condition: as of `sample`.
          bits: codes in {0, 1}, (n, h, w, c).
          settings: of the sampler that the bound is about; None for the tightest bound.
          num_draws: of noise, where the bound averages over any.
        """
        raise NotImplementedError

    def network_calls(self, settings: Any, labelled: bool) -> tuple[int, int]:
        """Returns how often a sample calls the network with its label, and without."""
        raise UserError(f"A {name_of(self)} does not tell how often it calls a network.")


def check_temperature(temperature: float) -> None:
    """Refuses a temperature tau that is not above 0 and finite."""
    if not 0 < temperature < math.inf:
        raise UserError(f"The temperature must be above 0 and finite; got {temperature}.")


def name_of(prior: Prior) -> str:
    """Returns what a kind of prior is called in messages."""
    return f"prior of the kind {type(prior).__name__}"


def has(prior: Prior, method: str) -> bool:
    """Returns whether a kind of prior has an optional method."""
    return hasattr(prior, method)


def optional(prior: Prior, method: str) -> Callable:
    """Returns an optional method of a prior; a kind without it is refused."""
    if not has(prior, method):
        raise UserError(f"A {name_of(prior)} has no {method}: use another mode or another prior.")
    return getattr(prior, method)
