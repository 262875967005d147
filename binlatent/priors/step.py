"""Stage 2: the Bernoulli diffusion prior over the codes of a frozen encoder (paper, Section 4)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from binlatent.priors.bernoulli import losses, process, schedules, targets
from binlatent.priors.transformer import Transformer
from binlatent.runtime import machine
from binlatent.training import state as state_lib

Array = jax.Array
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network and the process that it was trained for; its parameters come with each call.

    Fields:
      network: the transformer.
      schedule: a name or k_0..k_T; see `schedules.keep_at`.
      num_timesteps: T.
      continuous: whether it was trained on all times in (0, T], not on 1..T alone.
      target: what the output is about, of `targets.TARGETS`.
      pair: of `losses.PAIRS`, that it was trained for.
      evidence: whether the output leaves out what a bit's own noisy value says of it, which is
        known and added.
    """

    network: Transformer
    schedule: schedules.Schedule
    num_timesteps: int
    continuous: bool = False
    target: str = "flip"
    pair: str = "plain_mixture"
    evidence: bool = True

    def keep_at(self, t: Array) -> Array:
        """Returns k_t in float32 for times in [0, T], whole or not, of any shape."""
        return schedules.keep_at(self.schedule, jnp.asarray(t, jnp.float32) / self.num_timesteps)

    def output(
        self,
        params: Any,
        z_t: Array,
        t: Array,
        label: Array | None = None,
        given: Array | None = None,
    ) -> Array:
        """Returns the network's output, float32, (n, h, w, c).

        Args:
          params: of the network.
          z_t: (n, h, w, c) in {0, 1}.
          t: (n,) in (0, T].
          label, given: as of `Transformer`.
        """
        return self.network.apply(params, z_t, (t - 1) / self.num_timesteps, label, given)

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
        k_t = _by_image(self.keep_at(t))
        if self.target == "z_s":
            k_s = _by_image(self.keep_at(jnp.maximum(t - 1, 0)))
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


def _by_image(x: Array) -> Array:
    """Returns (n,) as (n, 1, 1, 1)."""
    return x[:, None, None, None]


@dataclasses.dataclass(frozen=True)
class Objective:
    """L = L_residual + lambda L_vlb, and the times that it is averaged over (paper, (13)).

    Fields:
      vlb_weight: lambda >= 0; 0 costs nothing. The target z_s has L_vlb alone, unweighted.
      time_weight: of `losses.TIME_WEIGHTS`.
      stratified: whether a batch's times are spread evenly.
      label_dropout: share of labels dropped, a sample at a time, for guidance (supplement C).
    """

    vlb_weight: float
    time_weight: str
    stratified: bool
    label_dropout: float


class Noise(NamedTuple):
    """What one batch draws: n images, codes (n, h, w, c)."""

    z_0: Array  # (n, h, w, c) uniform in [0, 1), for the code
    z_t: Array  # (n, h, w, c) uniform in [0, 1), for the forward process
    t: Array  # (n,) float32: 1..T, or in (0, T] if continuous
    unlabelled: Array  # (n,) bool, whose label is dropped


def draw_times(
    key: Array, n: int, num_timesteps: int, *, continuous: bool, stratified: bool
) -> Array:
    """Returns (n,) times, float32: uniform over 1..T, or over (0, T] if continuous.

    Args:
      key: a typed PRNG key.
      n: how many.
      num_timesteps: T.
      continuous: see above.
      stratified: one in each nth of the range, from a single offset (Kingma et al., Variational
        Diffusion Models, 2021): each is still uniform, but their mean varies less.
    """
    if stratified:
        u = (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0
    else:
        u = jax.random.uniform(key, (n,))
    if continuous:
        return num_timesteps * (1 - u)
    return jnp.minimum(jnp.floor(u * num_timesteps), num_timesteps - 1) + 1


def draw_noise(
    key: Array,
    code_shape: tuple[int, ...],
    num_timesteps: int,
    *,
    continuous: bool = False,
    stratified: bool = False,
    label_dropout: float = 0.0,
) -> Noise:
    """Draws a batch's noise; code_shape is (n, h, w, c), label_dropout a probability."""
    z_0_key, z_t_key, t_key, label_key = jax.random.split(key, 4)
    n = code_shape[0]
    return Noise(
        z_0=jax.random.uniform(z_0_key, code_shape),
        z_t=jax.random.uniform(z_t_key, code_shape),
        t=draw_times(t_key, n, num_timesteps, continuous=continuous, stratified=stratified),
        unlabelled=jax.random.bernoulli(label_key, label_dropout, (n,)),
    )


class Prediction(NamedTuple):
    """A batch of codes, their noised versions, and what the network says of them."""

    z_0: Array  # (n, h, w, c)
    z_t: Array  # (n, h, w, c)
    output: Array  # (n, h, w, c), the network's
    flip_logit: Array  # (n, h, w, c), the log-odds of a flip
    k_t: Array  # (n, 1, 1, 1)
    k_s: Array  # (n, 1, 1, 1), at s = t - 1, or 0


def predict(
    denoiser: Denoiser, params: Any, probs: Array, label: Array, noise: Noise
) -> Prediction:
    """Draws codes, noises them and applies the network (supplement, Algorithm 1, 5 to 8).

    Args:
      denoiser, params: the prior.
      probs: the encoder's y, (n, h, w, c) in [0, 1].
      label: (n,) int.
      noise: of the batch.
    """
    z_0 = process.draw(noise.z_0, process.at_least_float32(probs))
    k_t = _by_image(denoiser.keep_at(noise.t))
    k_s = _by_image(denoiser.keep_at(jnp.maximum(noise.t - 1, 0)))
    z_t = process.draw(noise.z_t, process.forward_probs(z_0, k_t))
    output = denoiser.output(params, z_t, noise.t, label, ~noise.unlabelled)
    return Prediction(z_0, z_t, output, denoiser.flip_logit(output, z_t, noise.t), k_t, k_s)


def bit_losses(
    denoiser: Denoiser, objective: Objective, prediction: Prediction
) -> dict[str, Array]:
    """Returns the terms of (13) a bit, in nats: `residual`, `vlb`, or the one that is needed."""
    z_0, z_t, output, flip_logit, k_t, k_s = prediction
    terms = {}
    if denoiser.target != "z_s":
        # z_0 or the flip, from one formula: bits and their log-odds change sign together.
        logit = flip_logit if denoiser.pair == "plain_mixture" else output
        loss = losses.bce if denoiser.pair == "plain_mixture" else losses.balanced_bce
        terms["residual"] = loss(logit, process.flip_target(z_t, z_0))
        if objective.vlb_weight:
            terms["vlb"] = losses.posterior_kl(flip_logit, z_t, z_0, k_t, k_s)
    else:
        posterior = process.posterior_probs(z_t, z_0, k_t, k_s)
        terms["vlb"] = losses.bce(output, posterior) - losses.entropy(posterior)
    return terms


def loss(
    denoiser: Denoiser,
    objective: Objective,
    params: Any,
    probs: Array,
    label: Array,
    noise: Noise,
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a batch (paper, (13)) and its metrics: scalars.

    The metrics are `loss`, its terms, unweighted, and `flip_accuracy`, how often the predicted
    flip, rounded, is right.
    """
    prediction = predict(denoiser, params, probs, label, noise)
    terms = bit_losses(denoiser, objective, prediction)
    scale = {"residual": 1.0, "vlb": objective.vlb_weight}
    if denoiser.target == "z_s":
        scale = {"vlb": 1.0}
    total = sum(scale[name] * term for name, term in terms.items())
    weight = losses.time_weight(noise.t, denoiser.num_timesteps, objective.time_weight)
    total = jnp.mean(_by_image(weight) * total)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    right = (prediction.flip_logit > 0) == (flipped > 0)
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    return total, {"loss": total, **metrics, "flip_accuracy": jnp.mean(right)}


def parts_for_caches(images: int, tokens: int) -> int:
    """Returns in how many parts this machine takes a batch; the update is the same up to rounding.

    On a CPU as many as leave each core 256 tokens: what fewer leave behind for the gradient comes
    back from the caches, but adding up the gradients of more parts takes longer than that saves.
    Elsewhere one.

    Args:
      images: of the batch.
      tokens: of an image.
    """
    if jax.default_backend() != "cpu":
        return 1
    least = 256 * machine.cores()
    divisors = (num for num in range(1, images + 1) if images % num == 0)
    return max(num for num in divisors if num == 1 or images // num * tokens >= least)


def update(
    state: state_lib.TrainState,
    batch: Batch,
    noise: Noise,
    *,
    denoiser: Denoiser,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Takes one step on a device's share of a batch with the noise given; under pmap.

    Args:
      state: replicated.
      batch: {"probs": (n, h, w, c) in [0, 1], "label": (n,)}.
      noise: of `draw_noise`.
      denoiser, objective: of the prior.
      optimizer, ema_decay: of `state.apply_gradients`.
      accumulate: in how many parts the share is taken, one after the other, which divides n; 0
        for those of `parts_for_caches`.
    """
    n, h, w, _ = batch["probs"].shape
    gradients_of = jax.grad(functools.partial(loss, denoiser, objective), has_aux=True)
    _, (gradients, metrics) = state_lib.accumulate(
        lambda _, part: ((), gradients_of(state.params, *part)),
        (),
        (batch["probs"], batch["label"], noise),
        accumulate or parts_for_caches(n, h * w),
    )
    return state_lib.apply_gradients(
        state, gradients, metrics, optimizer=optimizer, ema_decay=ema_decay
    )


def train_step(
    state: state_lib.TrainState,
    batch: Batch,
    encoder_params: Any,
    *,
    encode: Callable[[Any, Array], Array],
    denoiser: Denoiser,
    objective: Objective,
    **statics: Any,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Encodes the batch if need be, draws the step's noise and takes the step; under pmap.

    Args:
      state: replicated.
      batch: {"label": (n,)} with "probs", (n, h, w, c), the encoder's y from the cache, uint8 in
        255ths, or "image".
      encoder_params: of the frozen encoder, replicated; None with cached codes.
      encode: the frozen encoder, (encoder_params, image) -> y.
      denoiser, objective: of the prior.
      **statics: of `update`.
    """
    probs = batch["probs"] if "probs" in batch else encode(encoder_params, batch["image"])
    if probs.dtype == jnp.uint8:
        probs = probs / 255
    noise = draw_noise(
        state_lib.step_key(state),
        probs.shape,
        denoiser.num_timesteps,
        continuous=denoiser.continuous,
        stratified=objective.stratified,
        label_dropout=objective.label_dropout,
    )
    batch = {"probs": probs, "label": batch["label"]}
    return update(state, batch, noise, denoiser=denoiser, objective=objective, **statics)


@functools.partial(jax.jit, static_argnames="denoiser")
def eval_step(params: Any, probs: Array, label: Array, key: Array, *, denoiser: Denoiser) -> Array:
    """Returns each image's flip BCE in nats a bit, (n,), whatever the network's target is.

    Times, code and noise are drawn from `key`.
    """
    noise = draw_noise(key, probs.shape, denoiser.num_timesteps, continuous=denoiser.continuous)
    prediction = predict(denoiser, params, probs, label, noise)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    return jnp.mean(losses.bce(prediction.flip_logit, flipped), axis=(1, 2, 3))
