"""Saves and restores a stage; the only module that uses Orbax.

A stage's folder holds its last checkpoints, named by their steps. A checkpoint has three parts:

- `state`: what training needs, without the EMA.
- `ema_params`: what sampling needs.
- `meta`: JSON with the version of binlatent, the config, the data iterator's state, the
  fingerprints of the images and of a prior's encoder, and the seconds trained so far.

Fingerprints of all three are stored in `meta` and checked when a part is read. Orbax ensures that a
checkpoint is complete, but does not detect every flipped bit.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from binlatent.runtime.errors import UserError
from binlatent.runtime.strict_json import finite
from binlatent.runtime.version import VERSION
from binlatent.runtime.weights import fingerprint
from binlatent.training.state import TrainState

log = logging.getLogger(__name__)

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint cannot be read, or differs from what was saved."""


def _fingerprint_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def exists(workdir: Path, stage: str) -> bool:
    """Returns whether a stage has a finished checkpoint in a workdir."""
    return (workdir / stage).is_dir() and bool(ocp.utils.checkpoint_steps(workdir / stage))


def on_first_device(like: Any) -> Any:
    """Adds one device's sharding to shapes and types from `jax.eval_shape`, for restoring."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


class Checkpoints:
    """The checkpoints of one stage; a context manager.

    With several processes, all of them must open, save and close it together.
    """

    def __init__(self, directory: Path, keep: int | None = None, *, alone: bool = False):
        """Opens the folder; creates it if it does not exist.

        Args:
          directory: the stage's folder.
          keep: the number of checkpoints to keep, the last ones; None for all.
          alone: for reading in this process only; the folder must exist.
        """
        self.directory = directory
        self._keep, self._alone = keep, alone
        self._damaged = set()  # steps
        if alone:  # listed once, since a training may add and remove some meanwhile
            self._steps = sorted(ocp.utils.checkpoint_steps(directory))
        else:
            _ = self._manager  # all processes create it together

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's reader and writer, which starts JAX; the steps and `meta` are read without it."""
        this = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep and ocp.checkpoint_managers.LatestN(self._keep),
            create=not self._alone,
            # Saving asynchronously would also lose, on a kill, the steps trained during the save.
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=this if self._alone else 0,
                active_processes={this} if self._alone else None,
            ),
        )
        return ocp.CheckpointManager(self.directory.absolute(), options=options)

    @classmethod
    def open(cls, workdir: Path, stage: str) -> "Checkpoints":
        """Opens a trained stage for reading."""
        if not exists(workdir, stage):
            raise UserError(
                f"The workdir {workdir} has no checkpoint of the {stage}: train it first with "
                f"`python -m binlatent.main --config=CONFIG --workdir={shlex.quote(str(workdir))} "
                f"--mode=train_{stage}`."
            )
        return cls(workdir / stage, alone=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint not known to be damaged, or None."""
        return max(set(self.all_steps()) - self._damaged, default=None)

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first."""
        return self._steps if self._alone else sorted(self._manager.all_steps())

    def newest(self, read: Callable[["Checkpoints"], T], set_aside: bool = False) -> T:
        """Returns the result of `read` for the newest checkpoint that is not damaged.

        Args:
          read: reads parts of the newest checkpoint with this object's methods. If a part is
            damaged, it is called again for the checkpoint before.
          set_aside: whether to rename damaged checkpoints, so that training can save the same steps
            again. Their files stay.
        """
        while True:
            try:
                result = read(self)
                break
            except Damaged as damage:
                log.warning("%s", damage)
                self._damaged.add(self.latest_step())
                if self.latest_step() is None:
                    raise UserError(
                        f"All checkpoints in {self.directory} are damaged: restore a copy of one, "
                        "or delete that folder and train again."
                    ) from damage
        if self._damaged:
            log.warning("The checkpoint of step %d is used instead.", self.latest_step())
        if self._damaged and set_aside:
            self._set_aside()
        return result

    def _set_aside(self) -> None:
        """Renames damaged checkpoints; call it only if another one is left."""
        if jax.process_index() == 0:
            for step in sorted(self._damaged):
                path = self.directory / str(step)
                number = 0
                while (aside := path.with_name(f"{step}.damaged{number or ''}")).exists():
                    number += 1
                path.rename(aside)
                log.warning("%s was renamed to %s: you may delete it.", path, aside.name)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        self._damaged.clear()

    def close(self) -> None:
        """Stops Orbax's threads."""
        if "_manager" in vars(self):
            self._manager.close()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a checkpoint; returns when it is on disk."""
        meta = finite({"version": VERSION, **meta})
        # As NumPy arrays, so that only process 0 writes them.
        state = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
        parts = {"state": state.replace(ema_params={}), "ema_params": state.ema_params}
        fingerprints = {name: fingerprint(part) for name, part in parts.items()}
        fingerprints["meta"] = _fingerprint_of_json(meta)
        args = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        args["meta"] = ocp.args.JsonSave({"content": meta, "fingerprints": fingerprints})
        step = int(state.step)
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except jax.errors.JaxRuntimeError as error:  # the processes could not synchronise
            raise UserError(
                f"Another process was lost while the checkpoint of step {step} was being saved: "
                "start all of them again to resume from the last checkpoint."
            ) from error
        except Exception as error:  # such as OSError, or ValueError from tensorstore
            raise UserError(
                f"The checkpoint of step {step} could not be written to {self.directory}: "
                f"{_reason(error)}. Earlier checkpoints are intact: make room on the disk, or "
                "remove the cause, and run the same command again."
            ) from error

    def _read(self, **args: Any) -> Any:
        """Returns parts of the newest checkpoint.

        Raises:
          Damaged: if a part cannot be read.
        """
        step = self.latest_step()
        with self._reporting_damage():
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    @contextmanager
    def _reporting_damage(self) -> Iterator[None]:
        """Raises Damaged if the block cannot read the newest checkpoint."""
        try:
            yield
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not caused by the files
        except Exception as error:  # of many types, depending on the damage
            raise self._damage(f"cannot be read: {_reason(error)}") from error

    def _damage(self, what: str) -> Damaged:
        return Damaged(f"The checkpoint {self.directory / str(self.latest_step())} {what}.")

    def _meta_and_fingerprints(self) -> tuple[dict[str, Any], dict[str, str]]:
        path = self.directory / str(self.latest_step()) / "meta" / "metadata"
        with self._reporting_damage():
            stored = json.loads(path.read_text("utf-8"))
        try:
            meta, fingerprints = stored["content"], stored["fingerprints"]
            expected = fingerprints["meta"], fingerprints["state"], fingerprints["ema_params"]
            typed = (
                isinstance(meta["config"], dict)
                and isinstance(meta["data"], dict | None)
                and isinstance(meta["source"], str)
                and isinstance(meta["encoder"], str)
                and isinstance(meta["seconds"], int | float)
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damage("lacks parts of its meta/metadata") from error
        if not typed or _fingerprint_of_json(meta) != expected[0]:
            raise self._damage("has a meta/metadata that differs from what was saved")
        return meta, fingerprints

    def _restore(self, **like: Any) -> Any:
        """Returns parts of the newest checkpoint, after checking their fingerprints."""
        _, fingerprints = self._meta_and_fingerprints()
        args = {name: ocp.args.StandardRestore(part) for name, part in like.items()}
        restored = self._read(**args)
        for name in like:
            if fingerprint(restored[name]) != fingerprints[name]:
                raise self._damage(f"has numbers in {name} that differ from what was saved")
        return restored

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest checkpoint's state, with the shapes and sharding of `like`.

        Raises:
          Damaged: if it cannot be read; the other reading methods raise it too.
        """
        key = jax.eval_shape(jax.random.key_data, like.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=like.key.sharding)
        state = like.replace(ema_params={}, key=key)
        restored = self._restore(state=state, ema_params=like.ema_params)
        return restored.state.replace(
            ema_params=restored.ema_params, key=jax.random.wrap_key_data(restored.state.key)
        )

    def meta(self) -> dict[str, Any]:
        """Returns the newest checkpoint's `meta`."""
        return self._meta_and_fingerprints()[0]

    def check_encoder(self, fingerprint: str) -> None:
        """Raises UserError if the prior was trained on codes of another encoder."""
        if self.meta()["encoder"] != fingerprint:
            raise UserError(
                f"The prior in {self.directory} was trained for another autoencoder than the one "
                "beside it: restore that one, or delete the prior's folder and train it again."
            )

    def restore_ema(self, like: Any) -> Any:
        """Returns the newest checkpoint's EMA parameters on the first local device.

        Args:
          like: their shapes and types, from `jax.eval_shape`.
        """
        return self._restore(ema_params=on_first_device(like)).ema_params


def _reason(error: Exception) -> str:
    """Returns the cause of an error in a few words; Orbax's messages are long."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if getattr(error, "errno", None) == number or os.strerror(number) in text:
            return os.strerror(number)
    first = re.split(r"\n|(?<=[^.])[.:] ", text.strip(), maxsplit=1)[0]
    return first[:120] or type(error).__name__
