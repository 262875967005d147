"""CelebA-HQ at 1024x1024 in 32x32 tokens of 64 bits (paper, Table 3).

python -m binlatent.main --config=configs/celebahq1024.py --workdir=runs/celebahq1024

Cost: autoencoder of 64.5 M parameters, 17 TFLOP per image and step with its discriminator, LPIPS
and remat; prior of 76.8 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): FID 6.12 in 64 steps, 6.03 in 256.
"""

import ml_collections

from binlatent.configs import ffhq1024


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = ffhq1024.get_config(variant)
    config.data.name = "celeb_a_hq/1024"
    return config
