"""Reads the weights in a workdir."""

from pathlib import Path
from typing import Any

import jax

from binlatent.experiment import Experiment, of_checkpoint
from binlatent.experiment.resume import check_same_model
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints


def load_stage(
    workdir: Path, stage: str, experiment: Experiment | None, encoder: str | None = None
) -> tuple[Experiment, Any]:
    """Returns the experiment and the EMA parameters of the newest whole checkpoint of a stage.

    Args:
      workdir: of a training run.
      stage: "autoencoder" or "prior".
      experiment: to use instead of the checkpoint's; its model must be the same.
      encoder: hash of the encoder that the prior must have been trained with; None for any.
    """
    if not workdir.is_dir():
        raise UserError(f"There is no workdir {workdir}: train a model there, or check --workdir.")

    def read(checkpoints: Checkpoints) -> tuple[Experiment, Any]:
        if encoder is not None:
            checkpoints.check_encoder(encoder)
        trained = of_checkpoint(checkpoints.meta(), workdir / stage)
        used = experiment.as_trained(trained) if experiment else trained
        check_same_model(used, trained, stage)
        spec = {"autoencoder": used.autoencoder, "prior": used.prior}[stage]
        like = jax.eval_shape(spec.init, jax.random.key(0))
        return used, checkpoints.restore_ema(like)

    with Checkpoints.open(workdir, stage) as checkpoints:
        return checkpoints.newest(read)
