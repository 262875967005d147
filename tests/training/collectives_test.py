"""Communication between devices in a training step: only sums of gradients."""

import re

import jax
import numpy as np
import pytest

from binlatent.benchmark import workloads

KINDS = (
    "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|"
    "ragged-all-to-all"
)


def _collectives(work):
    """Returns the kind and size of each collective in the compiled program."""
    found = []
    for line in work.programs[0].compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [
                np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in shapes
            ]
            found.append((match[2], sum(sizes)))
    return found


def _size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("cached", [True, False], ids=["codes", "images"])
def test_the_priors_step_has_one_collective(tiny_experiment, cached):
    experiment = tiny_experiment.change({"prior.cache_codes": cached})
    parameters = _size(experiment.prior.init(jax.random.key(0)))
    [(kind, size)] = _collectives(workloads.PROGRAMS["train_prior"](experiment, 8, 2))
    assert kind == "all-reduce"
    assert parameters < size < parameters + 10  # the metrics


def test_the_autoencoders_step_has_one_collective(tiny_experiment):
    parameters = _size(tiny_experiment.autoencoder.init(jax.random.key(0)))
    [(kind, size)] = _collectives(workloads.PROGRAMS["train_autoencoder"](tiny_experiment, 8, 2))
    assert kind == "all-reduce"
    assert parameters < size < parameters + 10


def test_a_discriminator_adds_its_own_gradients_and_moments(tiny_experiment):
    experiment = tiny_experiment.change(
        {
            "autoencoder.loss.adversarial": 1.0,
            "autoencoder.discriminator.width": 8,
            "autoencoder.discriminator.num_layers": 2,
        }
    )
    state = experiment.autoencoder.init_state(0)
    parameters = _size((state.params, state.discriminator["params"]))
    found = _collectives(workloads.PROGRAMS["train_autoencoder"](experiment, 8, 2))
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Each batch norm adds a mean and a square per channel, and their gradients.
    assert parameters < sum(size for _, size in found) < parameters + 1000
