"""The kind of prior "autoregressive", over tokens: `config.prior.kind = "autoregressive"`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from binlatent.priors import prior as prior_lib
from binlatent.priors.autoregressive import programs
from binlatent.priors.autoregressive.heads import make_head
from binlatent.priors.autoregressive.network import CausalTransformer
from binlatent.priors.conditions import Condition
from binlatent.priors.guidance import check_guidance
from binlatent.priors.prior import Known, Prior
from binlatent.runtime.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AutoregressiveSettings(prior_lib.Settings):
    """How to sample.

    Fields:
      temperature: tau > 0; divides the logits of each bit or, with the head "joint", of the values
        of a group of bits.
      guidance: w >= 0 (supplement C).
    """

    temperature: float = 1.0
    guidance: float = 0.0

    def __post_init__(self):
        prior_lib.check_temperature(self.temperature)
        check_guidance(self.guidance, (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class AutoregressivePrior(Prior):
    """p(code) as a product over tokens in raster order, each given all tokens before; exact.

    Fields, in addition to those of `Prior`:
      head: "independent": a token's bits are c Bernoullis given the tokens before. "joint": any
        distribution of the token, drawn in groups of bits.
      group: bits of a group of "joint"; the last group may be smaller.
    """

    Settings = AutoregressiveSettings
    exact = True
    trained = ("head", "group")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"group": (1, 16)}
    lacks: ClassVar[dict[str, str]] = {
        "steps": "An autoregressive prior always takes one step per token: leave out steps.",
        "renoise": "An autoregressive prior draws every bit once: leave out renoise.",
    }

    head: str = "joint"
    group: int = 8

    @classmethod
    def make_network(
        cls, code_shape: tuple[int, int, int], section: Mapping[str, Any], **fields: Any
    ) -> nn.Module:
        """Returns a causal transformer with the head of the kind's section."""
        for other in ("name", "dit"):  # of the networks of other kinds
            fields.pop(other, None)
        head = make_head(section["head"], code_shape[-1], section["group"], fields["dtype"])
        return CausalTransformer(code_shape, head, **fields)

    def _bit_losses(self, params: Any, bits: Array, condition: Condition | None) -> Array:
        """Returns -log p(code) in nats per bit, (n,)."""
        nats = -programs.log_likelihood(self.network, params, bits, condition)
        return nats / math.prod(self.code_shape)

    def loss(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Returns -log p(code) in nats per bit, also as the only metric."""
        loss = jnp.mean(self._bit_losses(params, bits, condition))
        return loss, {"loss": loss}

    def image_metrics(
        self, params: Any, bits: Array, condition: Condition | None, noise: Any
    ) -> dict[str, Array]:
        """Returns `bce`, which is -log p(code) in nats per bit."""
        return {"bce": self._bit_losses(params, bits, condition)}

    def check_known(self, mask: np.ndarray) -> None:
        """Refuses masks that are not a raster prefix of whole tokens."""
        tokens = np.asarray(mask).reshape(len(mask), -1, self.code_shape[-1]) > 0
        whole = tokens.all(axis=-1)
        in_order = np.all(whole[:, :-1] >= whole[:, 1:])
        if not in_order or np.any(tokens.any(axis=-1) != whole):
            raise UserError(
                "An autoregressive prior can only complete an image whose first tokens in raster "
                "order are kept: use a mask that hides the lower part, such as --mask=bottom, or "
                "another kind of prior."
            )

    def sample(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: AutoregressiveSettings,
        known: Known | None = None,
    ) -> Array:
        """Draws codes, or completes codes with a known raster prefix; both are exact."""
        if known is not None:
            self.check_known(known.mask)
        return programs.sample_codes(
            *(params, keys, condition, known),
            float(settings.temperature),  # an integer would compile another program
            float(settings.guidance),
            network=self.network,
            guided=self._guided(settings, condition is not None),
        )

    @staticmethod
    def _guided(settings: AutoregressiveSettings, labelled: bool) -> bool:
        return labelled and settings.guidance != 0

    def code_lengths(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        bits: Array,
        settings: AutoregressiveSettings | None,
        num_draws: int,
    ) -> Array:
        """Returns the exact -log2 p(code), at temperature 1 and without guidance."""
        del keys, settings, num_draws
        return programs.code_lengths(params, condition, bits, network=self.network)

    def network_calls(self, settings: AutoregressiveSettings, labelled: bool) -> tuple[int, int]:
        """Returns the passes over all tokens with the label and without it; a token at a time."""
        if not labelled:
            return 0, 1
        return 1, int(self._guided(settings, labelled))
