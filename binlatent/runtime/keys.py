"""PRNG keys: one for each purpose of a seed, one for each sample of a batch."""

import functools
import zlib

import jax
import numpy as np

from binlatent.runtime.errors import UserError

Array = jax.Array


MAX_SEED = 2**32 - 1


def seed_problem(seed: int) -> str | None:
    """Returns what is wrong with a seed, in words; None of one from 0 to MAX_SEED.

    JAX fails at larger ones, or takes them modulo 2**32.
    """
    return None if 0 <= seed <= MAX_SEED else f"must be between 0 and {MAX_SEED}, not {seed}"


def key_for(seed: int, purpose: str) -> Array:
    """Returns the key of a seed for one purpose, so that no two purposes share randomness."""
    # Under jit it is not known here.
    if isinstance(seed, int) and (problem := seed_problem(seed)) is not None:
        raise UserError(f"The seed {problem}.")
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def sample_keys(key: Array, num: int, first: int = 0) -> Array:
    """Returns a key for each of `num` samples, from the `first` on, whatever batches they are in.

    Takes a typed PRNG key of all; or already those of the samples, (num,), which come back.
    """
    if key.shape == (num,):
        return key
    if key.shape:
        raise UserError(f"Give one key, or one for each of {num} samples, not {key.shape}.")
    return jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(first, first + num))
