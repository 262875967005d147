"""The kind of prior "bernoulli", that of the paper: `config.prior.kind = "bernoulli"`."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import numpy as np

from binlatent.priors import prior as prior_lib
from binlatent.priors import schedules
from binlatent.priors.bernoulli import losses, objective, programs, sampling
from binlatent.priors.bernoulli.denoiser import Denoiser
from binlatent.priors.conditions import Condition
from binlatent.priors.guidance import check_guidance, guidance_weights
from binlatent.priors.prior import Known
from binlatent.runtime.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BernoulliSettings(prior_lib.Settings):
    """How to sample.

    Fields:
      steps: evenly spaced reverse steps from T, 1 to T.
      times: a list that falls to 0, integers or not, in place of `steps`.
      temperature: tau > 0 (paper, Section 4.3).
      guidance: w >= 0 (supplement C).
      guidance_interval: in t/T; no guidance outside.
      pair: what the temperature acts on: one of `losses.PAIRS`, or "trained" for that of training.
      threshold_last: whether the last step rounds the prediction instead of drawing it.
      corrector_steps: number after each step; each is one network call.
      corrector_size: share of bits that a corrector step draws anew.
      renoise: in [0, 1), share of bits that each step draws anew from its prediction.
      known: "kept" or "noised": the known bits of inpainting at t > 0.
    """

    steps: int = 64
    times: Any = None
    temperature: float = 1.0
    guidance: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    pair: str = "trained"
    threshold_last: bool = False
    corrector_steps: int = 0
    corrector_size: float = 0.1
    renoise: float = 0.0
    known: str = "kept"

    def __post_init__(self):
        prior_lib.check_temperature(self.temperature)
        check_guidance(self.guidance, self.guidance_interval)
        if self.corrector_steps < 0 or not 0 <= self.corrector_size <= 1:
            raise UserError(
                "corrector_steps must be at least 0 and corrector_size between 0 and 1; got "
                f"{self.corrector_steps} and {self.corrector_size}."
            )
        if not 0 <= self.renoise < 1:
            raise UserError(
                f"The sampling option renoise must be at least 0 and below 1; got {self.renoise}."
            )
        if self.known not in ("kept", "noised"):
            raise UserError(f'known must be "kept" or "noised"; got {self.known!r}.')
        if self.pair not in ("trained", *losses.PAIRS):
            raise UserError(
                f'The pair must be "trained" or one of {", ".join(losses.PAIRS)}; '
                f"got {self.pair!r}."
            )


@dataclasses.dataclass(frozen=True)
class BernoulliPrior(Denoiser):
    """The paper's prior, with the fields of `Denoiser`. Its code lengths are upper bounds (7)."""

    Settings = BernoulliSettings
    trained = ("num_timesteps", "continuous", "schedule", "keep", "target", "pair", "evidence")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "num_timesteps": (1, 1_000_000),
        "vlb_weight": (0, math.inf),
    }

    @property
    def max_steps(self) -> int | None:
        """T; None if the prior was trained on continuous times."""
        return None if self.continuous else self.num_timesteps

    def check_settings(self, settings: BernoulliSettings) -> BernoulliSettings:
        """Replaces the pair "trained" by the pair of training; refuses settings that do not fit."""
        if settings.pair == "trained":
            settings = dataclasses.replace(settings, pair=self.pair)
        if settings.pair != "plain_mixture" and self.target == "z_s":
            raise UserError('A prior with the target "z_s" needs sample.pair "plain_mixture".')
        self.times(settings)
        return settings

    def times(self, settings: BernoulliSettings | None, start: float = 1.0) -> np.ndarray:
        """Returns the times to visit, from `start` T to 0, float32 (S + 1,).

        Args:
          settings: with `times` or `steps`; None for all T steps.
          start: in (0, 1]; ignored if `times` are given.
        """
        T, continuous = self.num_timesteps, self.continuous
        if settings is not None and settings.times is not None:
            return schedules.check_times(settings.times, T)
        steps = T if settings is None else settings.steps
        even = schedules.visited_times(steps, T, continuous=continuous)
        if start == 1:
            return even
        first = start * T if continuous else max(round(start * T), 1)
        return np.concatenate([[first], even[even < first]]).astype(np.float32)

    def draw_noise(self, keys: Array, n: int) -> objective.Noise:
        """Draws the times and the noise of the forward process."""
        return objective.draw_noise(self, keys, n)

    def loss(
        self, params: Any, bits: Array, condition: Condition | None, noise: objective.Noise
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss (13)."""
        return objective.loss(self, params, bits, condition, noise)

    def image_metrics(
        self, params: Any, bits: Array, condition: Condition | None, noise: objective.Noise
    ) -> dict[str, Array]:
        """Returns `bce`, the cross-entropy of flips in nats per bit."""
        return {"bce": objective.flip_bce(self, params, bits, condition, noise)}

    def _draw(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: BernoulliSettings,
        *,
        known: Known | None = None,
        bits: Array | None = None,
        strength: float = 1.0,
        return_trajectory: bool = False,
    ) -> tuple[Array, sampling.Trajectory | None]:
        times = self.times(settings, strength)
        if known is not None:
            known = sampling.Known(*known, settings.known == "noised")
        return programs.sample_codes(
            *(params, keys, condition, bits, known, times),
            self._guidance(settings, times, condition is not None),
            float(settings.temperature),  # an integer would compile another program
            float(settings.corrector_size),
            float(settings.renoise) or None,
            denoiser=self,
            pair=settings.pair,
            threshold_last=settings.threshold_last,
            corrector_steps=settings.corrector_steps,
            return_trajectory=return_trajectory,
        )

    def _guidance(
        self, settings: BernoulliSettings, times: np.ndarray, labelled: bool
    ) -> np.ndarray:
        """Returns w at each step; 0 without a label, where guidance changes nothing."""
        w = settings.guidance if labelled else 0.0
        return guidance_weights(w, times / self.num_timesteps, settings.guidance_interval)

    def sample(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: BernoulliSettings,
        known: Known | None = None,
    ) -> Array:
        """Draws codes by ancestral sampling (Algorithm 2), or with `renoise`."""
        return self._draw(params, keys, condition, settings, known=known)[0]

    def trajectory(
        self, params: Any, keys: Array, condition: Condition | None, settings: BernoulliSettings
    ) -> sampling.Trajectory:
        """Returns the states of the sampler: `z_t` and `p_0`, with first axis n."""
        _, passed = self._draw(params, keys, condition, settings, return_trajectory=True)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), passed)

    def vary(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        settings: BernoulliSettings,
        bits: Array,
        strength: float,
    ) -> Array:
        """Adds noise to codes up to t = strength T, and denoises them."""
        return self._draw(params, keys, condition, settings, bits=bits, strength=strength)[0]

    def code_lengths(
        self,
        params: Any,
        keys: Array,
        condition: Condition | None,
        bits: Array,
        settings: BernoulliSettings | None,
        num_draws: int,
    ) -> Array:
        """Returns the variational bound (7) of ancestral sampling at the settings' times.

        Other settings are ignored.
        """
        times = self.times(settings)
        return programs.bound_code_lengths(
            *(params, keys, condition, bits, times), denoiser=self, num_draws=num_draws
        )

    def network_calls(self, settings: BernoulliSettings, labelled: bool) -> tuple[int, int]:
        """Returns the calls with the label and without it; a guided step takes both."""
        times = self.times(settings)
        calls = np.full(len(times) - 1, 1)
        calls[1:] += settings.corrector_steps  # after each step but the last
        guided = self._guidance(settings, times, labelled) != 0
        with_label, both = int(np.sum(calls)), int(np.sum(calls[guided]))
        return (with_label, both) if labelled else (0, with_label)
