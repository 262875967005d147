"""Saving and restoring a stage; the only user of Orbax.

A stage's folder holds its last checkpoints, each named by its step with three parts: `state`, all
that training needs but the EMA; `ema_params`, all that sampling needs; `meta`, JSON: the version
of binlatent, the config, the data iterator's state, the fingerprints of the images and of the
encoder that a prior belongs to, and the seconds trained so far; with fingerprints of all three,
which reading compares, as Orbax and its formats see to it that a checkpoint is complete, but do not
see each flipped bit.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable
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
    """A checkpoint cannot be read, or is not what was saved."""


def _fingerprint_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def exists(workdir: Path, stage: str) -> bool:
    """Tells whether a stage has a finished checkpoint in a workdir."""
    return (workdir / stage).is_dir() and bool(ocp.utils.checkpoint_steps(workdir / stage))


def on_first_device(like: Any) -> Any:
    """Returns shapes and types, as `jax.eval_shape` gives them, to be restored on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


class Checkpoints:
    """The checkpoints of one stage; a context manager.

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
            # So that a kill loses one interval at most, and not what is trained while writing too.
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=this if alone else 0, active_processes={this} if alone else None
            ),
        )
        self.directory = directory
        self._damaged = set()  # steps
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    @classmethod
    def open(cls, workdir: Path, stage: str) -> "Checkpoints":
        """Opens a trained stage for reading."""
        if not exists(workdir, stage):
            raise UserError(
                f"The workdir {workdir} has no checkpoint of the {stage}: train it first, by "
                f"`python -m binlatent.main --config=CONFIG --workdir={shlex.quote(str(workdir))} "
                f"--mode=train_{stage}`."
            )
        return cls(workdir / stage, alone=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint not known to be damaged, None without one."""
        return max(set(self.all_steps()) - self._damaged, default=None)

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self, read: Callable[["Checkpoints"], T], set_aside: bool = False) -> T:
        """Returns what `read` makes of the newest checkpoint that is whole.

        Args:
          read: asks this object for parts of the newest checkpoint; called again, for the one
            before, if a part is damaged.
          set_aside: whether to rename the damaged ones, so that training, when it comes to their
            steps again, can save them. Their files stay.
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
                        f"None of the checkpoints in {self.directory} is whole: bring back a copy "
                        "of one, or delete that folder and train anew."
                    ) from damage
        if self._damaged:
            log.warning("The one before is whole: step %d.", self.latest_step())
        if self._damaged and set_aside:
            self._set_aside()
        return result

    def _set_aside(self) -> None:
        """Renames what is damaged; only now, as without a whole one nothing may look untrained."""
        if jax.process_index() == 0:
            for step in sorted(self._damaged):
                path = self.directory / str(step)
                number = 0
                while (aside := path.with_name(f"{step}.damaged{number or ''}")).exists():
                    number += 1
                path.rename(aside)
                log.warning("%s is now %s; delete it when you have seen it.", path, aside.name)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        self._damaged.clear()

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves, and returns when all is on disk."""
        meta = finite({"version": VERSION, **meta})
        # As NumPy's arrays, of which process 0 writes each once.
        state = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
        parts = {"state": state.replace(ema_params={}), "ema_params": state.ema_params}
        fingerprints = {name: fingerprint(part) for name, part in parts.items()}
        fingerprints["meta"] = _fingerprint_of_json(meta)
        args = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        args["meta"] = ocp.args.JsonSave({"content": meta, "fingerprints": fingerprints})
        step = int(state.step)
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except jax.errors.JaxRuntimeError as error:  # of what the processes have to agree on
            raise UserError(
                f"Another process was lost while the checkpoint of step {step} was being saved: "
                "start all again, and they go on from the last one."
            ) from error
        except Exception as error:  # by what failed: OSError, or tensorstore's ValueError
            raise UserError(
                f"The checkpoint of step {step} could not be written to {self.directory}: "
                f"{_reason(error)}. Those before it are whole; make room, or whatever it needs, "
                "and start again."
            ) from error

    def _read(self, **args: Any) -> Any:
        """Returns parts of the newest checkpoint.

        Raises:
          Damaged: if they cannot be read.
        """
        step = self.latest_step()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # no fault of the files
        except Exception as error:  # by where the damage is
            raise self._damage(f"cannot be read, {_reason(error)}") from error

    def _damage(self, what: str) -> Damaged:
        return Damaged(f"The checkpoint {self.directory / str(self.latest_step())} {what}.")

    def _meta_and_fingerprints(self) -> tuple[dict[str, Any], dict[str, str]]:
        stored = self._read(meta=ocp.args.JsonRestore()).meta
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
            raise self._damage("has lost parts of its meta/metadata") from error
        if not typed or _fingerprint_of_json(meta) != expected[0]:
            raise self._damage("has another meta/metadata than was saved")
        return meta, fingerprints

    def _restore(self, **like: Any) -> Any:
        """Returns arrays of the newest checkpoint, by part, that are as they were saved."""
        _, fingerprints = self._meta_and_fingerprints()
        args = {name: ocp.args.StandardRestore(part) for name, part in like.items()}
        restored = self._read(**args)
        for name in like:
            if fingerprint(restored[name]) != fingerprints[name]:
                raise self._damage(f"has other numbers in {name} than were saved")
        return restored

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest checkpoint's state, placed and shaped as `like`.

        Raises:
          Damaged: as do all that read.
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
        """Refuses a prior that was trained on the codes of another encoder."""
        if self.meta()["encoder"] != fingerprint:
            raise UserError(
                f"The prior in {self.directory} was trained for another autoencoder than the one "
                "beside it: bring that one back, or delete the prior's folder and train it anew."
            )

    def restore_ema(self, like: Any) -> Any:
        """Returns the newest checkpoint's EMA parameters on the first local device.

        Args:
          like: their shapes and types, as `jax.eval_shape` gives them.
        """
        return self._restore(ema_params=on_first_device(like)).ema_params


def _reason(error: Exception) -> str:
    """Returns what went wrong in a few words: Orbax's messages are long, its causes are not."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if getattr(error, "errno", None) == number or os.strerror(number) in text:
            return os.strerror(number)
    first = re.split(r"\n|(?<=[^.])[.:] ", text.strip(), maxsplit=1)[0]
    return first[:120] or type(error).__name__
