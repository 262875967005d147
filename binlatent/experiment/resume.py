"""Compares a config with that of a checkpoint: what does not fit, and what changes training."""

import functools
import json
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from binlatent.data import classes
from binlatent.experiment import Experiment, bottleneck_keys
from binlatent.runtime.errors import UserError

# Keys that the arrays of a stage depend on, in addition to those of its bottleneck or kind.
_AUTOENCODER_KEYS = (
    *("data.image_size", "data.channels"),
    *(
        f"autoencoder.{name}"
        for name in (
            *("bottleneck", "base_width", "multipliers", "patch", "num_blocks", "decoder_depth"),
            "refine_width",
            *("attention_resolutions", "embedding_width", "norm_first"),
        )
    ),
)


def _value(experiment: Experiment, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("."), experiment.content)


def _model_keys(here: Experiment, there: Experiment, stage: str) -> list[str]:
    own = bottleneck_keys(here.content["autoencoder"]["bottleneck"])
    keys = [*_AUTOENCODER_KEYS, *(f"autoencoder.{key}" for key in own)]
    if stage == "prior":
        kind = here.prior.kind
        keys += ["data.num_classes", "prior.kind", "prior.condition", "prior.text_width"]
        keys += ["texts.encoder", "texts.sha256"] if there.texts.encoder else []
        network = here.content["prior"]["network"]
        keys += [f"prior.network.{key}" for key in network if key not in ("name", "dit")]
        if kind != "autoregressive":  # which has its own network
            keys.append("prior.network.name")
            if network["name"] == "dit":
                keys += [f"prior.network.dit.{key}" for key in network["dit"]]
        if there.prior.kind == kind:
            keys += [f"prior.{kind}.{key}" for key in here.prior.prior.trained]
    return keys


def check_same_model(here: Experiment, there: Experiment, stage: str) -> None:
    """Refuses an experiment whose model differs from the checkpoint's.

    Args:
      here: the experiment of this run.
      there: the experiment in the checkpoint.
      stage: "autoencoder" or "prior"; a prior fits one autoencoder only.
    """
    if stage == "prior":
        names = (x.prior.conditioning.names for x in (here, there))
        classes.check_same_classes(*names, stage)
    pairs = {
        name: (_value(there, name), _value(here, name)) for name in _model_keys(here, there, stage)
    }
    differences = [
        f"{name} is {before} there and {now} here"
        for name, (before, now) in pairs.items()
        # As JSON, which turns tuples into lists.
        if json.dumps(before, default=str) != json.dumps(now, default=str)
    ]
    if differences:
        raise UserError(
            f"The config does not fit the trained {stage} in the workdir: "
            f"{'; '.join(differences)}. Use the same values, or another --workdir."
        )


def check_same_data(here: Experiment, there: Experiment, stage: str) -> None:
    """Refuses data other than those that the checkpoint's training began with.

    Args:
      here: the experiment of this run.
      there: the experiment in the checkpoint.
      stage: its name.
    """
    for name in ("name", "texts"):
        now, before = getattr(here.data, name), getattr(there.data, name)
        if now != before:
            raise UserError(
                f"The {stage} in the workdir is being trained on config.data.{name} = {before!r}, "
                f"not {now!r}: use the same, or another --workdir."
            )


def check_resumable(here: Experiment, there: Experiment, stage: str) -> None:
    """Refuses an experiment with which a checkpoint's training cannot continue; see above."""
    check_same_model(here, there, stage)
    now, before = here.autoencoder, there.autoencoder
    critics = now.networks.discriminator, before.networks.discriminator
    if stage != "autoencoder" or critics == (None, None):
        return
    if None in critics:
        raise UserError(
            "The autoencoder in the workdir was trained with config.autoencoder.loss.adversarial = "
            f"{before.objective.adversarial}, so it cannot go on with {now.objective.adversarial}: "
            "there is a discriminator only if the weight is above 0. To start the discriminator "
            "later, set loss.start_step."
        )
    for name in ("width", "num_layers", "norm"):
        new, old = (getattr(critic, name) for critic in critics)
        if new != old:
            raise UserError(
                f"config.autoencoder.discriminator.{name} was {old!r} and cannot become {new!r}: "
                "use the same, or another --workdir."
            )


# Losses in `config.autoencoder.loss` that a bottleneck does not use.
_OTHER_LOSSES = {
    "binary": ("commitment", "kl"),
    "vq": ("entropy", "kl"),
    "real": ("entropy", "commitment"),
}


def changed_keys(here: Experiment, there: Experiment, stage: str) -> dict[str, tuple[Any, Any]]:
    """Returns the keys that change the next steps of a stage, with their values there and here.

    Keys that `check_resumable` refuses are left out. So are keys that change nothing: paths, how
    often something is logged or saved, weights of unused losses, and the number of steps if the
    learning rate does not depend on it.

    Args:
      here: the experiment of this run.
      there: the experiment in the checkpoint.
      stage: "autoencoder" or "prior".
    """
    before, now = (dict(_step_values(x, stage)) for x in (there, here))
    unused = _unused(there, stage) & _unused(here, stage)
    names = [name for name in before | now if name not in unused]
    pairs = {name: (before.get(name), now.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _step_values(experiment: Experiment, stage: str) -> Iterator[tuple[str, Any]]:
    """Yields keys and values, apart from the model, that the steps of a stage depend on."""
    content = experiment.content
    for name in ("seed", "dtype"):
        yield name, content[name]
    for name in ("crop", "flip"):
        yield f"data.{name}", content["data"][name]
    section = content[stage]
    sections = ["loss", "discriminator", "train"]
    if stage == "prior":
        yield "prior.label_dropout", section["label_dropout"]
        # Codes on disk have rounded probabilities, in both places.
        yield "prior.cache_codes", section["cache_codes"] or bool(section["codes"])
        sections = [section["kind"], "train"]
    for name in sections:
        yield from _flat(section.get(name, {}), f"{stage}.{name}")


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}")
    else:
        yield name, value


def _unused(experiment: Experiment, stage: str) -> set[str]:
    """Returns the keys that a stage's steps do not depend on, given the other keys."""
    names = set()
    if experiment.content[stage]["train"]["decay"] == "constant":
        names.add(f"{stage}.train.num_steps")
    if stage == "prior":
        names.add("prior.train.accumulate")  # the sums are the same up to rounding
        if experiment.prior.conditioning.kind == "none":
            names.add("prior.label_dropout")
        return names
    names.add("autoencoder.loss.vgg16")
    others = _OTHER_LOSSES.get(experiment.content["autoencoder"]["bottleneck"], ())
    names |= {f"autoencoder.loss.{name}" for name in others}
    if experiment.autoencoder.networks.discriminator is None:
        names |= {f"autoencoder.loss.{name}" for name in ("adaptive", "start_step", "r1")}
        critic = experiment.content["autoencoder"]["discriminator"]
        names |= {f"autoencoder.discriminator.{name}" for name in critic}
    return names
