"""3,786 emoji of 64x64 in 8x8 tokens of 48 bits, drawn from captions; on two CPU cores.

bash launch/emoji.sh
"""

import ml_collections

from binlatent.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the emoji config."""
    config = default.get_config()
    config.data.image_size = 64

    config.autoencoder.num_bits = 48
    config.autoencoder.base_width = 64
    config.autoencoder.multipliers = (1, 2)
    config.autoencoder.patch = 4
    config.autoencoder.refine_width = 16
    config.autoencoder.num_blocks = 1
    config.autoencoder.attention_resolutions = ()
    config.autoencoder.embedding_width = 128
    config.autoencoder.loss.l1 = 0.5
    config.autoencoder.loss.perceptual = 0.0
    config.autoencoder.loss.adversarial = 0.0
    config.autoencoder.train.batch_size = 32
    config.autoencoder.train.num_steps = 4_000
    config.autoencoder.train.learning_rate = 2e-3
    config.autoencoder.train.warmup_steps = 200
    config.autoencoder.train.decay = "cosine"
    config.autoencoder.train.ema_decay = 0.999

    config.log_every = 50
    config.preview_every = 1_000
    config.checkpoint_every = 500
    config.keep_checkpoints = 1
    return config
