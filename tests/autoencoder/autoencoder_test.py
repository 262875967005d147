"""Agreement of the autoencoder with the authors' code; shapes, precision and remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from binlatent.autoencoder import adversarial, bottleneck
from binlatent.autoencoder.discriminator import Discriminator
from binlatent.autoencoder.modules import (
    Autoencoder,
    Decoder,
    Downsample,
    Encoder,
    Levels,
    depth_to_space,
    last_kernel,
    space_to_depth,
)
from binlatent.convert import released

BITS = {"ae_c16": 16, "ae_c24_genmul2": 24}


def load(name):
    """Model, weights, inputs, outputs and losses of one of the released layouts."""
    levels = Levels(32, (1, 1, 2), attention_resolutions=(8,))
    model = Autoencoder(
        Encoder(levels, num_blocks=1, embedding_width=64),
        bottleneck.Binary(BITS[name], 64),
        Decoder(levels, num_blocks=BITS[name] // 8 - 1, num_channels=3, norm_first=True),
    )
    images = reference.io(name)
    like, critic = (
        jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(images["image"]))
        for module in (model, Discriminator(width=16))
    )
    params = reference.variables(name, like["params"], released.autoencoder_tensors)
    critic = reference.variables(name, critic, released.discriminator_tensors)
    return model, {"params": params}, images, reference.losses(name), critic


@pytest.fixture(scope="module", params=BITS)
def golden(request):
    return load(request.param)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4)


def test_probabilities_codes_and_images(golden):
    model, variables, io, *_ = golden
    with jax.default_matmul_precision("highest"):
        code, aux = model.apply(variables, io["image"], io["uniform"], method="encode")
        decoded = model.apply(variables, io["code"], method="decode")
    close(aux["probs"], io["probs"])
    np.testing.assert_array_equal(code, io["code"])
    close(decoded, io["decoded"], atol=1e-4 * np.abs(io["decoded"]).max())


def test_losses_and_gradients(golden):
    model, variables, io, losses, _ = golden

    def mse(variables):
        reconstruction, aux = model.apply(variables, io["image"], io["uniform"])
        return jnp.mean(jnp.square(reconstruction - io["image"])), (reconstruction, aux)

    with jax.default_matmul_precision("highest"):
        (value, (reconstruction, aux)), gradient = jax.value_and_grad(mse, has_aux=True)(variables)
    close(value, losses["mse"])
    close(np.mean(np.abs(reconstruction - io["image"])), losses["l1"])
    # The authors' code applies a sigmoid to y, which is a sigmoid already.
    s = jax.nn.sigmoid(aux["probs"])
    close(np.mean(s * (1 - s)), losses["code_loss"])
    norm = np.sqrt(
        sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient))
    )
    close(norm, losses["grad_norm_of_mse"])
    first = gradient["params"]["encoder"]["blocks_0"]["kernel"]
    expected = losses["encoder_conv_in_grad_of_mse"].transpose(2, 3, 1, 0)
    close(first, expected, atol=1e-4 * np.abs(expected).max())
    assert last_kernel(variables).shape == (3, 3, 32, 3)


def test_adaptive_weight(golden):
    model, variables, io, losses, critic = golden

    @jax.jit
    def at_last_kernel(variables):
        reconstruction = model.apply(variables, io["image"], io["uniform"])[0]
        logits = Discriminator(width=16).apply(critic, reconstruction, train=False)
        l1 = jnp.mean(jnp.abs(reconstruction - io["image"]))
        return jnp.stack([l1, adversarial.generator_loss(logits)])

    with jax.default_matmul_precision("highest"):
        l1, generator = last_kernel(jax.jacrev(at_last_kernel)(variables))
    weight = adversarial.adaptive_weight(l1, generator, 1.0)
    close(weight, losses["adaptive_weight_l1_vs_g"])


def make(multipliers=(1,), patch=1, attention=(), num_blocks=1, code=None, **fields):
    levels = Levels(32, multipliers, attention, patch, **fields)
    return Autoencoder(
        Encoder(levels, num_blocks, embedding_width=8),
        code or bottleneck.Binary(6, 8),
        Decoder(levels, num_blocks, num_channels=3),
    )


IMAGES = jax.random.uniform(jax.random.key(0), (2, 28, 28, 3), minval=-1)


@pytest.mark.parametrize(
    "patch, levels, side", [(7, 1, 4), (1, 3, 7), (2, 2, 7), (4, 1, 7), (14, 2, 1)]
)
def test_downsampling_is_the_patch_times_two_per_level(patch, levels, side):
    model = make((1,) * levels, patch, attention=(side,))
    (reconstruction, aux), params = model.init_with_output(jax.random.key(0), IMAGES)
    assert aux["probs"].shape == (2, side, side, 6)
    assert reconstruction.shape == IMAGES.shape
    code = jnp.round(aux["probs"])
    assert model.apply(params, code, method="decode").shape == IMAGES.shape


@pytest.mark.parametrize("levels, k", [(4, 8), (5, 16), (6, 32)])
def test_the_papers_downsamplings_by_the_number_of_levels(levels, k):
    shapes = jax.eval_shape(
        make((1,) * levels).init_with_output, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    assert shapes[0][1]["probs"].shape == (1, 64 // k, 64 // k, 6)


def test_attention_follows_blocks_at_its_resolutions():
    # Levels of sides 28 and 14 with one block each: attention follows the second block.
    shapes = jax.eval_shape(make((1, 2), attention=(14,)).init, jax.random.key(0), IMAGES)
    blocks = {
        room: [i for i in range(20) if "q" in shapes["params"][room].get(f"blocks_{i}", ())]
        for room in ("encoder", "decoder")
    }
    # conv, res, down, res, attention, res, attention, res, norm, conv
    assert blocks["encoder"] == [4, 6]
    # conv, res, attention, res, res, attention, up, res, norm, conv
    assert blocks["decoder"] == [2, 5]


def test_stride_2_convolutions_are_padded_after_the_last_row_only():
    # As in the authors' code: the first output depends on rows 0 to 2, the last on the last two.
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0], kernel[2, 2] = 1, 10
    variables = {"params": {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}}
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    out = Downsample().apply(variables, image)[0, ..., 0]
    np.testing.assert_array_equal(out, [[0 + 10 * 10, 2], [8, 10]])


def test_space_to_depth_moves_each_patch_into_channels():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = space_to_depth(images, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), images[1, 2:4, 4:6])
    np.testing.assert_array_equal(depth_to_space(patches, 2), images)


@pytest.mark.parametrize(
    "code",
    [
        bottleneck.Binary(6, 8),
        bottleneck.Binary(6, 8, signed=True),
        bottleneck.VectorQuantized(5, 3, 8),
        bottleneck.Real(4, 8),
        bottleneck.Real(4, 8, variational=False),
    ],
)
def test_every_parameter_gets_a_gradient(code):
    model = make((1, 1), 2, attention=(7,), code=code)
    params = model.init(jax.random.key(1), IMAGES)
    shape = jax.eval_shape(functools.partial(model.apply, method="encode"), params, IMAGES)[0].shape
    uniform = jax.random.uniform(jax.random.key(2), shape)

    def loss(params):
        reconstruction, aux = model.apply(params, IMAGES, uniform)
        # The codebook of "vq" gets gradients only from its own loss.
        return jnp.sum((reconstruction - IMAGES) ** 2) + aux.get("codebook", 0.0)

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


def test_remat_is_in_the_program_and_leaves_the_gradient():
    def gradient(model, params):
        return jax.grad(lambda p: jnp.mean((model.apply(p, IMAGES)[0] - IMAGES) ** 2))(params)

    plain, remat = (make((1, 1), 2, attention=(7,), remat=x) for x in (False, True))
    params = plain.init(jax.random.key(1), IMAGES)
    shapes = jax.eval_shape(remat.init, jax.random.key(1), IMAGES)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)  # same names
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        gradient(plain, params),
        gradient(remat, params),
    )
    jaxprs = [str(jax.make_jaxpr(functools.partial(gradient, m))(params)) for m in (plain, remat)]
    assert "remat" not in jaxprs[0] and "remat" in jaxprs[1]


def test_bfloat16_keeps_float32_parameters_and_agrees_roughly():
    params = make(patch=7).init(jax.random.key(1), IMAGES)
    full, aux = make(patch=7).apply(params, IMAGES)
    half, half_aux = make(patch=7, dtype=jnp.bfloat16).apply(params, IMAGES)
    assert half.dtype == half_aux["probs"].dtype == jnp.float32
    np.testing.assert_allclose(aux["probs"], half_aux["probs"], atol=0.05)
    half_params = make(patch=7, dtype=jnp.bfloat16).init(jax.random.key(1), IMAGES)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_params))


def test_without_draws_probabilities_are_the_code():
    drawn, fixed = (
        make(patch=7, code=bottleneck.Binary(6, 8, deterministic=x)) for x in (False, True)
    )
    params = drawn.init(jax.random.key(1), IMAGES)
    probs = drawn.apply(params, IMAGES, method="probs")
    assert np.mean((probs > 0.01) & (probs < 0.99)) > 0
    bits = fixed.apply(params, IMAGES, method="probs")
    np.testing.assert_array_equal(bits, probs > 0.5)
    uniform = jax.random.uniform(jax.random.key(2), probs.shape)
    code, _ = fixed.apply(params, IMAGES, uniform, method="encode")
    np.testing.assert_array_equal(code, bits)  # for any noise
