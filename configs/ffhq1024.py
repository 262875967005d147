"""FFHQ at 1024x1024 in 32x32 tokens of 64 bits (paper, Table 3).

python -m binlatent.main --config=configs/ffhq1024.py --workdir=runs/ffhq1024 --config.data.path=DIR

Cost: autoencoder of 64.5 M parameters, 17 TFLOP per image and step with its discriminator, LPIPS
and remat; prior of 76.8 M. docs/sizes.md lists the memory it needs. This config was not trained.
Expected (the paper): FID 6.75 in 64 steps, 6.35 in 256.
"""

import ml_collections

from binlatent.configs import default


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Returns the config, "paper", "released" or "modern"; see `configs/default.py`."""
    config = default.get_config(variant)
    config.data.name = "folder"  # TFDS does not have it
    config.data.image_size = 1024
    config.data.num_classes = 0
    config.autoencoder.num_bits = 64
    # One more level, for k = 32. It has the smallest width, where it costs the least memory.
    config.autoencoder.multipliers = (1, 1, 1, 2, 2, 4)
    config.autoencoder.attention_resolutions = (32,)
    config.autoencoder.remat = True
    config.prior.train.batch_size = 16
    config.sample.temperature = 0.8
    config.sample.batch_size = 1
    config.evaluate.num_images = 100
    return config
