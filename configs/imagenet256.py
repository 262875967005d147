"""ImageNet-1K at 256x256 in 16x16 tokens of 64 bits, with classes (paper, Table 2).

python -m binlatent.main --config=configs/imagenet256.py --workdir=runs/imagenet256

Cost: autoencoder of 63.1 M parameters, 9.1 TFLOP per step of 8 images with its discriminator and
LPIPS; prior of 172.4 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): FID 8.21, IS 162.32, CAS 65.07% top-1, in 64 steps with guidance 2.
"""

import ml_collections

from binlatent.configs import default


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = default.get_config(variant)
    config.data.name = "imagenet2012"
    config.autoencoder.num_bits = 64
    config.prior.network.width = 768
    config.prior.network.num_heads = 12
    config.prior.train.batch_size = 256
    config.sample.guidance = 2.0
    return config
