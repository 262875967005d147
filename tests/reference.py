"""The reference checkpoints in the layout of the authors' code, whole, without PyTorch.

tests/data has their tensors as plain arrays under the names that they have there, read out of the
`*.th` files once; of an autoencoder, those that nothing uses have only a name and a shape, in
released_shapes.json, and are 0 here.
"""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np

from binlatent.convert import released

SHAPES = json.loads(Path("tests/data/released_shapes.json").read_text())
AUTOENCODERS = {"ae_c16": "c16", "ae_c24_genmul2": "c24"}
PRIORS = ("prior_uncond", "prior_class", "prior_text_token", "prior_text_cross")


def arrays(name):
    """All that tests/data has of a checkpoint: tensors, inputs and outputs (`io.*`), losses."""
    if name in PRIORS:
        return dict(np.load(f"tests/data/{name}.npz"))
    parts = [
        f"tests/data/{part}_{AUTOENCODERS[name]}.npz" for part in ("autoencoder", "discriminator")
    ]
    return {key: x for part in parts for key, x in np.load(part).items()}


def state(name):
    """The state dict of a checkpoint."""
    found = arrays(name)
    unused = {
        key: np.zeros(shape, np.int64 if "num_batches" in key else np.float32)
        for key, shape in SHAPES[name].items()
    }
    return {key: found.get(key, zeros) for key, zeros in unused.items()}


def prior_of_clip(name):
    """The state dict of a prior of texts, changed for the small CLIP of tests/encoders.py.

    That gives 48 numbers for a text, of 768 that the reference prior takes, and 64 for a token, of
    which the reference prior takes 32: these become twice the same.
    """
    changed = state(name)
    for key, x in changed.items():
        if key.endswith("cls_embedding.weight"):
            changed[key] = x[:, :48]
        elif key.endswith((".cross.kv.weight", ".cross.null_emb")):
            changed[key] = np.concatenate([x, x], axis=-1)
    return changed


def write(path, state):
    """Writes a state dict as `torch.save` does, without PyTorch.

    The pickle is of the protocol that is text: ( begins a list, t makes it a tuple, V is a string,
    I a number, c a name of a module, R a call, Q what lies in a file of the archive, d a dict.
    """
    pickled = "("
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, x) in enumerate(state.items()):
            kind = {"float32": "Float", "int64": "Long"}[x.dtype.name]
            x = np.array(x, order="C")
            shape = "".join(f"I{size}\n" for size in x.shape)
            strides = "".join(f"I{step // x.itemsize}\n" for step in x.strides)
            storage = f"(Vstorage\nctorch\n{kind}Storage\nV{i}\nVcpu\nI{x.size}\ntQ"
            arguments = f"({storage}I0\n({shape}t({strides}tI00\n(dt"
            pickled += f"V{name}\nctorch._utils\n_rebuild_tensor_v2\n{arguments}R"
            archive.writestr(f"archive/data/{i}", x.tobytes())
        archive.writestr("archive/data.pkl", f"{pickled}d.")


def io(name, prefix="io."):
    """Inputs and outputs of a checkpoint; images and codes as (n, height, width, channels)."""
    found = {k.removeprefix(prefix): x for k, x in arrays(name).items() if k.startswith(prefix)}
    return {k: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for k, x in found.items()}


def losses(name):
    """The losses and gradients of an autoencoder."""
    found = arrays(name).items()
    return {k.removeprefix("losses."): x for k, x in found if k.startswith("losses.")}


def variables(name, like, tensors):
    """The tensors of a checkpoint as a tree of ours.

    Args:
      name: of the checkpoint.
      like: the tree's shapes.
      tensors: of `convert.released`, what each is called there.
    """
    return released.Checkpoint(state(name), "checkpoint").pop_tree(like, tensors(like))


def zeros(spec):
    """A tree of zeros in place of the parameters of a stage's spec."""
    like = jax.eval_shape(spec.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like)
