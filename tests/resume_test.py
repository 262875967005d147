"""The warning if training continues with other settings than it began with."""

import pytest

from binlatent.configs import default
from binlatent.experiment import resolve
from binlatent.experiment.resume import changed_keys


def resolved(overrides=(), **more):
    config = default.get_config()
    config.update_from_flattened_dict(dict(overrides) | more)
    return resolve(config)


def changed(stage, overrides, common=()):
    return changed_keys(resolved(dict(common) | overrides), resolved(common), stage)


# For each stage, values that change its next steps.
OTHERWISE = {
    "autoencoder": {
        **{"seed": 5, "dtype": "bfloat16", "data.crop": "random", "data.flip": True},
        "autoencoder.train.batch_size": 16,
        "autoencoder.train.learning_rate": 1e-5,
        "autoencoder.train.warmup_steps": 0,
        "autoencoder.train.decay": "cosine",
        "autoencoder.train.max_grad_norm": 2.0,
        "autoencoder.train.ema_decay": 0.9,
        "autoencoder.train.accumulate": 2,  # of which the discriminator's statistics are
        **{f"autoencoder.loss.{name}": 0.5 for name in ("mse", "l1", "perceptual", "entropy")},
        **{f"autoencoder.loss.{name}": 0.5 for name in ("adversarial", "r1")},
        **{"autoencoder.loss.adaptive": True, "autoencoder.loss.start_step": 7},
        "autoencoder.discriminator.augment": ("colour",),
    },
    "prior": {
        **{"seed": 5, "dtype": "bfloat16", "data.crop": "random", "data.flip": True},
        "prior.train.batch_size": 16,
        "prior.train.learning_rate": 1e-5,
        "prior.train.warmup_steps": 0,
        "prior.train.decay": "cosine",
        "prior.train.max_grad_norm": 2.0,
        "prior.train.ema_decay": 0.9,
        "prior.label_dropout": 0.2,
        "prior.bernoulli.vlb_weight": 0.5,
        "prior.bernoulli.time_weight": "falling",
        "prior.bernoulli.stratified": True,
        "prior.bernoulli.evidence": False,
        "prior.bernoulli.continuous": True,
    },
}
CLASSES = {"data.num_classes": 3}


@pytest.mark.parametrize(
    "stage, name", [(stage, name) for stage, names in OTHERWISE.items() for name in names]
)
def test_a_key_that_changes_the_step_is_listed_with_both_values(stage, name):
    value = OTHERWISE[stage][name]
    before = resolved(CLASSES)
    *sections, key = name.split(".")
    content = before.content
    for section in sections:
        content = content[section]
    assert changed(stage, {name: value}, CLASSES) == {name: (content[key], value)}


def test_codes_on_disk_are_rounded_wherever_they_lie():
    listed = {"prior.cache_codes": (False, True)}
    assert changed("prior", {"prior.cache_codes": True}) == listed
    assert changed("prior", {"prior.codes": "there"}) == listed
    assert changed("prior", {"prior.codes": "here"}, {"prior.codes": "there"}) == {}


@pytest.mark.parametrize("stage, other", [("prior", "autoencoder"), ("autoencoder", "prior")])
def test_keys_of_the_other_stage_are_not_listed(stage, other):
    shared = ("seed", "dtype", "data.crop", "data.flip")
    values = {name: value for name, value in OTHERWISE[other].items() if name not in shared}
    assert changed(stage, values, CLASSES) == {}


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_what_changes_no_step_is_not_listed(stage):
    values = {
        **dict(log_every=1, preview_every=2, checkpoint_every=3, keep_checkpoints=4),
        **{"debug_nans": True, "on_nonfinite": "skip"},
        **{"sample.steps": 8, "sample.batch_size": 3, "evaluate.every": 7},
        **{"data.path": "moved", "data.max_broken": 0.5, "autoencoder.loss.vgg16": "moved.npz"},
        **{f"{name}.train.num_steps": 7 for name in ("autoencoder", "prior")},
        **{"autoencoder.remat": True, "prior.train.accumulate": 2},
        # Values of bottlenecks and a condition that are not in use.
        **{"autoencoder.loss.kl": 1.0, "autoencoder.loss.commitment": 1.0},
        **{"autoencoder.num_channels": 8, "prior.label_dropout": 0.5},
    }
    assert changed(stage, values, {"data.num_classes": 0}) == {}


@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_the_number_of_steps_counts_under_a_cosine(stage):
    name, cosine = f"{stage}.train.num_steps", {f"{stage}.train.decay": "cosine"}
    assert changed(stage, {name: 7}, cosine) == {name: (1_000_000, 7)}
    listed = {f"{stage}.train.decay": ("constant", "cosine"), name: (1_000_000, 7)}
    assert changed(stage, {name: 7} | cosine) == listed


def test_without_a_discriminator_its_keys_are_not_listed():
    values = {
        **{"autoencoder.loss.adaptive": True, "autoencoder.loss.start_step": 7},
        **{"autoencoder.loss.r1": 1.0, "autoencoder.discriminator.augment": ("colour",)},
    }
    assert changed("autoencoder", values, {"autoencoder.loss.adversarial": 0.0}) == {}


@pytest.mark.parametrize("bottleneck, name", [("vq", "commitment"), ("real", "kl")])
def test_a_loss_of_the_bottleneck_is_listed(bottleneck, name):
    name, common = f"autoencoder.loss.{name}", {"autoencoder.bottleneck": bottleneck}
    assert list(changed("autoencoder", {name: 1.0}, common)) == [name]
    assert changed("autoencoder", {"autoencoder.loss.entropy": 1.0}, common) == {}
