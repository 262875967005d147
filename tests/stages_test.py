"""The pmapped steps: one update whatever the number of devices, donation, EMA, keys, learning."""

import dataclasses
import functools
import re

import chain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from binlatent import build, programs
from binlatent.autoencoder import step as autoencoder_stage
from binlatent.configs import default
from binlatent.priors import step as prior_stage
from binlatent.priors import transformer
from binlatent.priors.bernoulli import process, targets
from binlatent.runtime import devices, machine
from binlatent.training import state as state_lib

N = 8


@pytest.fixture
def config(tiny_config):
    tiny_config.data.num_classes = 10
    tiny_config.prior.target = "flip"
    return tiny_config


def autoencoder_parts(config, optimizer=None, lpips_params=None):
    """The state, the batch, the noise and the bound update of the autoencoder."""
    optimizer = optimizer or build.optimizer(config.autoencoder.train)
    params = build.init_autoencoder(config, jax.random.key(0))
    networks, discriminator = build.networks(config), None
    if networks.discriminator:
        discriminator = autoencoder_stage.create_discriminator_state(
            networks.discriminator, jax.random.key(4), build.image_shape(config), optimizer
        )
    state = state_lib.create_state(jax.random.key(1), params, optimizer, discriminator)
    images = jax.random.uniform(jax.random.key(2), (N, 28, 28, 1), minval=-1)
    objective = build.autoencoder_objective(config)
    noise = autoencoder_stage.draw_noise(
        jax.random.key(3), images.shape, (N, *build.code_shape(config)), objective.augment
    )
    statics = dict(networks=networks, objective=objective, optimizer=optimizer, ema_decay=0.9)
    statics |= dict(lpips_params=lpips_params, accumulate=config.autoencoder.train.accumulate)
    return state, {"image": images}, noise, functools.partial(autoencoder_stage.update, **statics)


def prior_parts(config, optimizer=None):
    """The same of the prior."""
    optimizer = optimizer or build.optimizer(config.prior.train)
    params = build.init_prior(config, jax.random.key(0))
    state = state_lib.create_state(jax.random.key(1), params, optimizer)
    denoiser = build.denoiser(config)
    shape = (N, *build.code_shape(config))
    batch = {"probs": jax.random.uniform(jax.random.key(2), shape), "label": jnp.arange(N)}
    noise = prior_stage.draw_noise(
        jax.random.key(3), shape, denoiser.num_timesteps, label_dropout=0.1
    )
    objective = build.prior_objective(config)
    statics = dict(denoiser=denoiser, objective=objective, optimizer=optimizer, ema_decay=0.9)
    return state, batch, noise, functools.partial(prior_stage.update, **statics)


PARTS = {"autoencoder": autoencoder_parts, "prior": prior_parts}


def on_devices(update, num_devices):
    return jax.pmap(
        update,
        axis_name=devices.AXIS,
        in_axes=(None, 0, 0),
        out_axes=(None, None),
        donate_argnums=0,
        devices=jax.devices()[:num_devices],
    )


def run_updates(parts, num_devices, steps=3):
    state, batch, noise, update = parts
    step = on_devices(update, num_devices)
    split = functools.partial(
        jax.tree.map, lambda x: np.asarray(x).reshape(num_devices, -1, *x.shape[1:])
    )
    state = jax.tree.map(jnp.copy, state)
    for _ in range(steps):
        state, metrics = step(state, split(batch), split(noise))
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.parametrize("stage", PARTS)
def test_one_and_four_devices_make_the_same_update(config, stage):
    # Plain gradient descent: Adam makes full steps of gradients that are zero up to rounding.
    parts = PARTS[stage](config, optax.sgd(0.5))
    one, one_metrics = run_updates(parts, 1)
    four, four_metrics = run_updates(parts, 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, four)
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], four_metrics[name], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, jax.device_get(parts[0].params))
    assert max(jax.tree.leaves(moved)) > 1e-4  # and the update is not nothing


@pytest.mark.parametrize("num_devices, accumulate", [(1, 4), (2, 2)])
def test_parts_of_a_batch_make_the_prior_the_same_update(config, num_devices, accumulate):
    parts = prior_parts(config, optax.sgd(0.5))
    whole, whole_metrics = run_updates(parts, num_devices)
    state, batch, noise, update = parts
    update = functools.partial(update, accumulate=accumulate)
    params, metrics = run_updates((state, batch, noise, update), num_devices)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), params, whole)
    for name in whole_metrics:
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-4)


@pytest.mark.parametrize(
    "cores, images, tokens, parts",
    [
        (2, 8, 256, 4),  # of 2 x 256 tokens = 2 x 256
        (2, 128, 16, 4),  # 32 x 16 = 2 x 256
        (2, 24, 100, 4),  # 6 x 100 >= 512 > 4 x 100
        (2, 7, 128, 1),  # 7 is prime
        (2, 7, 1024, 7),
        (2, 1, 4096, 1),
        (2, 8, 16, 1),  # too few for a second part
        (8, 128, 16, 1),  # 8 x 256 = all of them
        (1, 8, 256, 8),
    ],
)
def test_a_part_of_a_batch_leaves_each_core_256_tokens(monkeypatch, cores, images, tokens, parts):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    assert prior_stage.parts_for_caches(images, tokens) == parts
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert prior_stage.parts_for_caches(images, tokens) == 1


def test_the_priors_batch_is_in_parts_if_the_machine_likes_it(config, monkeypatch):
    config.prior.train.accumulate = default.get_config().prior.train.accumulate
    monkeypatch.setattr(machine, "cores", lambda: 1)
    step = on_devices(build.prior_step(config), 1)
    state = build.init_prior_state(config)

    def loops(images):
        shape = (1, images, *build.code_shape(config))
        batch = {"probs": jnp.zeros(shape), "label": jnp.zeros((1, images), jnp.int32)}
        traced = jax.make_jaxpr(lambda *arguments: step(*arguments, None))(state, batch)
        return re.findall(r"scan\[.*?length=(\d+)", str(traced), re.DOTALL)

    assert build.code_shape(config)[:2] == (4, 4)
    assert loops(16) == []  # 256 tokens
    assert loops(80) == ["5"]  # 16 images each


def test_to_find_a_nan_the_prior_takes_its_batch_whole(config):
    config.prior.train.accumulate = 4
    assert build.prior_step(config).keywords["accumulate"] == 4
    config.debug_nans = True
    assert build.prior_step(config).keywords["accumulate"] == 1


def test_autoencoder_gradient_is_that_of_the_whole_batch(config):
    # The mean over devices of the gradients equals jax.grad of the loss on the global batch.
    state, batch, noise, update = autoencoder_parts(config)
    model = build.autoencoder(config)

    def loss(params):
        reconstruction, _ = model.apply(params, batch["image"], noise.uniform)
        return jnp.mean(jnp.square(reconstruction - batch["image"]))

    gradients = jax.grad(loss)(state.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    _, metrics = run_updates((state, batch, noise, update), 4, steps=1)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_a_step_donates_its_state_and_keeps_the_ema_apart(config):
    state, batch, noise, update = prior_parts(config)
    step = on_devices(update, 4)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x).reshape(4, -1, *x.shape[1:]))
    first, _ = step(devices.replicate(state), split(batch), split(noise))
    second, _ = step(first, split(batch), split(noise))
    assert jax.tree.leaves(first.params)[0].is_deleted()
    assert int(second.step) == 2


def test_ema_is_the_recurrence_of_its_docstring(config):
    state, batch, noise, update = prior_parts(config)
    step = on_devices(update, 1)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x)[None])
    ema = np.asarray(state.params["params"]["pos_emb"])
    for i in range(5):
        state, _ = step(state, split(batch), split(noise))
        decay = min(0.9, (1 + i) / (10 + i))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["params"]["pos_emb"])
    np.testing.assert_allclose(state.ema_params["params"]["pos_emb"], ema, atol=1e-6)


def with_discriminator(config):
    loss = {"adversarial": 1.0, "adaptive": True}
    config.autoencoder.loss.update(loss)
    config.autoencoder.discriminator.update({"width": 8, "num_layers": 1})


@pytest.mark.parametrize("stage", PARTS)
def test_a_step_that_is_not_finite_on_one_device_is_skipped_on_all(config, stage):
    with_discriminator(config)
    state, batch, noise, update = PARTS[stage](config)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x).reshape(4, -1, *x.shape[1:]))
    plain = on_devices(update, 4)
    skipping = on_devices(state_lib.skip_nonfinite(update), 4)
    # Two steps make every part of the state other than zero, the statistics too.
    start = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        start, _ = plain(start, split(batch), split(noise))
    raw = functools.partial(jax.tree.map, lambda x: np.asarray(jax.random.key_data(x)))
    before = jax.device_get(start.replace(key=None))
    key = raw(start.key)

    # A finite step is taken as without.
    after, metrics = skipping(jax.tree.map(jnp.copy, start), split(batch), split(noise))
    assert int(metrics["skipped"]) == 0 and int(after.step) == 3
    expected, _ = plain(jax.tree.map(jnp.copy, start), split(batch), split(noise))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        *(jax.device_get(x.replace(key=None)) for x in (after, expected)),
    )

    # The last device alone has a NaN: in an image, or in a time.
    if stage == "autoencoder":
        batch = {"image": batch["image"].at[-1].set(jnp.nan)}
    else:
        noise = noise._replace(t=noise.t.at[-1].set(jnp.nan))
    after, metrics = skipping(start, split(batch), split(noise))
    assert int(metrics["skipped"]) == 1 and int(after.step) == 3
    np.testing.assert_array_equal(raw(after.key), key)
    after = jax.device_get(after.replace(key=None, step=before.step))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if stage == "autoencoder":
        assert not np.isfinite(metrics["loss"])
        assert np.abs(jax.tree.leaves(before.discriminator["batch_stats"])[0]).max() > 0


def test_updates_are_counted_by_the_optimiser(config):
    state, batch, noise, update = prior_parts(config)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x)[None])
    skipping = on_devices(state_lib.skip_nonfinite(update), 1)
    for i in range(3):
        t = jnp.full(N, jnp.nan) if i == 1 else noise.t
        state, _ = skipping(state, split(batch), split(noise._replace(t=t)))
    assert int(state.step) == 3 and state_lib.updates_made(state) == 2


def test_each_step_and_device_has_its_own_key(config):
    state, *_ = prior_parts(config)
    keys = jax.pmap(
        lambda state, _: jax.random.key_data(state_lib.step_key(state)),
        axis_name=devices.AXIS,
        in_axes=(None, 0),
    )
    later = state.replace(step=state.step + 1)
    seen = np.concatenate([np.asarray(keys(s, np.zeros(4))) for s in (state, later)])
    assert len(np.unique(seen, axis=0)) == 8


def test_warmup_and_cosine_decay_follow_their_closed_form():
    # Adam's first update has the size of the learning rate, whatever the gradient.
    optimizer = state_lib.create_optimizer(0.1, 2, 10, "cosine", 1e9)
    params, gradient = jnp.zeros(()), jnp.ones(())
    opt_state, rates = optimizer.init(params), []
    for _ in range(10):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        rates.append(-float(updates))
    expected = [0, 0.05] + [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-5)
    with pytest.raises(ValueError, match="'constant' or 'cosine', got 'linear'"):
        state_lib.create_optimizer(0.1, 2, 10, "linear", 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2**14 - 1,), (2**14,), (7, 8191), (3, 5, 7, 11, 17)])
def test_the_global_norm_in_float64(shape, dtype):
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.standard_normal(shape), dtype), "b": jnp.full((9,), 0.5, dtype)}
    exact = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in tree.values()))
    norm = jax.jit(state_lib.global_norm)
    np.testing.assert_allclose(norm(tree), exact, rtol=1e-6)
    for place in range(0, tree["a"].size, 5003):
        broken = tree["a"].ravel().at[-1 - place].set(jnp.nan)
        assert np.isnan(norm(tree | {"a": broken.reshape(shape)}))


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = state_lib.create_optimizer(0.1, 0, 10, "constant", 1.0)
    params = {"a": jnp.zeros(2)}
    big, small = ({"a": jnp.array([3.0, 4.0]) * scale} for scale in (100.0, 0.2))
    states = [optimizer.update(g, optimizer.init(params), params)[1] for g in (big, small)]
    moments = [jax.tree.leaves(s)[1] for s in states]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)  # both of norm 1, same direction


def test_clipping_keeps_the_type_of_each_gradient():
    optimizer = state_lib.create_optimizer(0.1, 0, 10, "constant", 1.0)
    gradients = {"a": jnp.full(3, 100, jnp.bfloat16), "b": jnp.full(2, 100.0)}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert {name: x.dtype for name, x in updates.items()} == {"a": jnp.bfloat16, "b": jnp.float32}


def test_label_dropout_is_per_sample_at_its_rate():
    noise = prior_stage.draw_noise(jax.random.key(0), (20_000, 1, 1, 1), 64, label_dropout=0.1)
    np.testing.assert_allclose(np.mean(noise.unlabelled), 0.1, atol=0.01)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_times_are_uniform(continuous, stratified):
    draw = functools.partial(
        prior_stage.draw_times, n=1000, continuous=continuous, stratified=stratified
    )
    t = np.concatenate([draw(jax.random.key(i), num_timesteps=64) for i in range(30)])
    assert t.min() > 0 and t.max() <= 64
    np.testing.assert_allclose(np.mean(t), 32 if continuous else 32.5, atol=0.5)
    if continuous:
        assert np.mean(t == np.rint(t)) < 0.01
    else:
        counts = np.bincount(t.astype(int), minlength=65)
        assert np.all(t == np.rint(t)) and counts[0] == 0
        np.testing.assert_allclose(counts[1:], len(t) / 64, rtol=0.25)
    # Large T: the last of the uniforms below 1 must not round to T + 1.
    assert draw(jax.random.key(0), num_timesteps=10**6).max() <= 10**6


def test_stratified_times_have_one_in_each_part_and_a_less_noisy_mean():
    draw = functools.partial(prior_stage.draw_times, n=16, num_timesteps=64, continuous=True)
    keys = jax.random.split(jax.random.key(0), 200)
    strata = np.sort(np.stack([draw(key, stratified=True) for key in keys]))
    np.testing.assert_allclose(np.diff(strata), 4, atol=1e-4)
    plain = np.stack([draw(key, stratified=False) for key in keys])
    assert strata.mean(1).std() < 0.35 * plain.mean(1).std()
    # And each of the batch's places has all times in turn.
    places = np.stack([draw(key, stratified=True) for key in keys])
    assert np.ptp(places, axis=0).max() > 3


@pytest.mark.parametrize("condition, kinds", [("class", 1), ("text_cross", 2)])
def test_the_config_keeps_all_attention_from_cudnn(config, monkeypatch, condition, kinds):
    config.prior.condition = condition
    asked = []
    monkeypatch.setattr(transformer, "_cudnn_attends", lambda k: asked.append(k))
    for config.prior.cudnn in (False, True):
        assert not asked
        network = build.denoiser(config).network
        z_t, time = jnp.zeros((2, *build.code_shape(config))), jnp.zeros(2)
        jax.eval_shape(network.init, jax.random.key(0), z_t, time)
    assert len(asked) == kinds * config.prior.num_layers


def test_dropped_labels_reach_the_network_as_unlabelled(config):
    state, batch, noise, _ = prior_parts(config)
    params = jax.tree.map(lambda x: x + 0.1, state.params)
    denoiser = build.denoiser(config)

    def logits(label, unlabelled):
        replaced = noise._replace(unlabelled=unlabelled)
        return prior_stage.predict(denoiser, params, batch["probs"], label, replaced).flip_logit

    dropped = logits(batch["label"], jnp.ones(N, bool))
    explicit = logits(None, jnp.zeros(N, bool))
    kept = logits(batch["label"], jnp.zeros(N, bool))
    np.testing.assert_allclose(dropped, explicit, atol=1e-5)
    assert np.any(np.asarray(kept) != np.asarray(dropped))


def losses_at_start(config, n=4_000):
    """The mean loss and its terms of an untrained prior on random codes, times in turn."""
    denoiser, objective = build.denoiser(config), build.prior_objective(config)
    params = build.init_prior(config, jax.random.key(0))
    t = jnp.arange(n) % denoiser.num_timesteps + 1.0
    noise = prior_stage.draw_noise(jax.random.key(1), (n, 4, 4, 8), denoiser.num_timesteps)
    probs, label = jnp.full((n, 4, 4, 8), 0.5), jnp.zeros(n, jnp.int32)
    return prior_stage.loss(denoiser, objective, params, probs, label, noise._replace(t=t))


B = np.arange(1, 9) / 16  # b_1 to b_8 of the tiny config: linear, T = 8


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_untrained_prior_with_evidence_has_the_entropy_of_the_noise(config, optimised):
    # The network starts at zero, so f = b_t: its BCE at t is the entropy of a B(b_t) flip. Random
    # codes have nothing more to know, so L_vlb, whose terms telescope, is that of fair bits.
    # Without optimisations XLA adds numbers one after the other, which costs the fifth digit.
    config.prior.vlb_weight = 0.5
    loss, metrics = losses_at_start(config)
    np.testing.assert_allclose(metrics["residual"], entropy(B).mean(), atol=0.005)
    np.testing.assert_allclose(metrics["vlb"], np.log(2) / 8, atol=0.002)
    np.testing.assert_allclose(loss, metrics["residual"] + 0.5 * metrics["vlb"], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(target="flip"), np.log(2)),
        (dict(target="z_0"), np.log(2)),
        # Within an image a share of about b_t is flipped: b (1 - b) + (1 - b) b, times log 2.
        (dict(pair="balanced_plugin"), np.log(2) * np.mean(2 * B * (1 - B))),
        (dict(time_weight="falling"), np.log(2) * np.mean(1 - np.arange(8) / 8)),
    ],
)
def test_without_evidence_the_untrained_prior_says_one_half(config, changes, expected):
    config.prior.update({"evidence": False, "vlb_weight": 0.0, **changes})
    loss, metrics = losses_at_start(config)
    assert "vlb" not in metrics  # a weight of 0 costs nothing
    np.testing.assert_allclose(loss, expected, atol=0.005)


def test_predicting_z_s_is_trained_by_the_bound_alone(config):
    config.prior.update({"evidence": False, "target": "z_s"})
    loss, metrics = losses_at_start(config)
    # KL(q(z_s | z_t, z_0) || B(1/2)) = log 2 - H, by Bayes' rule for each of agree and disagree.
    b_s = np.append(0, B[:-1])
    e = (1 - (1 - 2 * B) / (1 - 2 * b_s)) / 2
    agree, disagree = (1 - e) * (1 - b_s) / (1 - B), (1 - e) * b_s / B
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (1 - B) * np.nan_to_num(entropy(agree)) + B * np.nan_to_num(entropy(disagree))
    np.testing.assert_allclose(loss, np.log(2) - terms.mean(), atol=0.005)
    assert set(metrics) == {"loss", "vlb", "flip_accuracy"}


class TrueNetwork:
    """Stands for a network whose output is the truth about chains, plus `params`."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def apply(self, params, z_t, time, label, given):
        t = time * self.denoiser.num_timesteps + 1
        k_t, k_s = (
            self.denoiser.keep_at(jnp.maximum(x, 0))[:, None, None, None] for x in (t, t - 1)
        )
        per_chain = jnp.repeat(k_t.ravel(), z_t[0].size // chain.BITS)
        output = chain.denoise(z_t, per_chain)
        if self.denoiser.evidence or self.denoiser.pair == "balanced_plugin":
            output = output - process.flip_evidence(k_t)
        if self.denoiser.target == "z_0":
            output = targets.flip_from_z_0(output, z_t)
        elif self.denoiser.target == "z_s":
            output = targets.z_s_from_flip(output, z_t, k_t, k_s)
        return output + params

    def round_weights(self, params):
        return params


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(time_weight="falling"),
        dict(evidence=False),
        dict(evidence=False, target="z_0"),
        dict(target="z_0"),
        dict(evidence=False, target="z_s"),
        dict(evidence=False, pair="balanced_plugin", vlb_weight=0.0),
        dict(evidence=False, pair="balanced_plugin"),
        dict(schedule="cos", continuous=True),
        dict(schedule="given", keep=(1, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_the_truth_is_the_minimum_of_every_loss(config, changes):
    config.prior.update(changes)
    denoiser, objective = build.denoiser(config), build.prior_objective(config)
    denoiser = dataclasses.replace(denoiser, network=TrueNetwork(denoiser))
    shape = (64, 16, 16, chain.BITS)
    chains = jax.random.choice(
        jax.random.key(0),
        jnp.asarray(chain.STATES, jnp.float32),
        shape[:3],
        p=jnp.asarray(chain.P_DATA, jnp.float32),
    )
    noise = prior_stage.draw_noise(
        jax.random.key(1), shape, 8, continuous=denoiser.continuous, stratified=True
    )
    label = jnp.zeros(64, jnp.int32)
    loss = jax.jit(
        lambda shift: prior_stage.loss(denoiser, objective, shift, chains, label, noise)[0]
    )
    best, higher, lower = loss(0.0), loss(0.2), loss(-0.2)
    assert best < higher and best < lower
    # A parabola with its bottom at the truth.
    np.testing.assert_allclose((higher - lower) / (higher + lower - 2 * best), 0, atol=0.15)
    bce = prior_stage.predict(denoiser, 0.0, chains, label, noise)
    right = (bce.flip_logit > 0) == (process.flip_target(bce.z_t, bce.z_0) > 0)
    assert np.mean(right) > 0.75


@pytest.mark.parametrize(
    "changes",
    [
        dict(evidence=False, target="z_0"),
        dict(evidence=False, target="z_s"),
        dict(evidence=False, pair="balanced_plugin"),
        dict(schedule="sigmoid"),
    ],
)
def test_the_sampler_works_with_every_target_and_pair(config, changes):
    config.prior.update({"num_timesteps": 32, **changes})
    denoiser = build.denoiser(config)
    denoiser = dataclasses.replace(denoiser, network=TrueNetwork(denoiser))
    n, shape = 10_000, (1, 1, chain.BITS)
    # Steps of one and of many: the target z_s was learnt for s = t - 1 alone.
    times = np.array([32, 28, 24, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.float32)
    codes, _ = programs.sample_codes(
        0.0,
        jax.random.split(jax.random.key(0), n),
        jnp.zeros(n, jnp.int32),
        jnp.full((n, *shape), 0.5),
        None,
        times,
        np.zeros(len(times) - 1, np.float32),
        1.0,
        0.0,
        denoiser=denoiser,
        pair=denoiser.pair,
        threshold_last=False,
        corrector_steps=0,
        return_trajectory=False,
    )
    codes = np.asarray(codes).reshape(n, chain.BITS)
    np.testing.assert_allclose(codes.mean(0), chain.MARGINALS, atol=0.025)
    counts = np.bincount((codes @ 2 ** np.arange(5, -1, -1)).astype(int), minlength=64)
    assert 0.5 * np.abs(counts / n - chain.P_DATA).sum() < 0.1


def test_a_flip_logit_is_the_same_for_both_pairs_but_for_the_evidence(config):
    z_t = jax.random.bernoulli(jax.random.key(0), shape=(8, 4, 4, 8)).astype(jnp.float32)
    output, t = jax.random.normal(jax.random.key(1), z_t.shape), jnp.arange(1.0, 9)
    evidence = np.log(B / (1 - B))[:, None, None, None]
    changes = [
        (dict(), 0, 1),
        (dict(evidence=False), -1, 0),
        (dict(evidence=False, pair="balanced_plugin"), 0, 1),
    ]
    for change, plugin, mixture in changes:
        config.prior.update(change)
        denoiser = build.denoiser(config)
        got = denoiser.flip_logit(output, z_t, t)
        np.testing.assert_allclose(got, output + mixture * evidence, atol=1e-5)
        got = denoiser.flip_logit(output, z_t, t, "balanced_plugin", 0.5)
        np.testing.assert_allclose(got, (output + plugin * evidence) / 0.5, atol=1e-5)


def test_prior_trains_on_images_with_a_frozen_encoder(config):
    # The loss of the step on images is the loss on the encoder's probabilities.
    autoencoder, params = (
        build.autoencoder(config),
        build.init_autoencoder(config, jax.random.key(9)),
    )
    state, batch, _, _ = prior_parts(config)
    images = jax.random.uniform(jax.random.key(2), (N, 28, 28, 1), minval=-1)
    step = jax.pmap(
        functools.partial(
            prior_stage.train_step,
            encode=functools.partial(autoencoder.apply, method="probs"),
            denoiser=build.denoiser(config),
            objective=build.prior_objective(config),
            optimizer=build.optimizer(config.prior.train),
            ema_decay=0.9,
        ),
        axis_name=devices.AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
    )
    probs = np.asarray(autoencoder.apply(params, images, method="probs"))
    label = np.asarray(batch["label"])
    _, on_the_fly = step(
        state, devices.shard({"image": np.asarray(images), "label": label}), params
    )
    _, cached = step(state, devices.shard({"probs": probs, "label": label}), None)
    np.testing.assert_allclose(on_the_fly["loss"], cached["loss"], rtol=1e-5)


def test_the_autoencoder_learns_to_copy_a_batch(config):
    config.autoencoder.train.learning_rate = 3e-3
    config.autoencoder.train.num_steps = 200
    state, batch, _, _ = autoencoder_parts(config)
    step = devices.parallel(
        functools.partial(
            autoencoder_stage.train_step,
            code_shape=build.code_shape(config),
            networks=build.networks(config),
            objective=build.autoencoder_objective(config),
            optimizer=build.optimizer(config.autoencoder.train),
            ema_decay=0.9,
        ),
        num_frozen=1,
    )
    y, x = np.mgrid[:28, :28]
    patterns = [np.where((x // 7 + i * (y // 7)) % (2 + i % 3) == 0, 0.8, -0.8) for i in range(N)]
    images = devices.shard({"image": np.stack(patterns)[..., None].astype(np.float32)})
    state = devices.replicate(state)
    for _ in range(100):
        state, metrics = step(state, images, {})
        # Where more than 32 steps are queued, JAX's fake devices can wait for one another for ever.
        jax.block_until_ready(metrics)
    # The images vary by 0.64 about zero; the codes must carry most of it.
    assert float(metrics["loss"]) < 0.15
