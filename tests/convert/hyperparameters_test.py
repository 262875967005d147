"""Inferring networks from the names and shapes of the authors' checkpoints."""

import numpy as np
import pytest
import reference

from binlatent.configs import default
from binlatent.convert import hyperparameters, released
from binlatent.experiment import resolve
from binlatent.priors import schedules
from binlatent.runtime.errors import UserError

AUTOENCODER = {
    "data.image_size": 32,
    "data.channels": 3,
    "autoencoder.base_width": 32,
    "autoencoder.multipliers": (1, 1, 2),
    "autoencoder.num_blocks": 1,
    "autoencoder.attention_resolutions": (8,),
    "autoencoder.embedding_width": 64,
    "autoencoder.norm_first": True,
    "autoencoder.discriminator.width": 16,
    "autoencoder.discriminator.num_layers": 3,
}
PRIOR = {
    "tokens": 64,
    "num_bits": 16,
    "prior.network.width": 64,
    "prior.network.num_layers": 3,
    "data.num_classes": 0,
}


def checkpoint(name, what="checkpoint", change=None):
    """A checkpoint with some tensors replaced, or removed where the value is None."""
    state = {**reference.state(name), **(change or {})}
    state = {key: x for key, x in state.items() if x is not None}
    return released.Checkpoint(state, what)


@pytest.mark.parametrize("name, bits, depth", [("ae_c16", 16, 1), ("ae_c24_genmul2", 24, 2)])
def test_autoencoders(name, bits, depth):
    expected = {"autoencoder.num_bits": bits, "autoencoder.decoder_depth": depth}
    assert hyperparameters.of_autoencoder(checkpoint(name), 32) == {**AUTOENCODER, **expected}


@pytest.mark.parametrize(
    "name, more",
    [
        ("prior_uncond", {}),
        ("prior_class", {"prior.condition": "class", "data.num_classes": 10}),
        ("prior_text_token", {"prior.condition": "text_token", "prior.text_width": 768}),
        ("prior_text_cross", {"prior.condition": "text_cross", "prior.text_width": 32}),
    ],
)
def test_priors(name, more):
    found = checkpoint(name)
    assert hyperparameters.of_prior(found) == {**PRIOR, **more}
    assert hyperparameters.find_schedule(found) == ("linear", 64)


def released_with(changes):
    """The experiment of the variant `released` with other values."""
    return resolve(default.get_config("released")).change(changes)


def layout(**changes):
    """A state dict of zeros for another architecture, given by config keys."""
    experiment = released_with({"data.image_size": 64, "data.num_classes": 0, **changes})
    spec = experiment.autoencoder
    return experiment, released.autoencoder_state(spec, reference.zeros(spec), {})


@pytest.mark.parametrize(
    "changes",
    [
        {"multipliers": (1,), "num_blocks": 1, "attention_resolutions": ()},
        {"multipliers": (1, 2, 4), "num_blocks": 3, "attention_resolutions": (32, 16)},
        {"multipliers": (2, 2), "num_blocks": 2, "decoder_depth": 1.5, "norm_first": False},
        {"multipliers": (1, 1, 2, 2, 4), "num_blocks": 2, "decoder_depth": 3.0},  # C128's
    ],
)
def test_other_architectures_are_recovered(changes):
    small = {"base_width": 32, "embedding_width": 32, "num_bits": 5, "attention_resolutions": ()}
    small = {f"autoencoder.{name}": value for name, value in {**small, **changes}.items()}
    experiment, state = layout(**small)
    found = hyperparameters.of_autoencoder(released.Checkpoint(state, "x"), 64)
    section = {k.split(".")[1]: v for k, v in found.items() if k.startswith("autoencoder.")}
    assert section == {name: experiment.content["autoencoder"][name] for name in section}
    assert "discriminator.width" not in found and len(section) == 8


def test_errors_name_the_tensor_that_does_not_fit():
    weight = np.zeros((32, 32, 3, 3), np.float32)
    cases = [
        ("ae_c16", {"ae.encoder.blocks.0.weight": None}, r"lacks ae\.encoder\.blocks\.0\.weight"),
        ("ae_c16", {"ae.encoder.blocks.0.weight": np.zeros(3)}, r"\(3,\), but must have 4"),
        ("ae_c16", {"ae.encoder.blocks.10.weight": None}, r"blocks\.10\.weight"),
        (
            "ae_c16",
            {"ae.encoder.blocks.12.weight": weight},
            "of ae.encoder have an unknown order",
        ),
        ("ae_c16", {"ae.generator.blocks.13.weight": weight}, "of ae.generator"),
        ("prior_class", {}, r"lacks ae\.encoder\.blocks\.0\.weight"),
    ]
    for name, change, message in cases:
        with pytest.raises(UserError, match=f"not fit the authors' autoencoder: .*{message}"):
            hyperparameters.of_autoencoder(checkpoint(name, "autoencoder", change), 32)
    with pytest.raises(UserError, match=r"authors' prior: it lacks _denoise_fn\.tok_emb\.weight\."):
        hyperparameters.of_prior(checkpoint("ae_c16", "prior"))


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("num_timesteps", [16, 64, 256])
def test_a_schedule_is_recognised_by_its_values(name, num_timesteps):
    keep = np.load("tests/data/schedules.npz").get(f"{name}_{num_timesteps}_k")
    if keep is None:
        keep = schedules.keep_schedule(name, num_timesteps)
    found = released.Checkpoint({"scheduler.k_final": np.float32(keep)}, "prior")
    assert hyperparameters.find_schedule(found) == (name, num_timesteps)


def test_an_unknown_schedule_or_none():
    found = released.Checkpoint({"scheduler.k_final": np.float32([1, 0.5, 0.25, 0.125])}, "prior")
    assert hyperparameters.find_schedule(found) == ((1.0, 0.5, 0.25, 0.125), 3)
    assert hyperparameters.find_schedule(released.Checkpoint({}, "prior")) is None


def test_flags_describe_the_released_models():
    changes = {"autoencoder.num_bits": 128, "autoencoder.decoder_depth": 3.0, "data.num_classes": 0}
    words = hyperparameters.describe_as_flags(released_with(changes), has_prior=True)
    for flag in (
        *("--codebook_size 128", "--latent_shape 1 16 16", "--ch_mult 1 1 2 2 4", "--gen_mul 3.0"),
        *("--nf 128", "--emb_dim 256", "--total_steps 64", "--norm_first", "--p_flip"),
        *("--sampler bld", "--dataset custom", "--focal -1", "--loss_final mean", "--ndf 64"),
    ):
        assert flag in words
    assert "--use_tanh" not in words and "--cross" not in words
    changes |= {"prior.condition": "text_cross", "autoencoder.signed": True}
    changes |= {"prior.bernoulli.evidence": False, "prior.bernoulli.pair": "balanced_plugin"}
    words = hyperparameters.describe_as_flags(released_with(changes), has_prior=True)
    assert "--dataset laion" in words and "--cross" in words and "--focal 0" in words
    assert "--use_tanh" in words
    changes |= {"prior.condition": "class", "data.num_classes": 10}
    words = hyperparameters.describe_as_flags(released_with(changes), has_prior=True)
    assert "--dataset imagenet" in words and "--cross" not in words
    changes |= {"autoencoder.loss.adversarial": 0.0}  # no discriminator to describe
    words = hyperparameters.describe_as_flags(released_with(changes), has_prior=False)
    assert "bert" not in words and "--ndf" not in words


@pytest.mark.parametrize("blocks, depth", [(7, 61), (11, 15), (13, 15), (2, 6), (3, 1), (0, 0)])
def test_every_depth_of_a_decoder_is_recovered(blocks, depth):
    assert int(blocks * hyperparameters.depth_ratio(depth, blocks)) == depth


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("ae_c16", {"disc.main.8.weight": None}, r"it lacks disc\.main\.8\.weight"),
        ("ae_c16", {"disc.main.11.weight": None}, r"it lacks disc\.main\.11\.weight"),
        ("ae_c16", {"disc.main.12.weight": np.zeros(3)}, "layers of disc.main have an unknown"),
        ("ae_c16", {"ae.encoder.blocks.0.weight": np.zeros((0, 3, 3, 3))}, r"\(0, 3, 3, 3\)"),
        ("ae_c16", {"ae.encoder.blocks.3": ...}, r"it lacks ae\.encoder\.blocks\.3"),
        ("prior_class", {"_denoise_fn.tok_emb.weight": np.zeros((16, 0))}, r"\(16, 0\)"),
        ("prior_class", {"_denoise_fn.blocks.1": ...}, r"it lacks _denoise_fn\.blocks\.1"),
        ("prior_class", {"_denoise_fn.blocks": ...}, r"it lacks _denoise_fn\.blocks\.0"),
        (
            "prior_class",
            {"scheduler.k_final": np.ones(1)},
            "k_final is not a schedule: .*two or more",
        ),
        (
            "prior_class",
            {"scheduler.k_final": np.ones(3)},
            "k_final is not a schedule: .*fall strict",
        ),
    ],
)
def test_missing_or_unexpected_tensors_are_named(name, change, message):
    state = reference.state(name)
    for key, x in change.items():
        if x is ...:  # all names with this prefix
            state = {k: v for k, v in state.items() if not k.startswith(f"{key}.")}
        else:
            state[key] = x
    found = released.Checkpoint({k: x for k, x in state.items() if x is not None}, "checkpoint")
    with pytest.raises(UserError, match=message):
        if name == "ae_c16":
            changes = hyperparameters.of_autoencoder(found, 32)
            released.read_autoencoder(found, released_with(changes).autoencoder)
        else:
            hyperparameters.of_prior(found)
            hyperparameters.find_schedule(found)
