"""The variational bound on the code length of a code under the prior (paper, (7))."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import losses, process
from binlatent.priors.guidance import Noise

Array = jax.Array


def likelihood_bound(
    denoise: Callable[..., Array],
    noise: Noise,
    z_0: Array,
    *,
    times: Array,
    keep: Array,
    num_draws: int = 1,
    in_groups: bool = False,
) -> Array:
    """Returns an unbiased estimate of the bound on -log2 p(z_0), in bits per image: (n,).

    The bound is L_T plus, for each step of the grid from t to s, KL(q(z_s | z_t, z_0) ||
    p(z_s | z_t)) in closed form, averaged over draws of z_t. At the last step, s = 0, this is
    -log p(z_0 | z_t). Divide by the number of bits for bits per dimension. Fewer times give a
    looser bound, because p is then a sampler that visits only these times.

    If a step draws bits in groups, the chain rule gives KL(q || p) as the mean over z_s ~ q of the
    sum over groups, each in closed form given the z_s of the groups before.

    Args:
      denoise: `denoise(z_t, t)` -> flip logits, including the bit's own evidence; t is a scalar. In
        groups `denoise(z_t, t, z_s, s)`, each given the bits of z_s in the groups before.
      noise: uniforms of the codes' shape; uses draws 0 to S num_draws - 1, and as many more with
        groups.
      z_0: codes, (n, h, w, c).
      times: (S + 1,), decreasing to 0.
      keep: (S + 1,), k at those times.
      num_draws: draws of z_t per step, at least 1.
      in_groups: see above; a z_s is drawn for each z_t.
    """
    axes = tuple(range(1, z_0.ndim))

    def step_bound(total, step):
        i, t, s, k_t, k_s = step
        z_t = process.draw(noise(i), process.forward_probs(z_0, k_t))
        drawn = ()
        if in_groups:
            posterior = process.posterior_probs(z_t, z_0, k_t, k_s)
            drawn = process.draw(noise(num + i), posterior), s
        kl = losses.posterior_kl(denoise(z_t, t, *drawn), z_t, z_0, k_t, k_s)
        return total + jnp.sum(kl, axis=axes) / num_draws, None

    steps = (times[:-1], times[1:], keep[:-1], keep[1:])
    steps, num = [jnp.repeat(x, num_draws) for x in steps], num_draws * (len(times) - 1)
    start = losses.end_kl(keep[0]) * jnp.ones_like(process.at_least_float32(z_0)).sum(axis=axes)
    nats, _ = jax.lax.scan(step_bound, start, (jnp.arange(num), *steps))
    return nats / jnp.log(2.0)
