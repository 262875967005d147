"""Reveals a code in S network calls, in one compiled loop; and the bound on its length."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from binlatent.priors.absorbing import process
from binlatent.priors.absorbing.objective import hidden_nats
from binlatent.priors.guidance import Noise

Array = jax.Array

# (z, hidden, w) -> log-odds of the bits, float32; z and hidden are (n, h, w, c), w is the guidance.
Predict = Callable[[Array, Array, Array], Array]

ORDERS = ("random", "confidence")
SCORES = ("certainty", "likelihood")


class Trajectory(NamedTuple):
    """The states of the sampler over S calls for n codes, bool (S + 1, n, h, w, c)."""

    z_t: Array  # hidden bits have the values of the last call, 0 before the first
    hidden: Array


def confidence(score: str, logit: Array, drawn: Array, hidden: Array, g: int) -> Array:
    """Returns the network's confidence in the hidden bits of each unit: (n, h, w, c / g).

    Args:
      score: "certainty", the mean of |2 p - 1|, which does not depend on the drawn bits (BiGR); or
        "likelihood", log p of the drawn bits (Chang et al., MaskGIT, 2022).
      logit, drawn, hidden: of the bits, (n, h, w, c).
      g: bits of a unit.
    """
    if score == "certainty":
        # 2 p - 1 = tanh(logit / 2)
        sure, number = (
            jnp.sum(process.by_units(x, g), axis=-1)
            for x in (jnp.where(hidden, jnp.abs(jnp.tanh(logit / 2)), 0.0), hidden)
        )
        return sure / jnp.maximum(number, 1)
    nats = jnp.where(hidden, optax.sigmoid_binary_cross_entropy(logit, drawn), 0.0)
    return -jnp.sum(process.by_units(nats, g), axis=-1)


def gumbel(uniform: Array) -> Array:
    """Returns Gumbel noise from uniform noise in [0, 1)."""
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(uniform.dtype).tiny)))


def unmask(
    predict: Predict,
    noise: Noise,
    z: Array,
    free: Array,
    *,
    g: int,
    counts: Array,
    guidance: Array,
    temperature: float | Array = 1.0,
    order: str = "random",
    score: str = "certainty",
    order_temperature: float | Array = 0.0,
    revise: bool = False,
    return_trajectory: bool = False,
) -> tuple[Array, Trajectory | None]:
    """Draws the free bits of codes.

    Each call draws all hidden bits independently and keeps those of some units: a share
    1 - c_{j+1} / c_j of the hidden units, rounded up, where c are the counts. An image with known
    bits has fewer than c_j hidden units. Where c falls by one, at most one unit is kept.

    Args:
      predict: the network, guidance included.
      noise: uniforms of the codes' shape; call j uses draws 2 j and 2 j + 1.
      z: codes, (n, h, w, c); free bits are ignored.
      free: bool (n, h, w, c), the bits to draw; they need not be whole units.
      g: bits of a unit.
      counts: int (S + 1,), from `process.hidden_counts`.
      guidance: (S,), w at each call.
      temperature: tau > 0; divides the log-odds.
      order: one of `ORDERS`. "random" keeps random units, so that codes follow the model.
        "confidence" keeps the units with the highest score.
      score: one of `SCORES`.
      order_temperature: factor of the Gumbel noise that is added to the score; multiplied by
        1 - j / S at call j = 1, ..., S.
      revise: whether to hide the lowest scores among all units, where a kept unit has the score of
        the call that drew it (Ghazvininejad et al., Mask-Predict, 2019).
      return_trajectory: whether to return the states.

    Returns:
      The codes, float32 in {0, 1}, and the trajectory, or None.
    """
    steps = len(counts) - 1
    drawable = jnp.any(process.by_units(free, g), axis=-1)

    def call(state, step):
        z, hidden, sure = state
        j, count, count_after, w = step
        hidden_bits = process.by_bits(hidden, g) & free
        logit = predict(z, hidden_bits, w) / temperature
        drawn = (noise(2 * j) < jax.nn.sigmoid(logit)).astype(z.dtype)
        z = jnp.where(hidden_bits, drawn, z)

        uniform = noise(2 * j + 1)[..., : hidden.shape[-1]]
        if order == "random":
            rank = uniform
        else:
            sure = jnp.where(hidden, confidence(score, logit, z, hidden_bits, g), sure)
            rank = sure + order_temperature * (1 - (j + 1) / steps) * gumbel(uniform)
        rank = jnp.where(drawable if revise else hidden, rank, jnp.inf)
        left = jnp.sum(hidden, axis=(1, 2, 3))
        # In float32: a product of counts can overflow an int32. The last term covers rounding.
        after = jnp.floor(left * (count_after / count) + left * 2.0**-22).astype(left.dtype)
        left = jnp.maximum(after, left - (count - count_after))
        hidden = process.lowest(rank, left)
        passed = Trajectory(z.astype(bool), process.by_bits(hidden, g) & free)
        return (z, hidden, sure), passed if return_trajectory else None

    start = jnp.where(free, 0.0, z.astype(jnp.float32))
    state = (start, drawable, jnp.zeros(drawable.shape))
    (z, _, _), passed = jax.lax.scan(
        call, state, (jnp.arange(steps), counts[:-1], counts[1:], guidance)
    )
    if passed is None:
        return z, None
    first = Trajectory(start.astype(bool), free)
    return z, jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, passed)


def likelihood_bound(
    predict: Callable[[Array, Array], Array],
    noise: Noise,
    z_0: Array,
    *,
    g: int,
    counts: Array,
    any_order: bool,
    num_draws: int = 1,
) -> Array:
    """Returns an unbiased estimate of a bound on -log2 p(z_0), in bits per image: (n,).

    For a sampler in random order that keeps r of m hidden units in a call, Jensen's inequality
    gives the bound: the sum over calls of the mean over hidden sets of r / m times the
    cross-entropy of the hidden bits. With `any_order` the bound is the tightest, of one unit per
    call in U calls; one random call stands for all calls between two counts.

    Args:
      predict: the network, (z, hidden) -> log-odds.
      noise: uniforms of the codes' shape; two for each call and draw.
      z_0: codes, (n, h, w, c).
      g: bits of a unit.
      counts: int (S + 1,), falling from U to 0.
      any_order: see above; if False, the bound is that of S calls.
      num_draws: of hidden sets per call, at least 1.
    """

    def add_call(total, step):
        i, m, m_after = step
        kept = m - m_after
        order = noise(2 * i)[..., : z_0.shape[-1] // g]
        m = jnp.full(len(z_0), m)
        if any_order:
            u = noise(2 * i + 1)[:, 0, 0, 0]
            m = m - jnp.minimum(jnp.floor(u * kept).astype(m.dtype), kept - 1)
        hidden = process.by_bits(process.lowest(order, m), g)
        nats = hidden_nats(predict(z_0, hidden), z_0, hidden)
        return total + kept / m * nats / num_draws, None

    each = [jnp.repeat(x, num_draws) for x in (counts[:-1], counts[1:])]
    start = jnp.zeros(len(z_0))
    nats, _ = jax.lax.scan(add_call, start, (jnp.arange(len(each[0])), *each))
    return nats / jnp.log(2.0)
