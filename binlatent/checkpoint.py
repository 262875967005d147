"""Saving and restoring a stage; the only user of Orbax.

A stage's folder holds its last checkpoints, each named by its step with three parts: `state`, all
that training needs but the EMA; `ema_params`, all that sampling needs; `meta`, JSON: the config,
the data iterator's state, the fingerprint of the encoder that a prior belongs to, and the seconds
trained so far.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from binlatent.errors import UserError
from binlatent.stages.state import AXIS, TrainState


def fingerprint(params: Any) -> str:
    """Returns 16 hexadecimal digits that tell parameters apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def exists(workdir: Path, stage: str) -> bool:
    """Tells whether a stage has a finished checkpoint in a workdir."""
    return (workdir / stage).is_dir() and bool(ocp.utils.checkpoint_steps(workdir / stage))


def as_config(content: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns a config out of JSON, which has lists for tuples."""

    def with_tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_tuples(entry) for key, entry in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ml_collections.ConfigDict(with_tuples(content))


def on_first_device(like: Any) -> Any:
    """Returns shapes and types, as `jax.eval_shape` gives them, to be restored on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


class Checkpoints:
    """The checkpoints of one stage; a context manager that ends when all is on disk.

    Where there are several processes, all of them open, save and close together.
    """

    def __init__(self, directory: Path, keep: int | None = None, *, alone: bool = False):
        """Opens, or creates, the folder.

        Args:
          directory: of the stage.
          keep: how many of the last checkpoints stay; all if None.
          alone: for reading only, whatever the other processes do; the folder must exist.
        """
        this = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep and ocp.checkpoint_managers.LatestN(keep),
            create=not alone,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=this if alone else 0, active_processes={this} if alone else None
            ),
        )
        self.directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @classmethod
    def open(cls, workdir: Path, stage: str) -> "Checkpoints":
        """Opens a trained stage for reading.

        Raises:
          UserError: if it has no checkpoint.
        """
        if not exists(workdir, stage):
            raise UserError(
                f"{workdir} has no checkpoint of the {stage}: run --mode=train_{stage} first."
            )
        return cls(workdir / stage, alone=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, None without one."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until all is on disk."""
        self._manager.close()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves in the background; the arrays of `state` may be donated at once."""
        state = jax.tree.map(jnp.copy, state)
        if jax.process_count() > 1:  # Orbax wants one array of them all, pmap gives each its own
            processes = range(jax.process_count())
            devices = [device for i in processes for device in jax.local_devices(process_index=i)]
            state = multihost_utils.host_local_array_to_global_array(
                state,
                jax.sharding.Mesh(np.asarray(devices), (AXIS,)),
                jax.sharding.PartitionSpec(),
            )
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state.replace(ema_params={})),
                ema_params=ocp.args.StandardSave(state.ema_params),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest checkpoint's state, placed and shaped as `like`."""
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like.replace(ema_params={})),
                ema_params=ocp.args.StandardRestore(like.ema_params),
            ),
        )
        return restored.state.replace(ema_params=restored.ema_params)

    def meta(self) -> dict[str, Any]:
        """Returns the newest checkpoint's `meta`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.latest_step(), args=args).meta

    def config(self) -> ml_collections.ConfigDict:
        """Returns the config that the newest checkpoint was trained with."""
        return as_config(self.meta()["config"])

    def check_encoder(self, fingerprint: str) -> None:
        """Refuses a prior that was trained on the codes of another encoder.

        Raises:
          UserError: if the newest checkpoint's encoder has another fingerprint.
        """
        if self.meta()["encoder"] != fingerprint:
            raise UserError(
                f"The prior in {self.directory} was trained for another autoencoder than the one "
                "beside it: delete that folder and run --mode=train_prior."
            )

    def restore_ema(self, like: Any) -> Any:
        """Returns the newest checkpoint's EMA parameters on the first local device.

        Args:
          like: their shapes and types, as `jax.eval_shape` gives them.
        """
        like = on_first_device(like)
        args = ocp.args.Composite(ema_params=ocp.args.StandardRestore(like))
        return self._manager.restore(self.latest_step(), args=args).ema_params
