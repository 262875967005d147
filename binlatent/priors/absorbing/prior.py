"""The kind of prior "absorbing": `config.prior.kind = "absorbing"`."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import numpy as np

from binlatent.priors import prior as prior_lib
from binlatent.priors import schedules
from binlatent.priors.absorbing import objective, process, programs, sampling
from binlatent.priors.conditions import Condition
from binlatent.priors.guidance import check_guidance, guidance_weights
from binlatent.priors.prior import Known
from binlatent.runtime.errors import UserError

Array = jax.Array

_MOST_CALLS = 64  # of the tightest bound, per image and draw


@dataclasses.dataclass(frozen=True)
class AbsorbingSettings(prior_lib.Settings):
    """How to sample.

    Fields:
      steps: network calls, 1 to the number of units.
      temperature: tau > 0; divides the log-odds.
      guidance: w >= 0 (supplement C).
      guidance_interval: in t/T; no guidance outside.
      guidance_schedule: "constant", or "rising" linearly from 0 at the first call.
      order: "random" or "confidence": which units a call keeps.
      score: one of `sampling.SCORES`, for the order "confidence".
      order_temperature: of the Gumbel noise in that order at the first call; it falls to 0.
      revise: whether, in that order, the least certain kept units are hidden again.
    """

    steps: int = 16
    temperature: float = 1.0
    guidance: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: str = "constant"
    order: str = "random"
    score: str = "certainty"
    order_temperature: float = 1.0
    revise: bool = False

    def __post_init__(self):
        prior_lib.check_temperature(self.temperature)
        if not 0 <= self.order_temperature < math.inf:
            raise UserError(
                f"order_temperature must be at least 0 and finite; got {self.order_temperature}."
            )
        check_guidance(self.guidance, self.guidance_interval)
        named = {
            "guidance_schedule": ("constant", "rising"),
            "order": sampling.ORDERS,
            "score": sampling.SCORES,
        }
        for name, (one, other) in named.items():
            if getattr(self, name) not in (one, other):
                raise UserError(
                    f'{name} must be "{one}" or "{other}"; got {getattr(self, name)!r}.'
                )
        if self.revise and self.order != "confidence":
            raise UserError(
                'revise needs the order "confidence": it hides the least certain units.'
            )


@dataclasses.dataclass(frozen=True)
class AbsorbingPrior(prior_lib.Prior):
    """An absorbing diffusion; its code lengths are upper bounds.

    Fields:
      unit: the bits that are hidden together: "token", "bit", or a number that divides c.
      schedule: one of `schedules.NAMES` or "given"; 1 - k is the share of hidden units.
      keep: k_0..k_T for the schedule "given", ending at 0; else ().
      time_weight: "bound": the mean loss is the bound. "falling": weights of 1 - t/T (Bond-Taylor
        et al., Unleashing Transformers, 2022).
    """

    Settings = AbsorbingSettings
    trained = ("unit",)
    lacks: ClassVar[dict[str, str]] = {
        "renoise": "An absorbing prior has no renoise: use revise, with the order confidence, to "
        "draw bits again.",
    }

    unit: str | int = "token"
    schedule: str = "linear"
    keep: tuple[float, ...] = ()
    time_weight: str = "bound"

    def __post_init__(self):
        process.bits_of_unit(self.unit, self.code_shape[-1])  # refuses invalid units
        if self.time_weight not in objective.TIME_WEIGHTS:
            raise UserError(
                "config.prior.absorbing.time_weight must be one of "
                f"{', '.join(objective.TIME_WEIGHTS)}; got {self.time_weight!r}."
            )
        schedules.check_schedule(self.curve)
        if self.keep and self.keep[-1] != 0:
            raise UserError(
                "config.prior.absorbing.keep must end at 0, where all units are hidden; its last k "
                f"is {self.keep[-1]:g}."
            )

    @property
    def curve(self) -> schedules.Schedule:
        """The schedule, a name or k_0..k_T; see `schedules.keep_at`."""
        return schedules.named_or_given("prior.absorbing", self.schedule, self.keep)

    @property
    def g(self) -> int:
        """Bits of a unit."""
        return process.bits_of_unit(self.unit, self.code_shape[-1])

    @property
    def max_steps(self) -> int:
        """U, the number of units of a code."""
        return math.prod(self.code_shape) // self.g

    def check_settings(self, settings: AbsorbingSettings) -> AbsorbingSettings:
        """Refuses more calls than there are units."""
        if not 1 <= settings.steps <= self.max_steps:
            raise UserError(
                f"the number of sampling steps must be between 1 and {self.max_steps}, the number "
                "of units of a code, because each step reveals at least one; got "
                f"{settings.steps}."
            )
        return settings

    def draw_noise(self, keys: Array, n: int) -> objective.Noise:
        """Draws times, and the order in which units are hidden."""
        h, w, c = self.code_shape
        return objective.draw_noise(keys, n, (h, w, c // self.g))

    def _terms(
        self, params: Any, bits: Array, condition: Condition | None, noise: objective.Noise
    ) -> objective.Terms:
        times = process.times_of_counts(self.curve, self.max_steps)
        return objective.image_terms(self.network, params, bits, condition, noise, times)

    def loss(
        self, params: Any, bits: Array, condition: Condition | None, noise: objective.Noise
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the weighted cross-entropy of hidden bits, in nats per bit of the code.

        Metrics: `loss`, and `accuracy`, the share of hidden bits that are predicted correctly.
        """
        terms = self._terms(params, bits, condition, noise)
        loss = getattr(terms, self.time_weight).mean()
        return loss, {"loss": loss, "accuracy": terms.accuracy.mean()}

    def image_metrics(
        self, params: Any, bits: Array, condition: Condition | None, noise: objective.Noise
    ) -> dict[str, Array]:
        """Returns `bce`, in nats per bit; its mean is the tightest bound on a code's length."""
        return {"bce": self._terms(params, bits, condition, noise).bound}

    def _draw(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: AbsorbingSettings,
        *,
        known: Known | None = None,
        units: int | None = None,
        return_trajectory: bool = False,
    ) -> tuple[Array, sampling.Trajectory | None]:
        units = units or self.max_steps
        steps = min(settings.steps, units)
        return programs.unmask_codes(
            *(params, keys, condition, known, process.hidden_counts(self.curve, units, steps)),
            self._guidance(settings, steps, condition is not None),
            float(settings.temperature),  # an integer would compile another program
            float(settings.order_temperature),
            network=self.network,
            shape=self.code_shape,
            g=self.g,
            order=settings.order,
            score=settings.score,
            revise=settings.revise,
            return_trajectory=return_trajectory,
        )

    def _guidance(self, settings: AbsorbingSettings, steps: int, labelled: bool) -> np.ndarray:
        """Returns w at each call; 0 without a label."""
        w = settings.guidance if labelled else 0.0
        if settings.guidance_schedule == "rising" and steps > 1:
            w = w * np.arange(steps) / (steps - 1)
        return guidance_weights(w, np.linspace(1, 0, steps + 1), settings.guidance_interval)

    def sample(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: AbsorbingSettings,
        known: Known | None = None,
    ) -> Array:
        """Draws codes; known bits are never hidden, so samples are conditioned on them."""
        return self._draw(params, keys, condition, settings, known=known)[0]

    def trajectory(
        self, params: Any, keys: Array, condition: Condition | None, settings: AbsorbingSettings
    ) -> sampling.Trajectory:
        """Returns the states of the sampler: `z_t` and `hidden`, with first axis n."""
        _, passed = self._draw(params, keys, condition, settings, return_trajectory=True)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), passed)

    def vary(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: AbsorbingSettings,
        bits: Array,
        strength: float,
    ) -> Array:
        """Hides a random share `strength` of the units, and draws them again."""
        count = math.ceil(strength * self.max_steps)
        known = programs.hide_anew(keys, bits, count=count, g=self.g)
        return self._draw(params, keys, condition, settings, known=known, units=count)[0]

    def code_lengths(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        bits: Array,
        settings: AbsorbingSettings | None,
        num_draws: int,
    ) -> Array:
        """Returns the bound of a sampler of the settings' steps in random order, at temperature 1.

        Without settings it is the tightest bound, of one unit per call; the estimate takes at most
        64 calls.
        """
        units = self.max_steps
        if settings is None:
            counts = process.hidden_counts("linear", units, min(units, _MOST_CALLS))
        else:
            counts = process.hidden_counts(self.curve, units, settings.steps)
        return programs.unmask_code_lengths(
            *(params, keys, condition, bits, counts),
            network=self.network,
            g=self.g,
            any_order=settings is None,
            num_draws=num_draws,
        )

    def network_calls(self, settings: AbsorbingSettings, labelled: bool) -> tuple[int, int]:
        """Returns the calls with the label and without it; a guided call takes both."""
        steps = settings.steps
        if not labelled:
            return 0, steps
        return steps, int(np.count_nonzero(self._guidance(settings, steps, labelled)))
