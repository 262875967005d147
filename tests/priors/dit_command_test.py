"""The network "dit" by its config: refused values, training by the command, and resuming."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import call_main, tiny_flags
from PIL import Image

from binlatent import stages
from binlatent.benchmark import workloads
from binlatent.configs import default
from binlatent.convert import released
from binlatent.experiment import of_checkpoint, resolve
from binlatent.experiment.resume import check_same_model
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.dit import DiT
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError

DIT = {"prior.network.name": "dit"}
KEYS = "prior.network.dit."


def resolved(changes=()):
    return resolve(default.get_config()).change(dict(changes))


def test_each_key_is_a_field_of_the_network():
    network = resolved(DIT).prior.prior.network
    assert network == DiT(512, 24, 8, "class", num_classes=-1)
    content = default.get_config().to_dict()
    for name, value in content["prior"]["network"]["dit"].items():
        other = "learned" if name == "positions" else False
        changed = resolved({**DIT, KEYS + name: other}).prior.prior.network
        assert getattr(network, name) == value and changed == network.clone(**{name: other})
    assert isinstance(resolved({KEYS + "adaln": False}).prior.prior.network, Transformer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prior.network.name": "unet"}, 'name must be "released" or "dit", not \'unet\''),
        ({**DIT, KEYS + "positions": "sines"}, 'positions must be "rotary" or "learned", not'),
        (
            {**DIT, "prior.network.width": 24, "prior.network.num_heads": 4},
            'multiple of 4: change config.prior.network.num_heads, or set .* to "learned"',
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        resolved(changes)


def test_heads_of_another_width_need_learned_positions():
    narrow = {"prior.network.width": 24, "prior.network.num_heads": 4}
    resolved(narrow)
    resolved({**DIT, **narrow, KEYS + "positions": "learned"})


def test_the_keys_fix_a_trained_prior_where_it_has_this_network():
    with pytest.raises(UserError, match="prior.network.name is released there and dit here"):
        check_same_model(resolved(DIT), resolved(), "prior")
    with pytest.raises(UserError, match="prior.network.dit.swiglu is True there and False here"):
        check_same_model(resolved({**DIT, KEYS + "swiglu": False}), resolved(DIT), "prior")
    check_same_model(resolved({KEYS + "swiglu": False}), resolved(), "prior")


def test_an_autoregressive_prior_has_its_own_network():
    own = {"prior.kind": "autoregressive", "data.num_classes": 0}
    dit, released = resolved({**DIT, **own}), resolved(own)
    assert dit.prior.prior == released.prior.prior
    check_same_model(dit, released, "prior")


def test_a_checkpoint_without_the_keys_has_the_released_network():
    config = default.get_config().to_dict()
    without = json.loads(json.dumps(config))
    del without["prior"]["network"]["name"], without["prior"]["network"]["dit"]
    found = of_checkpoint({"config": without, "version": "0.2.0"}, "runs/x/prior")
    assert found == resolve(config)
    assert isinstance(found.prior.prior.network, Transformer)


def test_it_is_not_exported_to_the_authors_code():
    evidence = {"prior.bernoulli.evidence": False}
    spec = resolved({**DIT, **evidence, "data.num_classes": 0}).prior
    with pytest.raises(UserError, match='code has no network "dit", so it cannot load this'):
        released.prior_state(spec, {}, np.zeros((32, 256)))


def test_a_training_step_is_measured(tiny_experiment):
    experiment = tiny_experiment.change(DIT)
    assert workloads.describe_size("train_prior", experiment) == "dit 1x16, 16 tokens"
    work = workloads.train_prior_work(experiment, 8, 2)
    assert all(np.all(np.isfinite(x)) for x in work.call().values())
    assert 0.2 < work.flops / work.xla_flops <= 1  # XLA also counts Adam, norms and activations


def test_the_command_trains_it_goes_on_and_samples(digits_dir, trained_workdir, tmp_path):
    shutil.copytree(trained_workdir / "autoencoder", tmp_path / "autoencoder")
    shutil.copytree(trained_workdir / "codes", tmp_path / "codes")
    flags = [*tiny_flags(digits_dir), f"--workdir={tmp_path}", "--config.prior.network.name=dit"]
    assert call_main(*flags, "--mode=train_prior") == 0
    whole = BinaryLatentDiffusion.from_workdir(tmp_path)
    assert isinstance(whole.experiment.prior.prior.network, DiT)
    assert "modulation" in whole.prior_params["params"]["blocks_0"]
    for step in ("4", "6"):  # as if it had been killed after step 2
        shutil.rmtree(tmp_path / "prior" / step)
    stages.train_prior(whole.experiment, tmp_path)
    again = BinaryLatentDiffusion.from_workdir(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.prior_params, whole.prior_params)
    picture = tmp_path / "a.png"
    asked = ("--mode=sample", "--num=3", "--label=7", f"--out={picture}")
    assert call_main(f"--workdir={tmp_path}", *asked) == 0
    assert len(np.unique(np.asarray(Image.open(picture)))) > 2


def test_parameters_at_the_papers_size():
    def size(changes):
        spec = resolved({"data.num_classes": 0, **changes}).prior
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(spec.init, jax.random.key(0))))

    d, layers, tokens, c = 512, 24, 256, 32
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 6 * d  # with two norms and two gammas
    shared = c * d + tokens * d + 2 * (d * d + d) + d * c + c
    assert size({}) == layers * block + shared + 2 * d
    f = 1368
    block = 4 * d * d + 4 * d + 3 * d * f + 2 * f + d + 6 * d * d + 6 * d + 2 * 64
    assert size(DIT) == layers * block + shared + 2 * d * d + 2 * d
