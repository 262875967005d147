"""Turns a config into typed, checked, frozen objects; the only reader of ConfigDicts.

`limits` checks each number and choice by itself. Values that depend on each other are checked where
the object is built.
"""

import copy
import dataclasses
import functools
import logging
import operator
import os
import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import ml_collections

from binlatent.autoencoder import spec as autoencoder_spec
from binlatent.autoencoder.bottleneck import BOTTLENECKS
from binlatent.autoencoder.modules import Levels
from binlatent.autoencoder.spec import AutoencoderSpec
from binlatent.autoencoder.step import Objective
from binlatent.configs import default
from binlatent.data.splits import Data
from binlatent.experiment.limits import Content, check_texts, check_values, spell, value_of
from binlatent.priors.conditions import Conditioning
from binlatent.priors.kinds import KINDS
from binlatent.priors.settings import make_settings
from binlatent.priors.spec import PriorSpec
from binlatent.runtime import paths
from binlatent.runtime.errors import UserError
from binlatent.runtime.version import VERSION
from binlatent.texts.spec import Texts
from binlatent.training.loop import Run
from binlatent.training.optimizer import Training

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sample:
    """How to sample: the batch size over all devices, and the settings of the prior's sampler."""

    batch_size: int
    settings: Any


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The section `evaluate` of a config; `configs/default.py` describes each key."""

    num_images: int
    num_samples: int
    bound_draws: int
    classifier_images: int
    network: str
    weights: str
    reference: str
    labels: str
    every: int
    metrics: tuple[str, ...]
    cas_epochs: int
    cas_batch_size: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config, resolved.

    Fields:
      seed: of all random numbers.
      dtype: to compute in; parameters and losses stay float32.
      data, texts, autoencoder, prior, sample, evaluate, run: the parts.
      content: the config as nested dictionaries, for checkpoints and `change`.
    """

    seed: int
    dtype: Any
    data: Data
    texts: Texts
    autoencoder: AutoencoderSpec
    prior: PriorSpec
    sample: Sample
    evaluate: Evaluate
    run: Run
    content: Content = dataclasses.field(repr=False, compare=False)

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the config as nested dictionaries."""
        return copy.deepcopy(dict(self.content))

    @property
    def without_paths(self) -> dict[str, Any]:
        """A copy of the config with empty paths, because paths differ between machines."""
        content = self.config
        for name in PATHS:
            *sections, key = name.split(".")
            functools.reduce(operator.getitem, sections, content)[key] = ""
        return content

    def change(self, values: Mapping[str, Any]) -> "Experiment":
        """Returns a checked copy with other values by key, such as {"sample.steps": 16}."""
        content = self.config
        for name, value in values.items():
            *sections, key = name.split(".")
            section = functools.reduce(operator.getitem, sections, content)
            if key not in section:
                raise KeyError(name)
            section[key] = value
        return resolve(content, self.prior.conditioning.names)

    def with_names(self, names: tuple[str, ...]) -> "Experiment":
        """Returns a copy with the names of the classes, by number."""
        return resolve(self.content, names)

    def with_classes(self, num_classes: int, names: tuple[str, ...] = ()) -> "Experiment":
        """Returns a copy with the number of classes and, if given, their names."""
        return self.change({"data.num_classes": num_classes}).with_names(names)

    def with_texts(self, width: int, sha256: str = "") -> "Experiment":
        """Returns a copy with the width of text features and the hash of the encoder's file."""
        if self.prior.conditioning.text_width not in (0, width):
            raise UserError(
                f"config.prior.text_width is {self.prior.conditioning.text_width}, but the "
                f"features of the texts have the width {width}: set it to {width} or to 0."
            )
        return self.change({"prior.text_width": width, "texts.sha256": sha256})

    def as_trained(self, trained: "Experiment") -> "Experiment":
        """Returns a copy whose unset values about classes and texts are those found in training."""
        used, width = self, trained.prior.conditioning.text_width
        if used.data.num_classes == -1:
            used = used.with_classes(trained.data.num_classes)
        if width and used.prior.conditioning.text_width in (0, width):
            used = used.with_texts(width, used.texts.sha256 or trained.texts.sha256)
        if not used.prior.conditioning.names:
            used = used.with_names(trained.prior.conditioning.names)
        return used


def resolve(
    config: ml_collections.ConfigDict | Content, class_names: tuple[str, ...] = ()
) -> Experiment:
    """Returns the experiment of a config; refuses values out of range or that contradict others.

    It is called before anything starts, so that a mistake in the settings of stage 2 or of sampling
    is found before stage 1 is trained.

    Args:
      config: with the keys of `configs/default.py`.
      class_names: by number; () if unknown or without names.
    """
    content = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    content = with_tuples(content)
    spell(content)
    check_values(content)
    _locate(content)
    dtype = jnp.dtype(content["dtype"])
    data = _take(Data, content, "data")
    section, texts = content["prior"], _take(Texts, content, "texts")
    if (data.flip or data.crop == "random") and (section["cache_codes"] or section["codes"]):
        raise UserError(
            "Codes on disk (prior.cache_codes, prior.codes) are made without random crops and "
            'flips: train on images, or set data.crop to "centre" and data.flip to False.'
        )
    autoencoder = _autoencoder(content, data, dtype)
    conditioning = Conditioning.of_config(
        section["condition"], data.num_classes, section["text_width"], class_names
    )
    check_texts(conditioning.of_texts, data.texts, texts.encoder)
    prior = _prior(content, conditioning, autoencoder.code_shape, dtype)
    return Experiment(
        seed=content["seed"],
        dtype=dtype,
        data=data,
        texts=texts,
        autoencoder=autoencoder,
        prior=prior,
        sample=Sample(
            content["sample"]["batch_size"], make_settings(prior.prior, content["sample"])
        ),
        evaluate=_take(Evaluate, content, "evaluate"),
        run=_take(Run, content),
        content=content,
    )


# Keys whose values are paths of files or folders, or empty.
PATHS = (
    *("data.path", "prior.codes", "autoencoder.loss.vgg16", "texts.weights", "evaluate.weights"),
    "evaluate.reference",
)


def _locate(content: dict[str, Any]) -> None:
    """Makes a config's paths absolute, so that they stay valid in another working directory.

    `data.table` is relative to `data.path`. TFDS can read a data directory in a bucket.
    """
    for name in PATHS:
        *sections, key = name.split(".")
        section = functools.reduce(operator.getitem, sections, content)
        path = section[key]
        of_tfds = name == "data.path" and content["data"]["name"] not in ("folder", "lmdb")
        word = name == "evaluate.reference" and path in ("train", "test")
        if path and not word and not (of_tfds and paths.is_address(path)):
            section[key] = os.path.abspath(paths.expand(path, f"config.{name}"))


def with_tuples(value: Any) -> Any:
    """Returns a copy with tuples in place of lists: JSON turns tuples into lists."""
    if isinstance(value, Mapping):
        return {key: with_tuples(entry) for key, entry in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value


def _take(cls: type[T], content: Content, name: str = "") -> T:
    """Returns a dataclass filled from the section's keys of the same names."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{key: value_of(content, f"{name}.{key}" if name else key) for key in names})


def _autoencoder(content: Content, data: Data, dtype: Any) -> AutoencoderSpec:
    section = content["autoencoder"]
    bottleneck_type = BOTTLENECKS[section["bottleneck"]]
    keys = bottleneck_keys(section["bottleneck"])
    bottleneck = bottleneck_type(
        embedding_width=section["embedding_width"], **{key: section[key] for key in keys}
    )
    levels = Levels(
        base_width=section["base_width"],
        multipliers=section["multipliers"],
        attention_resolutions=section["attention_resolutions"],
        patch=section["patch"],
        remat=section["remat"],
        dtype=dtype,
    )
    model = autoencoder_spec.build_autoencoder(
        *(bottleneck, levels, data.image_shape),
        num_blocks=section["num_blocks"],
        decoder_depth=section["decoder_depth"],
        refine_width=section["refine_width"],
        norm_first=section["norm_first"],
    )
    critic, losses = dict(section["discriminator"]), section["loss"]
    augment, rate = critic.pop("augment"), critic.pop("learning_rate_ratio")
    weights = {key: losses[key] for key in Objective._fields if key != "augment"}
    objective = Objective(**weights, augment=augment)
    return AutoencoderSpec(
        networks=autoencoder_spec.build_networks(
            *(model, objective, data.image_size, dtype), **critic
        ),
        objective=objective,
        train=_take(Training, content, "autoencoder.train"),
        start_step=losses["start_step"],
        discriminator_rate=rate,
        vgg16=losses["vgg16"],
        image_shape=data.image_shape,
    )


def bottleneck_keys(name: str) -> list[str]:
    """Returns the keys of `config.autoencoder` that a bottleneck uses: its fields."""
    fields = [field.name for field in dataclasses.fields(BOTTLENECKS[name])]
    return [key for key in fields if key not in ("embedding_width", "parent", "name")]


def _prior(
    content: Content, conditioning: Conditioning, code_shape: tuple[int, int, int], dtype: Any
) -> PriorSpec:
    section = content["prior"]
    width, num_heads = (section["network"][key] for key in ("width", "num_heads"))
    if width < 4 or width % num_heads or width % 4:
        raise UserError(
            "config.prior.network.width must be a multiple of 4 and of config.prior.network."
            f"num_heads; got the width {width} and {num_heads} heads."
        )
    rotary = section["network"]["dit"]["positions"] == "rotary"
    if section["network"]["name"] == "dit" and rotary and width // num_heads % 4:
        raise UserError(
            "Rotary positions need heads whose width is a multiple of 4: change config.prior."
            'network.num_heads, or set config.prior.network.dit.positions to "learned".'
        )
    name = section["kind"]
    kind, own = KINDS[name], section.get(name, {})
    network = kind.make_network(
        code_shape,
        own,
        **section["network"],
        condition=conditioning.kind,
        num_classes=conditioning.num_classes,
        text_width=conditioning.text_width,
        dtype=dtype,
    )
    return PriorSpec(
        kind=name,
        prior=kind(code_shape=code_shape, network=network, **own),
        conditioning=conditioning,
        train=_take(Training, content, "prior.train"),
        **{key: section[key] for key in ("label_dropout", "cache_codes", "codes")},
    )


# Configs of checkpoints

_OLDEST = (0, 2, 0)  # configs since this version differ by added keys and by those in _REMOVED
# Each with the value that changes nothing.
_REMOVED = {
    "sample.ddim": 0.0,
    "prior.bernoulli.groups": 1,
    "prior.bernoulli.self_conditioning": False,
}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _with_added_keys(content: Content, defaults: Content) -> Content:
    """Returns a config with defaults for missing keys, which keep the behaviour without them."""
    added = {key: value for key, value in defaults.items() if key not in content}
    sections = {
        key: _with_added_keys(content[key], value)
        for key, value in defaults.items()
        if isinstance(value, Mapping) and isinstance(content.get(key), Mapping)
    }
    return {**content, **added, **sections}


def _without_removed_keys(content: Content, where: Any) -> Content:
    """Returns a config without removed keys.

    If the value of one had an effect, warns for a sampling option and refuses others.
    """
    content = copy.deepcopy(dict(content))
    for name, neutral in _REMOVED.items():
        *sections, key = name.split(".")
        section = functools.reduce(operator.getitem, sections, content)
        value = section.pop(key, neutral)
        if value != neutral and sections != ["sample"]:
            raise UserError(f"binlatent has no setting config.{name}, which is {value} there.")
        if value != neutral:
            log.warning(
                "config.%s=%s in %s is ignored: binlatent has no such setting. The other settings "
                "apply.",
                *(name, value, where),
            )
    return content


def of_checkpoint(meta: Mapping[str, Any], where: Any) -> Experiment:
    """Returns the experiment of a checkpoint, whose config may be invalid.

    Args:
      meta: from `Checkpoints.meta`.
      where: the checkpoint's folder, for messages.
    """
    try:
        content, version = meta["config"], meta.get("version", "0.1.0")
        if _OLDEST <= _numbers(version) <= _numbers(VERSION):
            content = _with_added_keys(content, default.get_config().to_dict())
            content = _without_removed_keys(content, where)
        return resolve(content, tuple(map(str, meta.get("classes", ()))))
    except KeyError as error:
        raise UserError(
            f"{where} was written by binlatent {meta.get('version', '0.1.0')}, whose config has no "
            f"{error.args[0]}: use that version, or train again in another --workdir."
        ) from error
    except Exception as error:  # such as a value of another type
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(f"The config in {where} is invalid: {reason}") from error
