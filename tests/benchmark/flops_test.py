"""FLOPs by formula against XLA's count, which has norms and activations, and brute force."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import traverse_util

from binlatent.autoencoder import lpips
from binlatent.autoencoder.discriminator import Discriminator
from binlatent.autoencoder.lpips import VGG16
from binlatent.benchmark import flops, workloads
from binlatent.experiment import resolve
from binlatent.priors.autoregressive.prior import AutoregressivePrior
from binlatent.priors.dit import DiT
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_xla(function, *arguments):
    """Returns XLA's count before optimisation, which needs no compilation."""
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
    ours = flops.count_transformer(network, (6, 6, 16), label is not None, 20)
    assert 0.98 < ours / counted <= 1
    # Nearly all FLOPs are two per weight of a block and token.
    kernels = [math.prod(x.shape) for x in jax.tree.leaves(params["params"]["blocks_0"])]
    if condition == "none":
        assert ours == pytest.approx(2 * 37 * 2 * sum(kernels), rel=0.05)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize(
    "condition, label",
    [
        ("class", array(1, dtype=jnp.int32)),
        ("text_token", array(1, 96)),
        ("text_cross", array(1, 20, 96)),
        ("text_cross", None),
    ],
)
def test_dit_within_two_percent(condition, label, on):
    network = DiT(1024, 2, 4, condition, 10, 96, adaln=on, swiglu=on)
    code, time = array(1, 6, 6, 16), array(1)
    params = jax.eval_shape(network.init, jax.random.key(0), code, time, label)
    counted = by_xla(network.apply, params, code, time, label)
    ours = flops.count_network(network, (6, 6, 16), label is not None, 20)
    assert 0.98 < ours / counted <= 1


@pytest.mark.parametrize(
    "condition, label, head",
    [
        ("none", None, "independent"),
        ("class", array(1, dtype=jnp.int32), "joint"),
        ("text_token", array(1, 96), "independent"),
        ("text_cross", array(1, 20, 96), "joint"),
    ],
)
def test_the_causal_transformer_within_two_percent(condition, label, head):
    network = AutoregressivePrior.make_network(
        *((6, 6, 20), {"head": head, "group": 8}),
        **dict(width=1024, num_layers=2, num_heads=4, condition=condition, num_classes=10),
        **dict(text_width=96, dtype=jnp.float32),
    )
    code, time = array(1, 6, 6, 20), array(1)
    params = jax.eval_shape(network.init, jax.random.key(0), code, time, label)
    counted = by_xla(network.apply, params, code, time, label)
    ours = flops.count_network(network, (6, 6, 20), label is not None, 20)
    assert 0.98 < ours / counted <= 1


def test_a_network_that_is_not_known_is_not_counted():
    with pytest.raises(UserError, match="The FLOPs of a Dense are unknown"):
        flops.count_network(nn.Dense(3), (6, 6, 20), True)


AUTOENCODERS = {
    "levels": {"multipliers": (1, 2), "num_blocks": 2, "attention_resolutions": (16,)},
    "deep": {"multipliers": (1, 2), "num_blocks": 1, "decoder_depth": 2.0, "norm_first": True},
    "patch": {"multipliers": (2,), "num_blocks": 0, "patch": 4},
    "refined": {"multipliers": (1,), "num_blocks": 0, "patch": 4, "refine_width": 128},
    "vq": {"multipliers": (1, 1), "num_blocks": 1, "bottleneck": "vq"},
    "real": {"multipliers": (1, 1), "num_blocks": 1, "bottleneck": "real"},
}


def stage_1(tiny_config, **changes):
    # Wide, so that norms and activations matter less.
    values = {"patch": 1, "base_width": 128, "embedding_width": 64} | changes
    values = {f"autoencoder.{name}": value for name, value in values.items()}
    return resolve(tiny_config).change({"data.image_size": 32, **values}).autoencoder


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_autoencoder_within_one_percent(tiny_config, name):
    spec = stage_1(tiny_config, **AUTOENCODERS[name])
    model, shape, code = spec.networks.autoencoder, spec.image_shape, spec.code_shape
    params = jax.eval_shape(spec.init, jax.random.key(0))
    encode = functools.partial(model.apply, method="encode")
    decode = functools.partial(model.apply, method="decode")
    ratios = [
        flops.count_encoding(model, shape, code) / by_xla(encode, params, array(1, *shape)),
        flops.count_decoding(model, code) / by_xla(decode, params, array(1, *code)),
    ]
    assert all(0.99 < ratio <= 1 for ratio in ratios), ratios


def test_the_discriminator_and_vgg16_within_one_percent():
    module = Discriminator(norm="group")
    params = jax.eval_shape(module.init, jax.random.key(0), array(1, 64, 64, 3))
    counted = by_xla(module.apply, params, array(1, 64, 64, 3))
    assert 0.99 < flops.count_discriminator(module, (64, 64, 3)) / counted <= 1
    params = jax.eval_shape(VGG16().init, jax.random.key(0), array(1, 64, 64, 3))
    counted = by_xla(VGG16().apply, params, array(1, 64, 64, 3))
    assert 0.99 < flops.count_vgg16((64, 64, 3)) / counted <= 1


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_a_training_step_within_one_percent(tiny_config, r1):
    changes = {"multipliers": (1, 1), "num_blocks": 1, "attention_resolutions": (16,)}
    changes |= {"loss.perceptual": 1.0, "loss.adversarial": 1.0, "loss.r1": r1}
    changes |= {"discriminator.num_layers": 2, "discriminator.norm": "group"}
    spec = stage_1(tiny_config, **changes)
    state = jax.eval_shape(functools.partial(spec.init_state, 0))
    vgg16 = {"params": traverse_util.unflatten_dict(lpips.vgg16_shapes(), sep="/")}
    # One device, as a vmapped axis.
    on_one = jax.vmap(spec.step(spec.networks), axis_name="batch", in_axes=(None, 0, None))
    counted = by_xla(on_one, state, {"image": array(1, 16, 32, 32, 1)}, vgg16)
    per_image = flops.count_autoencoder_step(spec.networks, (32, 32, 1), spec.code_shape, bool(r1))
    assert 0.99 < 16 * per_image / counted <= 1


@pytest.mark.parametrize("name", ["released", "dit"])
def test_the_priors_training_step_within_three_percent(tiny_config, name):
    changes = {"data.num_classes": 10, "prior.network.width": 1024, "prior.train.accumulate": 1}
    changes["prior.network.name"] = name
    spec, num = resolve(tiny_config).change(changes).prior, 64
    network, code = spec.prior.network, spec.prior.code_shape
    on_one = jax.vmap(spec.step(encode=None), axis_name="batch", in_axes=(None, 0, None))
    batch = {
        "probs": array(1, num, *code, dtype=jnp.uint8),
        "label": array(1, num, dtype=jnp.int32),
    }
    state = jax.eval_shape(functools.partial(spec.init_state, 0))
    counted = by_xla(on_one, state, batch, None)
    ours = num * 3 * flops.count_network(network, code, True)
    assert 0.97 < ours / counted <= 1


def test_a_sample_is_its_calls_of_the_network(tiny_config):
    changes = {"data.num_classes": 10, "sample.guidance_interval": (0.0, 0.5)}
    experiment = resolve(tiny_config).change({**changes, "sample.corrector_steps": 2})
    prior, model = experiment.prior.prior, experiment.autoencoder.networks.autoencoder
    with_label, without = (
        flops.count_network(prior.network, prior.code_shape, labelled) for labelled in (True, False)
    )
    # Of four steps, at t/T of 1, 3/4, 1/2 and 1/4, the last two are guided. A step's two
    # correctors come after it, at the guidance of the next; none after the last.
    expected = (4 + 3 * 2) * with_label + 2 * (1 + 2) * without
    expected += flops.count_decoding(model, prior.code_shape)
    work = workloads.sample_work(experiment, 8, 2)
    assert work.flops == 2 * expected and work.xla_flops is None
