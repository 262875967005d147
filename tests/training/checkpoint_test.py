"""Damaged checkpoints, and full disks."""

import functools
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from binlatent.runtime.devices import replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.version import VERSION
from binlatent.runtime.weights import fingerprint
from binlatent.training.checkpoint import Checkpoints
from binlatent.training.state import create_state

SIZE = 30_000  # size of an array; Orbax keeps smaller ones in its index
META = {"config": {"seed": 0}, "data": {"next_index": 1}, "source": "s", "encoder": "e"}
META["seconds"] = 1.5


@functools.cache
def state_of(step):
    """A complete state whose numbers are determined by its step."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {name: jax.random.normal(key, (SIZE,)) for name, key in zip("ab", keys, strict=True)}
    discriminator = {"params": {"c": params["a"] + 1}, "batch_stats": {"mean": jnp.ones(3) * step}}
    state = create_state(jax.random.key(step), params, optax.adam(1e-3), discriminator)
    return replicate(state.replace(step=jnp.asarray(step, jnp.int32)))


def meta_of(step):
    return META | {"data": {"next_index": step}}


def save(directory, *steps, keep=None):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), meta_of(step))


def read(checkpoints):
    return checkpoints.meta(), checkpoints.restore(state_of(0))


def read_newest(directory, set_aside=False):
    with Checkpoints(directory) as checkpoints:
        meta, state = checkpoints.newest(read, set_aside)
        step = checkpoints.latest_step()
    # The checkpoint that was read is identical to what was saved.
    assert meta == meta_of(step) | {"version": VERSION}
    state, expected = (x.replace(key=jax.random.key_data(x.key)) for x in (state, state_of(step)))
    assert fingerprint(state) == fingerprint(expected)
    return step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "prior"
    save(directory, 2, 4)
    return directory


def remove(path, rng):
    path.unlink()


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def scramble(path, rng):
    path.write_bytes(rng.bytes(path.stat().st_size))


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("part", ["state", "ema_params"])
@pytest.mark.parametrize("damage", [remove, truncate, flip, scramble])
def test_damaged_arrays_fall_back_to_the_checkpoint_before(saved, tmp_path, caplog, damage, part):
    directory = shutil.copytree(saved, tmp_path / "prior")
    # The largest file holds the arrays; Orbax does not detect a flipped byte there.
    damage(largest(directory / "4" / part), np.random.default_rng(0))
    with caplog.at_level(logging.WARNING, "binlatent"):
        assert read_newest(directory) == 2
    assert re.search(rf"The checkpoint {directory}/4 (cannot be read|has numbers in)", caplog.text)
    assert "The checkpoint of step 2 is used instead." in caplog.text
    assert (directory / "4").is_dir()  # reading renames nothing


@pytest.mark.parametrize("path", ["state", "ema_params", "meta", "meta/metadata"])
def test_a_missing_part_falls_back_to_the_checkpoint_before(saved, tmp_path, caplog, path):
    directory = shutil.copytree(saved, tmp_path / "prior")
    path = directory / "4" / path
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read_newest(directory) == 2
    assert f"The checkpoint {directory}/4 cannot be read" in caplog.text


@pytest.mark.slow
def test_damage_to_any_file_is_detected(saved, tmp_path):
    # Some files are not needed, or are redundant: then step 4 is still intact.
    rng, found = np.random.default_rng(0), []
    files = sorted(p.relative_to(saved) for p in (saved / "4").rglob("*") if p.is_file())
    for file in files:
        for damage in (remove, truncate, flip, flip, flip, scramble):
            directory = shutil.copytree(saved, tmp_path / "prior")
            damage(directory / file, rng)
            found.append(read_newest(directory))
            shutil.rmtree(directory)
    assert set(found) == {2, 4}


def test_every_flipped_byte_of_meta_is_detected(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "prior")
    path = directory / "4" / "meta" / "metadata"
    content, whole = path.read_bytes(), meta_of(4) | {"version": VERSION}
    assert b'"next_index": 4' in content
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with Checkpoints(directory) as checkpoints:
            try:
                assert checkpoints.meta() == whole  # such as a space
            except UserError as error:
                assert f"{directory}/4 " in str(error)


def test_training_can_save_the_step_of_a_renamed_checkpoint(saved, tmp_path, caplog):
    directory = shutil.copytree(saved, tmp_path / "prior")
    for name in ("4.damaged", "4.damaged1"):
        flip(largest(directory / "4" / "state"), np.random.default_rng(1))
        with Checkpoints(directory, 3) as checkpoints:
            checkpoints.newest(read, set_aside=True)
            assert checkpoints.all_steps() == [2]
            checkpoints.save(state_of(4), meta_of(4))
        assert f"{directory}/4 was renamed to {name}" in caplog.text
        assert (directory / name / "state").is_dir()
        caplog.clear()
        assert read_newest(directory) == 4 and not caplog.text


def test_if_all_are_damaged_there_is_one_error_and_nothing_is_renamed(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "prior")
    for step in ("2", "4"):
        (directory / step / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=f"All checkpoints in {directory} are damaged"):
        read_newest(directory, set_aside=True)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.all_steps() == [2, 4]


def test_an_error_of_the_reader_is_not_damage(saved):
    def refuse(checkpoints):
        raise UserError("another model")

    with Checkpoints(saved) as checkpoints, pytest.raises(UserError, match="another model"):
        checkpoints.newest(refuse, set_aside=True)
    assert (saved / "4").is_dir()


@pytest.mark.parametrize("small_disk", ["1536k"], indirect=True)
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay_intact(small_disk):
    directory = small_disk / "prior"  # random numbers: 0.6 MB per checkpoint
    reason = rf"The checkpoint of step 6 could not be written to {directory}: No space left on dev"
    with pytest.raises(UserError, match=reason):
        save(directory, 2, 4, 6, keep=3)
    assert read_newest(directory) == 4
    # With room again, the remains of the failed save do not matter.
    shutil.rmtree(directory / "2")
    save(directory, 6, keep=3)
    assert read_newest(directory) == 6
    assert sorted(p.name for p in directory.iterdir()) == ["4", "6"]
