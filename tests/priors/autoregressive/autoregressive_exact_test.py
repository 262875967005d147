"""Exactness, with true conditionals of the chain in place of a network; sums over all codes."""

import functools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors.autoregressive.heads import make_head
from binlatent.priors.autoregressive.prior import AutoregressivePrior, AutoregressiveSettings
from binlatent.priors.conditions import Condition
from binlatent.priors.prior import Known
from binlatent.runtime import devices
from binlatent.runtime.errors import UserError

PLACES = 2 ** np.arange(chain.BITS - 1, -1, -1)  # of bits in the number of a state
N = 20_000
CLASSES = Condition(jnp.arange(99) % 3)


def probability(start, state, span, values):
    """P(the next `span` bits | those of a state before `start`), (values,), lowest bit first."""
    before = np.all(chain.STATES[:, :start] == state[:start], axis=1)
    codes = chain.STATES[:, start : start + span] @ 2 ** np.arange(span)
    p = np.bincount(codes[before].astype(int), chain.P_DATA[before], minlength=values)
    return p / p.sum()


class TrueNetwork:
    """A stand-in for a network, with the true logits of the chain times `scale`.

    The head's input is the known part of the code, and the place of the token.
    Without a label, bits are fair.
    """

    def __init__(self, code_shape, head):
        self.code_shape, self.head = code_shape, head
        c = code_shape[-1]
        starts = [
            i * c + j * head.group_size
            for i in range(chain.BITS // c)
            for j in range(head.num_groups)
        ]
        size = c if head.num_groups == 1 else head.group_size
        table = [
            [self._logits(start, state, c, size) for state in chain.STATES] for start in starts
        ]
        self.starts, self.table = np.array(starts), jnp.asarray(np.array(table), jnp.float32)

    def _logits(self, start, state, c, size):
        span = min(size, c - start % c)
        p = probability(start, state, span, 2**self.head.group_size)
        if type(self.head).__name__ == "JointHead":
            with np.errstate(divide="ignore"):
                return np.maximum(np.log(p), -50)
        ones = np.array([p[(np.arange(len(p)) >> i) % 2 == 1].sum() for i in range(c)])
        return np.log(ones) - np.log1p(-ones)

    def _at(self, codes, step):
        """Logits (..., K) of groups by their number in the code, codes (..., 6)."""
        known = jnp.arange(chain.BITS)[None] < self.starts[:, None]
        codes = jnp.where(known[step], codes, 0)
        return self.table[step, (codes @ PLACES).astype(int)]

    def apply(self, params, *args, method=None, mutable=None):
        (_, _, c), groups = self.code_shape, self.head.num_groups
        given = args[-1]
        if method is None:
            bits = args[0].reshape(-1, 1, chain.BITS)
            steps = jnp.arange(len(self.starts))
            codes = jnp.broadcast_to(bits, (len(bits), len(steps), chain.BITS))
            logits = self._at(codes, jnp.broadcast_to(steps, codes.shape[:2]))
            return logits.reshape(len(bits), -1, groups, self.table.shape[-1])
        if method == "advance":
            before, place, _, given = args
            codes = params["cache"]["codes"]
            written = jax.lax.dynamic_update_slice(
                jnp.pad(codes, ((0, 0), (c, 0))), before, (0, place * c)
            )[:, c:]
            trusted = jnp.ones(len(codes)) if given is None else given.astype(float)
            places = jnp.full(len(codes), place)
            return (written, places, trusted), {"cache": {"codes": written}}
        (codes, places, trusted), token, group = args
        starts = places * c
        shift = jax.vmap(lambda code, token, at: jax.lax.dynamic_update_slice(code, token, (at,)))
        logits = self._at(shift(codes, token, starts), places * groups + group)
        return logits * trusted[:, None]

    def empty_cache(self, params, n, label, given):
        return {"codes": jnp.zeros((n, chain.BITS))}

    def round_weights(self, params):
        return params


@functools.cache
def true_prior(shape, head, group=1):
    network = TrueNetwork(shape, make_head(head, shape[-1], group, jnp.float32))
    return AutoregressivePrior(shape, network, head, group)


# Tokens of 1, 2 and 3 bits, the last with a smaller group; one token in groups of 4 and 2.
EXACT = [
    ((2, 3, 1), "independent", 1),
    ((3, 2, 1), "joint", 8),
    ((1, 3, 2), "joint", 2),
    ((2, 1, 3), "joint", 2),
    ((1, 1, 6), "joint", 4),
    ((1, 1, 6), "joint", 1),
]


def states(shape):
    return jnp.asarray(chain.STATES, jnp.float32).reshape(-1, *shape)


def lengths(prior, codes, params=None):
    return np.asarray(prior.code_lengths(params, None, None, codes, None, 1), np.float64)


def sample(prior, settings=None, known=None, condition=None, params=None, n=N):
    keys = jax.random.split(jax.random.key(0), n)
    settings = settings or AutoregressiveSettings()
    return np.asarray(prior.sample(params or {}, keys, condition, settings, known))


def distance(codes, p):
    """The deviation of the total variation from its mean under p, in standard errors.

    It is half of the sum of 64 absolute deviations, each nearly normal.
    """
    counts = np.bincount((codes.reshape(-1, chain.BITS) @ PLACES).astype(int), minlength=64)
    found = 0.5 * np.abs(counts / len(codes) - p).sum()
    deviations = np.sqrt(p * (1 - p) / len(codes))
    mean = 0.5 * np.sqrt(2 / np.pi) * deviations.sum()
    error = 0.5 * np.sqrt((1 - 2 / np.pi) * np.sum(deviations**2))
    return (found - mean) / error


@pytest.mark.parametrize("shape, head, group", EXACT)
def test_with_the_true_conditionals_the_code_length_is_the_entropy(shape, head, group):
    prior = true_prior(shape, head, group)
    found = lengths(prior, states(shape))
    np.testing.assert_allclose(found, -np.log2(chain.P_DATA), atol=5e-6)
    np.testing.assert_allclose(chain.P_DATA @ found, chain.ENTROPY_BITS, atol=1e-6)


@pytest.mark.parametrize("shape, head, group", EXACT)
def test_with_the_true_conditionals_samples_follow_the_data(shape, head, group):
    assert abs(distance(sample(true_prior(shape, head, group)), chain.P_DATA)) < 4


@pytest.mark.parametrize("shape", [(1, 3, 2), (1, 2, 3), (1, 1, 6)])
def test_independent_bits_of_a_token_lose_what_they_say_of_one_another(shape):
    # Sum over tokens of H(bits given the tokens before), bit by bit.
    c = shape[-1]
    p = np.ones(64)
    for start in range(0, chain.BITS, c):
        for i in range(start, start + c):
            conditional = [probability(start, s, i + 1 - start, 64) for s in chain.STATES]
            one = np.array([q[np.arange(64) >> (i - start) & 1 == 1].sum() for q in conditional])
            p = p * np.where(chain.STATES[:, i] == 1, one, 1 - one)
    assert p.sum() == pytest.approx(1)
    prior = true_prior(shape, "independent")
    found = chain.P_DATA @ lengths(prior, states(shape))
    np.testing.assert_allclose(found, -chain.P_DATA @ np.log2(p), atol=1e-6)
    assert found > chain.ENTROPY_BITS + 0.1
    codes = sample(prior)
    assert abs(distance(codes, p)) < 4 < distance(codes, chain.P_DATA)


def test_the_temperature_divides_logits_of_bits_and_of_values_of_groups():
    # With one token in one group it acts on the whole distribution; with bits, on each conditional.
    tau = 0.5
    joint = sample(true_prior((1, 1, 6), "joint", 6), AutoregressiveSettings(temperature=tau))
    p = chain.P_DATA ** (1 / tau)
    assert abs(distance(joint, p / p.sum())) < 4
    bits = sample(true_prior((2, 3, 1), "independent"), AutoregressiveSettings(temperature=tau))
    p = np.ones(64)
    for i in range(chain.BITS):
        one = np.array([probability(i, s, 1, 2)[1] for s in chain.STATES]) ** (1 / tau)
        zero = np.array([probability(i, s, 1, 2)[0] for s in chain.STATES]) ** (1 / tau)
        p = p * np.where(chain.STATES[:, i] == 1, one, zero) / (zero + one)
    assert abs(distance(bits, p)) < 4


@pytest.mark.parametrize(
    "shape, head, group", [((2, 3, 1), "independent", 1), ((1, 3, 2), "joint", 2)]
)
def test_guidance_adds_logits_of_both_networks(shape, head, group):
    # Unconditional logits are 0, so guided by w = 1 they are doubled: as at temperature 1/2.
    prior = true_prior(shape, head, group)
    condition = Condition(jnp.zeros(2_000, jnp.int32))
    guided = AutoregressiveSettings(guidance=1.0)
    sharp = AutoregressiveSettings(temperature=0.5)
    found = sample(prior, guided, condition=condition, n=2_000)
    np.testing.assert_array_equal(found, sample(prior, sharp, n=2_000))
    unguided = sample(prior, condition=condition, n=2_000)
    np.testing.assert_array_equal(unguided, sample(prior, n=2_000))
    assert np.any(found != unguided)


# Completion


@pytest.mark.parametrize(
    "shape, head, group", [((2, 3, 1), "independent", 1), ((1, 3, 2), "joint", 2)]
)
def test_a_completion_follows_the_data_given_the_prefix(shape, head, group):
    prior, prefix = true_prior(shape, head, group), np.array([1, 0])
    bits, mask = np.zeros((N, chain.BITS)), np.zeros((N, chain.BITS))
    bits[:, :2], mask[:, :2] = prefix, 1
    codes = sample(prior, known=Known(*(jnp.asarray(x.reshape(N, *shape)) for x in (bits, mask))))
    p = np.where(np.all(chain.STATES[:, :2] == prefix, axis=1), chain.P_DATA, 0)
    assert abs(distance(codes, p / p.sum())) < 4


def test_a_completion_of_a_samples_own_prefix_is_the_sample():
    prior, n = true_prior((1, 3, 2), "joint", 2), 64
    codes = sample(prior, n=n)
    # All lengths of a prefix, one per sample.
    mask = np.arange(3)[None] < np.arange(n)[:, None] % 4
    mask = np.repeat(mask, 2, axis=1).reshape(codes.shape)
    known = Known(jnp.asarray(np.where(mask, codes, 1 - codes)), jnp.asarray(mask))
    np.testing.assert_array_equal(sample(prior, known=known, n=n), codes)


@pytest.mark.parametrize("tokens", [[0, 1, 1], [1, 0, 1], [0, 0, 1]])
def test_a_mask_that_is_no_prefix_is_refused(tokens):
    prior = true_prior((1, 3, 2), "joint", 2)
    mask = np.repeat(np.array(tokens, np.float32), 2).reshape(1, 1, 3, 2)
    known = Known(jnp.zeros_like(mask), jnp.asarray(mask))
    with pytest.raises(UserError, match="first tokens in raster order are kept: use a mask"):
        sample(prior, known=known, n=1)
    mask[:] = [1, 0]  # a half of each token
    with pytest.raises(UserError, match="first tokens in raster order"):
        prior.check_known(mask)


# Any network gives a distribution


def random_prior(shape, head, group, condition="none"):
    """A prior of small random weights, and these."""
    network = AutoregressivePrior.make_network(
        shape,
        {"head": head, "group": group},
        width=16,
        num_layers=1,
        num_heads=2,
        condition=condition,
        num_classes=3,
        text_width=6,
        dtype=jnp.float32,
    )
    prior = AutoregressivePrior(shape, network, head, group)
    label = {"none": None, "class": jax.ShapeDtypeStruct((1,), jnp.int32)}[condition]
    return prior, small_random(jax.eval_shape(prior.init, jax.random.key(0), label))


def small_random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def all_codes(shape):
    size = int(np.prod(shape))
    codes = np.arange(2**size)[:, None] >> np.arange(size)[None] & 1
    return jnp.asarray(codes.reshape(-1, *shape), jnp.float32)


@pytest.mark.parametrize(
    "shape, head, group",
    [
        ((2, 2, 3), "independent", 8),
        ((2, 2, 3), "joint", 8),
        ((1, 2, 5), "joint", 3),
        ((1, 1, 9), "joint", 4),
    ],
)
def test_the_probabilities_of_all_codes_sum_to_one(shape, head, group):
    prior, params = random_prior(shape, head, group)
    codes = all_codes(shape)
    p = 2.0 ** -lengths(prior, codes, params)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    assert p.max() > 10 / len(codes)  # far from uniform


@pytest.mark.parametrize("head, group", [("independent", 8), ("joint", 2)])
def test_samples_are_as_long_as_their_entropy(head, group):
    prior, params = random_prior((2, 2, 3), head, group)
    p = 2.0 ** -lengths(prior, all_codes((2, 2, 3)), params)
    drawn = sample(prior, params=params, n=4_000).reshape(4_000, -1)
    numbers = (drawn @ 2 ** np.arange(drawn.shape[1])).astype(int)
    found = -np.log2(p)[numbers]
    entropy = -np.sum(p * np.log2(p))
    spread = np.sqrt(np.sum(p * np.log2(p) ** 2) - entropy**2)
    assert abs(found.mean() - entropy) < 4 * spread / np.sqrt(4_000)


def test_a_guidance_of_almost_0_is_as_none():
    # Guidance of 0 is another program, without the unconditional network.
    prior, params = random_prior((2, 2, 3), "joint", 2, "class")
    codes = [
        sample(prior, AutoregressiveSettings(guidance=w), condition=CLASSES, params=params, n=99)
        for w in (0.0, 1e-30, 2.0)
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert np.any(codes[0] != codes[2])


def test_a_sample_is_its_keys_alone_and_devices_draw_without_a_word_to_one_another():
    prior, params = random_prior((2, 2, 3), "joint", 2, "class")
    settings = AutoregressiveSettings(guidance=0.5, temperature=0.9)
    keys, label = jax.random.split(jax.random.key(3), 8), jnp.arange(8) % 3

    @jax.jit
    def draw(params, keys, label):
        return prior.sample(params, keys, Condition(label), settings)

    arguments = devices.replicate(params), *devices.spread([keys, label])
    program = draw.lower(*arguments).compile()
    together = program(*arguments)
    assert len(together.devices()) == 4
    assert len(np.unique(np.asarray(together).reshape(8, -1), axis=0)) == 8
    for i in (0, 5):
        alone = draw(params, keys[i : i + 1], label[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in program.as_text()


def test_the_loss_is_the_code_length_in_nats_per_bit():
    prior, params = random_prior((2, 2, 3), "joint", 2)
    codes = all_codes((2, 2, 3))[::7]
    expected = lengths(prior, codes, params) * np.log(2) / 12
    loss, metrics = jax.jit(prior.loss)(params, codes, None, ())
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert metrics == {"loss": loss}
    found = jax.jit(prior.image_metrics)(params, codes, None, ())["bce"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
