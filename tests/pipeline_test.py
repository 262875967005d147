"""The user's object, on untrained tiny networks."""

import jax
import numpy as np
import pytest

from binlatent import build, figures, outputs
from binlatent.errors import UserError
from binlatent.pipeline import BinaryLatentDiffusion, map_batches, sample_codes


def random_like(params, seed):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture
def pipeline(tiny_config):
    tiny_config.data.num_classes = 10
    key = jax.random.key(0)
    return BinaryLatentDiffusion(
        tiny_config,
        random_like(build.init_autoencoder(tiny_config, key), 1),
        random_like(build.init_prior(tiny_config, key), 2),
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, 28, 28, 1)).astype(np.float32)


def test_map_batches_joins_equal_batches_and_drops_the_filling():
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    np.testing.assert_array_equal(map_batches(double, 3, np.arange(7)), 2 * np.arange(7))
    assert sizes == [3, 3, 3]


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
    pipeline.config.sample.batch_size = 2
    np.testing.assert_allclose(pipeline.reconstruct(images), whole, atol=1e-5)


def test_sample_is_a_function_of_its_key(pipeline):
    first = pipeline.sample(3, jax.random.key(0), 1)
    assert first.shape == (3, 28, 28, 1)
    np.testing.assert_array_equal(pipeline.sample(3, jax.random.key(0), 1), first)
    assert np.any(pipeline.sample(3, jax.random.key(1), 1) != first)
    assert len(np.unique(first.round(3), axis=0)) == 3  # the samples of a batch differ


def test_batches_of_a_large_draw_differ(pipeline):
    pipeline.config.sample.batch_size = 4
    codes = pipeline.trajectory(8, jax.random.key(0), 1)[:, -1]
    assert np.any(codes[:4] != codes[4:])


def test_temperature_guidance_and_label_do_not_recompile(pipeline):
    pipeline.sample(4, jax.random.key(0), 0, steps=3)
    compiled = sample_codes._cache_size()
    baseline = pipeline.trajectory(4, jax.random.key(0), 0, steps=3)
    for options in (
        dict(label=3),
        dict(label=None),
        dict(label=0, temperature=0.3),
        dict(label=0, guidance=4.0),
        dict(label=0, guidance=0.0),
        dict(label=[0, 1, 2, 3]),
    ):
        changed = pipeline.trajectory(4, jax.random.key(0), steps=3, **options)
        assert np.any(changed != baseline), options
    assert sample_codes._cache_size() == compiled


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_trajectory_has_a_state_a_step(pipeline, steps):
    assert pipeline.trajectory(2, jax.random.key(0), 0, steps=steps).shape == (
        *(2, steps + 1),
        *(4, 4, 8),
    )


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
    # One hidden pixel in the first 7x7 patch: what is known of the code is all but that token.
    mask = np.ones((28, 28), bool)
    mask[3, 3] = False
    result = pipeline.inpaint(images, mask, jax.random.key(0), 1)
    np.testing.assert_array_equal(result[:, mask], images[:, mask])
    everything = pipeline.inpaint(images, np.ones((28, 28), bool), jax.random.key(0), 1)
    np.testing.assert_array_equal(everything, images)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, k: p.sample(0, k, 1), "at least 1; got 0"),
        (lambda p, k: p.sample(1, k, 10), "between 0 and 9; got 10"),
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


def test_unconditional_prior_takes_no_label(tiny_config):
    tiny_config.data.num_classes = 0
    key = jax.random.key(0)
    pipeline = BinaryLatentDiffusion(
        tiny_config,
        build.init_autoencoder(tiny_config, key),
        build.init_prior(tiny_config, key),
    )
    assert pipeline.sample(2, key).shape == (2, 28, 28, 1)
    with pytest.raises(UserError, match="unconditional"):
        pipeline.sample(2, key, 1)


def test_sampling_before_the_prior_is_trained_says_so(tiny_config):
    tiny_config.data.num_classes = 10
    key = jax.random.key(0)
    pipeline = BinaryLatentDiffusion(tiny_config, build.init_autoencoder(tiny_config, key))
    with pytest.raises(UserError, match="--mode=train_prior first"):
        pipeline.sample(1, key, 1)


# Pictures


def test_grid_lays_images_out_in_rows_with_gaps():
    rows = [np.full((3, 4, 5, 1), value, np.uint8) for value in (10, 200)]
    sheet = figures.grid(rows)
    assert sheet.shape == (2 * (4 + 2) + 2, 3 * (5 + 2) + 2, 1)
    np.testing.assert_array_equal(sheet[2:6, 2:7], 10)
    np.testing.assert_array_equal(sheet[8:12, 16:21], 200)
    np.testing.assert_array_equal(sheet[:, :2], 96)


def test_png_is_enlarged_by_a_whole_factor(tmp_path):
    from PIL import Image

    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    figures.save_png(tmp_path / "new" / "x.png", image, min_side=8)
    read = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    np.testing.assert_array_equal(read, image[..., 0].repeat(2, 0).repeat(2, 1))


def test_sample_sheet_has_a_row_a_class(pipeline):
    sheet = outputs.samples(pipeline, jax.random.key(0))
    assert sheet.shape == (10 * 30 + 2, 10 * 30 + 2, 1)
    assert outputs.samples(pipeline, jax.random.key(0), num=3).shape == (32, 3 * 30 + 2, 1)


def test_rows_are_filled_up_black():
    rows = outputs.as_rows(np.ones((3, 2, 2, 1)), columns=2)
    assert [row.mean() for row in rows] == [255, 127.5]


def test_reconstruction_sheet_alternates_images_and_reconstructions(pipeline, images):
    sheet = outputs.reconstructions(pipeline, images)
    assert sheet.shape == (2 * 30 + 2, 5 * 30 + 2, 1)
    np.testing.assert_allclose(sheet[2:30, 2:30] / 127.5 - 1, images[0], atol=0.01)


def test_half_masks_are_complements():
    top, bottom, left, right = outputs.half_masks(4, 6)
    assert top[:2].all() and not top[2:].any()
    np.testing.assert_array_equal(top, ~bottom)
    assert left[:, :3].all() and not left[:, 3:].any()
    np.testing.assert_array_equal(left, ~right)


def test_trajectory_and_inpainting_sheets_have_their_columns(pipeline, images):
    sheet = outputs.trajectory(pipeline, jax.random.key(0), columns=3)
    assert sheet.shape == (10 * 30 + 2, 3 * 30 + 2, 1)
    sheet = outputs.inpaintings(pipeline, images, np.arange(5), jax.random.key(0))
    assert sheet.shape == (5 * 30 + 2, 8 * 30 + 2, 1)
