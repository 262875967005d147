"""CIFAR-10 in 8x8 tokens of 32 bits, with classes.

python -m binlatent.main --config=configs/cifar10.py --workdir=runs/cifar10
python -m binlatent.main --config=configs/cifar10.py --workdir=runs/cifar10 \\
    --config.data.name=folder --config.data.path=DIR

Cost: autoencoder of 2.6 M parameters, 0.082 TFLOP a step of 64 images; prior of 4.9 M, 0.125 TFLOP
a step of 64 codes. docs/sizes.md says how to choose other sizes.
"""

import ml_collections

from binlatent.configs import images32


def get_config() -> ml_collections.ConfigDict:
    """Returns the config for CIFAR-10."""
    config = images32.get_config()
    config.data.name = "cifar10"
    config.data.num_classes = 10
    return config
