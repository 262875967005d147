"""The InceptionV3 of FID and the inception score (Szegedy et al., 2016; Heusel et al., 2017).

It is TensorFlow's network of 2015, with 1,008 logits. Average pooling leaves padding out, and the
last block has max pooling where others average. Parameters are named as in pytorch-fid and
torch-fidelity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Array = jax.Array

SIZE = 299  # side of its input

_max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _avg_pool(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)


def _resize_matrix(size: int) -> np.ndarray:
    """Returns TensorFlow 1's bilinear weights, (SIZE, size): pixels at corners, no antialiasing."""
    position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = np.floor(position).astype(int)
    share = position - low
    matrix = np.zeros((SIZE, size), np.float32)
    rows = np.arange(SIZE)
    matrix[rows, low] += 1 - share
    matrix[rows, np.minimum(low + 1, size - 1)] += share
    return matrix


def resize(images: Array) -> Array:
    """Returns images, (n, h, w, c), resized to SIZE x SIZE as in TensorFlow 1."""
    _, h, w, _ = images.shape
    resized = jnp.einsum("Hh,nhwc->nHwc", _resize_matrix(h), images.astype(jnp.float32))
    return jnp.einsum("Ww,nHwc->nHWc", _resize_matrix(w), resized)


class _Conv(nn.Module):
    """A convolution, its batch normalisation with stored statistics, and a ReLU."""

    width: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        geometry = self.window, (self.stride, self.stride), self.padding
        x = nn.Conv(self.width, *geometry, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


class _Mixed(nn.Module):
    """Concatenates chains of convolutions, given as (width, *window), and a pooling of the input.

    With `pool_width` the grid stays, and the pooling is an average and a convolution of that width.
    Without it, the last convolution of each chain and a max pooling halve the grid.
    """

    chains: dict[str, list[tuple[int, int, int]]]
    pool_width: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        halves, outputs = self.pool_width is None, []
        for chain, convolutions in self.chains.items():
            y, last = x, len(convolutions)
            for i, (width, *window) in enumerate(convolutions, start=1):
                name = chain if last == 1 else f"{chain}_{i}"
                stride, padding = (2, "VALID") if halves and i == last else (1, "SAME")
                y = _Conv(width, tuple(window), stride, padding, name=name)(y)
            outputs.append(y)
        pool = _max_pool(x) if halves else _Conv(self.pool_width, name="branch_pool")(_avg_pool(x))
        return jnp.concatenate([*outputs, pool], axis=-1)


_MIXED_5 = {
    "branch1x1": [(64, 1, 1)],
    "branch5x5": [(48, 1, 1), (64, 5, 5)],
    "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
}
_MIXED_6A = {"branch3x3": [(384, 3, 3)], "branch3x3dbl": _MIXED_5["branch3x3dbl"]}
_MIXED_7A = {
    "branch3x3": [(192, 1, 1), (320, 3, 3)],
    "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)],
}


def _mixed_6(w: int) -> dict[str, list[tuple[int, int, int]]]:
    return {
        "branch1x1": [(192, 1, 1)],
        "branch7x7": [(w, 1, 1), (w, 1, 7), (192, 7, 1)],
        "branch7x7dbl": [(w, 1, 1), (w, 7, 1), (w, 1, 7), (w, 7, 1), (192, 1, 7)],
    }


class _Mixed7(nn.Module):
    last: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def fork(x, name):
            wide = _Conv(384, (1, 3), 1, "SAME", name=f"{name}a")(x)
            tall = _Conv(384, (3, 1), 1, "SAME", name=f"{name}b")(x)
            return jnp.concatenate([wide, tall], axis=-1)

        one = _Conv(320, name="branch1x1")(x)
        three = fork(_Conv(384, name="branch3x3_1")(x), "branch3x3_2")
        double = _Conv(448, name="branch3x3dbl_1")(x)
        double = _Conv(384, (3, 3), 1, "SAME", name="branch3x3dbl_2")(double)
        double = fork(double, "branch3x3dbl_3")
        # As published: the last block has another pooling.
        pool = nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1))) if self.last else _avg_pool(x)
        pool = _Conv(192, name="branch_pool")(pool)
        return jnp.concatenate([one, three, double, pool], axis=-1)


class InceptionV3(nn.Module):
    """Features of images at four depths, and logits unless `logits` is False."""

    logits: bool = True

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """Returns the features of image metrics, float32, for images in 0 to 255, (n, h, w, 3).

        `64`, `192`, `768` and `2048`, each of that width, are means over the grid at four depths.
        `spatial`, (n, 17 * 17 * 7), is for sFID (Nash et al., 2021): seven features of each place
        in Mixed_6d. `logits`, (n, 1008), and `logits_unbiased`, without the last bias, are for the
        inception score.
        """

        mean = functools.partial(jnp.mean, axis=(1, 2))
        x = (resize(images) - 128) / 128
        x = _Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), 1, "SAME", name="Conv2d_2b_3x3")(x)
        x = _max_pool(x)
        features = {"64": mean(x)}
        x = _Conv(80, name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _max_pool(x)
        features["192"] = mean(x)
        for name, width in (("b", 32), ("c", 64), ("d", 64)):
            x = _Mixed(_MIXED_5, width, name=f"Mixed_5{name}")(x)
        x = _Mixed(_MIXED_6A, name="Mixed_6a")(x)
        for name, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = _Mixed(_mixed_6(width), 192, name=f"Mixed_6{name}")(x)
            if name == "d":
                # The first seven features, of `mixed_6/conv` in TensorFlow's graph.
                features["spatial"] = x[..., :7].reshape(len(x), -1)
        features["768"] = mean(x)
        x = _Mixed(_MIXED_7A, name="Mixed_7a")(x)
        for name in "bc":
            x = _Mixed7(name == "c", name=f"Mixed_7{name}")(x)
        features["2048"] = mean(x)
        if not self.logits:
            return features
        unbiased = nn.Dense(1008, use_bias=False, name="fc")(features["2048"])
        bias = self.param("fc_bias", nn.initializers.zeros, (1008,))
        return {**features, "logits_unbiased": unbiased, "logits": unbiased + bias[None]}
