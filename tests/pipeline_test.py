"""`BinaryLatentDiffusion` on untrained tiny networks, and its pictures."""

import jax
import numpy as np
import pytest
from conftest import untrained_pipeline

from binlatent.data import masks
from binlatent.evaluation import pictures
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.bernoulli.programs import sample_codes
from binlatent.priors.conditions import Condition
from binlatent.runtime import png
from binlatent.runtime.devices import map_batches
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import sample_keys


def random_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def with_sample(pipeline, **sample):
    """The pipeline with other values in config.sample."""
    values = {f"sample.{name}": value for name, value in sample.items()}
    return BinaryLatentDiffusion(
        pipeline.experiment.change(values), pipeline.autoencoder_params, pipeline.prior_params
    )


@pytest.fixture(scope="module")
def params(untrained_workdir):
    """Parameters far from the initial ones, for which all codes are nearly equal."""
    pipeline = BinaryLatentDiffusion.from_workdir(untrained_workdir)
    params = jax.device_get((pipeline.autoencoder_params, pipeline.prior_params))
    return random_like(params[0], 1), random_like(params[1], 2)


@pytest.fixture
def pipeline(tiny_experiment, params):
    return BinaryLatentDiffusion(tiny_experiment, *params)


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, 28, 28, 1)).astype(np.float32)


def test_map_batches_joins_equal_batches_and_drops_the_filling():
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    np.testing.assert_array_equal(map_batches(double, 6, np.arange(21)), 2 * np.arange(21))
    assert sizes == [8, 8, 8]  # on four devices
    np.testing.assert_array_equal(map_batches(double, 8, np.arange(3)), 2 * np.arange(3))
    assert sizes[3:] == [4]


def test_encode_is_the_rounded_or_drawn_probability(pipeline, images):
    probs = pipeline.encode_probs(images)
    assert probs.shape == (5, 4, 4, 8) and probs.min() >= 0 and probs.max() <= 1
    np.testing.assert_array_equal(pipeline.encode(images), probs > 0.5)
    np.testing.assert_array_equal(pipeline.encode(images, "soft"), probs)
    draws = [pipeline.encode(images, "sample", jax.random.key(i)) for i in range(300)]
    draws = np.mean(draws, axis=0)
    np.testing.assert_allclose(draws, probs, atol=0.15)


def test_reconstruct_is_decode_of_encode(pipeline, images):
    reconstructed = pipeline.reconstruct(images)
    assert reconstructed.shape == images.shape and np.abs(reconstructed).max() <= 1
    np.testing.assert_array_equal(reconstructed, pipeline.decode(pipeline.encode(images)))


def test_results_do_not_depend_on_the_batch_size(pipeline, images):
    whole = pipeline.reconstruct(images)
    parts = with_sample(pipeline, batch_size=2).reconstruct(images)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_sample_is_a_function_of_its_key(pipeline):
    first = pipeline.sample(3, jax.random.key(0), 1)
    assert first.shape == (3, 28, 28, 1)
    np.testing.assert_array_equal(pipeline.sample(3, jax.random.key(0), 1), first)
    assert np.any(pipeline.sample(3, jax.random.key(1), 1) != first)
    assert len(np.unique(first.round(3), axis=0)) == 3  # the samples of a batch differ


def test_the_same_key_gives_the_same_codes_whatever_the_batch_split(pipeline):
    codes = pipeline.sample_codes(8, jax.random.key(0), 1)
    assert np.any(codes[:4] != codes[4:])
    np.testing.assert_array_equal(pipeline.sample_codes(5, jax.random.key(0), 1), codes[:5])
    parts = with_sample(pipeline, batch_size=3).sample_codes(8, jax.random.key(0), 1)
    np.testing.assert_array_equal(parts, codes)


def test_a_key_a_sample_gives_any_part_of_the_samples(pipeline):
    key = jax.random.key(7)
    keys = sample_keys(key, 3, first=2)
    np.testing.assert_array_equal(pipeline.sample_codes(3, keys), pipeline.sample_codes(5, key)[2:])
    with pytest.raises(UserError, match=r"Give one key or 4 keys, .* of shape \(3,\)"):
        pipeline.sample_codes(4, keys)


def test_an_integer_is_the_seed_of_a_key(pipeline, images):
    def drawn(key):
        codes = pipeline.encode(images, "sample", key)
        keep = np.ones((28, 28), bool)
        keep[14:] = False
        return [
            codes,
            pipeline.sample_codes(2, key, 1),
            pipeline.trajectory(2, key, 1).z_t,
            pipeline.inpaint(images[:2], keep, key, 1),
            pipeline.vary(images[:2], key, 1),
            pipeline.code_lengths(codes[:2], key, 1),
            *pipeline.image_metrics(codes[:2] * 0.9, np.array([1, 2]), key).values(),
        ]

    for found, expected in zip(drawn(3), drawn(jax.random.key(3)), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(drawn(np.int64(3))[1], drawn(3)[1])


def test_temperature_guidance_and_label_do_not_recompile(pipeline):
    pipeline.sample(4, jax.random.key(0), 0, steps=3)
    compiled = sample_codes._cache_size()
    baseline = pipeline.sample_codes(4, jax.random.key(0), 0, steps=3)
    for options in (
        dict(label=3),
        dict(label=0, temperature=0.3),
        dict(label=0, guidance=4.0),
        dict(label=0, guidance=0.0),
        dict(label=[0, 1, 2, 3]),
        dict(label=0, guidance=4.0, guidance_interval=(0.3, 0.8)),
        dict(label=0, times=[8, 1.5, 0.5, 0]),
    ):
        changed = pipeline.sample_codes(4, jax.random.key(0), **({"steps": 3} | options))
        assert np.any(changed != baseline), options
    assert sample_codes._cache_size() == compiled


def _rounded(jaxpr, in_loop=False):
    """Yields the shape of each array that becomes bfloat16, and whether that is in a loop."""
    for equation in jaxpr.eqns:
        (x, *_), (y, *_) = equation.invars or [None], equation.outvars or [None]
        if equation.primitive.name == "convert_element_type" and y.aval.dtype == "bfloat16":
            yield x.aval.shape, in_loop
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                loop = in_loop or equation.primitive.name in ("scan", "while")
                yield from _rounded(getattr(inner, "jaxpr", inner), loop)


def _is_jaxpr(x):
    return hasattr(x, "eqns")


def test_sampling_in_bfloat16_rounds_the_weights_before_its_loop(pipeline):
    times = np.linspace(8, 0, 5, dtype=np.float32)
    traced = sample_codes.trace(
        pipeline.prior_params,
        sample_keys(jax.random.key(0), 4),
        Condition(np.zeros(4, int)),
        *(None, None, times, np.ones(4, np.float32), 1.0, 0.1),
        denoiser=pipeline.experiment.change({"dtype": "bfloat16"}).prior.prior,
        pair="plain_mixture",
        threshold_last=False,
        corrector_steps=0,
        return_trajectory=False,
    )
    rounded = list(_rounded(traced.jaxpr.jaxpr))
    kernel = pipeline.prior_params["params"]["blocks_0"]["mlp_0"]["kernel"].shape
    # The tiny network has one layer.
    assert [in_loop for shape, in_loop in rounded if shape == kernel] == [False]


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_trajectory_has_a_state_a_step_and_ends_in_the_sample(pipeline, steps):
    passed = pipeline.trajectory(2, jax.random.key(0), 0, steps=steps)
    assert passed.z_t.shape == (2, steps + 1, 4, 4, 8) and passed.z_t.dtype == bool
    assert passed.p_0.shape == (2, steps, 4, 4, 8)
    assert passed.p_0.min() >= 0 and passed.p_0.max() <= 1
    codes = pipeline.sample_codes(2, jax.random.key(0), 0, steps=steps)
    np.testing.assert_array_equal(passed.z_t[:, -1], codes.astype(bool))


def test_temperature_acts_on_the_logit_of_the_pair(pipeline):
    # Both pairs are the same posterior of this prior, except for the temperature.
    def codes(**options):
        return pipeline.sample_codes(20, jax.random.key(0), 0, **options)

    cold = dict(temperature=0.5)
    same = codes(temperature=1.0), codes(temperature=1.0, pair="balanced_plugin")
    assert np.mean(same[0] != same[1]) < 0.01  # rounding
    assert np.mean(codes(**cold) != codes(**cold, pair="balanced_plugin")) > 0.02


def test_every_option_of_the_config_is_read(pipeline):
    key = jax.random.key(0)
    baseline = pipeline.sample_codes(20, key, 0, guidance=1.0)
    changes = dict(
        steps=2,
        temperature=0.5,
        guidance=3.0,
        guidance_interval=(0.0, 0.3),
        pair="balanced_plugin",
        threshold_last=True,
        corrector_steps=1,
    )
    for name, value in changes.items():
        changed = pipeline.sample_codes(20, key, 0, **({"guidance": 1.0} | {name: value}))
        assert np.any(changed != baseline), name
    first = pipeline.sample_codes(20, key, 0, guidance=1.0, corrector_steps=1)
    pipeline = with_sample(pipeline, guidance=1.0, corrector_steps=1)
    np.testing.assert_array_equal(pipeline.sample_codes(20, key, 0), first)
    larger = pipeline.sample_codes(20, key, 0, corrector_size=0.9)
    assert np.any(larger != first)


def test_code_lengths_are_the_bits_of_a_prior_that_knows_nothing(untrained_workdir):
    key = jax.random.key(0)
    # The output is 0: all bits are fair.
    untrained = BinaryLatentDiffusion.from_workdir(untrained_workdir)
    codes = np.asarray(jax.random.bernoulli(key, shape=(100, 4, 4, 8)), np.float32)
    lengths = untrained.code_lengths(codes, key, np.arange(100) % 10)
    assert lengths.shape == (100,)
    np.testing.assert_allclose(lengths.mean(), 4 * 4 * 8, rtol=0.03)
    again = untrained.code_lengths(codes[:7], key, np.arange(7))
    np.testing.assert_allclose(again, lengths[:7], rtol=1e-4)
    few = untrained.code_lengths(codes, key, 0, steps=2, num_draws=3)
    np.testing.assert_allclose(few.mean(), 4 * 4 * 8, rtol=0.03)


def test_without_a_label_there_is_nothing_to_guide(pipeline):
    key = jax.random.key(0)
    plain = pipeline.sample_codes(20, key, guidance=0.0)
    np.testing.assert_array_equal(pipeline.sample_codes(20, key, guidance=3.0), plain)


def test_variations_are_nearer_the_weaker_they_are(pipeline, images):
    codes = pipeline.encode(images)

    prior, settings = pipeline.experiment.prior.prior, pipeline.settings({"steps": 8})

    def flipped(strength):
        keys = [sample_keys(jax.random.key(i), len(codes)) for i in range(4)]
        return np.mean(
            [
                prior.vary(pipeline.prior_params, k, None, settings, codes, strength) != codes
                for k in keys
            ]
        )

    # One step from t = 1 flips few bits; from T the code is lost.
    assert flipped(1 / 8) < 0.2 < flipped(1.0)
    varied = pipeline.vary(images, jax.random.key(0), 1, strength=0.3)
    assert varied.shape == images.shape
    whole = pipeline.vary(images, jax.random.key(0), 1, strength=1.0)
    sampled = pipeline.sample(5, jax.random.key(0), 1)
    np.testing.assert_array_equal(whole, sampled)  # from T it is a sample


def test_inpainting_keeps_known_pixels_and_draws_the_others(pipeline, images):
    mask = np.zeros((28, 28), bool)
    mask[:14] = True
    results = [pipeline.inpaint(images, mask, jax.random.key(i), 1) for i in range(2)]
    np.testing.assert_array_equal(results[0][:, :14], images[:, :14])
    assert np.any(results[0][:, 14:] != results[1][:, 14:])


def test_inpainting_does_not_look_at_hidden_pixels(pipeline, images):
    mask = np.zeros((28, 28), bool)
    mask[:, 7:] = True
    changed = images.copy()
    changed[:, :, :7] = 1.0
    results = [pipeline.inpaint(x, mask, jax.random.key(0), 1) for x in (images, changed)]
    np.testing.assert_array_equal(results[0], results[1])


def test_a_partly_hidden_token_is_drawn_anew(pipeline, images):
    # One hidden pixel in the first 7x7 patch: all tokens except the first are known.
    mask = np.ones((28, 28), bool)
    mask[3, 3] = False
    result = pipeline.inpaint(images, mask, jax.random.key(0), 1)
    np.testing.assert_array_equal(result[:, mask], images[:, mask])
    everything = pipeline.inpaint(images, np.ones((28, 28), bool), jax.random.key(0), 1)
    np.testing.assert_array_equal(everything, images)


def test_inpainting_may_return_the_decoded_pixels_and_noise_the_known_bits(pipeline, images):
    mask = np.zeros((28, 28), bool)
    mask[:14] = True
    key = jax.random.key(0)
    kept = pipeline.inpaint(images, mask, key, 1)
    decoded = pipeline.inpaint(images, mask, key, 1, keep_pixels=False)
    np.testing.assert_array_equal(decoded[:, 14:], kept[:, 14:])
    assert np.abs(decoded[:, :14] - images[:, :14]).max() > 0.1
    noised = pipeline.inpaint(images, mask, key, 1, known="noised")
    np.testing.assert_array_equal(noised[:, :14], images[:, :14])
    assert np.any(noised[:, 14:] != kept[:, 14:])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, k: p.sample(0, k, 1), "at least 1; got 0"),
        (
            lambda p, k: p.sample(1, k, 1, tau=1.0),
            "no sampling option 'tau': the options are corrector_size",
        ),
        (lambda p, k: p.sample(1, k, 1, times=[8, 9, 0]), "falls strictly from at most 8 to 0"),
        (lambda p, k: p.sample(1, k, 1, pair="plugin"), "plain_mixture.*got 'plugin'"),
        (lambda p, k: p.sample(1, k, 1, steps=2.0), "steps must be like 4, not 2.0"),
        (lambda p, k: p.sample(1, k, 1, threshold_last="no"), "must be like False, not 'no'"),
        (lambda p, k: p.sample(1, k, 1, guidance_interval=(0.2,)), r"like \(0.0, 1.0\), not"),
        (lambda p, k: p.code_lengths(np.full((1, 4, 4, 8), 0.5), k), "Only codes of 0 and 1"),
        (lambda p, k: p.encode(np.zeros((1, 28, 28, 1)), "x"), 'mode must be "deterministic"'),
        (lambda p, k: p.inpaint(np.zeros((28, 28, 1)), np.ones((28, 28)), k), "Images must be"),
        (
            lambda p, k: p.encode(np.full((1, 28, 28, 1), 255, np.uint8)),
            "from 255 to 255; .*to_float",
        ),
        (lambda p, k: p.vary(np.full((1, 28, 28, 1), np.nan), k), "from nan to nan"),
        (lambda p, k: p.sample(1, k, 1, corrector_size=2.0), "between 0 and 1; got 0 and 2"),
        (lambda p, k: p.sample(1, k, 1, known="frozen"), '"kept" or "noised"'),
        (
            lambda p, k: p.vary(np.zeros((1, 28, 28, 1)), k, strength=0.0),
            "above 0 and at most 1; got 0",
        ),
        (
            lambda p, k: p.code_lengths(np.zeros((1, 4, 4, 8)), k, num_draws=0),
            "at least 1; got 0",
        ),
        (lambda p, k: p.sample(1, k, 10), "between 0 and 9; got 10"),
        (lambda p, k: p.sample(1, -1), "The seed must be between 0 and 4294967295, not -1"),
        (lambda p, k: p.sample(1, 0.5), "A key must be a seed"),
        (lambda p, k: p.sample(2, jax.random.PRNGKey(0)), "A key must be a seed"),
        (lambda p, k: p.encode(np.zeros((1, 28, 28, 1)), "sample", "0"), "A key must be a seed"),
        (lambda p, k: p.sample(1, k, -1), "between 0 and 9; got -1"),
        (lambda p, k: p.sample(1, k, 1, steps=0), "between 1 and 8,.*got 0"),
        (lambda p, k: p.sample(1, k, 1, steps=9), "between 1 and 8,.*got 9"),
        (lambda p, k: p.sample(1, k, 1, temperature=0.0), "temperature must be above 0"),
        (lambda p, k: p.sample(1, k, 1, guidance=-1.0), "must not be negative"),
        (lambda p, k: p.encode(np.zeros((1, 32, 32, 1))), r"\(n, 28, 28, 1\).*\(1, 32, 32, 1\)"),
        (lambda p, k: p.decode(np.zeros((4, 4, 8))), r"\(n, 4, 4, 8\).*\(4, 4, 8\)"),
        (
            lambda p, k: p.inpaint(np.zeros((1, 28, 28, 1)), np.ones((14, 14)), k),
            r"height and width, \(28, 28\), not \(14, 14\)",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        call(pipeline, jax.random.key(0))


def test_unconditional_prior_takes_no_label(tiny_experiment):
    pipeline, key = untrained_pipeline(tiny_experiment.with_classes(0)), jax.random.key(0)
    assert pipeline.sample(2, key).shape == (2, 28, 28, 1)
    with pytest.raises(UserError, match="unconditional"):
        pipeline.sample(2, key, 1)
    for options in ({"guidance": 1.0}, {"guidance": 2, "steps": 2}):
        with pytest.raises(UserError, match="unconditional, so guidance has no effect"):
            pipeline.sample(2, key, **options)


def test_sampling_before_the_prior_is_trained_says_so(tiny_experiment):
    pipeline = untrained_pipeline(tiny_experiment, prior=False)
    assert not pipeline.has_prior
    with pytest.raises(UserError, match="--mode=train_prior`"):
        pipeline.sample(1, jax.random.key(0), 1)


# Pictures


def test_sample_sheet_has_a_row_a_class(pipeline):
    sheet = pictures.samples(pipeline, jax.random.key(0))
    margin = sheet.shape[1] - (10 * 30 + 2)  # with the names of the classes
    assert sheet.shape == (10 * 30 + 2, 10 * 30 + 2 + margin, 1) and margin > 5
    for row in range(10):
        assert (sheet[2 + 30 * row : 30 + 30 * row, :margin] > 200).any()


def test_samples_of_given_number_or_label_have_the_names_of_their_classes(pipeline):
    # The expected text is drawn by `png.grid` around the same images.
    for num, label, text in (
        (12, None, {"captions": ["0, 1, 2, 3, 4, 5, 6, 7, 8, 9", "0, 1"]}),
        (3, "2", {"titles": ["2"]}),
    ):
        labels = np.arange(12) % 10 if label is None else label
        drawn = pipeline.sample(num, jax.random.key(0), labels)
        expected = png.grid(pictures.as_rows(drawn), **text)
        sheet = pictures.samples(pipeline, jax.random.key(0), num=num, label=label)
        np.testing.assert_array_equal(sheet, expected)


def test_rows_are_filled_up_black():
    rows = pictures.as_rows(np.ones((3, 2, 2, 1)), columns=2)
    assert [row.mean() for row in rows] == [255, 127.5]


def test_reconstruction_sheet_alternates_images_and_reconstructions(pipeline, images):
    sheet = pictures.reconstructions(pipeline, images)
    assert sheet.shape == (2 * 30 + 2, 5 * 30 + 2, 1)
    np.testing.assert_allclose(sheet[2:30, 2:30] / 127.5 - 1, images[0], atol=0.01)
    rows = [sheet[top : top + 28, 2:].reshape(28, 5, 30, 1)[:, :, :28] for top in (2, 32)]
    rows = [row.transpose(1, 0, 2, 3) for row in rows]
    named = png.grid(rows, captions=["3, 1, 4, 1, 5", "reconstructions"])
    labels = np.array([3, 1, 4, 1, 5])
    np.testing.assert_array_equal(pictures.reconstructions(pipeline, images, labels), named)


def test_sheets_have_their_columns(pipeline, images):
    sheet = pictures.trajectory(pipeline, jax.random.key(0), columns=3)
    assert sheet.shape[0] == 10 * 30 + 2 and sheet.shape[1] > 3 * 30 + 2
    keep = np.stack([masks.preset(name, 28, 28) for name in masks.PRESETS[:5]])
    sheet = pictures.inpaintings(pipeline, images, keep, None, jax.random.key(0), num=2)
    assert sheet.shape == (5 * 30 + 2, 4 * 30 + 2, 1)
    # The second column shows the known part, and grey.
    given = sheet[2:30, 32:60]
    np.testing.assert_array_equal(given[~keep[0]], 128)
    np.testing.assert_array_equal(given[keep[0]], sheet[2:30, 2:30][keep[0]])
    sheet = pictures.variations(pipeline, images, 1, jax.random.key(0), num=3)
    margin = sheet.shape[1] - (4 * 30 + 2)
    assert sheet.shape[0] == 5 * 30 + 2 and margin > 5
    plain = [np.full((4, 28, 28, 1), 96, np.uint8)] * 5
    titles = png.grid(plain, titles=["1"] * 5)[:, :margin]
    np.testing.assert_array_equal(sheet[:, :margin], titles)
