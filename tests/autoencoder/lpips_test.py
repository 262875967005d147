"""LPIPS: agreement with the published implementation, invariances, and its weight file."""

import importlib.resources
from pathlib import Path

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.autoencoder import lpips
from binlatent.autoencoder.lpips import LPIPS, MIN_SIZE, VGG16, unit_length
from binlatent.convert import published
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "data" / "lpips_vgg.npz"


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.npz"
    weights.write_npz(path, published.vgg16(drawn.vgg16_state()))
    return path


@pytest.fixture(scope="module")
def variables(vgg16_file):
    return jax.device_put(lpips.read_vgg16(vgg16_file))


def images(seed, n=2, size=32, channels=3):
    return jax.random.uniform(jax.random.key(seed), (n, size, size, channels), minval=-1)


# Compiled once per shape for all tests.
distance = jax.jit(LPIPS().apply)
gradients = jax.jit(jax.grad(lambda v, x, y: jnp.sum(LPIPS().apply(v, x, y)), argnums=(1, 2)))


def test_agrees_with_the_published_implementation(variables):
    golden = np.load(GOLDEN, allow_pickle=False)
    x, y = (jnp.asarray(golden[name].transpose(0, 2, 3, 1)) for name in ("x", "y"))
    with jax.default_matmul_precision("highest"):
        layers = jax.jit(lambda v, x, y: LPIPS().apply(v, x, y, method="layers"))(variables, x, y)
        value = distance(variables, x, y)
    np.testing.assert_allclose(layers, golden["per_layer"], rtol=1e-4)
    np.testing.assert_allclose(value, golden["value"], rtol=1e-4)


def test_parameters_have_the_same_names_in_both_modules(variables):
    x = images(0, n=1, size=MIN_SIZE)
    for module, inputs in ((VGG16(), (x,)), (LPIPS(), (x, x))):
        shapes = jax.eval_shape(lambda m=module, i=inputs: m.init(jax.random.key(0), *i))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    assert {"conv1_1", "conv5_3"} < variables["params"].keys()
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 14_714_688  # torchvision's


def test_taps_halve_the_grid_and_the_smallest_image_leaves_one_pixel(variables):
    taps = jax.eval_shape(VGG16().apply, variables, images(0, size=MIN_SIZE))
    assert [tap.shape for tap in taps] == [
        (2, 16, 16, 64),
        (2, 8, 8, 128),
        (2, 4, 4, 256),
        (2, 2, 2, 512),
        (2, 1, 1, 512),
    ]
    x, y = images(0, size=MIN_SIZE), images(1, size=MIN_SIZE)
    assert np.all(np.isfinite(distance(variables, x, y)))


def test_is_a_symmetric_distance(variables):
    x, y = images(0), images(1)
    there, back = distance(variables, x, y), distance(variables, y, x)
    assert there.shape == (2,) and there.dtype == jnp.float32
    assert np.all(there > 0.001)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    np.testing.assert_array_equal(distance(variables, x, x), np.zeros(2))


def test_greyscale_images_are_expanded_to_rgb(variables):
    x, y = images(0, channels=1), images(1, channels=1)
    x3, y3 = (jnp.repeat(image, 3, axis=-1) for image in (x, y))
    np.testing.assert_allclose(
        distance(variables, x, y), distance(variables, x3, y3), rtol=1e-5, atol=0
    )


def test_bfloat16_agrees_roughly(variables):
    x, y = images(0), images(1)
    half = jax.jit(LPIPS(jnp.bfloat16).apply)(variables, x, y)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, distance(variables, x, y), rtol=0.05)


def test_gradient_of_equal_images_is_zero(variables):
    for gradient in gradients(variables, images(0), images(0)):
        # Not exactly: a compiler may round the features of the two images differently.
        np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-9)


@pytest.mark.parametrize("bias", [-0.5, -1e6])
def test_gradient_is_finite_where_all_features_are_zero(variables, bias):
    params = dict(variables["params"])
    # In constant areas, the first layer's features are 0; with a bias of -1e6, everywhere.
    kernel = params["conv1_1"]["kernel"]
    kernel -= jnp.mean(kernel, axis=(0, 1), keepdims=True)
    params["conv1_1"] = {"kernel": kernel, "bias": jnp.full(64, bias)}
    params["conv1_2"] = {**params["conv1_2"], "bias": jnp.zeros(64)}
    x = images(0).at[:, :16].set(0.25)  # constant in the upper half
    tap = jax.jit(VGG16().apply)({"params": params}, x)[0]
    assert np.all(tap[:, 4:12, 4:-4] == 0)
    assert np.all(tap == 0) == (bias == -1e6)
    for y in (images(1), x):
        for gradient in gradients({"params": params}, x, y):
            assert np.all(np.isfinite(gradient))


def test_unit_length_has_a_finite_gradient_at_zero():
    x = jnp.zeros((1, 1, 3, 2)).at[0, 0, 1].set(jnp.array([3.0, 4.0])).at[0, 0, 2].set(1e-30)
    np.testing.assert_allclose(unit_length(x)[0, 0, :2], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(unit_length(x)[..., 0]))(x)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[0, 0, 1], [0.128, -0.096], rtol=1e-5)  # (16, -12) / 125


def test_gradient_is_the_slope_of_the_distance(variables):
    x, y = images(0), images(1)
    gradient = gradients(variables, x, y)[0]
    step = 1e-2 * gradient / jnp.max(jnp.abs(gradient))
    slope = distance(variables, x + step, y) - distance(variables, x - step, y)
    np.testing.assert_allclose(slope, 2 * jnp.sum(gradient * step, axis=(1, 2, 3)), rtol=0.02)


def test_the_published_linear_weights_come_with_their_licence():
    folder = importlib.resources.files("binlatent.autoencoder")
    with np.load(folder / "lpips_linear.npz", allow_pickle=False) as file:
        linear = [file[f"lin{i}"] for i in range(5)]
        assert len(file.files) == 5
    assert [x.shape for x in linear] == [(64,), (128,), (256,), (512,), (512,)]
    assert sum(x.size for x in linear) == 1472
    assert all(np.all(x >= 0) for x in linear)
    assert "Richard Zhang" in (folder / "lpips_linear.LICENSE").read_text()


def test_a_missing_file_says_where_the_weights_are_from():
    with pytest.raises(UserError) as error:
        lpips.read_vgg16("no/vgg16.npz")
    for part in (
        "'no/vgg16.npz'",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out no/vgg16.npz`",
        "--config.autoencoder.loss.vgg16=FILE",
    ):
        assert part in str(error.value)


def test_a_damaged_file_is_refused(vgg16_file, tmp_path):
    path = tmp_path / "vgg16.npz"
    good = vgg16_file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for data in (b"", b"weights", b"PK\x03\x04", good[:1000], good[:-10], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"vgg16\.npz is not .* damaged or not an \.npz file"):
            lpips.read_vgg16(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "vgg16.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # .npy
    with pytest.raises(UserError, match="damaged or not an .npz file"):
        lpips.read_vgg16(path)
    np.savez(path, **{"conv1_1/bias": np.array([{}])})  # a pickle
    with pytest.raises(UserError, match="damaged or not an .npz file"):
        lpips.read_vgg16(path)

    shapes = {name: like.shape for name, like in lpips.vgg16_shapes().items()}
    small = {"conv1_1/kernel", "conv1_1/bias"}
    for wrong, message in (
        ({name: shapes[name] for name in small}, "it lacks conv1_2/bias"),
        (shapes | {"conv6_1/bias": (3,)}, "it also holds conv6_1/bias"),
        (
            shapes | {"conv1_1/kernel": (64, 3, 3, 3)},
            r"conv1_1/kernel is float32 \(64, 3, 3, 3\), not float32 \(3, 3, 3, 64\)",
        ),
    ):
        weights.write_npz(
            path, {name: np.zeros(shape, np.float32) for name, shape in wrong.items()}
        )
        with pytest.raises(UserError, match=rf"vgg16\.npz is not a file that .* {message}\."):
            lpips.read_vgg16(path)
