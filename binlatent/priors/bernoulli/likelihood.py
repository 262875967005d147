"""The variational bound on the code length of a code under the prior (paper, (7))."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import losses, process
from binlatent.priors.guidance import Noise

Array = jax.Array


def likelihood_bound(
    denoise: Callable[[Array, Array], Array],
    noise: Noise,
    z_0: Array,
    *,
    times: Array,
    keep: Array,
    num_draws: int = 1,
) -> Array:
    """Returns an unbiased estimate of the bound on -log2 p(z_0), in bits per image: (n,).

    The bound is L_T plus, for each step of the grid from t to s, KL(q(z_s | z_t, z_0) ||
    p(z_s | z_t)) in closed form, averaged over draws of z_t. At the last step, s = 0, this is
    -log p(z_0 | z_t). Divide by the number of bits for bits per dimension. Fewer times give a
    looser bound, because p is then a sampler that visits only these times.

    Args:
      denoise: `denoise(z_t, t)` -> flip logits, including the bit's own evidence; t is a scalar.
      noise: uniforms of the codes' shape; uses draws 0 to S num_draws - 1.
      z_0: codes, (n, h, w, c).
      times: (S + 1,), decreasing to 0.
      keep: (S + 1,), k at those times.
      num_draws: draws of z_t per step, at least 1.
    """
    axes = tuple(range(1, z_0.ndim))

    def step_bound(total, step):
        i, t, k_t, k_s = step
        z_t = process.draw(noise(i), process.forward_probs(z_0, k_t))
        kl = losses.posterior_kl(denoise(z_t, t), z_t, z_0, k_t, k_s)
        return total + jnp.sum(kl, axis=axes) / num_draws, None

    steps = [jnp.repeat(x, num_draws) for x in (times[:-1], keep[:-1], keep[1:])]
    start = losses.end_kl(keep[0]) * jnp.ones_like(process.at_least_float32(z_0)).sum(axis=axes)
    nats, _ = jax.lax.scan(step_bound, start, (jnp.arange(len(steps[0])), *steps))
    return nats / jnp.log(2.0)
