"""Draws the bits of a token in G groups, each given those before: `prior.bernoulli.groups`.

An ordinary step from t to s draws all bits independently given z_t, so few steps are worse than
many. Here the bits of a token are drawn in G groups, in order:

    p(z_s | z_t) = prod_g p(z_s^g | z_s^{<g}, z_t)

The bits of a group are independent given z_t and the z_s^{<g} of their token. Each is drawn from
the mixture (8) with its flip log-odds. With G = c this is exact for one token, for steps of any
length.

Given z_s, the head returns the log-odds of all groups at once, each given the groups before it.
With s = t and z_s = z_t, this is the network's P(z_0 = 1 | z_t), because only z_t is known.

Dimensions: n batch, h w latent grid, c bits of a token, G groups of k bits, m = n h w tokens, d
width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.priors.attention import dense, gelu
from binlatent.priors.bernoulli.denoiser import Denoiser
from binlatent.priors.conditions import Condition, negative
from binlatent.priors.transformer import TimeEmbedding, rounded

Array = jax.Array


def split_groups(x: Array, groups: int) -> Array:
    """Splits the bits of tokens into groups: (..., c) -> (G, ..., k)."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def merge_groups(x: Array) -> Array:
    """Undoes `split_groups`."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


class Begun(NamedTuple):
    """The state of the head for tokens whose first groups are drawn."""

    linear: Array  # float32 (m, G, k), the part of the log-odds that does not depend on bits
    hidden: Array  # (m, d), from the features, the time s, and the bits drawn so far


class JointHead(nn.Module):
    """Log-odds of the bits of tokens in groups, each given the bits of the groups before.

    It is a neural autoregressive distribution estimator (Larochelle and Murray, NADE, 2011): each
    drawn group adds its part to a hidden layer. A linear layer of the features is added.
    """

    num_bits: int
    groups: int
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        d, groups, k = self.width, self.groups, self.num_bits // self.groups
        zeros = nn.initializers.zeros
        self.head = nn.Dense(self.num_bits, dtype=jnp.float32, kernel_init=zeros)
        self.from_features = dense(d, dtype=self.dtype)
        self.from_time = TimeEmbedding(d, self.dtype)
        self.bit_emb = self.param(
            "bit_emb", nn.initializers.normal(self.num_bits**-0.5), (groups, k, d)
        )
        self.group_emb = self.param("group_emb", nn.initializers.normal(0.02), (groups, d))
        self.last = self.param("last", zeros, (groups, d, k))

    def begin(self, features: Array, time: Array) -> Begun:
        """Returns the state before the first group.

        Args:
          features: float32 (n, h, w, d), from the trunk.
          time: (n,), (s - 1) / T of the bits to draw.
        """
        n, h, w, d = features.shape
        rows = features.reshape(-1, d)
        of_time = jnp.repeat(self.from_time(time), h * w, axis=0)
        linear = self.head(rows).reshape(n * h * w, self.groups, -1)
        return Begun(linear, self.from_features(rows) + of_time)

    def add(self, begun: Begun, bits: Array, group: Array) -> Begun:
        """Returns the state after a group with bits (m, k) in {0, 1}; `group` is its index."""
        added = (2 * bits - 1).astype(self.dtype) @ self.bit_emb[group].astype(self.dtype)
        return begun._replace(hidden=begun.hidden + added)

    def group_logits(self, begun: Begun, group: Array) -> Array:
        """Returns the log-odds of a group, given the groups before, float32 (m, k)."""
        y = gelu(begun.hidden + self.group_emb[group].astype(self.dtype)[None])
        last = self.last[group].astype(self.dtype)
        return begun.linear[:, group] + jnp.matmul(y, last, preferred_element_type=jnp.float32)

    def __call__(self, features: Array, time: Array, bits: Array) -> Array:
        """Returns the log-odds of all groups, each given those before, float32 (n, h, w, c).

        Args:
          features, time: as in `begin`.
          bits: z_s, (n, h, w, c) in {0, 1}; a group sees only the groups before it.
        """
        begun = self.begin(features, time)
        signs = split_groups(2 * bits.reshape(-1, self.num_bits) - 1, self.groups)
        added = jnp.einsum(
            "gmk,gkd->gmd", signs.astype(self.dtype), self.bit_emb.astype(self.dtype)
        )
        before = jnp.cumsum(added, axis=0) - added
        y = gelu(begun.hidden[None] + before + self.group_emb.astype(self.dtype)[:, None])
        last = self.last.astype(self.dtype)
        y = jnp.einsum("gmd,gdk->gmk", y, last, preferred_element_type=jnp.float32)
        return (merge_groups(y) + begun.linear.reshape(-1, self.num_bits)).reshape(bits.shape)


class JointNetwork(nn.Module):
    """A network whose last layer is a `JointHead`.

    Fields:
      trunk: a network with a method `features`, such as `transformer.Transformer`, whose last layer
        is not used.
      num_bits: c.
      groups: G, which divides c.
    """

    trunk: nn.Module
    num_bits: int
    groups: int

    def setup(self):
        trunk = self.trunk
        self.joint = JointHead(self.num_bits, self.groups, trunk.width, trunk.dtype)

    @property
    def width(self) -> int:
        """The width of the trunk."""
        return self.trunk.width

    @property
    def num_layers(self) -> int:
        """The number of layers of the trunk."""
        return self.trunk.num_layers

    def __call__(
        self,
        z_t: Array,
        time: Array,
        label: Array | None = None,
        given: Array | None = None,
        estimate: Array | None = None,
        z_s: Array | None = None,
        time_s: Array | None = None,
    ) -> Array:
        """Applies the network.

        Args:
          z_t, time, label, given, estimate: as for the trunk.
          z_s: (n, h, w, c) in {0, 1}; a group sees the groups before it. None for z_t.
          time_s: (n,), (s - 1) / T; None for `time`.

        Returns:
          (n, h, w, c), float32. Zero at initialisation.
        """
        features = self.trunk.features(z_t, time, label, given, estimate)
        if z_s is None:
            z_s, time_s = z_t, time
        return self.joint(features, time_s, z_s)

    def features(self, *inputs: Array | None) -> Array:
        """Returns the features of the trunk, float32 (n, h, w, d); same arguments."""
        return self.trunk.features(*inputs)

    def logits(self, features: Array, time: Array, bits: Array) -> Array:
        """See `JointHead.__call__`."""
        return self.joint(features, time, bits)

    def begin(self, features: Array, time: Array) -> Begun:
        """See `JointHead.begin`."""
        return self.joint.begin(features, time)

    def add(self, begun: Begun, bits: Array, group: Array) -> Begun:
        """See `JointHead.add`."""
        return self.joint.add(begun, bits, group)

    def group_logits(self, begun: Begun, group: Array) -> Array:
        """See `JointHead.group_logits`."""
        return self.joint.group_logits(begun, group)

    def round_weights(self, params: Any) -> Any:
        """See `transformer.rounded`."""
        inner = params["params"]
        trunk = self.trunk.round_weights({"params": inner["trunk"]})["params"]
        joint = rounded({"joint": inner["joint"]}, self.trunk.dtype)
        return {"params": {"trunk": trunk, **joint}}


def draw_in_groups(
    z_t: Array,
    t: Array,
    s: Array,
    w: Array,
    estimate: Array | None,
    others: Any,
    draw: Callable[[Array, Array, Any], Array],
    *,
    denoiser: Denoiser,
    params: Any,
    condition: Condition | None,
    pair: str,
    temperature: Array,
) -> tuple[Array, Array]:
    """Draws z_s with one call of the trunk, or two with guidance, and G calls of the head.

    Guidance combines two log-odds of each group that are given the same bits.

    Args:
      z_t: bits, (n, h, w, c).
      t, s, w: scalars, times and the guidance.
      estimate: of self-conditioning, or None.
      others: a tree of arrays (n, h, w, c); `draw` gets the entries of its group.
      draw: (flip log-odds, z_t, others) of a group, (n, h, w, k) each -> its z_s.
      denoiser, params, condition, pair, temperature: as in `programs.sample_codes`.

    Returns:
      z_s, and the flip log-odds given only z_t, both (n, h, w, c).
    """
    network, times = denoiser.network, jnp.full(len(z_t), t)

    def features(asked: Condition | None) -> Array:
        return denoiser.features(params, z_t, times, asked, estimate)

    both = features(condition)[None]
    if condition is not None:
        against = functools.partial(features, negative(condition))
        both = jnp.stack([both[0], jax.lax.cond(w == 0, lambda: both[0], against)])
    rows = both.reshape(-1, *both.shape[2:])

    def for_both(bits: Array) -> Array:
        return jnp.concatenate([bits] * len(both))

    def time(u: Array) -> Array:
        return jnp.full(len(rows), (u - 1) / denoiser.num_timesteps)

    def flip_logit(output: Array, z: Array) -> Array:
        output = output.reshape(len(both), *z.shape)
        guided = output[0] if condition is None else (1 + w) * output[0] - w * output[1]
        return denoiser.flip_logit(guided, z, times, pair, temperature)

    def draw_group(begun: Begun, inputs: tuple) -> tuple[Begun, Array]:
        group, z, others = inputs
        output = network.apply(params, begun, group, method="group_logits")
        z_s = draw(flip_logit(output, z), z, others)
        bits = for_both(z_s).reshape(len(begun.hidden), -1)
        return network.apply(params, begun, bits, group, method="add"), z_s

    alone = network.apply(params, rows, time(t), for_both(z_t), method="logits")
    begun = network.apply(params, rows, time(s), method="begin")
    inputs = jax.tree.map(lambda x: split_groups(x, denoiser.groups), (z_t, others))
    _, z_s = jax.lax.scan(draw_group, begun, (jnp.arange(denoiser.groups), *inputs))
    return merge_groups(z_s), flip_logit(alone, z_t)
