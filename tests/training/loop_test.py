"""What the training loop logs of a stage that does nothing."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.training import loop
from binlatent.training.logbook import Logbook
from binlatent.training.optimizer import Training
from binlatent.training.state import create_state

STEPS, IMAGES = 6, 8


class Batches:
    """Batches of images of one number."""

    def __next__(self):
        return {"image": np.zeros((IMAGES, 1), np.float32)}

    def get_state(self):
        return {}


def stage_of(training):
    """A stage whose first step takes a second, as if it were compiled, and no other step any."""
    slow = [1.0]

    def step(state, batch, index):
        time.sleep(slow.pop() if slow else 0.01)
        return state.replace(step=jnp.int32(index + 1)), {"loss": jnp.float32(index)}

    state = create_state(jax.random.key(0), {"w": jnp.zeros(3)}, training.optimizer())
    nothing = {"check_resumable": None, "tell_changes": None, "check_unfinished": None}
    return loop.Stage(
        *("prior", training, state, step, Batches(), {"encoder": ""}),
        **nothing,
        evaluate=lambda _: {},
        preview=lambda _: np.zeros((4, 4, 1), np.uint8),
    )


@pytest.mark.parametrize("log_every, at", [(3, [3, 6]), (1, [2, 3, 4, 5, 6])])
def test_the_time_left_is_without_compilation(tiny_config, tmp_path, monkeypatch, log_every, at):
    logged = {}

    def record(self, step, metrics, seconds_left=None):
        if metrics:
            logged[step] = metrics, seconds_left

    monkeypatch.setattr(Logbook, "record", record)
    section = tiny_config.prior.train.to_dict() | {"num_steps": STEPS, "batch_size": IMAGES}
    run = loop.Run(log_every, 100, 100, 1, "stop", False)
    loop.train(stage_of(Training(**section)), run, tmp_path)
    assert [step for step, (_, left) in logged.items() if left is not None] == at
    for step in at:
        metrics, left = logged[step]
        speed = metrics["images_per_second"]
        assert speed > 2 * 3 * IMAGES  # a second among three steps would make it less
        assert left == pytest.approx((STEPS - step) * IMAGES / speed)
    # The losses are those of all steps.
    assert logged[at[-1]][0]["loss"] == np.mean(range(STEPS - log_every, STEPS))
