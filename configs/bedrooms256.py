"""LSUN Bedrooms at 256x256 in 16x16 tokens of 32 bits (paper, Tables 1 and 4).

python -m binlatent.main --config=configs/bedrooms256.py --workdir=runs/bedrooms256

Cost: autoencoder of 63.0 M parameters, 9.1 TFLOP per step of 8 images with its discriminator and
LPIPS; prior of 76.3 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): PSNR 24.02 ± 2.11, SSIM 0.75 ± 0.06 of reconstructed validation images;
FID 4.32 in 16 steps, 3.85 in 64.
"""

import ml_collections

from binlatent.configs import default


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = default.get_config(variant)
    config.data.name = "lsun/bedroom"
    config.data.num_classes = 0
    return config
