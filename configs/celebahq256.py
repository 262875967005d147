"""CelebA-HQ at 256x256 in 16x16 tokens of 32 bits (paper, Table 1).

python -m binlatent.main --config=configs/celebahq256.py --workdir=runs/celebahq256

Cost: autoencoder of 63.0 M parameters, 9.1 TFLOP per step of 8 images with its discriminator and
LPIPS; prior of 76.3 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): FID 7.80 in 16 steps, 6.24 in 64.
"""

import ml_collections

from binlatent.configs import default


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = default.get_config(variant)
    config.data.name = "celeb_a_hq/256"
    config.data.num_classes = 0
    return config
