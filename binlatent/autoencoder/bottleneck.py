"""What lies between encoder and decoder: bits (paper, Section 3, (1)), or what Table 4 compares.

Each bottleneck is a module of two methods, `encode`: features to a code and what training needs to
know of it, and `features`: a code to the features that the decoder takes. The noise of `encode`
is given, uniform in [0, 1) of the code's shape; without it the code is deterministic.

Beside these, each has `loss`, the loss of the code itself and what to log about it, from what
`encode` told and the weights of the losses (under pmap); for tables a `title`, the `code_width` c,
the `size` of a token as Table 4 writes it (codebook size, bits or channels) and the `bits` that a
token counts for there; and the `products` that `encode` takes for a token.

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
      soft: y, what can be differentiated; for bits sigmoid(logits).
      hard: z, what is passed on, of the same shape; for bits in {0, 1}.
    """
    # y - stop(y) first: it is exactly 0, whereas (z + y) - y can round away from {0, 1}.
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def binarize(probs: Array, mode: str, uniform: Array | None = None) -> Array:
    """Maps Bernoulli parameters to a code, differentiable with respect to them.

    Args:
      probs: y, in [0, 1], any shape.
      mode: "sample" draws z ~ B(y), "deterministic" takes y > 0.5, both with the straight-through
        gradient; "soft" returns y itself.
      uniform: noise in [0, 1) of the shape of `probs`, for "sample".

    Returns:
      The code, the shape and type of `probs`.
    """
    if mode == "sample":
        return straight_through(probs, (uniform < probs).astype(probs.dtype))
    if mode == "deterministic":
        return straight_through(probs, (probs > 0.5).astype(probs.dtype))
    if mode == "soft":
        return probs
    raise ValueError(f"mode must be 'sample', 'deterministic' or 'soft', got {mode!r}")


def entropy_penalty(probs: Array, mean_probs: Array) -> Array:
    """Mean entropy of a bit given its image, less that of a bit's frequency over the batch.

    Least, -1, where every bit is sure of each image and on in half of them. It is the factorised
    form of the entropy loss of lookup-free quantization (Yu et al., 2024, (5)).

    Args:
      probs: y, (n, h, w, c) in [0, 1].
      mean_probs: (c,), mean of y over all tokens of the batch, on all devices.

    Returns:
      A scalar in [-1, 1], in bits.
    """
    return jnp.mean(bit_entropy(probs)) - jnp.mean(bit_entropy(mean_probs))


def bit_entropy(probs: Array) -> Array:
    """Returns the entropy of each Bernoulli variable, in bits."""
    # Held off 0 and 1, where its gradient is infinite.
    p = jnp.clip(probs, 1e-6, 1 - 1e-6)
    return -(p * jnp.log2(p) + (1 - p) * jnp.log2(1 - p))


class Binary(nn.Module):
    """Bits, each embedded by a learned vector; their sum is the token's features.

    Fields:
      num_bits: c.
      embedding_width: e.
      deterministic: never draw the bits, always take y > 0.5; then y only carries the gradient.
      signed: embed -1 and 1 in place of 0 and 1, with y = (1 + tanh(x)) / 2; the code keeps its
        0 and 1.
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
        """(n, h, w, e) -> the code, (n, h, w, c) in {0, 1}; `probs`, y, of the same shape."""
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
        """Returns the entropy regulariser; `bit_entropy` is that of a bit given its image.

        It is a mean, in bits: 0 when the encoder is sure, 1 when its codes are coin flips.
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

    In few dimensions more of the vectors come to be used (Yu et al., "Vector-quantized image
    modeling with improved VQGAN", 2022); in all e, a few took every token.

    Fields:
      codebook_size: s.
      codebook_width: c, of a vector.
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
        """(n, h, w, e) -> the code, the nearest vectors, (n, h, w, c).

        Told of it: `indices`, (n, h, w) int32 in [0, s); `codebook` and `commitment`, scalars, the
        mean squared distances that move the vectors to the features and the features to the
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
        """Returns the distances that move vectors and features to each other."""
        loss = aux["codebook"] + weights.commitment * aux["commitment"]
        return loss, {"commitment": aux["commitment"]}


class Real(nn.Module):
    """Real-valued channels, drawn from a Gaussian that is held near N(0, 1) (Rombach et al., 2022).

    Fields:
      num_channels: c.
      embedding_width: e.
      variational: whether the channels are drawn; otherwise they are the mean.
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

        Told of it, if variational: `kl`, a scalar, the divergence of a channel's Gaussian from
        N(0, 1), in nats, mean over channels.
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
        """Returns the divergence from N(0, 1), 0 where nothing is drawn."""
        if not self.variational:
            return jnp.zeros(()), {}
        return weights.kl * aux["kl"], {"kl": aux["kl"]}


Bottleneck = Binary | VectorQuantized | Real

# By the value of config.autoencoder.bottleneck; their other keys there are the fields' names.
BOTTLENECKS = {"binary": Binary, "vq": VectorQuantized, "real": Real}
