"""Stage 2 as the config describes it: a kind of prior, its conditioning and its training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from binlatent.priors.conditions import Conditioning
from binlatent.priors.prior import Prior
from binlatent.priors.step import train_step
from binlatent.runtime.keys import key_for
from binlatent.training.optimizer import Training
from binlatent.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class PriorSpec:
    """Stage 2, as fixed by the config.

    Fields:
      kind: a key of `kinds.KINDS`.
      prior: the object of that kind.
      conditioning: what the prior is conditioned on.
      train: batches, optimiser, EMA.
      label_dropout: share of labels dropped in training, for guidance.
      cache_codes: encode the training set once, into the workdir.
      codes: a folder of codes to train on; "" for none.
    """

    kind: str
    prior: Prior
    conditioning: Conditioning
    train: Training
    label_dropout: float
    cache_codes: bool
    codes: str

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters."""
        return self.prior.init(key, self.conditioning.example())

    def init_state(self, seed: int) -> TrainState:
        """Returns the state before the first step."""
        init_key, base_key = jax.random.split(key_for(seed, "prior"))
        return create_state(base_key, self.init(init_key), self.train.optimizer())

    def step(self, encode: Callable, debug_nans: bool = False) -> Callable:
        """Returns the training step, (state, batch, encoder's parameters) -> (state, metrics).

        Args:
          encode: the frozen encoder, (parameters, images) -> y.
          debug_nans: take each batch whole, because in a loop JAX cannot name the operation that
            made a NaN.
        """
        return functools.partial(
            train_step,
            encode=encode,
            prior=self.prior,
            conditional=self.conditioning.kind != "none",
            label_dropout=self.label_dropout,
            optimizer=self.train.optimizer(),
            ema_decay=self.train.ema_decay,
            accumulate=1 if debug_nans else self.train.accumulate,
        )
