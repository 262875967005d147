"""A complete kind of prior: independent bits, with a learned frequency for each class."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from binlatent.priors.prior import Prior, Settings


@dataclasses.dataclass(frozen=True)
class Sharpness(Settings):
    """How to sample: at a temperature below 1, likely bits are still likelier."""

    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class IndependentBits(Prior):
    """p(bits) is a product; `penalty` keeps the logits of rare bits small."""

    Settings = Sharpness
    exact = True
    ranges = {"penalty": (0, 1)}

    penalty: float = 0.0

    def init(self, key, label):
        del key, label
        # The last row is for images without a label.
        return {"logits": jnp.zeros((self.network.num_classes + 1, *self.code_shape))}

    def _logits(self, params, condition, n):
        rows = jnp.full(n, self.network.num_classes)
        if condition is not None:
            given = True if condition.given is None else condition.given
            rows = jnp.where(given, condition.label, rows)
        return params["logits"][rows]

    def loss(self, params, bits, condition, noise):
        logits = self._logits(params, condition, len(bits))
        bce = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, bits))
        loss = bce + self.penalty * jnp.mean(logits**2)
        return loss, {"loss": loss, "bce": bce}

    def sample(self, params, keys, condition, settings, known=None):
        probs = jax.nn.sigmoid(self._logits(params, condition, len(keys)) / settings.temperature)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, self.code_shape))(keys)
        bits = (uniform < probs).astype(jnp.float32)
        return bits if known is None else jnp.where(known.mask == 1, known.bits, bits)

    def code_lengths(self, params, keys, condition, bits, settings, num_draws):
        logits = self._logits(params, condition, len(bits))
        nats = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, bits), axis=(1, 2, 3))
        return nats / jnp.log(2)
