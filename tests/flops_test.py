"""FLOPs by hand against XLA's, which counts norms and activations too, and by brute force."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from binlatent import build
from binlatent.autoencoder import lpips
from binlatent.autoencoder.discriminator import Discriminator
from binlatent.autoencoder.lpips import VGG16
from binlatent.benchmark import flops
from binlatent.priors import step as prior_stage
from binlatent.priors.transformer import Transformer


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_xla(function, *arguments):
    """Returns XLA's count before its optimisations, which nothing has to be compiled for."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("side, kernel, stride, padding", [(5, 3, 1, (1, 1)), (8, 3, 2, (0, 1))])
def test_a_convolution_does_not_multiply_its_padding(side, kernel, stride, padding):
    taps = 0
    for start in range(-padding[0], side + padding[1] - kernel + 1, stride):
        taps += sum(0 <= start + i < side for i in range(kernel))
    assert flops.conv(side, 3, 7, kernel, stride, padding) == 2 * taps**2 * 3 * 7

    def convolve(x, y):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, y, (stride, stride), (padding, padding), dimension_numbers=numbers
        )

    counted = by_xla(convolve, array(1, side, side, 3), array(kernel, kernel, 3, 7))
    assert flops.conv(side, 3, 7, kernel, stride, padding) == counted


@pytest.mark.parametrize(
    "condition, label",
    [
        ("none", None),
        ("class", None),
        ("class", array(1, dtype=jnp.int32)),
        ("text_token", array(1, 96)),
        ("text_cross", array(1, 20, 96)),
        ("text_cross", None),
    ],
)
def test_the_transformer_within_two_percent(condition, label):
    network = Transformer(1024, 2, 4, condition, 10, 96)
    code, time = array(1, 6, 6, 16), array(1)
    params = jax.eval_shape(network.init, jax.random.key(0), code, time, label)
    counted = by_xla(network.apply, params, code, time, label)
    ours = flops.transformer(network, (6, 6, 16), label is not None, 20)
    assert 0.98 < ours / counted <= 1
    # Nearly all of it is two for each weight of a block and token.
    kernels = [math.prod(x.shape) for x in jax.tree.leaves(params["params"]["blocks_0"])]
    if condition == "none":
        assert ours == pytest.approx(2 * 37 * 2 * sum(kernels), rel=0.05)


AUTOENCODERS = {
    "levels": {"multipliers": (1, 2), "num_blocks": 2, "attention_resolutions": (16,)},
    "deep": {"multipliers": (1, 2), "num_blocks": 1, "decoder_depth": 2.0, "norm_first": True},
    "patch": {"multipliers": (2,), "num_blocks": 0, "patch": 4},
    "vq": {"multipliers": (1, 1), "num_blocks": 1, "bottleneck": "vq"},
    "real": {"multipliers": (1, 1), "num_blocks": 1, "bottleneck": "real"},
}


def a_config(tiny_config, **changes):
    tiny_config.data.image_size = 32
    # Wide, as norms and activations count for less then.
    settings = {"patch": 1, "base_width": 128, "embedding_width": 64} | changes
    tiny_config.update_from_flattened_dict(
        {f"autoencoder.{name}": value for name, value in settings.items()}
    )
    return tiny_config


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_autoencoder_within_one_percent(tiny_config, name):
    config = a_config(tiny_config, **AUTOENCODERS[name])
    model, shape, code = build.autoencoder(config), (32, 32, 1), build.code_shape(config)
    params = jax.eval_shape(functools.partial(build.init_autoencoder, config), jax.random.key(0))
    encode = functools.partial(model.apply, method="encode")
    decode = functools.partial(model.apply, method="decode")
    ratios = [
        flops.encode(model, shape, code) / by_xla(encode, params, array(1, *shape)),
        flops.decode(model, code) / by_xla(decode, params, array(1, *code)),
    ]
    assert all(0.99 < ratio <= 1 for ratio in ratios), ratios


def test_the_discriminator_and_vgg16_within_one_percent():
    module = Discriminator(norm="group")
    params = jax.eval_shape(module.init, jax.random.key(0), array(1, 64, 64, 3))
    counted = by_xla(module.apply, params, array(1, 64, 64, 3))
    assert 0.99 < flops.discriminator(module, (64, 64, 3)) / counted <= 1
    params = jax.eval_shape(VGG16().init, jax.random.key(0), array(1, 64, 64, 3))
    counted = by_xla(VGG16().apply, params, array(1, 64, 64, 3))
    assert 0.99 < flops.vgg16((64, 64, 3)) / counted <= 1


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_a_training_step_within_one_percent(tiny_config, r1):
    settings = {"multipliers": (1, 1), "num_blocks": 1, "attention_resolutions": (16,)}
    settings |= {"loss.perceptual": 1.0, "loss.adversarial": 1.0, "loss.r1": r1}
    config = a_config(tiny_config, **settings)
    config.autoencoder.discriminator.num_layers = 2
    config.autoencoder.discriminator.norm = "group"
    networks = build.networks(config)
    step = build.autoencoder_step(config, networks)
    state = jax.eval_shape(functools.partial(build.init_autoencoder_state, config))
    vgg16 = {"params": traverse_util.unflatten_dict(lpips.vgg16_shapes(), sep="/")}
    # A device of one, as a vmapped axis.
    on_one = jax.vmap(step, axis_name="batch", in_axes=(None, 0, None))
    counted = by_xla(on_one, state, {"image": array(1, 16, 32, 32, 1)}, vgg16)
    ours = 16 * flops.train_autoencoder(networks, (32, 32, 1), build.code_shape(config), bool(r1))
    assert 0.99 < ours / counted <= 1


def test_the_priors_training_step_within_three_percent(tiny_config):
    config = tiny_config
    config.data.num_classes, config.prior.width = 10, 1024
    denoiser, num = build.denoiser(config), 64
    step = functools.partial(
        prior_stage.train_step,
        encode=None,
        denoiser=denoiser,
        objective=build.prior_objective(config),
        optimizer=build.optimizer(config.prior.train),
        ema_decay=0.9,
    )
    on_one = jax.vmap(step, axis_name="batch", in_axes=(None, 0, None))
    batch = {"probs": array(1, num, *build.code_shape(config), dtype=jnp.uint8)}
    batch["label"] = array(1, num, dtype=jnp.int32)
    state = jax.eval_shape(functools.partial(build.init_prior_state, config))
    counted = by_xla(on_one, state, batch, None)
    ours = num * 3 * flops.transformer(denoiser.network, build.code_shape(config), True)
    assert 0.97 < ours / counted <= 1


def test_sampling_counts_its_passes():
    network = Transformer(8, 1, 2, "class", 10)
    labelled = flops.transformer(network, (2, 2, 4), True)
    bare = flops.transformer(network, (2, 2, 4), False)
    assert labelled > bare

    def count(guidance, label=True, corrector_steps=0):
        return flops.sample(network, (2, 2, 4), label, np.array(guidance), corrector_steps)

    assert count([0.0, 0.0, 0.0]) == 3 * labelled
    assert count([0.0, 2.0, 1.0]) == 3 * labelled + 2 * bare
    assert count([0.0, 2.0, 1.0], label=False) == 3 * bare
    # A step's two correctors come after it, at the guidance of the next; none after the last.
    assert count([0.0, 2.0, 1.0], corrector_steps=2) == (3 + 4) * labelled + (2 + 4) * bare
