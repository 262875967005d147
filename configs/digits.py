"""5,000 real MNIST digits in 4x4 tokens of 24 bits; trains in minutes on two CPU cores.

python -m binlatent.main --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections

from binlatent.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the digits config."""
    config = default.get_config()
    config.data.name = "digits"
    config.data.image_size = 28
    config.data.channels = 1

    config.autoencoder.num_bits = 24
    config.autoencoder.multipliers = (1,)
    config.autoencoder.patch = 7  # all convolutions on the 4x4 grid
    config.autoencoder.num_blocks = 0
    config.autoencoder.attention_resolutions = ()
    config.autoencoder.embedding_width = 128
    config.autoencoder.loss.perceptual = 0.0
    config.autoencoder.loss.adversarial = 0.0
    config.autoencoder.loss.entropy = 0.01
    config.autoencoder.train.batch_size = 32
    config.autoencoder.train.num_steps = 1_300
    config.autoencoder.train.learning_rate = 6e-3
    config.autoencoder.train.warmup_steps = 100
    config.autoencoder.train.decay = "cosine"
    config.autoencoder.train.ema_decay = 0.99

    config.prior.network.width = 128
    config.prior.network.num_layers = 4
    config.prior.network.num_heads = 2  # 64 wide each, as in the paper
    config.prior.network.name = "dit"
    config.prior.bernoulli.target = "z_0"  # the best target; see docs/results.md
    config.prior.cache_codes = True
    config.prior.train.batch_size = 64
    config.prior.train.num_steps = 1_600
    config.prior.train.learning_rate = 4e-3
    config.prior.train.warmup_steps = 100
    config.prior.train.decay = "cosine"
    config.prior.train.ema_decay = 0.999

    config.sample.steps = 16
    config.sample.temperature = 0.8
    config.sample.guidance = 1.0
    config.sample.batch_size = 100

    config.evaluate.network = "classifier"
    config.evaluate.cas_epochs = 12
    config.evaluate.cas_batch_size = 128

    config.log_every = 50
    config.preview_every = 1_000
    config.checkpoint_every = 500
    return config
