"""A network together with the process that it denoises: from its output to flip log-odds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.priors import schedules
from binlatent.priors.bernoulli import losses, process, targets
from binlatent.priors.conditions import Condition, label_and_given
from binlatent.priors.prior import Prior
from binlatent.runtime.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Denoiser(Prior):
    """The statics of a Bernoulli diffusion (paper, Section 4); `config.prior.bernoulli`.

    Fields:
      num_timesteps: T.
      continuous: whether it is trained on all times in (0, T], not on 1..T alone.
      schedule: of `schedules.NAMES`, or "given".
      keep: k_0..k_T of the schedule "given", else ().
      target: what the network's output is the log-odds of, of `targets.TARGETS` (Table 7).
      pair: of `losses.PAIRS`, that it is trained for.
      evidence: whether the output leaves out a bit's own evidence, log(b_t / (1 - b_t)), which is
        known and added.
      vlb_weight: lambda >= 0 of (13); 0 costs nothing. The target z_s has L_vlb alone, unweighted.
      time_weight: of `losses.TIME_WEIGHTS`.
      stratified: whether a batch's times are spread evenly.
      self_conditioning: whether the network also gets an estimate of P(z_0 = 1) that an earlier
        call made (Chen et al., Analog Bits, 2023).
      groups: G, which divides c: in how many groups a step draws the bits of a token, each given
        those before; see `joint`. With 1 all are independent given z_t.
    """

    num_timesteps: int
    continuous: bool = False
    schedule: str = "linear"
    keep: tuple[float, ...] = ()
    target: str = "flip"
    pair: str = "plain_mixture"
    evidence: bool = True
    vlb_weight: float = 0.1
    time_weight: str = "mean"
    stratified: bool = False
    self_conditioning: bool = False
    groups: int = 1

    def __post_init__(self):
        named = {
            "target": targets.TARGETS,
            "pair": losses.PAIRS,
            "time_weight": losses.TIME_WEIGHTS,
        }
        for name, values in named.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"config.prior.bernoulli.{name} must be one of {', '.join(values)}; "
                    f"got {getattr(self, name)!r}."
                )
        if self.pair == "balanced_plugin" and self.target != "flip":
            raise UserError(
                'config.prior.bernoulli.pair "balanced_plugin" needs '
                'config.prior.bernoulli.target "flip".'
            )
        if self.groups > 1 and (self.target == "z_s" or self.pair != "plain_mixture"):
            raise UserError(
                'config.prior.bernoulli.groups above 1 needs the target "flip" or "z_0" and the '
                'pair "plain_mixture".'
            )
        if self.evidence and (self.target == "z_s" or self.pair != "plain_mixture"):
            raise UserError(
                'config.prior.bernoulli.evidence needs the target "flip" or "z_0" and the pair '
                '"plain_mixture"; set it to False.'
            )
        if self.groups < 1 or self.code_shape[2] % self.groups:
            raise UserError(
                f"config.prior.bernoulli.groups is {self.groups}, which does not divide the "
                f"{self.code_shape[2]} bits of a token."
            )
        schedules.keep_schedule(self.curve, self.num_timesteps)  # refuses what is none

    @property
    def curve(self) -> schedules.Schedule:
        """The schedule, a name or k_0..k_T; see `schedules.keep_at`."""
        return schedules.named_or_given("prior.bernoulli", self.schedule, self.keep)

    def keep_at(self, t: Array) -> Array:
        """Returns k_t in float32 for times in [0, T], whole or not, of any shape."""
        return schedules.keep_at(self.curve, jnp.asarray(t, jnp.float32) / self.num_timesteps)

    def _inputs(
        self, z_t: Array, t: Array, condition: Condition | None, estimate: Array | None
    ) -> tuple[Array | None, ...]:
        inputs = (z_t, (t - 1) / self.num_timesteps, *label_and_given(condition))
        return (*inputs, estimate) if self.self_conditioning else inputs

    def output(
        self,
        params: Any,
        z_t: Array,
        t: Array,
        condition: Condition | None = None,
        estimate: Array | None = None,
        z_s: Array | None = None,
        s: Array | None = None,
    ) -> Array:
        """Returns the network's output, float32, (n, h, w, c).

        Args:
          params: of the network.
          z_t: (n, h, w, c) in {0, 1}.
          t: (n,) in (0, T].
          condition: of the batch.
          estimate: P(z_0 = 1) by an earlier call, (n, h, w, c), 1/2 where there was none; None for
            none at all, and without `self_conditioning`.
          z_s: (n, h, w, c) in {0, 1}, of which each group of bits sees those before; None for z_t
            alone.
          s: (n,) in [0, t], with z_s.
        """
        drawn = {} if z_s is None else {"z_s": z_s, "time_s": (s - 1) / self.num_timesteps}
        return self.network.apply(params, *self._inputs(z_t, t, condition, estimate), **drawn)

    def features(
        self,
        params: Any,
        z_t: Array,
        t: Array,
        condition: Condition | None = None,
        estimate: Array | None = None,
    ) -> Array:
        """Returns what the network's last layer takes, float32, (n, h, w, d); as of `output`."""
        inputs = self._inputs(z_t, t, condition, estimate)
        return self.network.apply(params, *inputs, method="features")

    def first_estimate(
        self, params: Any, z_t: Array, t: Array, condition: Condition | None = None
    ) -> Array | None:
        """Returns P(z_0 = 1) by a call that gets no estimate, or None without `self_conditioning`.

        A function of z_t alone. No gradient passes through it. Arguments as of `output`.
        """
        if not self.self_conditioning:
            return None
        output = self.output(jax.lax.stop_gradient(params), z_t, t, condition)
        return targets.z_0_probs(self.flip_logit(output, z_t, t), z_t)

    def flip_logit(
        self,
        output: Array,
        z_t: Array,
        t: Array,
        pair: str = "plain_mixture",
        temperature: float | Array = 1.0,
    ) -> Array:
        """Returns the log-odds of a flip that a pair's posterior takes, from the network's output.

        "plain_mixture" wants the bit's own evidence in them, "balanced_plugin" does not; whatever
        the network was trained for, the difference is known (Bayes' rule). The temperature
        divides them, and with the target z_s, as in the paper, the log-odds of z_s.

        Args:
          output: of `output`, with guidance or without.
          z_t, t: that it was made from; t is (n,).
          pair: whose posterior it is for.
          temperature: tau > 0.
        """
        k_t = by_image(self.keep_at(t))
        if self.target == "z_s":
            k_s = by_image(self.keep_at(jnp.maximum(t - 1, 0)))
            logit, bare = targets.flip_from_z_s(output / temperature, z_t, k_t, k_s), False
            temperature = 1.0
        else:
            logit = targets.flip_from_z_0(output, z_t) if self.target == "z_0" else output
            bare = self.evidence or self.pair == "balanced_plugin"
        if bare and pair == "plain_mixture":
            logit = logit + process.flip_evidence(k_t)
        if not bare and pair == "balanced_plugin":
            logit = logit - process.flip_evidence(k_t)
        return logit / temperature


def by_image(x: Array) -> Array:
    """Returns (n,) as (n, 1, 1, 1)."""
    return x[:, None, None, None]
