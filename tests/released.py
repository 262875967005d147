"""The released weights in tests: the prior as one function, the autoencoder's as our tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_NUM_HEADS, _NUM_LAYERS, _NUM_TIMESTEPS = 4, 3, 64


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """The weights, "weights.*", and inputs with their logits."""
    return dict(np.load("tests/data/released_prior.npz"))


def logits(z: jax.Array, t: jax.Array) -> jax.Array:
    """(n, tokens, bits) in {0, 1} and (n,) in 1..T to logits, float32."""
    weights = {name[8:]: x for name, x in arrays().items() if name.startswith("weights.")}

    def linear(x, name):
        y = jnp.einsum("...i,oi->...o", x, weights[f"{name}.weight"], precision="highest")
        return y + jnp.broadcast_to(weights[f"{name}.bias"], y.shape)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * jnp.broadcast_to(weights[f"{name}.weight"], x.shape) + jnp.broadcast_to(
            weights[f"{name}.bias"], x.shape
        )

    def scaled(x, name):
        return x * jnp.broadcast_to(weights[name], x.shape)

    (n, tokens, _), d = z.shape, weights["pos_emb"].shape[-1]
    x = jnp.einsum("nlc,cd->nld", 2 * z - 1, weights["tok_emb.weight"], precision="highest")
    x = x + weights["pos_emb"]
    frequencies = np.exp(-np.log(10_000) * np.arange(d // 2) / (d // 2 - 1))
    angles = (t - 1)[:, None] / _NUM_TIMESTEPS * 4000 * frequencies[None].astype(np.float32)
    time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    time = linear(jax.nn.silu(linear(time, "time_step_embedding.l0")), "time_step_embedding.linear")
    x = jnp.concatenate([x, time[:, None]], axis=1)
    for i in range(_NUM_LAYERS):
        qkv = linear(norm(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn.qkv")
        q, k, v = jnp.split(qkv.reshape(n, tokens + 1, 3 * _NUM_HEADS, -1), 3, axis=2)
        weight = jnp.einsum("nqhd,nkhd->nhqk", q, k, precision="highest") / np.sqrt(d // _NUM_HEADS)
        y = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(weight), v, precision="highest")
        y = linear(y.reshape(n, tokens + 1, d), f"blocks.{i}.attn.proj")
        x = x + scaled(y, f"blocks.{i}.gamma_1")
        y = jax.nn.gelu(linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0"), approximate=False)
        x = x + scaled(linear(y, f"blocks.{i}.mlp.2"), f"blocks.{i}.gamma_2")
    return linear(norm(x[:, :tokens], "ln_f"), "head")


def autoencoder_variables(arrays):
    """The autoencoder's variables out of arrays under the released names, `ae.…`."""
    variables = {"encoder": {}, "decoder": {}}
    rooms = {"encoder": "encoder", "generator": "decoder"}
    for name, value in arrays.items():
        if not name.startswith(("ae.encoder.", "ae.generator.")):
            continue
        _, room, _, index, *path, leaf = name.split(".")
        tree = variables[rooms[room]].setdefault(f"blocks_{index}", {})
        for part in path:
            tree = tree.setdefault(part, {})
        attention = path and path[-1] in ("q", "k", "v", "proj_out")
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            tree["kernel"] = value[0, 0] if attention else value
        else:
            normalised = f"{name.rsplit('.', 1)[0]}.weight"
            is_norm = arrays[normalised].ndim == 1
            tree["scale" if is_norm and leaf == "weight" else "bias"] = value
    variables["bottleneck"] = {
        "proj": {
            "kernel": arrays["ae.quantize.proj.0.weight"][:, :, 0, 0].T,
            "bias": arrays["ae.quantize.proj.0.bias"],
        },
        "embed": arrays["ae.quantize.embed.weight"],
    }
    return {"params": variables}


_DISCRIMINATOR_LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def discriminator_variables(arrays):
    """The discriminator's variables out of arrays under the released names, `disc.main.…`."""
    variables = {"params": {}, "batch_stats": {}}
    for name, value in arrays.items():
        if not name.startswith("disc.") or name.endswith("num_batches_tracked"):
            continue
        _, _, index, leaf = name.split(".")
        room, leaf = ("params", "kernel") if value.ndim == 4 else _DISCRIMINATOR_LEAVES[leaf]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        variables[room].setdefault(f"main_{index}", {})[leaf] = value
    return variables
