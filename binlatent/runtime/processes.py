"""Training with several processes: joining, checking that they agree, stopping on a failure."""

import faulthandler
import functools
import hashlib
import importlib.util
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
import numpy as np

from binlatent.runtime import command, interrupt
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

# After this long without a heartbeat, JAX counts a process as lost and stops the others.
HEARTBEAT_SECONDS = 30

# How long finished processes wait for process 0, which evaluates and draws pictures.
_EXIT_SECONDS = 24 * 3600


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Ends with `bad_usage` if the flags of `join` are incomplete or out of range."""
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if not any(given):
        return
    if not all(given):
        command.bad_usage("--coordinator, --num_processes and --process_id must be given together")
    if not re.fullmatch(r".+:\d+", coordinator):
        command.bad_usage(f"--coordinator={coordinator} must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        command.bad_usage("--process_id must be at least 0 and less than --num_processes")


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a training run, if there are any.

    Without arguments, a Slurm step of several tasks or the hosts of a TPU are detected. Call this
    before JAX initialises its devices. Only process 0 keeps the package's log. JAX aborts if
    process 0 does not answer within five minutes.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      num_processes: of the training run.
      process_id: of this process, from 0.
    """
    # A task that is alone in its Slurm step trains alone, with all its GPUs.
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if coordinator is None and not slurm and not importlib.util.find_spec("libtpu"):
        return
    # When another process is lost, JAX prints it and aborts. Stack traces would hide the message.
    faulthandler.disable()
    given = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # the arguments are complete
    }
    given = given if coordinator is not None else {}
    if given or slurm:  # with libtpu alone, there may be one process only
        log.info(
            "Waiting for %s processes. If one is lost later, JAX aborts the others within %d "
            "seconds: start all of them again to resume from the last checkpoint.",
            *(num_processes or "all", HEARTBEAT_SECONDS + 15),
        )
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_EXIT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not given and not slurm:
            return  # libtpu is installed, but this machine is not a TPU host
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"This process cannot join the others: {reason}. Start all of them, with "
            "the same --coordinator and --num_processes, and a --process_id each."
        ) from error
    # JAX's handler ignores SIGTERM, which must end commands that do not train.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index():
        logging.getLogger("binlatent").setLevel(logging.WARNING)
    counts = [len(jax.local_devices(process_index=i)) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(f"Every process needs the same number of devices; they have {counts}.")


def check_same(what: str, value: str) -> None:
    """Raises UserError in all processes if their values of `what` differ.

    Args:
      what: a name for the error message.
      value: this process's value.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    # Gathered over all devices, as in a training step, so that they connect here, where all
    # processes meet. Between CPUs, gloo waits only 30 seconds for a late process.
    gather = functools.partial(jax.lax.all_gather, axis_name="device")
    gather = jax.pmap(gather, axis_name="device", out_axes=None)
    copies = np.tile(digest, (jax.local_device_count(), 1))
    digests = np.asarray(gather(copies))[:: jax.local_device_count()]
    different = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(different):
        # The first process to exit cuts the connections. A second gather cannot end before all
        # processes have read the first. It fails only where another process has already left.
        with suppress(jax.errors.JaxRuntimeError):
            np.asarray(gather(copies))
        names = ", ".join(map(str, different))
        raise UserError(
            f"The processes disagree on {what}: {names} of {len(digests)} differ from process 0. "
            "Start all of them with the same flags and one shared --workdir."
        )


@contextmanager
def together() -> Iterator[None]:
    """Ends this process at once if the block fails, so that the other processes stop too.

    An ordinary exit would wait for the others, while they wait for this process in the next step.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        # After a signal, all processes stop at the same step.
        if code in (0, None) or isinstance(error, interrupt.Stopped):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if jax.process_index() == 0:
            # All others end with process 0. First let them print their own errors.
            time.sleep(2)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
