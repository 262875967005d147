"""The sampler: exact on the chain, bit for bit on reference trajectories, and every option."""

import functools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from binlatent.convert import released
from binlatent.priors import schedules
from binlatent.priors.bernoulli import process, sampling
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.guidance import guidance_weights, guide, noise_from_keys
from binlatent.priors.transformer import Transformer


def sample(denoise, n, steps, key=0, num_timesteps=64, shape=(1, 1, 6), **options):
    times = options.pop("times", None)
    times = schedules.visited_times(steps, num_timesteps) if times is None else times
    arguments = dict(
        noise=noise_from_keys(jax.random.split(jax.random.key(key), n), shape),
        start_probs=jnp.full((n, *shape), 0.5),
        times=times,
        keep=schedules.keep_at("linear", jnp.asarray(times) / num_timesteps),
        guidance=np.zeros(len(times) - 1, np.float32),
        return_trajectory=True,
    )
    draw = functools.partial(sampling.reverse_process, denoise, **(arguments | options))
    return jax.jit(draw)()


def true_denoise(z_t, t, w):
    return chain.denoise(z_t, 1 - t / 64)


def distance(codes):
    """Total variation between the codes' frequencies and the data."""
    codes = np.asarray(codes).reshape(-1, chain.BITS)
    counts = np.bincount((codes @ 2 ** np.arange(5, -1, -1)).astype(int), minlength=64)
    return 0.5 * np.abs(counts / len(codes) - chain.P_DATA).sum()


# Against the data


@pytest.mark.parametrize("threshold_last", [False, True])
def test_ancestral_sampling_with_the_true_denoiser_gives_the_data_distribution(threshold_last):
    codes, _ = sample(true_denoise, 20_000, 64, threshold_last=threshold_last)
    # Within four standard errors.
    np.testing.assert_allclose(np.mean(codes, axis=(0, 1, 2)), chain.MARGINALS, atol=0.015)
    assert distance(codes) < 0.06


def test_both_pairs_draw_the_same_codes_from_the_same_network():
    def without_evidence(z_t, t, w):
        return true_denoise(z_t, t, w) - process.flip_evidence(1 - t / 64)

    mixture, _ = sample(true_denoise, 1_000, 16)
    plugin, _ = sample(without_evidence, 1_000, 16, pair="balanced_plugin")
    assert np.mean(mixture != plugin) < 1e-3  # up to rounding


def test_corrector_makes_up_for_too_few_steps():
    # Few long steps; there is no corrector after the last.
    draw = functools.partial(
        sample, true_denoise, 20_000, 0, times=np.array([64, 48, 32, 16, 8, 2, 0], np.float32)
    )
    plain = distance(draw()[0])
    corrected = distance(draw(corrector_steps=4, corrector_size=0.2)[0])
    assert corrected < 0.6 * plain, (corrected, plain)


def test_any_grid_of_times_will_do():
    uneven = np.array([64, 50.5, 37.25, 25, 17, 11.5, 7, 4, 2, 1, 0.5, 0.1, 0], np.float32)
    codes, _ = sample(true_denoise, 20_000, 0, times=uneven)
    assert distance(codes) < 0.15
    np.testing.assert_allclose(np.mean(codes, axis=(0, 1, 2)), chain.MARGINALS, atol=0.03)


# Against the reference trajectories


@pytest.mark.parametrize("name", ["full64", "skip16", "inpaint16"])
def test_reference_trajectories_are_reproduced_bit_for_bit(name):
    golden = np.load(f"tests/data/trajectory_{name}.npz")
    uniforms, steps = jnp.asarray(golden["uniforms"]), int(golden["sample_steps"])
    times = np.arange(64, -1, -1)
    if steps < 64:
        times = np.append((np.linspace(0, 1, steps) * 63).astype(int)[::-1] + 1, 0)
    n = uniforms.shape[1]
    shape = (8, 8, 16)
    network = Transformer(width=64, num_layers=3, num_heads=4)
    denoiser = BernoulliPrior(shape, network, 64, pair="balanced_plugin", evidence=False)
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones(1))
    params = reference.variables("prior_uncond", like["params"], released.prior_tensors)

    @jax.default_matmul_precision("highest")
    def denoise(z_t, t, w):
        t = jnp.full(n, t)
        output = denoiser.output({"params": params}, z_t, t)
        return denoiser.flip_logit(output, z_t, t, "balanced_plugin", float(golden["temp"]))

    def as_code(x):
        x = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (n, 64, 16))
        return x.reshape(n, *shape)

    known = None
    if "mask" in golden:
        known = sampling.Known(as_code(golden["latent"]), as_code(golden["mask"]))
    final, _ = sample(
        denoise,
        n,
        steps,
        times=times.astype(np.float32),
        shape=shape,
        noise=lambda i: uniforms[i].reshape(n, *shape),
        pair="balanced_plugin",
        threshold_last=True,
        known=known,
    )
    # Identical, except that with other rounding a draw with |u - p| < 1e-5 could differ.
    np.testing.assert_array_equal(final, golden["final"].reshape(n, *shape))


# Noise and results


def test_a_sample_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 8)
    whole, _ = sample(true_denoise, 8, 8, noise=noise_from_keys(keys, (1, 1, 6)))
    parts = [
        sample(true_denoise, 4, 8, noise=noise_from_keys(some, (1, 1, 6)))[0]
        for some in (keys[:4], keys[4:])
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_every_draw_has_its_own_noise():
    seen = []

    def record(i):
        seen.append(i)
        return jnp.zeros((2, 1, 1, 6))

    with jax.disable_jit():
        sampling.reverse_process(
            true_denoise,
            record,
            jnp.full((2, 1, 1, 6), 0.5),
            times=jnp.array([64.0, 32, 16, 0]),
            keep=jnp.array([0, 0.5, 0.75, 1]),
            guidance=jnp.zeros(3),
            corrector_steps=2,
            corrector_size=0.1,
        )
    assert [int(i) for i in seen] == [0, 1, 2, 3, 4, 5, 6, 7]  # no corrector after the last
    uniforms = noise_from_keys(jax.random.split(jax.random.key(0), 2), (5,))
    assert len(np.unique([uniforms(i) for i in range(4)])) == 4 * 2 * 5


def test_trajectory_starts_uniform_ends_in_the_codes_and_has_the_predictions():
    codes, passed = sample(true_denoise, 5_000, 4)
    assert passed.z_t.shape == (5, 5_000, 1, 1, 6) and passed.p_0.shape == (4, 5_000, 1, 1, 6)
    np.testing.assert_allclose(np.mean(passed.z_t[0]), 0.5, atol=0.02)
    np.testing.assert_array_equal(passed.z_t[-1], codes.astype(bool))
    for i, t in enumerate((64, 48, 32, 16)):
        z_t = np.asarray(passed.z_t[i], np.float32)
        flip = jax.nn.sigmoid(chain.denoise(jnp.asarray(z_t), 1 - t / 64))
        np.testing.assert_allclose(passed.p_0[i], np.abs(z_t - flip), atol=1e-5)
    nothing = sample(true_denoise, 10, 4, return_trajectory=False)[1]
    assert nothing is None


def test_one_step_draws_each_bit_from_the_prediction():
    # A denoiser that is certain of the code of ones.
    codes, passed = sample(lambda z_t, t, w: 20 * (1 - 2 * z_t), 8, 1)
    assert np.all(np.asarray(codes) == 1)
    assert passed.z_t.shape == (2, 8, 1, 1, 6)


def test_threshold_takes_the_likelier_bit_at_the_last_step():
    codes, passed = sample(lambda z_t, t, w: jnp.full_like(z_t, -0.1), 100, 1, threshold_last=True)
    np.testing.assert_array_equal(codes, passed.z_t[0])  # a flip is less likely


def test_start_probs_are_where_the_bits_come_from():
    start = jnp.tile(jnp.array([0.0, 0.1, 0.5, 0.9, 1.0, 0.3])[None, None, None], (5_000, 1, 1, 1))
    _, passed = sample(true_denoise, 5_000, 1, start_probs=start, times=np.array([32.0, 0]))
    np.testing.assert_allclose(np.mean(passed.z_t[0], axis=(0, 1, 2)), start[0, 0, 0], atol=0.03)


# Known bits

HALF = np.array([1.0, 1, 1, 0, 0, 0])


def known_bits(n, z_0, noised=False):
    tile = functools.partial(jnp.broadcast_to, shape=(n, 1, 1, 6))
    return sampling.Known(tile(jnp.asarray(z_0)), tile(jnp.asarray(HALF)), noised)


def test_kept_bits_never_change():
    known = known_bits(200, np.array([1.0, 0, 1, 0, 0, 0]))
    codes, passed = sample(true_denoise, 200, 8, known=known, corrector_steps=1, corrector_size=0.5)
    np.testing.assert_array_equal(
        np.asarray(passed.z_t)[..., :3], np.broadcast_to([True, False, True], (9, 200, 1, 1, 3))
    )
    assert np.mean(passed.z_t[0][..., 3:] != codes[..., 3:].astype(bool)) > 0.05


def test_noised_bits_are_as_noisy_as_the_others_and_right_at_the_end():
    known = known_bits(20_000, np.array([1.0, 0, 1, 0, 0, 0]), noised=True)
    codes, passed = sample(true_denoise, 20_000, 4, known=known)
    right = np.mean(np.asarray(passed.z_t)[..., :3] == [True, False, True], axis=(1, 2, 3))
    keep = np.array([0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(right, (1 + np.tile(keep[:, None], 3)) / 2, atol=0.015)
    np.testing.assert_array_equal(
        np.asarray(codes)[..., :3], np.ones((20_000, 1, 1, 1)) * [1, 0, 1]
    )


@pytest.mark.parametrize(
    "noised, correctors, share",
    [(False, 0, 0.65), (True, 0, 0.85), (False, 4, 0.3), (True, 4, 0.4)],
)
def test_completions_follow_the_known_bits(optimised, noised, correctors, share):
    match = (chain.STATES[:, :3] == [1, 0, 1]).all(axis=1)
    conditional = (chain.P_DATA[match] @ chain.STATES[match]) / chain.P_DATA[match].sum()
    n = 10_000
    known = known_bits(n, np.array([1.0, 0, 1, 0, 0, 0]), noised)
    codes, _ = sample(
        true_denoise, n, 64, known=known, corrector_steps=correctors, corrector_size=0.1
    )
    error = np.abs(np.mean(codes, axis=(0, 1, 2)) - conditional)[3:]
    # Neither is exact: kept bits are treated as noisy, noised bits lose information. Correctors fix
    # most of it. Relative to the error of completions that ignore the known bits:
    far = np.abs(chain.MARGINALS - conditional)[3:]
    assert np.all(error < share * far), error / far


# Guidance


def test_a_step_without_guidance_costs_one_network_call():
    calls = {"conditional": 0, "unconditional": 0}

    def counted(name):
        def count():
            calls[name] += 1

        def network(z_t, t):
            jax.debug.callback(count)
            return jnp.zeros_like(z_t)

        return network

    guided = guide(counted("conditional"), counted("unconditional"))
    guidance = guidance_weights(2.0, np.arange(64, -1, -8) / 64, interval=(0.2, 0.6))
    jax.block_until_ready(sample(guided, 2, 8, guidance=guidance))
    jax.effects_barrier()
    # Of the times 64, 56, ..., 8 the interval holds 32, 24 and 16.
    assert calls == {"conditional": 8, "unconditional": 3}
