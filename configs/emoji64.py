"""3,786 emoji of 64x64 in 8x8 tokens of 48 bits, drawn from captions.

bash launch/emoji.sh

Training of the autoencoder took 35 minutes, mostly on one core of an AMD EPYC. On two cores it ran
at 113 images/s, which is 19 minutes in all. The prior takes 53 minutes at the 60 images/s of one
core. Held-out images: PSNR 25.1 dB, SSIM 0.844. 32% of samples, and 70% of reconstructions, are
nearest to the image of their caption among 100 (docs/text.md).
"""

import ml_collections

from binlatent.configs import images64


def get_config() -> ml_collections.ConfigDict:
    """Returns the emoji config."""
    config = images64.get_config()
    config.data.path = "emoji"
    config.data.table = "captions.jsonl"
    config.texts.encoder = "minilm"

    config.autoencoder.loss.entropy = 0.0  # as in the measurements above
    config.autoencoder.train.num_steps = 4_000

    config.prior.condition = "text_cross"
    config.prior.network.name = "released"  # docs/text.md compares it with dit
    config.prior.train.num_steps = 3_000

    config.sample.guidance = 2.0
    config.sample.batch_size = 80

    config.evaluate.num_images = 391
    return config
