"""Metrics of images and codes: closed forms, and scikit-image."""

import numpy as np
import pytest
from skimage import metrics as skimage_metrics

from binlatent.evaluation.metrics import image_metrics


def random_images(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_psnr_of_constant_errors():
    x = np.full((3, 28, 28, 1), 100, np.uint8)
    y = x.copy()
    y[1] += 5
    y[2] -= 100
    expected = [np.inf, 20 * np.log10(255 / 5), 20 * np.log10(255 / 100)]
    np.testing.assert_allclose(image_metrics.psnr(x, y), expected, rtol=1e-12)


def test_psnr_is_of_the_mean_squared_error_of_an_image():
    x = np.zeros((2, 4, 4, 3), np.uint8)
    y = x.copy()
    y[0, 0, 0, 0] = 255
    y[1] = 255
    np.testing.assert_allclose(image_metrics.psnr(x, y), [10 * np.log10(48), 0.0], atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 28, 28, 1), (2, 17, 24, 3)])
def test_psnr_agrees_with_scikit_image(shape):
    x, y = random_images(0, shape), random_images(1, shape)
    expected = [skimage_metrics.peak_signal_noise_ratio(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(image_metrics.psnr(x, y), expected, rtol=1e-12)


def test_ssim_of_one_window_is_the_formula():
    # Images of 11 x 11 hold one window, so the formula of Wang et al. can be written out.
    x, y = random_images(0, (2, 11, 11, 1)), random_images(1, (2, 11, 11, 1))
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    a, b = x[..., 0].astype(np.float64), y[..., 0].astype(np.float64)

    def mean(image):
        return np.sum(window * image, axis=(1, 2))

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    covariance = mean(a * b) - mean(a) * mean(b)
    luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
    expected = luminance * (2 * covariance + c2) / (variances + c2)
    np.testing.assert_allclose(image_metrics.ssim(x, y), expected, rtol=1e-9)


def test_ssim_of_equal_and_constant_images():
    x = random_images(0, (1, 28, 28, 1))
    np.testing.assert_allclose(image_metrics.ssim(x, x), [1.0], rtol=1e-12)
    a, b, c1 = 40.0, 160.0, (0.01 * 255) ** 2
    values = image_metrics.ssim(np.full_like(x, 40), np.full_like(x, 160))
    np.testing.assert_allclose(values, [(2 * a * b + c1) / (a**2 + b**2 + c1)], rtol=1e-9)


def test_ssim_averages_channels_and_keeps_images_apart():
    x, y = random_images(0, (2, 20, 16, 3)), random_images(1, (2, 20, 16, 3))
    y[1] = x[1]
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    channels = [
        skimage_metrics.structural_similarity(x[0, ..., c], y[0, ..., c], **options)
        for c in range(3)
    ]
    np.testing.assert_allclose(image_metrics.ssim(x, y), [np.mean(channels), 1.0], rtol=1e-9)


@pytest.mark.parametrize("function", [image_metrics.psnr, image_metrics.ssim])
def test_image_metrics_reject_bad_images(function):
    x = random_images(0, (2, 12, 12, 1))
    with pytest.raises(ValueError, match="equal shapes"):
        function(x, x[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        function(x[0], x[0])
    with pytest.raises(ValueError, match="uint8"):
        function(x, x.astype(np.float32))


def test_ssim_rejects_images_smaller_than_its_window():
    x = random_images(0, (1, 12, 10, 1))
    with pytest.raises(ValueError, match="at least 11"):
        image_metrics.ssim(x, x)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
def test_code_statistics_by_hand(dtype):
    # Over four images the six bits are 1 in 0, 4, 2, 1, 3 and 2 images.
    counts = np.array([0, 4, 2, 1, 3, 2]).reshape(1, 2, 3)
    codes = (np.arange(4).reshape(4, 1, 1, 1) < counts).astype(dtype)
    statistics = image_metrics.code_statistics(codes)
    assert statistics["bit_rate"] == 6
    assert statistics["dead_bits"] == 2
    quarter = 2 - 0.75 * np.log2(3)
    assert statistics["mean_bit_entropy"] == pytest.approx((2 + 2 * quarter) / 6, rel=1e-12)


def test_duplicate_bits_are_the_same_or_the_opposite_of_one_before():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (50, 4, 4, 6))
    assert image_metrics.code_statistics(bits)["duplicate_bits"] == 0
    bits[..., 3] = bits[..., 0]
    bits[..., 5] = 1 - bits[..., 1]
    bits[..., 4] = 1  # dead, and not a duplicate
    assert image_metrics.code_statistics(bits)["duplicate_bits"] == 2
    # A difference in one of 200 tokens is still a duplicate; in one of 50 it is not.
    flat = bits[..., 3].reshape(-1).copy()
    for step, expected in ((200, 2), (50, 1)):
        other = flat.copy()
        other[::step] = 1 - other[::step]
        bits[..., 3] = other.reshape(bits.shape[:3])
        assert image_metrics.code_statistics(bits)["duplicate_bits"] == expected


def test_codebook_statistics_by_hand():
    indices = np.array([0, 0, 1, 3]).reshape(1, 2, 2)
    statistics = image_metrics.codebook_statistics(indices, 8)
    assert statistics["bit_rate"] == 4 * 3
    assert statistics["codebook_used"] == 3 / 8
    assert statistics["codebook_perplexity"] == pytest.approx(2**1.5, rel=1e-12)
    everything = image_metrics.codebook_statistics(np.arange(8).reshape(2, 2, 2), 8)
    assert everything["codebook_perplexity"] == pytest.approx(8, rel=1e-12)
    for bad in (np.array([[[8]]]), np.array([[[-1]]]), np.zeros((0, 2, 2), int)):
        with pytest.raises(ValueError, match=r"in \[0, 8\)"):
            image_metrics.codebook_statistics(bad, 8)


def test_code_statistics_rejects_bad_codes():
    with pytest.raises(ValueError, match="non-empty"):
        image_metrics.code_statistics(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="non-empty"):
        image_metrics.code_statistics(np.zeros((0, 3, 4, 5)))
    for bad in (0.5, 2, -1, np.nan):
        with pytest.raises(ValueError, match="only 0 and 1"):
            image_metrics.code_statistics(np.full((2, 3, 4, 5), bad))
