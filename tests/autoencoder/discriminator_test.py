"""Agreement of the discriminator with the authors' code, and between numbers of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from binlatent.autoencoder import adversarial
from binlatent.autoencoder.discriminator import BatchNorm, Discriminator, batch_moments, logits_side
from binlatent.convert import released


@pytest.fixture(scope="module", params=reference.AUTOENCODERS)
def golden(request):
    """Variables, inputs, outputs and losses of the released layout."""
    io = reference.io(request.param)
    like = jax.eval_shape(Discriminator(width=16).init, jax.random.key(0), jnp.asarray(io["image"]))
    variables = reference.variables(request.param, like, released.discriminator_tensors)
    return variables, io, reference.losses(request.param)


def random_images(n, side=16, channels=3, seed=0):
    return jax.random.uniform(jax.random.key(seed), (n, side, side, channels), minval=-1)


def random_variables(model, images, seed=1):
    """Variables of which none is 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.float32(rng.normal(0, 0.1, x.shape) + (x.ndim == 1)),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, variables, images, train=True):
    """The logits, and the new running statistics, if any."""
    logits, new = model.apply(variables, images, train=train, mutable="batch_stats")
    return logits, new.get("batch_stats")


# Agreement with the authors' code


def test_logits_agree_with_the_reference_numbers(golden):
    variables, io, _ = golden
    model = Discriminator(width=16)
    logits, _ = apply(model, variables, io["image"])
    np.testing.assert_allclose(logits, io["disc_logits_train"], rtol=1e-4)
    # The stored running statistics are those after the update.
    logits, _ = apply(model, variables, io["image"], train=False)
    np.testing.assert_allclose(logits, io["disc_logits_eval"], rtol=1e-4)


def test_losses_agree_with_the_reference_numbers(golden):
    variables, io, losses = golden
    real, fake = (
        apply(Discriminator(width=16), variables, io[name], train=False)[0]
        for name in ("image", "decoded")
    )
    loss = adversarial.generator_loss(fake)
    np.testing.assert_allclose(loss, losses["g_loss"], rtol=1e-4)
    loss = adversarial.hinge_discriminator_loss(real, fake)
    # A tight tolerance: with logits of 0 the loss would be 1.
    np.testing.assert_allclose(loss, losses["hinge_d_loss"], rtol=1e-6)


# Batch norm


def test_batch_norm_is_that_of_float64():
    rng = np.random.default_rng(0)
    # With a large mean, E[x^2] - E[x]^2 would lose all digits.
    x = 100 + 0.1 * rng.standard_normal((3, 4, 5, 2)).astype(np.float32)
    scale, bias, mean, var = (rng.uniform(0.5, 2, 2).astype(np.float32) for _ in range(4))
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    x64 = np.float64(x)
    y, new = BatchNorm().apply(variables, x, train=True, mutable="batch_stats")
    truth = (x64 - x64.mean((0, 1, 2))) / np.sqrt(x64.var((0, 1, 2)) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, truth, atol=1e-3)
    new = new["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * mean + 0.1 * x64.mean((0, 1, 2)), rtol=1e-6)
    # Unbiased: 60 values per channel.
    np.testing.assert_allclose(new["var"], 0.9 * var + 0.1 * x64.var((0, 1, 2), ddof=1), rtol=1e-6)
    y = BatchNorm().apply(variables, x, train=False)
    np.testing.assert_allclose(y, (x64 - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5)


def test_running_statistics_start_fresh_are_unbiased_and_stay_when_not_training():
    # The smallest count that shows it: 1 and 3 have variance 1, unbiased 2.
    norm, x = BatchNorm(axis_name="batch"), jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    variables = norm.init(jax.random.key(0), x, True)
    assert variables["batch_stats"] == {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    _, stats = apply(BatchNorm(), variables, x, train=True)
    np.testing.assert_allclose(stats["mean"], [0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 * 1 + 0.1 * 2], rtol=1e-6)
    _, stats = apply(norm, variables, x, train=False)
    assert stats == variables["batch_stats"]
    # A single value has variance 0, not NaN.
    _, stats = apply(BatchNorm(), variables, x[:1], train=True)
    np.testing.assert_allclose(stats["var"], [0.9])


def critic_loss(model, variables, images):
    """A loss with a gradient for every parameter, with R1; logits; statistics."""

    def logits_of(x):
        return model.apply(variables, x, mutable="batch_stats")[0]

    logits, new = model.apply(variables, images, mutable="batch_stats")
    loss = jnp.mean(jax.nn.softplus(logits)) + adversarial.r1_penalty(logits_of, images)
    return loss, (logits, new["batch_stats"])


def on_one_device(model, variables, images):
    """Gradients for parameters and images, logits and statistics, of the whole batch."""

    def loss(params, images):
        return critic_loss(model, variables | {"params": params}, images)

    gradients, (logits, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        variables["params"], images
    )
    return *gradients, logits, stats


def on_four_devices(model, variables, images):
    """The same for a split batch; only the parameters' gradients are averaged over devices."""

    def step(variables, images):
        of_params, of_images, logits, stats = on_one_device(model, variables, images)
        return jax.lax.pmean(of_params, "batch"), of_images, logits, stats

    parallel = jax.pmap(
        step, axis_name="batch", in_axes=(None, 0), out_axes=(None, 0, 0, 0), devices=jax.devices()
    )
    of_params, of_images, logits, stats = parallel(variables, images.reshape(4, -1, 16, 16, 3))
    for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    whole = (x.reshape(-1, *x.shape[2:]) for x in (of_images, logits))
    return of_params, *whole, jax.tree.map(lambda x: x[0], stats)


@pytest.fixture(scope="module")
def split():
    """Variables, images, and the results of one device."""
    # Images whose statistics differ between devices.
    images = random_images(8) * jnp.linspace(0.2, 1.0, 8).reshape(8, 1, 1, 1)
    model = Discriminator(width=4, num_layers=2)
    variables = random_variables(model, images)
    return variables, images, jax.jit(lambda v, x: on_one_device(model, v, x))(variables, images)


def test_four_devices_agree_with_one_device_on_the_whole_batch(split):
    variables, images, expected = split
    model = Discriminator(width=4, num_layers=2, axis_name="batch")
    of_params, of_images, logits, stats = on_four_devices(model, variables, images)

    def close(got, expected):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
            got,
            expected,
        )

    close(of_params, expected[0])
    # The images' gradients are of the sum of the four losses. Averaged over devices, they
    # give the exact gradients of a generator's parameters.
    close(of_images / 4, expected[1])
    close(logits, expected[2])
    close(stats, expected[3])


def test_without_the_axis_each_device_uses_its_own_statistics(split):
    variables, images, expected = split
    step = jax.pmap(
        lambda v, x: Discriminator(4, 2).apply(v, x, mutable="batch_stats")[0],
        in_axes=(None, 0),
        devices=jax.devices(),
    )
    logits = step(variables, images.reshape(4, 2, 16, 16, 3)).reshape(expected[2].shape)
    assert np.abs(logits - expected[2]).max() > 0.01


def test_moments_over_devices_are_those_of_all():
    x = random_images(8)
    mean, var = jax.pmap(lambda x: batch_moments(x, "batch"), axis_name="batch")(
        x.reshape(4, 2, 16, 16, 3)
    )
    for i in range(4):
        np.testing.assert_allclose(mean[i], np.float64(x).mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(var[i], np.float64(x).var((0, 1, 2)), rtol=1e-5)


# Norms, shapes and precision


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_only_with_batch_norm_do_logits_depend_on_the_other_images(norm):
    images = random_images(4)
    model = Discriminator(width=16, num_layers=2, norm=norm)
    variables = random_variables(model, images)
    together, alone = (apply(model, variables, x)[0][:1] for x in (images, images[:1]))
    if norm == "batch":
        assert np.abs(together - alone).max() > 1e-3
    else:
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert "batch_stats" not in variables
        evaluated, _ = apply(model, variables, images, train=False)
        np.testing.assert_allclose(together, evaluated[:1], atol=1e-6)


@pytest.mark.parametrize("width, groups", [(3, (2, 4)), (12, (8, 16)), (64, (32, 32))])
def test_group_norm_has_32_groups_or_the_most_that_a_width_allows(width, groups):
    model, images = Discriminator(width, num_layers=2, norm="group"), random_images(2)
    params = random_variables(model, images)["params"]
    expected, _ = apply(model, {"params": params}, images)
    for layer, count in zip(("main_2", "main_5"), groups, strict=True):
        kernel = params[layer]["kernel"]
        # Scaling a whole group changes nothing; scaling half of one does.
        for parts in (count, 2 * count):
            if kernel.shape[-1] % parts == 0:
                scale = np.repeat(np.resize([1, 3], parts), kernel.shape[-1] // parts)
                scaled = params | {layer: {"kernel": np.float32(kernel * scale)}}
                logits, _ = apply(model, {"params": scaled}, images)
                change = np.abs(logits - expected).max() / np.abs(expected).max()
                assert change < 1e-3 if parts == count else change > 0.01


@pytest.mark.parametrize(
    "num_layers, sides", [(1, (6, 9)), (2, (12, 17)), (3, (24, 28, 33)), (4, (48,))]
)
def test_the_side_of_the_logits(num_layers, sides):
    model = Discriminator(width=2, num_layers=num_layers)
    for side in sides:
        images = jnp.zeros((1, side, 2 * side, 1))
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
        assert logits.shape == (
            1,
            logits_side(side, num_layers),
            logits_side(2 * side, num_layers),
            1,
        )
    smallest = 3 * 2**num_layers
    assert logits_side(smallest, num_layers) == 1 and logits_side(smallest - 1, num_layers) == 0


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_gets_a_gradient(norm):
    images = random_images(2, channels=1)
    model = Discriminator(width=4, num_layers=2, norm=norm)
    variables = random_variables(model, images)

    def loss(params):
        return jnp.mean(jax.nn.softplus(apply(model, variables | {"params": params}, images)[0]))

    for path, leaf in jax.tree.leaves_with_path(jax.grad(loss)(variables["params"])):
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_bfloat16_keeps_float32_logits_parameters_and_statistics(norm):
    images = random_images(4)
    full, half = (Discriminator(8, 2, norm, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    own = jax.eval_shape(half.init, jax.random.key(0), images)
    variables = random_variables(full, images)
    got, expected = (apply(model, variables, images) for model in (half, full))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((own, got)))
    assert 0 < np.abs(got[0] - expected[0]).max() < 0.1 * np.abs(expected[0]).max()


def test_kernels_are_initialised_as_in_patchgan():
    init = jax.jit(Discriminator(width=32).init)
    params = init(jax.random.key(0), random_images(1, 32))["params"]
    kernel = params["main_5"]["kernel"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=2e-4)
    biased = [name for name, leaves in params.items() if leaves.keys() == {"kernel", "bias"}]
    assert biased == ["main_0", "main_11"]


def test_unknown_norm_is_refused():
    model = Discriminator(norm="layer")
    with pytest.raises(ValueError, match="'batch' or 'group', got 'layer'"):
        jax.eval_shape(model.init, jax.random.key(0), random_images(1, 32))
