"""A stage's training options: batches, learning rate, Adam, EMA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from binlatent.training.state import global_norm

DECAYS = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class Training:
    """The `train` section of a stage.

    Fields:
      batch_size: images per step, over all devices and processes.
      num_steps: of the whole training; the cosine decay reaches 0 there.
      learning_rate: after the warm-up.
      warmup_steps: steps of linear warm-up from 0; 0 for none.
      decay: "constant", as in the paper, or "cosine".
      max_grad_norm: gradients with a larger global norm are scaled down to it.
      ema_decay: of the averaged parameters.
      accumulate: number of parts into which a device splits its share of a batch, to process one
        after the other. 0, for the prior only, chooses a number that suits the machine.
    """

    batch_size: int
    num_steps: int
    learning_rate: float
    warmup_steps: int = 0
    decay: str = "constant"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    accumulate: int = 1

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the number of updates made before."""
        if self.decay == "cosine":
            steps = max(self.num_steps - self.warmup_steps, 1)
            after = optax.cosine_decay_schedule(self.learning_rate, steps)
        else:
            after = optax.constant_schedule(self.learning_rate)
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def optimizer(self) -> optax.GradientTransformation:
        """Returns Adam with the schedule and clipping by global norm (supplement B)."""

        def clip(gradients: Any, _: Any) -> Any:
            # As `optax.clip_by_global_norm`, but a scale avoids an intermediate in memory.
            scale = jnp.minimum(1, self.max_grad_norm / global_norm(gradients))
            return jax.tree.map(lambda x: (scale * x).astype(x.dtype), gradients)

        return optax.chain(optax.stateless(clip), optax.adam(self.schedule()))
