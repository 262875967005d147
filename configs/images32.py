"""Your images at 32x32, in 8x8 tokens of 32 bits; no VGG16 and no discriminator.

python -m binlatent.main --config=configs/images32.py --workdir=runs/mine --config.data.path=DIR

Cost: autoencoder of 2.6 M parameters, 0.028 TFLOP per step of 32 images; prior of 7.4 M, 0.122
TFLOP per step of 64 codes. docs/sizes.md describes how to choose other sizes. With classes,
on CIFAR-10 as JPEG files: rFID 14.6 and FID 38.3 after two and a quarter hours of one CPU core
(configs/cifar10.py).
"""

import ml_collections

from binlatent.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config for images of 32x32."""
    config = default.get_config()
    config.data.image_size = 32

    config.autoencoder.num_bits = 32
    config.autoencoder.base_width = 128
    config.autoencoder.multipliers = (1,)
    config.autoencoder.patch = 4
    config.autoencoder.refine_width = 16
    config.autoencoder.num_blocks = 1
    config.autoencoder.attention_resolutions = ()
    config.autoencoder.embedding_width = 128
    config.autoencoder.loss.l1 = 0.5
    config.autoencoder.loss.perceptual = 0.0
    config.autoencoder.loss.adversarial = 0.0
    config.autoencoder.loss.entropy = 0.02
    config.autoencoder.train.batch_size = 32
    config.autoencoder.train.num_steps = 10_000
    config.autoencoder.train.learning_rate = 2e-3
    config.autoencoder.train.warmup_steps = 200
    config.autoencoder.train.decay = "cosine"
    config.autoencoder.train.ema_decay = 0.999

    config.prior.network.width = 256
    config.prior.network.num_layers = 6
    config.prior.network.num_heads = 4  # 64 wide each, as in the paper
    config.prior.network.name = "dit"
    config.prior.bernoulli.target = "z_0"  # the best on digits; see docs/results.md
    config.prior.cache_codes = True
    config.prior.train.batch_size = 64
    config.prior.train.num_steps = 6_000
    config.prior.train.learning_rate = 2e-3
    config.prior.train.warmup_steps = 200
    config.prior.train.decay = "cosine"
    config.prior.train.ema_decay = 0.999

    config.sample.steps = 32
    config.sample.batch_size = 100

    config.evaluate.network = "efficientnet"

    config.log_every = 50
    config.preview_every = 500
    config.checkpoint_every = 500
    return config
