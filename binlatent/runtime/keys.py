"""PRNG keys: one per purpose of a seed, one per sample of a batch."""

import functools
import numbers
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.runtime.errors import UserError

Array = jax.Array
Key = Array | int  # a typed PRNG key, or a seed


MAX_SEED = 2**32 - 1


def seed_problem(seed: int) -> str | None:
    """Returns the end of an error message for a seed outside 0 to MAX_SEED, or None.

    JAX raises an error for larger seeds, or takes them modulo 2**32.
    """
    return None if 0 <= seed <= MAX_SEED else f"must be between 0 and {MAX_SEED}, not {seed}"


def key_for(seed: int, purpose: str) -> Array:
    """Returns the key of a seed for one purpose, so that no two purposes share randomness."""
    # Under jit the seed's value is not known.
    if isinstance(seed, int) and (problem := seed_problem(seed)) is not None:
        raise UserError(f"The seed {problem}.")
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def as_key(key: Key) -> Array:
    """Returns a typed PRNG key, or several; an integer is the seed of one."""
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        if (problem := seed_problem(key)) is not None:
            raise UserError(f"The seed {problem}.")
        return jax.random.key(int(key))
    if not isinstance(key, Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError(
            "A key must be a seed, such as 0, or a typed key, such as jax.random.key(0)."
        )
    return key


def sample_keys(key: Key, num: int, first: int = 0) -> Array:
    """Returns one key per sample, (num,), for the samples `first` to `first + num - 1`.

    A sample's key does not depend on the batch that it is drawn in. An array of `num` keys is
    returned unchanged.
    """
    key = as_key(key)
    if key.shape == (num,):
        return key
    if key.shape:
        raise UserError(f"Give one key or {num} keys, not an array of keys of shape {key.shape}.")
    return jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(first, first + num))
