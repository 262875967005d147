"""A config that cannot be trained is refused at once, in a sentence with its numbers."""

import jax
import pytest

from binlatent import checks, stages
from binlatent.configs import default
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint


def changed(overrides):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config


def test_the_defaults_are_accepted():
    checks.check(default.get_config())


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            {"data.image_size": 250},
            r"image_size is 250, which the downsampling of config.autoencoder, 16 \(patch 1, "
            r"5 levels\), does not divide",
        ),
        ({"autoencoder.patch": 3}, "downsampling of config.autoencoder, 48"),
        (
            {"autoencoder.attention_resolutions": (16, 20)},
            "attention_resolutions names 20, but the levels of an image of 256 have the sides "
            "256, 128, 64, 32, 16",
        ),
        ({"autoencoder.num_bits": 0}, "autoencoder.num_bits must be at least 1, not 0"),
        ({"autoencoder.codebook_size": 0}, "codebook_size must be at least 1"),
        ({"autoencoder.patch": 0}, "patch must be at least 1"),
        ({"autoencoder.train.accumulate": 0}, "autoencoder.train.accumulate must be at least 1"),
        ({"prior.train.accumulate": -1}, "prior.train.accumulate must be at least 0, not -1"),
        ({"autoencoder.multipliers": ()}, r"multipliers must have at least one entry"),
        ({"autoencoder.multipliers": (1, 0)}, r"each at least 1, not \(1, 0\)"),
        ({"autoencoder.base_width": 48}, "multiples of the 32 groups of a norm, not 48"),
        (
            {"autoencoder.norm_first": True, "autoencoder.embedding_width": 40},
            "embedding_width if norm_first, must be multiples of the 32 groups of a norm, not 40",
        ),
        ({"autoencoder.num_blocks": 0}, "attention_resolutions needs num_blocks of at least 1"),
        ({"autoencoder.num_blocks": -1}, "num_blocks must be at least 0, not -1"),
        ({"autoencoder.bottleneck": "bits"}, '"binary", "vq" or "real", not \'bits\''),
        ({"autoencoder.loss.entropy": -0.1}, "loss.entropy must be at least 0, not -0.1"),
        (
            {"autoencoder.loss.mse": 0.0, "autoencoder.loss.perceptual": 0.0},
            "one of mse, l1 and perceptual must be above 0",
        ),
        ({"on_nonfinite": "ignore"}, 'on_nonfinite must be "stop" or "skip", not \'ignore\''),
        ({"autoencoder.discriminator.norm": "layer"}, "must be batch or group, not 'layer'"),
        (
            {"autoencoder.discriminator.augment": ("colour", "cutout")},
            "knows colour and translation, not 'cutout'",
        ),
        (
            {
                "data.image_size": 16,
                "autoencoder.multipliers": (1,),
                "autoencoder.loss.perceptual": 0.0,
            },
            "An image of 16 is too small for config.autoencoder.discriminator.num_layers = 3",
        ),
        (
            {
                "data.image_size": 12,
                "autoencoder.multipliers": (1,),
                "autoencoder.attention_resolutions": (),
                "autoencoder.loss.adversarial": 0.0,
            },
            "loss.perceptual needs images of at least 16 pixels a side, not 12",
        ),
    ],
)
def test_is_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        checks.check(changed(overrides))


@pytest.mark.parametrize("accumulate, batch_size", [(1, 6), (3, 8), (4, 8)])
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_a_batch_must_split(tiny_config, tmp_path, stage, accumulate, batch_size):
    tiny_config[stage].train.update(accumulate=accumulate, batch_size=batch_size)
    devices = jax.device_count()
    parts = "" if accumulate == 1 else f", each in {accumulate} parts"
    sentence = f"{batch_size}, must be a multiple of {accumulate * devices}: {devices} devices"
    setup = {"autoencoder": stages.setup_autoencoder, "prior": stages.setup_prior}[stage]
    with pytest.raises(UserError, match=sentence + parts):
        setup(tiny_config, tmp_path)


def test_a_batch_must_split_on_one_device_too(tiny_config, monkeypatch):
    tiny_config.prior.train.update(accumulate=3, batch_size=8)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"8, must be a multiple of 3: 1 device, each in 3 parts"):
        stages.check_batch(tiny_config, "prior")


def test_the_perceptual_loss_asks_for_its_file_before_any_work(tiny_config, tmp_path):
    tiny_config.data.path = "there is no such folder, and it is not looked for"
    tiny_config.autoencoder.loss.perceptual = 1.0
    tiny_config.autoencoder.loss.vgg16 = str(tmp_path / "vgg16.npz")
    with pytest.raises(UserError) as error:
        stages.setup_autoencoder(tiny_config)
    for part in (
        str(tmp_path / "vgg16.npz"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out",
        "--config.autoencoder.loss.perceptual=0",
    ):
        assert part in str(error.value)


def test_a_prior_is_over_bits(tiny_config, tmp_path):
    tiny_config.autoencoder.bottleneck = "vq"
    with pytest.raises(UserError, match="The prior is over bits.*not 'vq'"):
        stages.setup_prior(tiny_config, tmp_path)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"autoencoder.loss.adversarial": 0.0}, "adversarial = 1.0, so it cannot go on with 0.0"),
        (
            {"autoencoder.discriminator.width": 32},
            "discriminator.width was 64 and cannot become 32",
        ),
        ({"autoencoder.num_bits": 16}, "num_bits is 32 there and 16 here"),
        ({"data.name": "digits"}, "data.name = 'folder', not 'digits'"),
        ({"data.texts": True}, "data.texts = False, not True"),
        ({"data.image_size": 128, "seed": 1}, "data.image_size is 256 there and 128 here"),
    ],
)
def test_training_goes_on_with_the_networks_it_began_with(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        checks.check_same_data(changed(overrides), default.get_config(), "autoencoder")
        checks.check_resumable(changed(overrides), default.get_config(), "autoencoder")


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_what_is_safe_may_change_on_the_way(stage):
    overrides = {
        **{f"{name}.train.num_steps": 7 for name in ("autoencoder", "prior")},
        **{f"{name}.train.learning_rate": 1e-5 for name in ("autoencoder", "prior")},
        **{f"{name}.train.decay": "cosine" for name in ("autoencoder", "prior")},
        **dict(log_every=1, preview_every=2, checkpoint_every=3, keep_checkpoints=4),
        **{"on_nonfinite": "skip", "debug_nans": True, "sample.steps": 8, "data.path": "moved"},
    }
    checks.check_resumable(changed(overrides), default.get_config(), stage)


def test_a_prior_goes_on_with_the_network_it_began_with():
    overrides = {"prior.num_layers": 12, "prior.schedule": "cos", "prior.label_dropout": 0.2}
    with pytest.raises(UserError) as error:
        checks.check_resumable(changed(overrides), default.get_config(), "prior")
    for part in ("num_layers is 24 there and 12 here", "schedule is linear there and cos here"):
        assert f"prior.{part}" in str(error.value)
    assert "label_dropout" not in str(error.value)
    checks.check_resumable(changed(overrides), default.get_config(), "autoencoder")


def test_weights_of_losses_may_change_on_the_way():
    overrides = {"autoencoder.loss.adversarial": 0.5, "autoencoder.loss.start_step": 7}
    overrides["autoencoder.codebook_size"] = 7  # which bits do not have
    checks.check_resumable(changed(overrides), default.get_config(), "autoencoder")
    checks.check_resumable(changed(overrides), default.get_config(), "prior")


def test_a_checkpoint_from_before_a_key_of_training_can_be_used():
    content = default.get_config().to_dict()
    del content["prior"]["train"]["accumulate"], content["prior"]["cudnn"]
    config = checkpoint.as_config(content)
    checks.check_stored(config, "runs/x/prior")
    assert config.prior.train.accumulate == 1 and config.prior.cudnn is True


def test_a_checkpoint_of_another_version_is_said_to_be_one():
    config = default.get_config().unlock()
    checks.check_stored(config, "runs/x/prior")
    del config.prior.condition
    with pytest.raises(UserError, match=r"runs/x/prior was written by .* no prior\.condition"):
        checks.check_stored(config, "runs/x/prior")
