"""Compiled functions of a trained autoencoder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.autoencoder.modules import Autoencoder

Array = jax.Array


@functools.partial(jax.jit, static_argnames="model")
def encode_probs(params: Any, images: Array, *, model: Autoencoder) -> Array:
    """Returns the probability of each bit of the images' codes, (n, h, w, c) in [0, 1]."""
    return model.apply(params, images, method="probs")


@functools.partial(jax.jit, static_argnames="model")
def encode_codes(
    params: Any, images: Array, *, model: Autoencoder
) -> tuple[Array, dict[str, Array]]:
    """Returns the images' deterministic codes, and the auxiliary outputs of each image."""
    code, aux = model.apply(params, images, method="encode")
    return code, {name: value for name, value in aux.items() if value.ndim}


@functools.partial(jax.jit, static_argnames="model")
def decode_codes(params: Any, codes: Array, *, model: Autoencoder) -> Array:
    """Returns the images of codes, clipped to [-1, 1]."""
    return jnp.clip(model.apply(params, codes, method="decode"), -1, 1)
