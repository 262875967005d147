"""Names and shapes of the authors' layout, and conversion to ours and back without loss."""

import jax
import numpy as np
import pytest
import reference

from binlatent.configs import default
from binlatent.convert import hyperparameters, released
from binlatent.experiment import resolve
from binlatent.runtime.errors import UserError


def experiment_of(name, **changes):
    """The experiment of a reference checkpoint; for a prior, with an autoencoder that fits."""
    like = name if name in reference.AUTOENCODERS else "ae_c16"
    values = {**hyperparameters.of_autoencoder(checkpoint(like), 32), "data.num_classes": 0}
    if name in reference.PRIORS:
        values |= {**hyperparameters.of_prior(checkpoint(name)), "prior.network.num_heads": 4}
        del values["tokens"], values["num_bits"]
    return resolve(default.get_config("released")).change({**values, **changes})


def autoencoder_of(name, **changes):
    return experiment_of(name, **changes).autoencoder


def prior_of(name, **changes):
    changes = {f"prior.bernoulli.{key}": value for key, value in changes.items()}
    return experiment_of(name, **changes).prior


def checkpoint(name, change=None):
    state = {**reference.state(name), **(change or {})}
    what = "autoencoder" if name in reference.AUTOENCODERS else "prior"
    return released.Checkpoint({k: x for k, x in state.items() if x is not None}, what)


def shapes(state):
    return {name: list(x.shape) for name, x in state.items()}


@pytest.mark.parametrize("name", reference.AUTOENCODERS)
def test_an_autoencoder_survives_the_round_trip(name):
    found, spec = checkpoint(name), autoencoder_of(name)
    params, discriminator = released.read_autoencoder(found, spec)
    assert found.unused(released.AUTOENCODER_UNUSED) == {
        "ae.generator.logsigma": 4,
        "conv_out of equal widths": 16 + 6 * (name != "ae_c16"),
        "num_batches_tracked": 3,
    }
    again = released.autoencoder_state(spec, params, discriminator)
    assert shapes(again) == reference.SHAPES[name]
    for key, x in reference.state(name).items():  # unused tensors are 0 in both
        assert again[key].dtype == x.dtype
        if "num_batches_tracked" not in key:  # a counter that is never read
            np.testing.assert_array_equal(again[key], x)


@pytest.mark.parametrize("name", reference.PRIORS)
def test_a_prior_survives_the_round_trip(name):
    found, spec, state = checkpoint(name), prior_of(name), reference.state(name)
    params = released.read_prior(found, spec)
    assert set(found.unused(released.PRIOR_UNUSED)) == {"scheduler", "embedding_weight"}
    again = released.prior_state(spec, params, state["embedding_weight"])
    assert shapes(again) == reference.SHAPES[name]
    for key, x in state.items():
        np.testing.assert_allclose(again[key], x, rtol=0, atol=1e-6 * key.startswith("scheduler."))


def test_kernels_are_transposed():
    # Kernels are transposed in all dimensions: a wrong order would change the numbers.
    params = released.read_prior(checkpoint("prior_uncond"), prior_of("prior_uncond"))["params"]
    state = reference.state("prior_uncond")
    kernel = params["blocks_1"]["attn"]["qkv"]["kernel"]
    assert kernel[3, 100] == state["_denoise_fn.blocks.1.attn.qkv.weight"][100, 3]
    assert params["tok_emb"]["kernel"][3, 5] == state["_denoise_fn.tok_emb.weight"][3, 5]
    params, critic = released.read_autoencoder(checkpoint("ae_c16"), autoencoder_of("ae_c16"))
    state = reference.state("ae_c16")
    kernel = params["params"]["decoder"]["blocks_8"]["conv1"]["kernel"]
    assert kernel[0, 2, 5, 7] == state["ae.generator.blocks.8.conv1.weight"][7, 5, 0, 2]
    kernel = params["params"]["encoder"]["blocks_6"]["q"]["kernel"]
    assert kernel[5, 7] == state["ae.encoder.blocks.6.q.weight"][7, 5, 0, 0]
    assert critic["batch_stats"]["main_3"]["var"][2] == state["disc.main.3.running_var"][2]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("ae_c16", {"ae.encoder.blocks.1.conv2.bias": None}, r"lacks ae\.encoder\..*conv2\.bias"),
        ("ae_c16", {"disc.main.8.weight": np.zeros((1, 2, 3, 4))}, r"of disc\.main\.8\.weight is"),
        ("ae_c16", {"ae.surprise": np.zeros(1)}, r"it also holds ae\.surprise"),
        ("ae_c16", {"ae.quantize.proj.0.bias": np.full(16, np.nan)}, r"proj\.0\.bias has a NaN"),
        ("prior_class", {"_denoise_fn.ln_f.bias": None}, r"it lacks _denoise_fn\.ln_f\.bias"),
        ("prior_class", {"_denoise_fn.head.bias": np.zeros(9)}, r"bias is \(9,\), not \(16,\)"),
        ("prior_class", {"optimizer": np.zeros(9)}, "it also holds optimizer"),
        (
            "prior_class",
            {"_denoise_fn.head.bias": np.zeros(16, int)},
            "has the type int64, not that of",
        ),
        (
            "prior_class",
            {"_denoise_fn.head.bias": np.zeros(16, complex)},
            "not that of real numbers",
        ),
        ("ae_c16", {"ae.generator.logsigma.0.weight_x": np.zeros(1)}, "also holds .*weight_x"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(name, change, message):
    found, experiment = checkpoint(name, change), experiment_of(name)
    with pytest.raises(UserError, match=f"not fit the authors' .*: .*{message}"):
        if name in reference.AUTOENCODERS:
            released.read_autoencoder(found, experiment.autoencoder)
            found.unused(released.AUTOENCODER_UNUSED)
        else:
            released.read_prior(found, experiment.prior)
            found.unused(released.PRIOR_UNUSED)


def test_weights_saved_from_several_gpus_are_the_same():
    state = {f"module.{key}": x for key, x in reference.state("prior_class").items()}
    found = released.Checkpoint(state, "prior")
    assert found.left.keys() == reference.SHAPES["prior_class"].keys()


def test_lpips_in_a_checkpoint_is_not_used():
    found = checkpoint("ae_c16", {"perceptual.net.slice1.0.weight": np.zeros(3)})
    released.read_autoencoder(found, autoencoder_of("ae_c16"))
    assert found.unused(released.AUTOENCODER_UNUSED)["perceptual"] == 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("autoencoder.patch", 2, r"autoencoder\.patch = 2"),
        ("autoencoder.bottleneck", "vq", "has only the bottleneck binary, not 'vq'"),
    ],
)
def test_what_their_code_lacks_is_not_exported(key, value, message):
    spec = autoencoder_of("ae_c16", **{key: value})
    with pytest.raises(UserError, match=message):
        released.autoencoder_state(spec, reference.zeros(spec), {})


def test_a_prior_of_z_s_is_not_exported():
    spec = prior_of("prior_uncond", target="z_s", evidence=False)
    with pytest.raises(UserError, match='cannot sample a prior with the target "z_s"'):
        released.prior_state(spec, reference.zeros(spec), np.zeros((16, 64)))


@pytest.mark.parametrize("schedule", ["linear", "cos", "sigmoid"])
def test_the_buffers_of_a_schedule_are_theirs(schedule):
    spec = prior_of("prior_uncond", schedule=schedule)
    state = released.prior_state(spec, reference.zeros(spec), np.zeros((16, 64)))
    golden = np.load("tests/data/schedules.npz")
    for theirs, name in (("k_final", "k"), ("b_final", "b"), ("beta", "keep")):
        expected = golden[f"{schedule}_64_{name}"]
        np.testing.assert_allclose(state[f"scheduler.{theirs}"], expected, atol=1e-6)
    beta = state["scheduler.beta"]
    np.testing.assert_allclose(state["scheduler.cumbeta"], np.cumprod(beta), atol=1e-6)


def test_a_custom_schedule_is_exported_with_the_weights():
    keep = (1.0, 0.5, 0.25, 0.125)
    changes = {"num_timesteps": 3, "schedule": "given", "keep": keep}
    changes = {f"prior.bernoulli.{key}": value for key, value in changes.items()}
    spec = experiment_of("prior_uncond", **changes, **{"sample.steps": 3}).prior
    state = released.prior_state(spec, reference.zeros(spec), np.zeros((16, 64)))
    np.testing.assert_array_equal(state["scheduler.k_final"], np.float32(keep))
    np.testing.assert_array_equal(state["scheduler.beta"], np.float32([1, 0.5, 0.5, 0.5]))


def test_a_prior_trained_here_has_their_names(tiny_config):
    """The class-conditional prior of the digits has the layout of the reference checkpoint."""
    spec = resolve(tiny_config).change({"data.num_classes": 10}).prior
    state = released.prior_state(spec, spec.init(jax.random.key(0)), np.zeros((8, 16)))
    expected = {
        key for key in reference.SHAPES["prior_class"] if ".blocks." not in key or "blocks.0" in key
    }
    assert state.keys() == expected
