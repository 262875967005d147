"""`Denoiser`: a network and its diffusion process; turns network outputs into flip log-odds."""

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
    """A Bernoulli diffusion (paper, Section 4), with the keys of `config.prior.bernoulli`.

    Fields:
      num_timesteps: T.
      continuous: whether to train on all times in (0, T] instead of 1..T.
      schedule: one of `schedules.NAMES`, or "given".
      keep: k_0..k_T for the schedule "given", else ().
      target: the variable whose log-odds the network predicts; one of `targets.TARGETS` (Table 7).
      pair: the pair of loss and posterior to train for; one of `losses.PAIRS`.
      evidence: whether the known log-odds log(b_t / (1 - b_t)) are added to the network's output,
        so that the network models only what the other bits imply.
      vlb_weight: lambda >= 0 of (13); with 0, L_vlb is not computed. The target z_s uses only
        L_vlb, with weight 1.
      time_weight: one of `losses.TIME_WEIGHTS`.
      stratified: whether the times of a batch are spread evenly.
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
        if self.evidence and (self.target == "z_s" or self.pair != "plain_mixture"):
            raise UserError(
                'config.prior.bernoulli.evidence needs the target "flip" or "z_0" and the pair '
                '"plain_mixture"; set it to False.'
            )
        schedules.keep_schedule(self.curve, self.num_timesteps)  # refuses invalid schedules

    @property
    def curve(self) -> schedules.Schedule:
        """The schedule, a name or k_0..k_T; see `schedules.keep_at`."""
        return schedules.named_or_given("prior.bernoulli", self.schedule, self.keep)

    def keep_at(self, t: Array) -> Array:
        """Returns k_t in float32 for times in [0, T], integers or not, of any shape."""
        return schedules.keep_at(self.curve, jnp.asarray(t, jnp.float32) / self.num_timesteps)

    def output(
        self, params: Any, z_t: Array, t: Array, condition: Condition | None = None
    ) -> Array:
        """Returns the network's output, float32, (n, h, w, c).

        Args:
          params: of the network.
          z_t: (n, h, w, c) in {0, 1}.
          t: (n,) in (0, T].
          condition: of the batch.
        """
        label, given = label_and_given(condition)
        return self.network.apply(params, z_t, (t - 1) / self.num_timesteps, label, given)

    def flip_logit(
        self,
        output: Array,
        z_t: Array,
        t: Array,
        pair: str = "plain_mixture",
        temperature: float | Array = 1.0,
    ) -> Array:
        """Returns the flip log-odds for the posterior of a pair, from the network's output.

        Those for "plain_mixture" include the bit's own log-odds `flip_evidence`, those for
        "balanced_plugin" do not (Bayes' rule); the term is added or removed if the network was
        trained for the other pair. The temperature divides the flip log-odds or, with the target
        z_s as in the paper, the log-odds of z_s.

        Args:
          output: from `output`, with guidance or without.
          z_t, t: the inputs of that call; t is (n,).
          pair: of the posterior, one of `losses.PAIRS`.
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
