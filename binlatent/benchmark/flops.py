"""FLOPs of the networks for one image, by formula; a multiplication and an addition count as two.

Only matrix products and convolutions are counted, as is usual for shares of a device's peak: no
norms, activations or softmax, and no taps of convolutions on padding. Training is three times the
forward pass, because each product has a gradient with respect to both factors; what `remat`
computes again is not counted.

Dimensions: c bits of a token, d width, m tokens of a text, e width of a text's features.
"""

import numpy as np
from flax import linen as nn

from binlatent.autoencoder import lpips
from binlatent.autoencoder.discriminator import Discriminator
from binlatent.autoencoder.modules import Autoencoder, Decoder, Encoder, Levels
from binlatent.autoencoder.step import Networks
from binlatent.priors.autoregressive.network import CausalTransformer
from binlatent.priors.dit import DiT, swiglu_width
from binlatent.priors.prior import Prior
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError

Shape = tuple[int, int, int]


def matmul(rows: int, width_in: int, width_out: int) -> int:
    """Returns the FLOPs of (rows, width_in) @ (width_in, width_out)."""
    return 2 * rows * width_in * width_out


def conv(
    side: int,
    width_in: int,
    width_out: int,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
) -> int:
    """Returns the FLOPs of a square convolution on a square grid, padded alike on both axes."""
    first = np.arange(-padding[0], side + padding[1] - kernel + 1, stride)
    taps = int(np.sum(np.minimum(first + kernel, side) - np.maximum(first, 0)))
    return matmul(taps**2, width_in, width_out)


def _attention(queries: int, keys: int, width: int) -> int:
    """Returns the FLOPs of the scores and the weighted sum, for any number of heads."""
    return 2 * matmul(queries, keys, width)


def count_transformer(
    network: Transformer, code_shape: Shape, labelled: bool, text_tokens: int = 1
) -> int:
    """Returns the FLOPs of a forward pass; `text_tokens` is m, for "text_cross" only."""
    h, w, c = code_shape
    d = network.width
    appended = labelled and network.condition in ("class", "text_token")
    n = h * w + 1 + appended  # including the tokens of time and label
    ends = 2 * matmul(h * w, c, d) + 2 * matmul(1, d, d)
    return _blocks_and_label(network, n, labelled, text_tokens) + ends


def count_dit(network: DiT, code_shape: Shape, labelled: bool, text_tokens: int = 1) -> int:
    """Returns the FLOPs of a forward pass; as above."""
    h, w, c = code_shape
    n, d = h * w, network.width
    mlp = 3 * swiglu_width(d) if network.swiglu else 8 * d
    ends = 2 * matmul(n, c, d) + 2 * matmul(1, d, d)
    if network.adaln:
        ends += matmul(1, d, (6 * network.num_layers + 2) * d)
    else:
        n += 1 + (labelled and network.condition in ("class", "text_token"))
    return _blocks_and_label(network, n, labelled, text_tokens, mlp) + ends


def count_causal_transformer(
    network: CausalTransformer, code_shape: Shape, labelled: bool, text_tokens: int = 1
) -> int:
    """Returns the FLOPs of a forward pass, or of one sample with a cache; as above.

    Scores of later tokens are counted, because most kernels compute and then mask them.
    """
    h, w, c = code_shape
    n, d = h * w, network.width
    ends = matmul(n, c, d) + 2 * n * network.head.products(d)
    return _blocks_and_label(network, n, labelled, text_tokens) + ends


def _blocks_and_label(
    network: Transformer | DiT | CausalTransformer,
    n: int,
    labelled: bool,
    text_tokens: int,
    mlp: int | None = None,
) -> int:
    """Returns the FLOPs of the blocks with n tokens, and of the embedding of a text.

    An MLP has d * `mlp` weights; by default `mlp` is 8 d.
    """
    d, e = network.width, network.text_width
    block = matmul(n, d, (3 + 1) * d + (mlp or 8 * d)) + _attention(n, n, d)
    if network.condition == "text_cross":
        m = text_tokens if labelled else 1
        block += matmul(n, d, 2 * d) + matmul(m, e, 2 * d) + _attention(n, m, d)
    label = matmul(1, e, d) if labelled and network.condition == "text_token" else 0
    return network.num_layers * block + label


# By the type of a prior's network.
_OF_NETWORKS = {
    Transformer: count_transformer,
    DiT: count_dit,
    CausalTransformer: count_causal_transformer,
}


def count_network(
    network: nn.Module, code_shape: Shape, labelled: bool, text_tokens: int = 1
) -> int:
    """Returns the FLOPs of a forward pass of a prior's network; refuses unknown types."""
    if type(network) not in _OF_NETWORKS:
        raise UserError(f"The FLOPs of a {type(network).__name__} are unknown.")
    return _OF_NETWORKS[type(network)](network, code_shape, labelled, text_tokens)


def count_prior_step(prior: Prior, text_tokens: int = 1) -> int:
    """Returns the FLOPs of a training step of a prior per image, with a label."""
    return 3 * count_network(prior.network, prior.code_shape, True, text_tokens)


def _residual(side: int, width_in: int, width_out: int) -> int:
    shortcut = conv(side, width_in, width_out, 1, padding=(0, 0)) if width_in != width_out else 0
    return conv(side, width_in, width_out) + conv(side, width_out, width_out) + shortcut


def _attention_block(side: int, width: int) -> int:
    return matmul(side**2, width, 4 * width) + _attention(side**2, side**2, width)


def _blocks(levels: Levels, level: int, side: int, width_in: int, num_blocks: int) -> int:
    width, total = levels.width(level), 0
    for _ in range(num_blocks):
        total += _residual(side, width_in, width)
        total += _attention_block(side, width) if side in levels.attention_resolutions else 0
        width_in = width
    return total


def _middle(levels: Levels, side: int, width_in: int) -> int:
    width = levels.width(-1)
    residuals = _residual(side, width_in, width) + _residual(side, width, width)
    return residuals + _attention_block(side, width)


def _encoder(module: Encoder, image_shape: Shape) -> int:
    levels, width = module.levels, module.levels.base_width
    side, patch = image_shape[0] // levels.patch, levels.patch
    total = conv(side, patch**2 * image_shape[2], width)
    for level in range(len(levels.multipliers)):
        if level > 0:
            total += conv(side, width, width, stride=2, padding=(0, 1))
            side //= 2
        total += _blocks(levels, level, side, width, module.num_blocks)
        width = levels.width(level) if module.num_blocks else width
    total += _middle(levels, side, width)
    return total + conv(side, levels.width(-1), module.embedding_width)


def _decoder(module: Decoder, side: int, embedding_width: int) -> int:
    levels, width = module.levels, module.levels.width(-1)
    total = conv(side, embedding_width, width) + _middle(levels, side, width)
    for level in reversed(range(len(levels.multipliers))):
        total += _blocks(levels, level, side, width, module.num_blocks)
        width = levels.width(level) if module.num_blocks else width
        if level > 0:
            side *= 2
            total += conv(side, width, width)
    last = module.refine_width or module.num_channels
    total += conv(side, width, levels.patch**2 * last)
    if module.refine_width:
        side *= levels.patch
        total += conv(side, last, last) + conv(side, last, module.num_channels)
    return total


def count_encoding(model: Autoencoder, image_shape: Shape, code_shape: Shape) -> int:
    """Returns the FLOPs from an image to its code."""
    h, w, _ = code_shape
    return _encoder(model.encoder, image_shape) + 2 * h * w * model.bottleneck.products


def count_decoding(model: Autoencoder, code_shape: Shape) -> int:
    """Returns the FLOPs from a code to its image."""
    h, w, c = code_shape
    width = model.bottleneck.embedding_width
    return matmul(h * w, c, width) + _decoder(model.decoder, h, width)


def count_discriminator(module: Discriminator, image_shape: Shape) -> int:
    """Returns the FLOPs of the forward pass."""
    side, _, width_in = image_shape
    total = 0
    for i in range(module.num_layers + 2):
        stride = 2 if i < module.num_layers else 1
        width = 1 if i == module.num_layers + 1 else module.width * min(2**i, 8)
        total += conv(side, width_in, width, 4, stride)
        side, width_in = (side - 2) // stride + 1, width
    return total


def count_vgg16(image_shape: Shape) -> int:
    """Returns the FLOPs of the forward pass of LPIPS's VGG16 on one image."""
    kernels = {name: x for name, x in lpips.vgg16_shapes().items() if name.endswith("/kernel")}
    # conv3_1/kernel comes after two poolings.
    sides = [image_shape[0] // 2 ** (int(name[len("conv")]) - 1) for name in kernels]
    return sum(conv(side, *x.shape[2:]) for side, x in zip(sides, kernels.values(), strict=True))


def count_autoencoder_step(
    networks: Networks, image_shape: Shape, code_shape: Shape, r1: bool = False
) -> int:
    """Returns the FLOPs of a training step per image.

    LPIPS has a forward pass on both images and a backward pass to one. The discriminator has a
    forward and a backward pass to the reconstruction for the generator, then forward and backward
    passes on both images. R1, if used, takes the gradient with respect to an image and
    differentiates it.
    """
    model = networks.autoencoder
    total = 3 * (count_encoding(model, image_shape, code_shape) + count_decoding(model, code_shape))
    if networks.lpips:
        total += 3 * count_vgg16(image_shape)
    if networks.discriminator:
        passes = 14 if r1 else 8
        total += passes * count_discriminator(networks.discriminator, image_shape)
    return total
