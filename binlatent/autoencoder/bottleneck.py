"""Bottlenecks between encoder and decoder: bits (paper, Section 3, (1)), and those of Table 4.

A bottleneck is a module with these methods and properties:

- `encode(features, uniform)`: the code, and auxiliary outputs for `loss`. `uniform` is noise in
  [0, 1) of the code's shape; without it the code is deterministic.
- `features(code)`: the decoder's input.
- `loss(aux, weights)`: the loss of the code and metrics to log, from the auxiliary outputs and the
  weights of the losses; under pmap.
- `title`, for tables; `code_width`, c; `size`, of a token as in Table 4: codebook size, bits or
  channels; `bits` per token in Table 4.
- `products`: multiplications of `encode` per token.

Dimensions: n batch, h w grid, e embedding width, c bits or channels of a code, s codebook size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.runtime.devices import mean_over_devices

Array = jax.Array


def straight_through(soft: Array, hard: Array) -> Array:
    """Returns `hard` with the gradient of `soft`: stop(z) + y - stop(y) (paper, (1)).

    Args:
      soft: y, with a gradient; for bits sigmoid(logits).
      hard: z, the value, of the same shape; for bits in {0, 1}.
    """
    # y - stop(y) first, which is exactly 0: (z + y) - y can round to other values than 0 and 1.
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def binarize(probs: Array, mode: str, uniform: Array | None = None) -> Array:
    """Maps Bernoulli parameters to a code; differentiable in `probs`.

    Args:
      probs: y, in [0, 1], any shape.
      mode: "sample" draws z ~ B(y), "deterministic" takes y > 0.5, both with the straight-through
        gradient; "soft" returns y.
      uniform: noise in [0, 1) of the shape of `probs`, for "sample".

    Returns:
      The code, of the shape and type of `probs`.
    """
    if mode == "sample":
        return straight_through(probs, (uniform < probs).astype(probs.dtype))
    if mode == "deterministic":
        return straight_through(probs, (probs > 0.5).astype(probs.dtype))
    if mode == "soft":
        return probs
    raise ValueError(f"mode must be 'sample', 'deterministic' or 'soft', got {mode!r}")


def entropy_penalty(probs: Array, mean_probs: Array) -> Array:
    """Returns the mean entropy of a bit given the image, minus that of its batch frequency.

    The minimum, -1, is reached if each bit is certain given the image and is 1 in half of the
    batch. This is the factorised entropy loss of lookup-free quantization (Yu et al., 2024, (5)).

    Args:
      probs: y, (n, h, w, c) in [0, 1].
      mean_probs: (c,), mean of y over all tokens of the batch, on all devices.

    Returns:
      A scalar in [-1, 1], in bits.
    """
    return jnp.mean(bit_entropy(probs)) - jnp.mean(bit_entropy(mean_probs))


def bit_entropy(probs: Array) -> Array:
    """Returns the entropy of each Bernoulli variable, in bits."""
    # Clipped, because the gradient is infinite at 0 and 1.
    p = jnp.clip(probs, 1e-6, 1 - 1e-6)
    return -(p * jnp.log2(p) + (1 - p) * jnp.log2(1 - p))


class Binary(nn.Module):
    """Bits; a token's features are the sum of its bits' learned vectors.

    Fields:
      num_bits: c.
      embedding_width: e.
      deterministic: whether bits are always y > 0.5 and never drawn; y only carries the gradient.
      signed: whether to embed -1 and 1 in place of 0 and 1, with y = (1 + tanh(x)) / 2; the code
        still has 0 and 1.
    """

    num_bits: int
    embedding_width: int
    deterministic: bool = False
    signed: bool = False

    title = "Binary"
    code_width = size = bits = property(lambda self: self.num_bits)
    products = property(lambda self: self.embedding_width * self.num_bits)

    def setup(self):
        self.proj = nn.Dense(self.num_bits)
        shape = (self.num_bits, self.embedding_width)
        self.embed = self.param("embed", nn.initializers.lecun_normal(), shape)

    def encode(self, features: Array, uniform: Array | None) -> tuple[Array, dict[str, Array]]:
        """(n, h, w, e) -> code (n, h, w, c) in {0, 1}; auxiliary: `probs`, y, of its shape."""
        logits = self.proj(features)
        # (1 + tanh(x)) / 2 is sigmoid(2 x).
        probs = jax.nn.sigmoid(2 * logits if self.signed else logits)
        draw = uniform is not None and not self.deterministic
        code = binarize(probs, "sample" if draw else "deterministic", uniform)
        return code, {"probs": probs}

    def features(self, code: Array) -> Array:
        """(n, h, w, c) in [0, 1] -> (n, h, w, e)."""
        return (2 * code - 1 if self.signed else code) @ self.embed

    @nn.nowrap
    def loss(self, aux: dict[str, Array], weights: Any) -> tuple[Array, dict[str, Array]]:
        """Returns the entropy regulariser, and metrics.

        The metric `bit_entropy` is the mean entropy of a bit given the image, in bits: 0 if the
        encoder is certain, 1 if the bits are coin flips.
        """
        probs = aux["probs"]
        metrics = {"bit_entropy": jnp.mean(bit_entropy(probs))}
        if not weights.entropy:
            return jnp.zeros(()), metrics
        mean_probs = mean_over_devices(jnp.mean(probs, axis=(0, 1, 2)))
        penalty = entropy_penalty(probs, mean_probs)
        return weights.entropy * penalty, metrics | {"entropy_penalty": penalty}


class VectorQuantized(nn.Module):
    """The nearest of s learned vectors (van den Oord et al., 2017), of few dimensions.

    In few dimensions, more of the codebook is used (Yu et al., "Vector-quantized image modeling
    with improved VQGAN", 2022). With e dimensions, a few vectors got all tokens.

    Fields:
      codebook_size: s.
      codebook_width: c, the dimension of a vector.
      embedding_width: e.
    """

    codebook_size: int
    codebook_width: int
    embedding_width: int

    title = "VQ"
    code_width = property(lambda self: self.codebook_width)
    size = property(lambda self: self.codebook_size)
    bits = property(lambda self: math.log2(self.codebook_size))
    products = property(
        lambda self: self.codebook_width * (self.embedding_width + self.codebook_size)
    )

    def setup(self):
        self.proj = nn.Dense(self.codebook_width)
        shape = (self.codebook_size, self.codebook_width)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), shape)
        self.embed = nn.Dense(self.embedding_width)

    def encode(self, features: Array, uniform: Array | None) -> tuple[Array, dict[str, Array]]:
        """(n, h, w, e) -> the code: the nearest vectors, (n, h, w, c).

        Auxiliary outputs: `indices`, (n, h, w) int32 in [0, s); `codebook` and `commitment`, mean
        squared distances whose gradients move the vectors to the features, and the features to the
        vectors.
        """
        del uniform  # nothing is drawn
        stop, soft = jax.lax.stop_gradient, self.proj(features)
        # |z - e|^2 less |z|^2, which is the same for all e.
        squares = jnp.sum(jnp.square(self.codebook), axis=1)[None, None, None]
        indices = jnp.argmin(squares - 2 * soft @ self.codebook.T, axis=-1).astype(jnp.int32)
        nearest = self.codebook[indices]
        return straight_through(soft, nearest), {
            "indices": indices,
            "codebook": jnp.mean(jnp.square(nearest - stop(soft))),
            "commitment": jnp.mean(jnp.square(stop(nearest) - soft)),
        }

    def features(self, code: Array) -> Array:
        """(n, h, w, c) -> (n, h, w, e)."""
        return self.embed(code)

    @nn.nowrap
    def loss(self, aux: dict[str, Array], weights: Any) -> tuple[Array, dict[str, Array]]:
        """Returns the weighted codebook and commitment losses."""
        loss = aux["codebook"] + weights.commitment * aux["commitment"]
        return loss, {"commitment": aux["commitment"]}


class Real(nn.Module):
    """Real-valued channels, from a Gaussian with a KL loss to N(0, 1) (Rombach et al., 2022).

    Fields:
      num_channels: c.
      embedding_width: e.
      variational: whether the channels are drawn; otherwise they are the mean, without a KL loss.
    """

    num_channels: int
    embedding_width: int
    variational: bool = True

    title = "Real value"
    code_width = size = property(lambda self: self.num_channels)
    bits = property(lambda self: 32 * self.num_channels)
    products = property(
        lambda self: self.embedding_width * (1 + self.variational) * self.num_channels
    )

    def setup(self):
        self.proj = nn.Dense((1 + self.variational) * self.num_channels)
        self.embed = nn.Dense(self.embedding_width)

    def encode(self, features: Array, uniform: Array | None) -> tuple[Array, dict[str, Array]]:
        """(n, h, w, e) -> the code, (n, h, w, c), real.

        Auxiliary output, if variational: `kl`, a scalar, the divergence of a channel's Gaussian
        from N(0, 1), in nats, the mean over channels.
        """
        mean = self.proj(features)
        if not self.variational:
            return mean, {}
        mean, log_variance = jnp.split(mean, 2, axis=-1)
        log_variance = jnp.clip(log_variance, -30, 20)  # as Rombach et al.
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        if uniform is None:
            return mean, {"kl": kl}
        normal = jax.scipy.special.ndtri(jnp.clip(uniform, 1e-7, 1 - 1e-7))
        return mean + jnp.exp(0.5 * log_variance) * normal, {"kl": kl}

    def features(self, code: Array) -> Array:
        """(n, h, w, c) -> (n, h, w, e)."""
        return self.embed(code)

    @nn.nowrap
    def loss(self, aux: dict[str, Array], weights: Any) -> tuple[Array, dict[str, Array]]:
        """Returns the weighted divergence from N(0, 1), or 0 if not variational."""
        if not self.variational:
            return jnp.zeros(()), {}
        return weights.kl * aux["kl"], {"kl": aux["kl"]}


Bottleneck = Binary | VectorQuantized | Real

# Keys are values of config.autoencoder.bottleneck; fields are keys of config.autoencoder.
BOTTLENECKS = {"binary": Binary, "vq": VectorQuantized, "real": Real}
