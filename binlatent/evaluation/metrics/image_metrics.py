"""Metrics of images and codes, (n, h, w, c), as pure NumPy functions in float64."""

import functools

import numpy as np
from scipy import special
from skimage import metrics as skimage_metrics

_MAX_PIXEL = 255.0
_SAME = 0.99  # two bits that agree in this share of tokens count as duplicates
# scikit-image truncates the Gaussian of sigma 1.5 at 3.5 sigma: an 11 x 11 window.
SSIM_WINDOW = 11


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """PSNR of each pair of images, uint8 (n, h, w, c), in dB: float64 (n,), infinite if equal."""
    _check_image_pair(x, y)
    ratio = functools.partial(skimage_metrics.peak_signal_noise_ratio, data_range=_MAX_PIXEL)
    with np.errstate(divide="ignore"):
        return np.array(list(map(ratio, x, y)))


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean structural similarity of each pair of images, uint8 (n, h, w, c): float64 (n,) up to 1.

    The window is a Gaussian of sigma 1.5, so h and w are at least 11. The settings are those that
    scikit-image documents for Wang et al., "Image quality assessment: from error visibility to
    structural similarity", 2004.
    """
    _check_image_pair(x, y)
    if min(x.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs at least {SSIM_WINDOW} pixels a side, got {x.shape[1:3]}.")
    similarity = functools.partial(
        skimage_metrics.structural_similarity,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=_MAX_PIXEL,
    )
    return np.array(list(map(similarity, x, y)))


def code_statistics(codes: np.ndarray) -> dict[str, float | int]:
    """Returns how much of their capacity binary codes use; 0 and 1 of any type, (n, h, w, c).

    `bit_rate`: h * w * c, bits per image. `mean_bit_entropy`, in [0, 1]: the entropy of a bit's
    frequency over the images, averaged over bits. `dead_bits`: the number of bits that have the
    same value in every image. `duplicate_bits`: the number of the c bits of a token that are not
    constant and equal an earlier bit, or its opposite, in at least 99% of tokens.
    """
    codes = np.asarray(codes)
    if codes.ndim != 4 or codes.size == 0:
        raise ValueError(f"codes must be a non-empty (n, h, w, c), got shape {codes.shape}.")
    if not np.all((codes == 0) | (codes == 1)):
        raise ValueError("codes must hold only 0 and 1.")
    frequency = np.mean(codes, axis=0, dtype=np.float64)
    tokens = codes.reshape(-1, codes.shape[-1])
    signs = 2.0 * tokens[:, tokens.min(axis=0) < tokens.max(axis=0)] - 1.0
    # The mean of a product of signs is the share of agreement minus that of disagreement.
    agreement = np.abs(signs.T @ signs) / len(signs)
    duplicate = np.any(np.triu(agreement, 1) >= 2 * _SAME - 1, axis=0)
    entropy = (special.entr(frequency) + special.entr(1.0 - frequency)) / np.log(2.0)
    return {
        "bit_rate": frequency.size,
        "mean_bit_entropy": float(np.mean(entropy)),
        "dead_bits": int(np.sum((frequency == 0.0) | (frequency == 1.0))),
        "duplicate_bits": int(np.sum(duplicate)),
    }


def codebook_statistics(indices: np.ndarray, size: int) -> dict[str, float | int]:
    """Returns how much of a codebook is used by indices, int (n, h, w) in [0, s), s = `size`.

    `bit_rate`: h * w * log2(s), bits per image. `codebook_used`: the share of entries that occur,
    in (0, 1]. `codebook_perplexity`: 2 to the power of the entropy in bits, in [1, s].
    """
    if indices.ndim != 3 or indices.size == 0 or indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"indices must be a non-empty (n, h, w) in [0, {size}).")
    frequency = np.bincount(indices.ravel(), minlength=size) / indices.size
    return {
        "bit_rate": float(np.prod(indices.shape[1:]) * np.log2(size)),
        "codebook_used": float(np.mean(frequency > 0)),
        "codebook_perplexity": float(np.exp(np.sum(special.entr(frequency)))),
    }


def _check_image_pair(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"images must be two equal shapes (n, h, w, c), got {x.shape}, {y.shape}.")
    if x.dtype != np.uint8 or y.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {x.dtype} and {y.dtype}.")
