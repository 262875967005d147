"""What a compiled program asks for, against what can be counted."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from binlatent import benchmark, build, evaluate
from binlatent.data import loader
from binlatent.data.sources import Source
from binlatent.errors import UserError


def size(tree):
    return sum(np.prod(leaf.shape, dtype=int) * 4 for leaf in jax.tree.leaves(tree))


def test_arguments_are_the_state_and_the_images(tiny_config):
    config = tiny_config
    row = benchmark.train_step_memory(config, 8, jax.devices()[0])
    state = jax.eval_shape(lambda: build.init_autoencoder_state(config))
    # A key is two words, and counts as one leaf.
    expected = size(state) + 4 + 8 * 28 * 28 * 4
    assert abs(row["arguments"] - expected) < 64
    assert row["total"] == row["arguments"] + row["temporary"]
    twice = benchmark.train_step_memory(config, 16, jax.devices()[0])
    assert row["temporary"] < twice["temporary"] < 3 * row["temporary"]
    assert 1.8 < twice["flops"] / row["flops"] < 2.1


def test_decoding_counts_its_multiplications(tiny_config):
    row = benchmark.decode_memory(tiny_config, 4, jax.devices()[0])
    # On the 4x4 grid: 8 bits to 16, five 3x3 convolutions (some taps lie outside), attention.
    tokens, width = 4 * 16, 32
    convolutions = 9 * (16 * width + 4 * width**2 + width * 49)
    attention = 4 * width**2 + 2 * 16 * width
    expected = 2 * tokens * (8 * 16 + convolutions + attention)
    assert 0.5 < row["flops"] / expected < 1.5
    with pytest.raises(UserError, match="Cannot compile for 'x9:7x7'"):
        benchmark.device_to_compile_for("x9:7x7")


def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "binlatent.benchmark", "memory"]
    flags = ["--config=configs/digits.py", "--config.autoencoder.base_width=32", "--batch_size=2"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:4] for line in result.stdout.splitlines()[2:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["train", "28", "2"], ["decode", "28", "2"]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Name a config" in result.stderr


def test_data_speed_is_that_of_the_examples(tiny_config, monkeypatch):
    class Slow:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            time.sleep(0.01)
            return {"image": np.zeros((28, 28, 1), np.uint8), "label": 0}

    monkeypatch.setattr(evaluate, "open_data", lambda config, split, keep: Source(Slow(), 0))
    monkeypatch.setattr(loader, "cores", lambda: 8)
    row = benchmark.data_speed(tiny_config, 5, seconds=2.0)
    assert row["cores"] == 8 and 300 < row["images_per_second"] <= 1.1 * 800
    assert benchmark.data_table([row]).splitlines()[2].startswith("| digits | 28 | 5 | 8 | ")
