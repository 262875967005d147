"""3,786 emoji of 64x64 in 8x8 tokens of 48 bits, drawn from captions; on two CPU cores.

bash launch/emoji.sh
"""

import ml_collections

from binlatent.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the emoji config."""
    config = default.get_config()
    config.data.path = "emoji"
    config.data.table = "captions.jsonl"
    config.data.image_size = 64
    config.texts.encoder = "minilm"

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

    config.prior.condition = "text_token"
    config.prior.network.width = 256
    config.prior.network.num_layers = 6
    config.prior.network.num_heads = 4
    config.prior.bernoulli.target = "z_0"
    config.prior.cache_codes = True
    config.prior.train.batch_size = 64
    config.prior.train.num_steps = 3_000
    config.prior.train.learning_rate = 2e-3
    config.prior.train.warmup_steps = 200
    config.prior.train.decay = "cosine"
    config.prior.train.ema_decay = 0.999

    config.sample.steps = 32
    config.sample.temperature = 0.9
    config.sample.guidance = 2.0
    config.sample.batch_size = 80

    config.evaluate.num_images = 391
    config.evaluate.network = "efficientnet"

    config.log_every = 50
    config.preview_every = 500
    config.checkpoint_every = 500
    config.keep_checkpoints = 1
    return config
