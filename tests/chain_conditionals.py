"""Conditionals of the chain: a stand-in for a network, and samplers by brute force.

Some bits of a code are visible, the others hidden. Sums are in float64, except in the network,
which priors call in JAX.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
from chain import BITS, P_DATA, STATES


@functools.cache
def given(visible, code):
    """P(bit = 1 | the visible bits of a code), (6,), both tuples of 6."""
    visible = np.array(visible, bool)
    match = (STATES[:, visible] == np.array(code)[visible]).all(axis=1)
    return (P_DATA[match] @ STATES[match]) / P_DATA[match].sum()


@dataclasses.dataclass(frozen=True)
class TrueNetwork:
    """Takes codes (n, 1, 1, 6) or (n, 1, 3, 2), 1/2 where hidden; returns visible bits as given."""

    def apply(self, params, z, time, label=None, given=None):
        codes = z.reshape(-1, BITS)
        states = jnp.asarray(STATES, jnp.float32)
        match = jnp.all(jnp.abs(codes[:, None] - states[None]) < 0.75, axis=-1)
        joint = match * jnp.asarray(P_DATA, jnp.float32)[None]
        one, zero = joint @ states, joint @ (1 - states)
        logit = jnp.log(jnp.maximum(one, 1e-30)) - jnp.log(jnp.maximum(zero, 1e-30))
        return logit.reshape(z.shape)

    def round_weights(self, params):
        return params


def sampled(counts, g, score=None, known=(False,) * BITS, code=(0,) * BITS):
    """(64,), the distribution of a sampler with the true conditionals.

    Args:
      counts: units hidden before each call, and 0.
      g: bits of a unit.
      score: None for a random order; else (p, drawn bits, which of them are hidden) of a unit ->
        how sure it is, and the surest are kept.
      known, code: which bits are known, by unit, and their values.
    """
    hidden_units = tuple(i for i in range(BITS // g) if not all(known[i * g : (i + 1) * g]))
    states = {(known, tuple(np.where(known, code, 0).tolist()), hidden_units): 1.0}
    for count, after in itertools.pairwise(counts):
        states_after = {}
        for (visible, values, units), p in states.items():
            kept = int(np.ceil(len(units) * (count - after) / count))
            for new, probs, p_drawn in _draws(visible, values):
                sets = list(itertools.combinations(units, kept))
                if score is not None:
                    sure = [_score(score, unit, g, visible, probs, new) for unit in units]
                    sets = [[units[i] for i in np.argsort(sure, stable=True)[len(units) - kept :]]]
                for revealed in sets:
                    seen = np.array(visible)
                    for unit in revealed:
                        seen[unit * g : (unit + 1) * g] = True
                    key = (
                        tuple(seen.tolist()),
                        tuple(np.where(seen, new, 0).tolist()),
                        tuple(unit for unit in units if unit not in revealed),
                    )
                    states_after[key] = states_after.get(key, 0) + p * p_drawn / len(sets)
        states = states_after
    result = np.zeros(len(STATES))
    for (_, values, _), p in states.items():
        result[int(np.array(values) @ 2 ** np.arange(BITS - 1, -1, -1))] += p
    return result


def _draws(visible, values):
    """Yields all codes with these visible bits, the bits' probabilities, and that of the code."""
    probs, hidden = given(visible, values), ~np.array(visible)
    for drawn in itertools.product((0, 1), repeat=int(hidden.sum())):
        new = np.array(values)
        new[hidden] = drawn
        yield new, probs, np.where(new == 1, probs, 1 - probs)[hidden].prod()


def _score(score, unit, g, visible, probs, new):
    bits = [i for i in range(unit * g, (unit + 1) * g) if not visible[i]]
    return score(probs[bits], new[bits])


def distance(p, q):
    """Total variation."""
    return 0.5 * np.abs(np.asarray(p) - q).sum()


def check_drawn(codes, p):
    """Asserts that codes (n, ...) follow p, (64,), by their total variation, to four deviations."""
    codes = np.asarray(codes).reshape(-1, BITS)
    n = len(codes)
    counts = np.bincount((codes @ 2 ** np.arange(BITS - 1, -1, -1)).astype(int), minlength=64)
    p = p / p.sum()
    chance = [distance(x / n, p) for x in np.random.default_rng(0).multinomial(n, p, 200)]
    assert distance(counts / n, p) < np.mean(chance) + 4 * np.std(chance)
