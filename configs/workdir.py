"""The config that a workdir was trained with or converted to: continue, or fine-tune on other data.

python -m binlatent.main --config=configs/workdir.py:runs/x --workdir=runs/x --mode=train_prior \
    --config.data.name=folder --config.data.path=path/to/images

Its values are those in the checkpoint, whatever config file they came from. Flags replace them.
"""

from pathlib import Path

import ml_collections

from binlatent.experiment import of_checkpoint, with_tuples
from binlatent.runtime import paths
from binlatent.training import checkpoint


def get_config(workdir: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a workdir's prior or, if it has none, of its autoencoder."""
    if not workdir:
        raise ValueError("name the workdir: --config=configs/workdir.py:DIR")
    workdir = paths.expand(workdir)
    stage = "prior" if checkpoint.exists(Path(workdir), "prior") else "autoencoder"
    with checkpoint.Checkpoints.open(Path(workdir), stage) as checkpoints:
        meta = checkpoints.newest(checkpoint.Checkpoints.meta)
    content = of_checkpoint(meta, Path(workdir) / stage).config
    return ml_collections.ConfigDict(with_tuples(content)).lock()
