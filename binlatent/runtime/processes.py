"""Several processes that train one model: how they join, agree, and leave when one fails."""

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

from binlatent.runtime import command
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

# A process from which nothing is heard for so long is taken for dead, and JAX stops the others.
HEARTBEAT_SECONDS = 30

# How long those that are done wait for process 0, which evaluates and draws.
_EXIT_SECONDS = 24 * 3600


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Refuses flags of `join` that do not go together; bad usage ends the process."""
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if not any(given):
        return
    if not all(given):
        command.bad_usage("--coordinator, --num_processes, --process_id go together")
    if not re.fullmatch(r".+:\d+", coordinator):
        command.bad_usage(f"--coordinator={coordinator} must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        command.bad_usage("--process_id must be at least 0 and less than --num_processes")


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of a training, if there are any.

    They are those of a Slurm step of several tasks, or of a TPU's hosts, where nothing is given;
    the coordinator is HOST:PORT of process 0, on which it listens. Comes before anything else asks
    JAX for its devices. Of the package's log only that of process 0 shows. If process 0 does not
    answer for five minutes, JAX aborts.
    """
    # A task with several GPUs, alone in its step, is for itself.
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if coordinator is None and not slurm and not importlib.util.find_spec("libtpu"):
        return
    # When another process is lost JAX says so and aborts; all threads' stacks would bury that.
    faulthandler.disable()
    given = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # what is given is all there is
    }
    given = given if coordinator is not None else {}
    if given or slurm:  # with libtpu alone this may be the only one
        log.info(
            "Waiting for %s processes. Should one be lost later, JAX aborts the others within %d "
            "seconds: start all again, and they go on from the last checkpoint.",
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
            return  # libtpu is installed, but this is no host of a TPU
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"This process cannot join the others: {reason}. Start all of them, with "
            "the same --coordinator and --num_processes, and a --process_id each."
        ) from error
    # JAX's own handler ignores SIGTERM, which is to end what is not training.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index():
        logging.getLogger("binlatent").setLevel(logging.WARNING)
    counts = [len(jax.local_devices(process_index=i)) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(f"Every process needs the same number of devices; they have {counts}.")


def check_same(what: str, value: str) -> None:
    """Refuses, in all processes, to go on where one has another value of `what` than process 0."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    # Over all devices, as the steps are: this connects them while all processes are here together,
    # and gloo, between CPUs, would wait for no more than 30 seconds for one that comes later.
    gather = functools.partial(jax.lax.all_gather, axis_name="device")
    gather = jax.pmap(gather, axis_name="device", out_axes=None)
    copies = np.tile(digest, (jax.local_device_count(), 1))
    digests = np.asarray(gather(copies))[:: jax.local_device_count()]
    different = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(different):
        # The first to leave cuts the connections, so it waits until all have read what they got:
        # none can be through with this before the last has begun it. To fail here is to be late.
        with suppress(jax.errors.JaxRuntimeError):
            np.asarray(gather(copies))
        names = ", ".join(map(str, different))
        raise UserError(
            f"The processes disagree on {what}: {names} of {len(digests)} differ from process 0. "
            "Start all of them alike, on one shared --workdir."
        )


@contextmanager
def together() -> Iterator[None]:
    """Ends this process at once if what is inside fails, so that the others notice and stop.

    An ordinary exit would wait for them, while they wait for this process in the next step.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if code in (0, None):  # after a signal, when all stop at the same step
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if jax.process_index() == 0:
            # With it all others end, so those that fail for the same reason are to say so first.
            time.sleep(2)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
