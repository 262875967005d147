"""Your images at 64x64, in 8x8 tokens of 48 bits; no VGG16 and no discriminator.

python -m binlatent.main --config=configs/images64.py --workdir=runs/mine --config.data.path=DIR

Cost: autoencoder of 2.7 M parameters, 0.049 TFLOP per step of 32 images; prior of 7.4 M, 0.122
TFLOP per step of 64 codes. docs/sizes.md describes how to choose other sizes.

With 500 steps in place of 10,000, four minutes of one core of an AMD EPYC at 70 images/s, the
autoencoder had a PSNR of 20.8 dB on held-out emoji (docs/sizes.md). No full training was measured;
that of configs/emoji64.py, with the same autoencoder, was: 25.1 dB after 4,000 steps.
"""

import ml_collections

from binlatent.configs import images32


def get_config() -> ml_collections.ConfigDict:
    """Returns the config for images of 64x64."""
    config = images32.get_config()
    config.data.image_size = 64
    config.autoencoder.num_bits = 48
    config.autoencoder.base_width = 64
    config.autoencoder.multipliers = (1, 2)
    return config
