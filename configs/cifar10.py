"""CIFAR-10 in 8x8 tokens of 32 bits, with classes.

python -m binlatent.main --config=configs/cifar10.py --workdir=runs/cifar10
python -m binlatent.main --config=configs/cifar10.py --workdir=runs/cifar10 \\
    --config.data.name=folder --config.data.path=DIR
bash launch/gpu.sh   # trains and measures :gpu

Cost: autoencoder of 2.6 M parameters, 0.028 TFLOP per step of 32 images; prior of 7.4 M, 0.122
TFLOP per step of 64 codes. docs/sizes.md describes how to choose other sizes.

On JPEG files of unknown quality and one core of an AMD EPYC, the autoencoder took 42 minutes (127
images/s) and the prior 90 (71 codes/s): PSNR 27.6 dB, SSIM 0.912, rFID 14.6; FID of 10,000 samples
38.3, without guidance 44.6; at most 0.474 bits per dimension (docs/results.md). Samples are judged
by efficientnet.npz or inception.npz; docs/evaluation.md describes how to make them.

`--config=configs/cifar10.py:gpu` is sized for ten minutes of one H100. The estimates come from
FLOPs; nothing was measured. The autoencoder has 12.5 M parameters and takes 16 PFLOP: 109 s at 15%
of 989 TFLOP/s, if 23,000 images per second are read. The prior has 115 M parameters and takes 138
PFLOP: 348 to 398 s at 40 to 35%, with up to 13,000 codes per second. Compiling, previews and
checkpoints take the rest.
"""

import ml_collections

from binlatent.configs import images32


def get_config(variant: str = "cpu") -> ml_collections.ConfigDict:
    """Returns the config for CIFAR-10, for a "cpu" or a "gpu"."""
    config = images32.get_config()
    config.data.name = "cifar10"
    config.data.num_classes = 10
    config.sample.steps = 16
    config.sample.guidance = 1.0
    if variant == "gpu":
        _for_gpu(config)
    elif variant != "cpu":
        raise ValueError(f"the variant must be :cpu or :gpu, not :{variant}")
    return config


def _for_gpu(config: ml_collections.ConfigDict) -> None:
    config.dtype = "bfloat16"

    # A smaller autoencoder would wait for images to be read.
    config.autoencoder.base_width = 128
    config.autoencoder.multipliers = (1, 2)
    config.autoencoder.patch = 2
    config.autoencoder.num_blocks = 2
    config.autoencoder.train.batch_size = 256
    config.autoencoder.train.num_steps = 10_000
    config.autoencoder.train.learning_rate = 1e-3
    config.autoencoder.train.warmup_steps = 500

    config.prior.network.width = 512  # as in the paper
    config.prior.network.num_layers = 24
    config.prior.network.num_heads = 8
    config.prior.train.batch_size = 512
    config.prior.train.num_steps = 9_000
    config.prior.train.learning_rate = 5e-4
    config.prior.train.warmup_steps = 500

    config.sample.batch_size = 500
    config.evaluate.num_samples = 10_000

    config.log_every = 100
    config.preview_every = 2_500
    config.checkpoint_every = 1_000  # 1.8 GB for the prior, about every 40 s
    config.keep_checkpoints = 2
