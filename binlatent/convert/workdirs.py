"""Converts the authors' checkpoints to workdirs, and workdirs to their checkpoints."""

import functools
import logging
import operator
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent import stages
from binlatent.configs import default
from binlatent.convert import hyperparameters, released
from binlatent.experiment import Experiment, of_checkpoint, resolve
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import command
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.runtime.state_dicts import State
from binlatent.texts.encoder import TextEncoder
from binlatent.training.checkpoint import Checkpoints, exists, on_first_device
from binlatent.training.state import TrainState, create_state

log = logging.getLogger("binlatent.convert")


def convert_autoencoder(
    state: State,
    out: Path,
    *,
    image_size: int = 256,
    norm_first: bool | None = None,
    signed: bool = False,
    deterministic: bool = False,
) -> None:
    """Converts an autoencoder of the authors' code, and its discriminator, to a workdir.

    Args:
      state: the state dict of `binaryae_ema_*.th` or `binaryae_*.th`.
      out: the workdir; it must not have an autoencoder yet.
      image_size: side of the images in pixels.
      norm_first: whether the decoder must have a norm first; None for either.
      signed, deterministic: `--use_tanh` and `--deterministic` of the authors' code.
    """
    refuse_existing(out, "autoencoder")
    checkpoint = released.Checkpoint(state, "autoencoder")
    found = hyperparameters.of_autoencoder(checkpoint, image_size)
    if norm_first not in (None, found["autoencoder.norm_first"]):
        norm = "has norm" if found["autoencoder.norm_first"] else "has no norm"
        raise UserError(f"--norm_first: the checkpoint {norm} before the decoder; omit this flag.")
    values = {
        "data.num_classes": 0,
        "autoencoder.signed": signed,
        "autoencoder.deterministic": deterministic,
        # Steps start again at 0, and a trained discriminator need not wait.
        "autoencoder.loss.start_step": 0,
    }
    if "autoencoder.discriminator.width" not in found:
        values["autoencoder.loss.adversarial"] = 0.0
        log.info("There is no discriminator: further training would lack the adversarial loss.")
    experiment = _released_with(values | found)
    spec = experiment.autoencoder
    params, discriminator = released.read_autoencoder(checkpoint, spec)
    unused = checkpoint.unused(released.AUTOENCODER_UNUSED)
    optimizer = spec.train.optimizer()
    if discriminator is not None:
        opt_state = optimizer.init(discriminator["params"])
        discriminator = {"batch_stats": {}, **discriminator, "opt_state": opt_state}
    _, base_key = jax.random.split(key_for(experiment.seed, "autoencoder"))
    state = create_state(base_key, params, optimizer, discriminator)
    with stages.alone_in(out):
        _save(out / "autoencoder", state, experiment)
    _report(experiment, found, unused)


# Keys of a prior that names and shapes do not determine.
_PRIOR_KEYS = (
    *(f"prior.bernoulli.{name}" for name in ("schedule", "num_timesteps", "target", "pair")),
    "prior.network.num_heads",
)


def convert_prior(
    state: State,
    out: Path,
    *,
    autoencoder: Path,
    num_heads: int | None = None,
    schedule: str | None = None,
    num_timesteps: int | None = None,
    target: str = "flip",
    pair: str | None = None,
    text_encoder: Path | None = None,
) -> None:
    """Converts a prior of the authors' code to a workdir with its autoencoder.

    Args:
      state: the state dict of `bld_ema_*.th` or `bld_*.th`.
      out: the workdir; the autoencoder is copied into it, if it has none.
      autoencoder: the workdir of the prior's autoencoder.
      num_heads: of attention; None for heads of width 64.
      schedule, num_timesteps: None for those in the checkpoint, or "linear" and 64.
      target: "flip", or "z_0" if the prior was trained without `--p_flip`.
      pair: of `losses.PAIRS`. None for "balanced_plugin" with the target "flip", as the authors'
        code trains, and "plain_mixture" with "z_0", for which their loss is not balanced.
      text_encoder: the encoder's file for prompts; the workdir stores its path.
    """
    refuse_existing(out, "prior")
    if not exists(autoencoder, "autoencoder"):
        raise UserError(
            f"There is no autoencoder in {autoencoder}: set --autoencoder to a workdir that "
            "`python -m binlatent.convert autoencoder --from FILE --out DIR` wrote."
        )
    model = BinaryLatentDiffusion.from_workdir(autoencoder, prior=False)
    elsewhere = out.resolve() != autoencoder.resolve()
    if elsewhere and exists(out, "autoencoder"):
        raise UserError(
            f"There is an autoencoder in {out} already: set --autoencoder={out}, or choose "
            "another --out."
        )
    checkpoint = released.Checkpoint(state, "prior")
    found = hyperparameters.of_prior(checkpoint)
    h, w, c = model.code_shape
    if (tokens := found.pop("tokens"), bits := found.pop("num_bits")) != (h * w, c):
        raise UserError(
            f"The prior has {tokens} tokens of {bits} bits, but the codes of {autoencoder} have "
            f"{h} x {w} tokens of {c} bits: use the autoencoder that it was trained with."
        )
    texts = {} if text_encoder is None else _text_values(found, text_encoder)
    stored = hyperparameters.find_schedule(checkpoint)
    schedule, num_timesteps = _agree(stored, schedule, num_timesteps)
    named = isinstance(schedule, str)
    width = found["prior.network.width"]
    usual_pair = "balanced_plugin" if target == "flip" else "plain_mixture"
    values = {
        **{section: model.experiment.config[section] for section in ("data", "autoencoder")},
        "prior.network.num_heads": max(width // 64, 1) if num_heads is None else num_heads,
        "prior.network.name": "released",
        "prior.bernoulli.num_timesteps": num_timesteps,
        "prior.bernoulli.schedule": schedule if named else "given",
        "prior.bernoulli.keep": () if named else schedule,
        "prior.bernoulli.target": target,
        "prior.bernoulli.pair": pair or usual_pair,
        "prior.bernoulli.evidence": False,
        "prior.bernoulli.vlb_weight": 0.0,
        "prior.train.learning_rate": 2e-4,
        "prior.train.max_grad_norm": 1e6,
        "prior.train.ema_decay": 0.9995,
        "sample.steps": num_timesteps,
        "sample.threshold_last": True,
        **texts,
    }
    experiment = _released_with(values | found)
    spec = experiment.prior
    params = released.read_prior(checkpoint, spec)
    embed = checkpoint.left.get("embedding_weight")
    own = model.autoencoder_params["params"]["bottleneck"]["embed"]
    if embed is not None and not (embed.shape == own.shape and np.allclose(embed, own, atol=1e-4)):
        log.warning(
            "The prior was trained with another autoencoder, as its copy of the bits' embedding "
            "differs: its images may be meaningless."
        )
    unused = checkpoint.unused(released.PRIOR_UNUSED)
    _, base_key = jax.random.split(key_for(experiment.seed, "prior"))
    state = create_state(base_key, params, spec.train.optimizer())
    with stages.alone_in(out):
        if elsewhere:
            unfinished = out / "autoencoder.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(autoencoder / "autoencoder", unfinished)
            # It may be left by an interrupted conversion.
            shutil.rmtree(out / "autoencoder", ignore_errors=True)
            unfinished.rename(out / "autoencoder")
        _save(out / "prior", state, experiment, encoder=model.encoder_fingerprint)
    _report(experiment, (*_PRIOR_KEYS, *found, *texts), unused)
    if experiment.prior.conditioning.of_texts and not texts:
        log.info(
            "Prompts need a text encoder, but none was given: convert with --text_encoder into "
            "another --out, or set it in each command as described in docs/pretrained.md."
        )


def _text_values(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the values of the config's section `texts`; the encoder must fit the prior.

    Args:
      found: from `hyperparameters.of_prior`.
      path: the encoder's file.
    """
    condition = found.get("prior.condition")
    if condition not in ("text_token", "text_cross"):
        raise UserError("The prior takes no texts: leave out --text_encoder.")
    encoder, wanted = TextEncoder.load(path), found["prior.text_width"]
    per_token = condition == "text_cross"
    width = encoder.width(per_token)
    if width != wanted:
        of = "each token of a text" if per_token else "a text"
        raise UserError(
            f"The prior takes {wanted} numbers for {of}, but the text encoder in {path} gives "
            f"{width}: use the encoder that it was trained with."
        )
    section = {"encoder": encoder.name, "weights": os.path.abspath(path), "sha256": encoder.sha256}
    return {f"texts.{key}": value for key, value in section.items()}


def _agree(stored: Any, schedule: str | None, num_timesteps: int | None) -> tuple[Any, int]:
    """Returns the schedule and T; flags must match the checkpoint's buffers, if any."""
    usual, steps = stored or ("linear", 64)
    given = (schedule or usual, steps if num_timesteps is None else num_timesteps)
    if stored and given != stored:
        name = stored[0] if isinstance(stored[0], str) else "a list of numbers"
        raise UserError(
            f"The checkpoint's schedule is {name} with {stored[1]} steps: omit --schedule and "
            "--num_timesteps."
        )
    return given


def _released_with(values: Mapping[str, Any]) -> Experiment:
    """Returns the experiment of `configs/default.py:released` with other values."""
    try:
        return resolve(default.get_config("released")).change(values)
    except UserError as error:
        raise UserError(
            f"The checkpoint and the flags do not define a valid model: {error}"
        ) from error


def refuse_existing(out: Path, stage: str) -> None:
    """Raises UserError if a workdir has a checkpoint of the stage already."""
    if exists(out, stage):
        what = f"There is a checkpoint of the {stage} in {out} already"
        raise UserError(f"{what}: choose another --out.")


def _save(folder: Path, state: TrainState, experiment: Experiment, encoder: str = "") -> None:
    """Saves a stage as step 0, so that further training makes all its steps."""
    meta = {"config": experiment.config, "data": None, "source": "", "encoder": encoder}
    meta |= {"seconds": 0.0}
    with command.deferring_interrupt(), Checkpoints(folder) as checkpoints:
        checkpoints.save(state, meta)
    log.info("Wrote %s", folder)


def _report(experiment: Experiment, keys: Iterable[str], unused: dict[str, int]) -> None:
    """Logs the hyperparameters and the unused tensors of a checkpoint."""
    for key in keys:
        value = functools.reduce(operator.getitem, key.split("."), experiment.config)
        log.info("  %s = %s", key, value)
    kinds = [f"{kind} ({count})" for kind, count in unused.items()]
    log.info("Tensors not used: %s", ", ".join(kinds) or "none")


def export_workdir(workdir: Path) -> tuple[dict[str, State], str]:
    """Converts a workdir to the authors' checkpoints.

    Returns:
      State dicts by file name, of the EMA weights and of the others; and the flags of the authors'
      code that describe the models.
    """
    model = BinaryLatentDiffusion.from_workdir(workdir)
    experiment, files = model.experiment, {}
    state, name = _restore(workdir, "autoencoder")
    critic = {k: state.discriminator[k] for k in ("params", "batch_stats") if state.discriminator}
    if critic and not critic["batch_stats"]:
        critic = {}
        log.warning("The discriminator is left out: the authors' code supports only batch norm.")
    for prefix, params in (("binaryae_ema", state.ema_params), ("binaryae", state.params)):
        state_dict = released.autoencoder_state(experiment.autoencoder, params, critic)
        files[f"{prefix}_{name}"] = state_dict
    if model.has_prior:
        state, name = _restore(workdir, "prior")
        embed = model.autoencoder_params["params"]["bottleneck"]["embed"]
        spec = experiment.prior
        files[f"bld_ema_{name}"] = released.prior_state(spec, state.ema_params, embed)
        raw = released.prior_state(spec, state.params, embed)
        # Their training saves and loads it with the prefix of several GPUs.
        files[f"bld_{name}"] = {f"module.{key}": x for key, x in raw.items()}
        if spec.prior.pair == "plain_mixture" and not spec.prior.evidence:
            log.warning(
                "This prior was trained with plain BCE, but the authors' code samples with the "
                "plug-in posterior: its samples will be worse there."
            )
    return files, hyperparameters.describe_as_flags(experiment, has_prior=model.has_prior)


def _restore(workdir: Path, stage: str) -> tuple[TrainState, int]:
    """Returns a stage's state, and the step for the file names."""

    def read(checkpoints: Checkpoints) -> TrainState:
        spec = getattr(of_checkpoint(checkpoints.meta(), workdir / stage), stage)
        like = jax.eval_shape(functools.partial(spec.init_state, 0))
        return checkpoints.restore(on_first_device(like))

    with Checkpoints.open(workdir, stage) as checkpoints:
        state = checkpoints.newest(read)
    # For their code, step 0 means to load nothing.
    return jax.device_get(state), max(int(state.step), 1)
