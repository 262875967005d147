"""From configs to experiments: the paper's configs, refused values, and changes on resuming."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from binlatent import stages
from binlatent.configs import default, digits, workdir
from binlatent.experiment import of_checkpoint, resolve, resume
from binlatent.experiment.resume import check_same_model
from binlatent.experiment.sizes import describe_stage, size_warning
from binlatent.pipeline.loading import load_stage
from binlatent.priors.dit import DiT
from binlatent.priors.kinds import KINDS
from binlatent.priors.prior import Prior, Settings
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints
from binlatent.training.state import create_state

# Configs of the paper, and the shapes of their codes.
CODES = {
    "default": (16, 16, 32),
    "churches256": (16, 16, 32),
    "bedrooms256": (16, 16, 32),
    "ffhq256": (16, 16, 32),
    "celebahq256": (16, 16, 32),
    "imagenet256": (16, 16, 64),
    "ffhq1024": (32, 32, 64),
    "celebahq1024": (32, 32, 64),
}

# Configs for small images, and the shapes of theirs.
STARTERS = {
    "images32": (8, 8, 32),
    "images64": (8, 8, 48),
    "cifar10": (8, 8, 32),
}


def load(name, *variant):
    return importlib.import_module(f"binlatent.configs.{name}").get_config(*variant)


def changed(overrides, config=None):
    config = config or default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config


def resolved(overrides=()):
    return resolve(changed(dict(overrides)))


# The paper's


def test_every_config_is_tested():
    files = {path.stem for path in Path("configs").glob("*.py")} - {
        "__init__",
        "digits",
        "emoji64",
        "workdir",
    }
    assert files == set(CODES) | set(STARTERS)


@pytest.mark.parametrize("variant", ["paper", "released", "modern"])
@pytest.mark.parametrize("name", CODES)
def test_a_config_of_the_paper(name, variant):
    experiment = resolve(load(name, variant))
    prior, modern = experiment.prior.prior, variant == "modern"
    assert isinstance(prior.network, DiT if modern else Transformer)
    assert prior.target == ("z_0" if modern else "flip")
    spec = experiment.autoencoder
    assert spec.code_shape == CODES[name]
    train, loss = spec.train, spec.objective
    if variant != "released":
        assert (train.learning_rate, train.warmup_steps, train.batch_size) == (5e-4, 10_000, 8)
        assert (loss.mse, loss.l1, loss.perceptual, loss.adversarial) == (1, 0, 1, 1)
        assert not loss.adaptive
    else:
        assert (loss.mse, loss.l1, loss.perceptual, loss.adversarial) == (0, 1, 1, 1)
        assert loss.adaptive and spec.networks.autoencoder.decoder.norm_first


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match=":paper, :released or :modern, not :realesed"):
        load("churches256", "realesed")


def test_the_released_layout_has_the_size_of_its_weights():
    # Of the authors' autoencoder for 256x256, without the shortcuts and the head it never uses:
    # counted by hand from its blocks, encoder and decoder.
    def residual(a, b):
        return 2 * (a + b) + 9 * b * (a + b) + 2 * b + (a * b + b if a != b else 0)

    def attention(a):
        return 2 * a + 4 * (a * a + a)

    middle = 2 * residual(512, 512) + attention(512)
    levels = [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    down = sum(residual(a, b) + residual(b, b) for a, b in levels) + 2 * attention(512)
    halvings = sum(9 * a * a + a for a in (128, 128, 256, 256))
    encoder = 9 * 3 * 128 + 128 + down + halvings + middle + 1024 + 9 * 512 * 256 + 256
    up_levels = [(512, 512), (512, 256), (256, 256), (256, 128), (128, 128)]
    up = sum(residual(a, b) + residual(b, b) for a, b in up_levels) + 2 * attention(512)
    doublings = sum(9 * a * a + a for a in (512, 256, 256, 128))
    decoder = 512 + 9 * 256 * 512 + 512 + middle + up + doublings + 256 + 9 * 128 * 3 + 3
    bits = 256 * 32 + 32 + 32 * 256
    spec = resolve(load("churches256", "released")).autoencoder
    params = jax.eval_shape(spec.init, jax.random.key(0))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == encoder + decoder + bits


# Starters, and the sizes that a stage prints


@pytest.mark.parametrize("name", STARTERS)
def test_a_starter_needs_nothing_but_images(name):
    experiment = resolve(load(name))
    networks = experiment.autoencoder.networks
    assert experiment.autoencoder.code_shape == STARTERS[name]
    assert networks.lpips is None and networks.discriminator is None
    assert experiment.data.channels == 3 and not size_warning(experiment)


def test_cifar10_may_be_a_folder():
    data = resolve(load("cifar10")).data
    assert (data.name, data.num_classes, data.image_size) == ("cifar10", 10, 32)
    config = changed({"data.name": "folder", "data.path": "images"}, load("cifar10"))
    assert resolve(config).data.num_classes == 10


def test_a_stage_says_its_sizes():
    # 32 * 32 * 3 * 8 bits of an image, 8 * 8 * 32 of a code; 10,000 steps of 32.
    experiment = resolve(load("images32"))
    assert describe_stage(experiment, "autoencoder", 1_249_999) == (
        "autoencoder: 32x32 images, 8x8 tokens of 32 bits (2,048 bits per image, from 24,576), "
        "1.2 million parameters, 320,000 images in 10,000 steps"
    )
    own = {"prior.kind": "absorbing", "prior.train.num_steps": 2, "prior.train.batch_size": 4}
    assert describe_stage(experiment.change(own), "prior", 999_999) == (
        "prior: absorbing, 8x8 tokens of 32 bits (2,048 bits per image), 999,999 parameters, "
        "8 images in 2 steps"
    )
    own["prior.train.num_steps"] = 1
    assert describe_stage(experiment.change(own), "prior", 1).endswith(", 4 images in 1 step")


@pytest.mark.parametrize("num, said", [(0, "no classes"), (1, "1 class"), (2, "2 classes")])
def test_the_classes_of_the_images_are_counted(tiny_experiment, caplog, num, said):
    caplog.set_level("INFO", "binlatent")
    ignoring = tiny_experiment.change({"data.num_classes": 0})
    stages.with_classes(ignoring, SimpleNamespace(examples=[0] * 3, num_classes=num, classes=()))
    assert caplog.messages == [f"3 training images, {said}"]


@pytest.mark.parametrize(
    "overrides, tokens",
    [
        (
            {"bottleneck": "vq", "codebook_size": 1024},
            "16x16 tokens of 10 bits (2,560 bits per image",
        ),
        ({"bottleneck": "vq", "codebook_size": 3}, "16x16 tokens of 1.58 bits (406 bits per image"),
        ({"num_bits": 4_096}, "16x16 tokens of 4,096 bits (1,048,576 bits per image"),
    ],
)
def test_bits_of_any_bottleneck(overrides, tokens):
    experiment = resolved({f"autoencoder.{key}": value for key, value in overrides.items()})
    assert f"256x256 images, {tokens}, from 1,572,864)" in describe_stage(
        experiment, "autoencoder", 1
    )


def test_a_coarse_grid_is_warned_of():
    # The paper's downsampling is 16.
    warning = size_warning(resolved({"data.image_size": 32}))
    assert "Images of 32x32 become 2x2 tokens of 16x16 pixels. A grid below 4x4" in warning
    assert "fewer levels in config.autoencoder.multipliers" in warning and "images32" in warning
    plain = {"data.image_size": 48, "autoencoder.attention_resolutions": ()}
    assert "3x3 tokens" in size_warning(resolved(plain))
    assert not size_warning(resolved({"data.image_size": 64}))
    assert not size_warning(resolve(digits.get_config()))  # 4x4


def test_a_code_as_large_as_its_image_is_warned_of():
    # A token is for 2 * 2 pixels of 3 * 8 bits.
    config = load("images32")
    config.autoencoder.patch = 2
    assert not size_warning(resolve(changed({"autoencoder.num_bits": 95}, config)))
    warning = size_warning(resolve(changed({"autoencoder.num_bits": 96}, config)))
    assert "A code has 24,576 bits and an image 24,576, at 8 bits per channel" in warning
    assert "lower config.autoencoder.num_bits" in warning
    real = changed({"autoencoder.bottleneck": "real", "autoencoder.num_channels": 96}, config)
    assert not size_warning(resolve(real))  # its float32 values are not bits of a code


def test_a_coarse_grid_with_too_many_bits_has_both_warnings():
    # 2 * 2 tokens of 6,144 bits; an image of 32 * 32 * 3 * 8 = 24,576.
    both = {"data.image_size": 32, "autoencoder.num_bits": 6_144}
    grid, _, bits = size_warning(resolved(both)).partition("See docs/sizes.md. ")
    assert "2x2 tokens" in grid and bits.startswith("A code has 24,576 bits")
    assert "multipliers" not in bits  # the grid must not become coarser


def test_the_warning_comes_before_any_work(tmp_path, caplog):
    experiment = resolved({"data.image_size": 32, "autoencoder.loss.vgg16": str(tmp_path / "no")})
    with pytest.raises(UserError, match="vgg16"):
        stages.train_autoencoder(experiment, tmp_path)
    assert caplog.messages == [size_warning(experiment)]


def test_both_stages_say_their_sizes_as_they_start(trained_workdir):
    said = (trained_workdir / "output.txt").read_text()
    params = {}
    for stage in ("autoencoder", "prior"):
        _, trained = load_stage(trained_workdir, stage, None)
        params[stage] = sum(x.size for x in jax.tree.leaves(trained))
    tokens, images = "4x4 tokens of 8 bits", "48 images in 6 steps"
    assert (
        f"autoencoder: 28x28 images, {tokens} (128 bits per image, from 6,272), "
        f"{params['autoencoder']:,} parameters, {images}\n"
    ) in said
    prior = f"prior: bernoulli, {tokens} (128 bits per image), {params['prior']:,} parameters"
    assert f"{prior}, {images}\n" in said
    assert "A grid below" not in said


# Fields of an experiment


def flat(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def other(value):
    """Returns another value of the type of a key."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.25
    return value + "other" if isinstance(value, str) else (*value, 1)


# Keys of one bottleneck only.
OWNERS = {
    "vq": ("codebook_size", "codebook_width"),
    "real": ("num_channels", "variational"),
}


def kind_of(name):
    """Returns the first kind of prior that takes a key, or the first of all."""
    *sections, key = name.split(".")
    for kind, prior in KINDS.items():
        fields = [field.name for field in dataclasses.fields(prior.Settings)]
        if name == f"prior.{kind}.{key}" or (sections == ["sample"] and key in fields):
            return kind
    return next(iter(KINDS))


@pytest.mark.parametrize("name", dict(flat(default.get_config().to_dict())))
def test_every_key_is_read(name):
    # Another value gives another experiment, or is refused.
    owner = next((x for x, keys in OWNERS.items() if name.split(".")[-1] in keys), "binary")
    base = {"autoencoder.bottleneck": owner, "prior.kind": kind_of(name)}
    if name.startswith("prior.network.dit."):
        base["prior.network.name"] = "dit"
    value = dict(flat(default.get_config().to_dict()))[name]
    try:
        experiment = resolved(base | {name: other(value)})
    except UserError:
        return
    assert experiment != resolved(base)


def test_an_experiment_says_what_its_config_does():
    config = changed(
        {
            **{"seed": 7, "dtype": "bfloat16", "data.name": "digits", "data.flip": True},
            **{"data.num_classes": 12, "prior.train.num_steps": 5, "prior.train.accumulate": 3},
            **{"autoencoder.train.decay": "cosine", "prior.bernoulli.schedule": "cos"},
            **{"prior.label_dropout": 0.25, "sample.temperature": 0.7, "sample.batch_size": 9},
            **{"evaluate.metrics": ("fid", "is"), "log_every": 11, "on_nonfinite": "skip"},
            "autoencoder.discriminator.augment": ("colour",),
        }
    )
    x = resolve(config)
    assert x.seed == 7 and x.dtype == jnp.bfloat16
    assert (x.data.name, x.data.flip, x.data.image_shape) == ("digits", True, (256, 256, 3))
    networks = x.autoencoder.networks
    for dtype in (
        networks.autoencoder.encoder.levels.dtype,
        networks.autoencoder.decoder.levels.dtype,
        *(networks.discriminator.dtype, networks.lpips.dtype, x.prior.prior.network.dtype),
    ):
        assert dtype == jnp.bfloat16
    assert x.autoencoder.train.decay == "cosine" and x.prior.train.decay == "constant"
    assert (x.prior.train.num_steps, x.prior.train.accumulate) == (5, 3)
    assert x.autoencoder.objective.augment == ("colour",)
    assert x.prior.prior.schedule == "cos" and x.prior.label_dropout == 0.25
    assert x.prior.conditioning.kind == x.prior.prior.network.condition == "class"
    assert x.prior.conditioning.num_classes == x.prior.prior.network.num_classes == 12
    assert x.prior.prior.code_shape == x.autoencoder.code_shape == (16, 16, 32)
    assert (x.sample.batch_size, x.sample.settings.temperature) == (9, 0.7)
    assert x.sample.settings.pair == "plain_mixture"  # for "trained"
    assert x.evaluate.metrics == ("fid", "is")
    assert (x.run.log_every, x.run.on_nonfinite) == (11, "skip")


def test_data_without_classes_has_a_prior_without_condition():
    assert resolved({"data.num_classes": 0}).prior.conditioning.kind == "none"
    assert resolved({"data.num_classes": 0}).prior.prior.network.condition == "none"
    texts = resolved({"data.num_classes": 0, "prior.condition": "text_token"})
    assert texts.prior.conditioning.kind == "text_token"


def test_a_config_comes_back_as_it_went_in():
    config = default.get_config()
    experiment = resolve(config)
    expected = config.to_dict()
    expected["autoencoder"]["loss"]["vgg16"] = str(Path("vgg16.npz").absolute())
    assert experiment.config == expected
    # JSON has lists for tuples.
    assert resolve(json.loads(json.dumps(experiment.config))) == experiment
    experiment.config["seed"] = 5
    experiment.config["prior"]["train"]["num_steps"] = 5
    expected = config.to_dict()
    expected["autoencoder"]["loss"]["vgg16"] = str(Path("vgg16.npz").absolute())
    assert experiment.config == expected


def test_changes_are_made_to_a_copy_and_checked():
    experiment = resolved()
    other = experiment.change({"prior.train.num_steps": 5, "seed": 3})
    assert other.prior.train.num_steps == 5 and other.config["prior"]["train"]["num_steps"] == 5
    assert other.seed == 3 and other != experiment and resolved() == experiment
    with pytest.raises(UserError, match="num_steps must be at least 1, not 0"):
        experiment.change({"prior.train.num_steps": 0})
    with pytest.raises(KeyError, match="prior.train.steps"):
        experiment.change({"prior.train.steps": 5})


def test_the_number_of_classes_is_put_in_when_it_is_known():
    experiment = resolved()
    assert experiment.data.num_classes == -1
    known = experiment.with_classes(10)
    assert known.data.num_classes == known.prior.prior.network.num_classes == 10
    assert known.with_classes(10) == known and not known.prior.conditioning.names
    assert known.with_names(("a", "b")) == known  # not the names of these classes
    named = experiment.with_classes(2, ("a", "b"))
    assert named.change({"seed": 1}).prior.conditioning.names == ("a", "b")
    assert named.change({"data.num_classes": 0}).prior.conditioning.names == ()
    assert experiment.with_classes(0).prior.conditioning.kind == "none"


@dataclasses.dataclass(frozen=True)
class OwnSettings(Settings):
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class OwnPrior(Prior):
    Settings = OwnSettings
    trained = ("depth",)
    ranges = {"depth": (1, 9)}  # noqa: RUF012
    depth: int = 1


@pytest.fixture
def own_kind(monkeypatch):
    """The default config with a user's own kind of prior, and its section."""
    monkeypatch.setitem(KINDS, "own", OwnPrior)
    content = default.get_config().to_dict()
    content["prior"] |= {"kind": "own", "own": {"depth": 4}}
    return content


def test_a_kind_of_ones_own_gets_its_section_and_settings(own_kind):
    experiment = resolve(own_kind)
    prior = experiment.prior.prior
    assert isinstance(prior, OwnPrior) and prior.depth == 4
    assert prior.code_shape == (16, 16, 32) and prior.network.width == 512
    assert experiment.sample.settings == OwnSettings(keep_pixels=True, temperature=0.9)
    with pytest.raises(UserError, match=r"prior\.own\.depth must be between 1 and 9, not 10"):
        experiment.change({"prior.own.depth": 10})


def test_a_kind_of_ones_own_goes_on_as_it_began(own_kind):
    here = resolve(own_kind)
    check_same_model(here, here, "prior")
    with pytest.raises(UserError, match=r"prior\.own\.depth is 4 there and 5 here"):
        check_same_model(here.change({"prior.own.depth": 5}), here, "prior")
    with pytest.raises(UserError, match=r"prior\.kind is bernoulli there and own here"):
        check_same_model(here, resolved(), "prior")
    check_same_model(here, resolved(), "autoencoder")


# Refused values


def test_the_defaults_are_accepted():
    resolve(default.get_config())


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            {"data.image_size": 250},
            r"image_size, 250, must be a multiple of the downsampling of config.autoencoder, 16 "
            r"\(patch 1, 5 levels\)",
        ),
        ({"autoencoder.patch": 3}, "downsampling of config.autoencoder, 48"),
        (
            {"autoencoder.attention_resolutions": (16, 20)},
            "attention_resolutions has 20, but the levels of an image of side 256 have the sides "
            "256, 128, 64, 32, 16",
        ),
        ({"autoencoder.num_bits": 0}, "autoencoder.num_bits must be at least 1, not 0"),
        ({"autoencoder.codebook_size": 0}, "codebook_size must be at least 1"),
        ({"autoencoder.patch": 0}, "patch must be at least 1"),
        ({"autoencoder.train.accumulate": 0}, "autoencoder.train.accumulate must be at least 1"),
        ({"prior.train.accumulate": -1}, "prior.train.accumulate must be at least 0, not -1"),
        ({"autoencoder.multipliers": ()}, r"multipliers must have at least one entry"),
        ({"autoencoder.multipliers": (1, 0)}, r"each at least 1, not \(1, 0\)"),
        ({"autoencoder.base_width": 48}, "multiples of 32, the groups of a norm, not 48"),
        (
            {"autoencoder.norm_first": True, "autoencoder.embedding_width": 40},
            "embedding_width with norm_first, must be multiples of 32, .* not 40",
        ),
        ({"autoencoder.num_blocks": 0}, "attention_resolutions needs num_blocks of at least 1"),
        ({"autoencoder.num_blocks": -1}, "num_blocks must be between 0 and 100, not -1"),
        ({"autoencoder.decoder_depth": 101}, "decoder_depth must be between 0 and 100, not 101"),
        ({"autoencoder.bottleneck": "bits"}, '"binary", "vq" or "real", not \'bits\''),
        ({"autoencoder.loss.entropy": -0.1}, "loss.entropy must be at least 0, not -0.1"),
        ({"autoencoder.loss.mse": float("inf")}, "loss.mse must be at least 0, not inf"),
        ({"autoencoder.loss.kl": float("nan")}, "loss.kl must be at least 0, not nan"),
        ({"prior.train.max_grad_norm": float("inf")}, "prior.train.max_grad_norm must be finite"),
        ({"sample.guidance_interval": (0.0, float("nan"))}, "guidance_interval must be finite"),
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
            "An image of side 16 is too small for config.autoencoder.discriminator.num_layers = 3",
        ),
        (
            {
                "data.image_size": 12,
                "autoencoder.multipliers": (1,),
                "autoencoder.attention_resolutions": (),
                "autoencoder.loss.adversarial": 0.0,
            },
            "loss.perceptual needs images of side 16 or more, not 12",
        ),
        ({"seed": -1}, "config.seed must be between 0 and 4294967295, not -1"),
        ({"seed": 2**32}, "config.seed must be between 0 and 4294967295"),
        ({"dtype": "float16"}, 'config.dtype must be "float32" or "bfloat16", not \'float16\''),
        ({"data.image_size": 10}, "image_size must be between 11 and 16384, not 10"),
        ({"data.max_broken": 1.5}, "max_broken must be between 0 and 1, not 1.5"),
        ({"data.crop": "left"}, 'data.crop must be "centre" or "random", not \'left\''),
        ({"data.flip": True, "prior.cache_codes": True}, "Codes on disk .* train on images"),
        ({"data.crop": "random", "prior.codes": "x"}, "Codes on disk .* set data.crop"),
        ({"autoencoder.train.decay": "linear"}, 'decay must be "constant" or "cosine"'),
        ({"prior.train.decay": "linear"}, "prior.train.decay must be .*, not 'linear'"),
        ({"prior.train.ema_decay": 1.5}, "ema_decay must be between 0 and 1, not 1.5"),
        ({"prior.label_dropout": -0.1}, "label_dropout must be between 0 and 1, not -0.1"),
        ({"prior.kind": "gaussian"}, "prior.kind must be one of bernoulli, .*not 'gaussian'"),
        ({"prior.condition": "colour"}, "class, text_token, text_cross; got 'colour'"),
        ({"prior.network.num_layers": 201}, "num_layers must be between 0 and 200, not 201"),
        (
            {"prior.network.num_heads": 3},
            "multiple of 4 and of .*num_heads; got the width 512 and 3 heads",
        ),
        ({"prior.network.width": 6, "prior.network.num_heads": 1}, "width must be a multiple of 4"),
        ({"prior.network.width": 0}, "got the width 0 and 8 heads"),
        ({"prior.bernoulli.num_timesteps": 0}, "num_timesteps must be between 1 and 1000000"),
        ({"prior.bernoulli.vlb_weight": -1.0}, "vlb_weight must be at least 0, not -1.0"),
        ({"prior.bernoulli.target": "z_1"}, "target must be one of flip, z_0, z_s; got 'z_1'"),
        ({"prior.bernoulli.pair": "plugin"}, "pair must be one of plain_mixture, .*got 'plugin'"),
        ({"prior.bernoulli.time_weight": "rising"}, "time_weight must be one of mean, falling"),
        ({"prior.bernoulli.schedule": "sin"}, "schedule must be one of linear, .*got 'sin'"),
        ({"prior.bernoulli.schedule": "given"}, "keep, k_0 to k_T, must be set if"),
        ({"prior.bernoulli.keep": (1.0, 0.0)}, "keep, k_0 to k_T, must be set if"),
        (
            {"prior.bernoulli.schedule": "given", "prior.bernoulli.keep": (1.0, 0.0)},
            "64 timesteps need 65 values",
        ),
        (
            {
                "prior.bernoulli.pair": "balanced_plugin",
                "prior.bernoulli.target": "z_0",
                "prior.bernoulli.evidence": False,
            },
            '"balanced_plugin" needs config.prior.bernoulli.target "flip"',
        ),
        ({"prior.bernoulli.pair": "balanced_plugin"}, "evidence needs the target .* to False"),
        ({"prior.bernoulli.target": "z_s"}, "evidence needs the target .* set it to False"),
        (
            {
                "prior.bernoulli.target": "z_s",
                "prior.bernoulli.evidence": False,
                "sample.pair": "balanced_plugin",
            },
            'A prior with the target "z_s" needs sample.pair "plain_mixture"',
        ),
        ({"sample.steps": 65}, "sampling steps must be between 1 and 64, .*; got 65"),
        ({"sample.temperature": 0.0}, "temperature must be above 0 and finite; got 0"),
        ({"sample.guidance": -1.0}, "guidance must not be negative or infinite; got -1"),
        ({"sample.guidance_interval": (0.5, 0.2)}, "0 <= low <= high <= 1"),
        ({"sample.corrector_steps": -1}, "corrector_steps must be at least 0"),
        ({"sample.known": "frozen"}, 'known must be "kept" or "noised"; got \'frozen\''),
        ({"sample.pair": "plugin"}, "pair must be \"trained\" or one of .*; got 'plugin'"),
        ({"sample.batch_size": 0}, "sample.batch_size must be at least 1, not 0"),
        ({"evaluate.network": "vgg"}, 'evaluate.network must be "inception", "efficientnet" or'),
        ({"evaluate.labels": "even"}, 'evaluate.labels must be "balanced" or "data"'),
        ({"evaluate.every": -1}, "evaluate.every must be at least 0, not -1"),
        ({"evaluate.bound_draws": 0}, "bound_draws must be at least 1, not 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, not 0"),
    ],
)
def test_is_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        resolved(overrides)


def test_more_steps_than_times_are_for_a_prior_of_all_times():
    assert resolved({"sample.steps": 65, "prior.bernoulli.continuous": True})


# Values that a stage refuses before any work


@pytest.mark.parametrize("accumulate, batch_size", [(1, 6), (3, 8), (4, 8)])
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_a_batch_must_split(tiny_experiment, tmp_path, stage, accumulate, batch_size):
    experiment = tiny_experiment.change(
        {f"{stage}.train.accumulate": accumulate, f"{stage}.train.batch_size": batch_size}
    )
    devices = jax.device_count()
    parts = "" if accumulate == 1 else f", each in {accumulate} parts"
    sentence = f"{batch_size}, must be a multiple of {accumulate * devices}: {devices} devices"
    setup = {"autoencoder": stages.setup_autoencoder, "prior": stages.setup_prior}[stage]
    with pytest.raises(UserError, match=f"config.{stage}.train.batch_size, {sentence}{parts}"):
        setup(experiment, tmp_path)


def test_a_batch_must_split_on_one_device_too(tiny_experiment, monkeypatch):
    changes = {"prior.train.accumulate": 3, "prior.train.batch_size": 8}
    train = tiny_experiment.change(changes).prior.train
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"8, must be a multiple of 3: 1 device, each in 3 parts"):
        stages.check_batch(train, "prior")


def test_the_perceptual_loss_asks_for_its_file_before_any_work(tiny_experiment, tmp_path):
    experiment = tiny_experiment.change(
        {
            "data.path": "there is no such folder, and it is not looked for",
            "autoencoder.loss.perceptual": 1.0,
            "autoencoder.loss.vgg16": str(tmp_path / "vgg16.npz"),
        }
    )
    with pytest.raises(UserError) as error:
        stages.setup_autoencoder(experiment, tmp_path)
    for part in (
        str(tmp_path / "vgg16.npz"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out",
        "--config.autoencoder.loss.perceptual=0",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["vq", "real"])
def test_a_prior_is_over_bits(tiny_experiment, tmp_path, name):
    experiment = tiny_experiment.change({"autoencoder.bottleneck": name})
    for refuse in (stages.setup_prior, stages.write_codes):
        with pytest.raises(UserError, match=f"A prior needs bits.*not '{name}'"):
            refuse(experiment, tmp_path)


# Changes of a trained stage


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"autoencoder.loss.adversarial": 0.0}, "adversarial = 1.0, so it cannot go on with 0.0"),
        (
            {"autoencoder.discriminator.width": 32},
            "discriminator.width was 64 and cannot become 32",
        ),
        (
            {"autoencoder.discriminator.num_layers": 2},
            "discriminator.num_layers was 3 and cannot become 2",
        ),
        (
            {"autoencoder.discriminator.norm": "group"},
            "discriminator.norm was 'batch' and cannot become 'group'",
        ),
        ({"autoencoder.num_bits": 16}, "num_bits is 32 there and 16 here"),
        ({"autoencoder.bottleneck": "vq"}, "bottleneck is binary there and vq here"),
        ({"data.image_size": 128, "seed": 1}, "data.image_size is 256 there and 128 here"),
    ],
)
def test_training_goes_on_with_the_networks_it_began_with(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        resume.check_resumable(resolved(overrides), resolved(), "autoencoder")


def test_a_discriminator_cannot_be_added_later():
    without = resolved({"autoencoder.loss.adversarial": 0.0})
    with pytest.raises(UserError, match="adversarial = 0.0, so it cannot go on with 1.0"):
        resume.check_resumable(resolved(), without, "autoencoder")
    resume.check_resumable(without, without, "autoencoder")
    resume.check_resumable(resolved(), without, "prior")  # which has none


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ({"data.name": "digits"}, "data.name = 'folder', not 'digits'"),
        (
            {"data.texts": True, "prior.condition": "text_token"},
            "data.texts = False, not True",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_training_goes_on_with_the_data_it_began_with(stage, overrides, sentence):
    with pytest.raises(UserError, match=f"The {stage} in the workdir is being .*{sentence}"):
        resume.check_same_data(resolved(overrides), resolved(), stage)
    resume.check_same_data(resolved({"data.path": "moved"}), resolved(), stage)


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_what_is_safe_may_change_on_the_way(stage):
    overrides = {
        **{f"{name}.train.num_steps": 7 for name in ("autoencoder", "prior")},
        **{f"{name}.train.learning_rate": 1e-5 for name in ("autoencoder", "prior")},
        **{f"{name}.train.decay": "cosine" for name in ("autoencoder", "prior")},
        **dict(log_every=1, preview_every=2, checkpoint_every=3, keep_checkpoints=4),
        **{"on_nonfinite": "skip", "debug_nans": True, "sample.steps": 8, "data.path": "moved"},
    }
    resume.check_resumable(resolved(overrides), resolved(), stage)


def test_a_prior_goes_on_with_the_network_it_began_with():
    here = resolved(
        {
            "prior.network.num_layers": 12,
            "prior.bernoulli.schedule": "cos",
            "prior.label_dropout": 0.2,
            "data.num_classes": 3,
        }
    )
    with pytest.raises(UserError) as error:
        resume.check_resumable(here, resolved(), "prior")
    for part in (
        "prior.network.num_layers is 24 there and 12 here",
        "prior.bernoulli.schedule is linear there and cos here",
        "data.num_classes is -1 there and 3 here",
    ):
        assert part in str(error.value)
    assert "label_dropout" not in str(error.value)
    resume.check_resumable(here, resolved(), "autoencoder")


@pytest.mark.parametrize(
    "key, value",
    [
        ("prior.network.width", 256),
        ("prior.network.num_heads", 4),
        ("prior.condition", "text_token"),
        ("prior.text_width", 512),
        ("prior.bernoulli.num_timesteps", 128),
        ("prior.bernoulli.continuous", True),
        ("prior.bernoulli.target", "z_0"),
        ("prior.bernoulli.evidence", False),
        ("autoencoder.signed", True),
        ("autoencoder.deterministic", True),
        ("autoencoder.patch", 2),
        ("autoencoder.norm_first", True),
        ("autoencoder.decoder_depth", 2.0),
    ],
)
def test_what_fixes_a_model_stays(key, value):
    attention = {"autoencoder.attention_resolutions": ()}
    with pytest.raises(UserError, match=rf"{key} is .* there and {value} here"):
        check_same_model(resolved(attention | {key: value}), resolved(attention), "prior")


def test_weights_of_losses_may_change_on_the_way():
    here = resolved(
        {
            "autoencoder.loss.adversarial": 0.5,
            "autoencoder.loss.start_step": 7,
            "prior.bernoulli.vlb_weight": 0.5,
            "autoencoder.codebook_size": 7,  # which bits do not have
        }
    )
    resume.check_resumable(here, resolved(), "autoencoder")
    resume.check_resumable(here, resolved(), "prior")


# Configs of checkpoints


def test_a_checkpoints_config_is_that_of_its_experiment():
    experiment = resolve(digits.get_config())
    stored = json.loads(json.dumps({"config": experiment.config, "version": "0.2.0"}))
    assert of_checkpoint(stored, "runs/x/prior") == experiment


@pytest.mark.parametrize("name", ["prior.condition", "prior.network.width", "evaluate", "seed"])
def test_a_checkpoint_of_another_version_is_said_to_be_one(name):
    content = default.get_config().to_dict()
    *sections, key = name.split(".")
    section = content
    for one in sections:
        section = section[one]
    del section[key]
    sentence = r"runs/x/prior was written by binlatent {}, whose config has no .*{}"
    with pytest.raises(UserError, match=sentence.format("0.1.0", key)):
        of_checkpoint({"config": content}, "runs/x/prior")
    with pytest.raises(UserError, match=sentence.format("0.3.0", key)):
        of_checkpoint({"config": content, "version": "0.3.0"}, "runs/x/prior")


def test_a_checkpoint_gets_the_keys_that_were_added_since():
    config = digits.get_config().to_dict()
    without = json.loads(json.dumps(config))
    del without["texts"], without["autoencoder"]["refine_width"], without["evaluate"]
    found = of_checkpoint({"config": without, "version": "0.2.0"}, "runs/x/prior")
    config["evaluate"] = default.get_config().to_dict()["evaluate"]
    assert found == resolve(config)


def with_removed_keys(config, ddim=0.0, **options):
    stored = json.loads(json.dumps({"config": config, "version": "0.2.0"}))
    stored["config"]["sample"]["ddim"] = ddim
    stored["config"]["prior"]["bernoulli"] |= {"groups": 1, "self_conditioning": False, **options}
    return stored


@pytest.mark.parametrize("value, warnings", [(0.0, 0), (0.5, 1)])
def test_a_checkpoints_config_loses_keys_that_were_removed(value, warnings, caplog):
    config = digits.get_config().to_dict()
    stored = with_removed_keys(config, value)
    found = of_checkpoint(stored, "runs/x/prior")
    assert found == resolve(config)
    assert found.config == resolve(config).config
    assert stored["config"]["sample"]["ddim"] == value
    sentence = "config.sample.ddim=0.5 in runs/x/prior is ignored: binlatent has no such setting."
    assert caplog.text.count(sentence) == len(caplog.records) == warnings


@pytest.mark.parametrize("key, value", [("groups", 4), ("self_conditioning", True)])
def test_a_prior_with_a_removed_option_is_refused(key, value):
    stored = with_removed_keys(digits.get_config().to_dict(), **{key: value})
    sentence = (
        "The config in runs/x/prior is invalid: binlatent has no setting "
        f"config.prior.bernoulli.{key}, which is {value} there."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        of_checkpoint(stored, "runs/x/prior")


def test_the_config_of_a_workdir_has_the_keys_that_were_added_since(tiny_experiment, tmp_path):
    config, without = tiny_experiment.config, tiny_experiment.config
    del without["prior"]["bernoulli"]["evidence"], without["texts"]
    state = create_state(jax.random.key(0), {"x": jnp.zeros(1)}, optax.sgd(1.0))
    with Checkpoints(tmp_path / "prior", 1) as checkpoints:
        meta = {"config": without, "data": {}, "source": "", "encoder": "", "seconds": 1.0}
        checkpoints.save(state, meta)
    assert workdir.get_config(str(tmp_path)).to_dict() == config


@pytest.mark.parametrize("version", ["0.2", "2", "new", ""])
def test_an_odd_version_is_no_crash(version):
    content = {"seed": 0}
    with pytest.raises(UserError, match="runs/x/prior"):
        of_checkpoint({"config": content, "version": version}, "runs/x/prior")


def test_a_checkpoint_whose_config_describes_no_model_is_refused():
    content = default.get_config().to_dict()
    content["autoencoder"]["num_bits"] = "many"
    with pytest.raises(UserError, match="The config in runs/x/prior is invalid: "):
        of_checkpoint({"config": content}, "runs/x/prior")
