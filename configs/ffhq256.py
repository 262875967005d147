"""FFHQ at 256x256 in 16x16 tokens of 32 bits (paper, Table 1).

python -m binlatent.main --config=configs/ffhq256.py --workdir=runs/ffhq256 --config.data.path=DIR

Cost: autoencoder of 63.0 M parameters, 9.1 TFLOP per step of 8 images with its discriminator and
LPIPS; prior of 76.3 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): FID 6.48 in 16 steps, 5.85 in 64.
"""

import ml_collections

from binlatent.configs import default


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = default.get_config(variant)
    config.data.name = "folder"  # TFDS does not have it
    config.data.num_classes = 0
    return config
