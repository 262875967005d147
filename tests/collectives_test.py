"""What the devices tell each other in a training step: sums of gradients, and nothing else."""

import re

import jax
import numpy as np
import pytest

from binlatent import build
from binlatent.benchmark import workloads

KINDS = (
    "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|"
    "ragged-all-to-all"
)


def _collectives(work):
    """Returns, for each collective of the one compiled program, its kind and how many numbers."""
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
def test_the_priors_step_has_one_collective(tiny_config, cached):
    tiny_config.data.num_classes = 10
    tiny_config.prior.cache_codes = cached
    parameters = _size(build.init_prior(tiny_config, jax.random.key(0)))
    [(kind, size)] = _collectives(workloads.train_prior(tiny_config, 8, 2))
    assert kind == "all-reduce"
    assert parameters < size < parameters + 10  # the metrics


def test_the_autoencoders_step_has_one_collective(tiny_config):
    parameters = _size(build.init_autoencoder(tiny_config, jax.random.key(0)))
    [(kind, size)] = _collectives(workloads.train_autoencoder(tiny_config, 8, 2))
    assert kind == "all-reduce"
    assert parameters < size < parameters + 10


def test_a_discriminator_adds_its_own_gradients_and_moments(tiny_config):
    section = tiny_config.autoencoder
    section.loss.adversarial = 1.0
    section.discriminator.width = 8
    section.discriminator.num_layers = 2
    state = build.init_autoencoder_state(tiny_config)
    parameters = _size((state.params, state.discriminator["params"]))
    found = _collectives(workloads.train_autoencoder(tiny_config, 8, 2))
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Of batch normalisation a mean and a square a channel, and their gradients, each time it runs.
    assert parameters < sum(size for _, size in found) < parameters + 1000
