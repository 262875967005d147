"""Infers hyperparameters of the authors' checkpoints, and writes ours as their flags."""

import re
from typing import Any

import numpy as np

from binlatent.convert import released
from binlatent.experiment import Experiment
from binlatent.priors import schedules


def _match_blocks(checkpoint: released.Checkpoint, module: str, pattern: str) -> re.Match:
    """Matches one letter per block: r, a, n, c, or s for a change of resolution."""
    prefix, kinds = f"{module}.blocks.", ""
    for i in range(checkpoint.count(prefix)):
        parts = {rest.split(".")[0] for rest in checkpoint.children(f"{prefix}{i}.")}
        if parts & {"norm1", "conv1", "norm2", "conv2"}:
            kinds += "r"
        elif parts & {"norm", "q", "k", "v", "proj_out"}:
            kinds += "a"
        elif "conv" in parts:
            kinds += "s"
        elif f"{prefix}{i}.weight" not in checkpoint:
            raise checkpoint.error(f"it lacks {prefix}{i}.weight")
        else:
            kinds += "n" if checkpoint.left[f"{prefix}{i}.weight"].ndim == 1 else "c"
    match = re.fullmatch(pattern, kinds)
    if not match:
        raise checkpoint.error(f"the blocks of {module} have an unknown order")
    return match


def _levels(checkpoint: released.Checkpoint, module: str, kinds: str) -> list[str]:
    """Splits the blocks into levels, which must have equally many residual blocks."""
    levels = kinds.split("s")
    depths = {level.count("r") for level in levels}
    known = all(level == "r" * len(level) or level == "ra" * level.count("r") for level in levels)
    if not known or len(depths) != 1 or depths == {0}:
        raise checkpoint.error(f"the blocks of {module}.blocks have an unknown order")
    return levels


def of_autoencoder(checkpoint: released.Checkpoint, image_size: int) -> dict[str, Any]:
    """Infers an autoencoder's hyperparameters, by config key, from names and shapes.

    `image_size`, the side of the images in pixels, cannot be inferred.
    """
    encoder, decoder = "ae.encoder", "ae.generator"
    base_width, channels, _, _ = checkpoint.shape(f"{encoder}.blocks.0.weight", 4)
    body = _match_blocks(checkpoint, encoder, "c(.*)rarnc")
    levels = _levels(checkpoint, encoder, body[1])
    # The first block of a level is residual and has its width. Block 0 is a convolution.
    firsts = [1, *(i + 2 for i, kind in enumerate(body[1]) if kind == "s")]
    widths = [checkpoint.shape(f"{encoder}.blocks.{i}.conv1.weight", 4)[0] for i in firsts]
    if any(width % base_width for width in widths):
        raise checkpoint.error(f"its levels' widths {widths} are not multiples of {base_width}")
    body = _match_blocks(checkpoint, decoder, "(n?)crar(.*)nc")
    num_blocks = levels[0].count("r")
    depth = _levels(checkpoint, decoder, body[2])[0].count("r")
    num_bits, embedding_width, _, _ = checkpoint.shape("ae.quantize.proj.0.weight", 4)
    with_attention = [i for i, level in enumerate(levels) if "a" in level]
    found = {
        "data.image_size": image_size,
        "data.channels": channels,
        "autoencoder.num_bits": num_bits,
        "autoencoder.base_width": base_width,
        "autoencoder.multipliers": tuple(width // base_width for width in widths),
        "autoencoder.num_blocks": num_blocks,
        "autoencoder.decoder_depth": depth_ratio(depth, num_blocks),
        "autoencoder.attention_resolutions": tuple(image_size // 2**i for i in with_attention),
        "autoencoder.embedding_width": embedding_width,
        "autoencoder.norm_first": bool(body[1]),
    }
    if rest := checkpoint.children("disc.main."):
        # Convolution and activation; per layer convolution, norm, activation; convolution.
        last = max(int(name.split(".")[0]) for name in rest if name.split(".")[0].isdecimal())
        num_layers, remainder = divmod(last - 2, 3)
        if num_layers < 1 or remainder:
            raise checkpoint.error("the layers of disc.main have an unknown order")
        found["autoencoder.discriminator.width"] = checkpoint.shape("disc.main.0.weight", 4)[0]
        found["autoencoder.discriminator.num_layers"] = num_layers
    return found


def depth_ratio(depth: int, num_blocks: int) -> float:
    """Returns a decoder_depth for which int(num_blocks * decoder_depth) is `depth`."""
    if not num_blocks:
        return 1.0
    ratio = depth / num_blocks
    return ratio if int(num_blocks * ratio) == depth else float(np.nextafter(ratio, np.inf))


def of_prior(checkpoint: released.Checkpoint) -> dict[str, Any]:
    """Infers a prior's hyperparameters, by config key, and `tokens` and `num_bits`."""
    num_bits, width = checkpoint.shape("_denoise_fn.tok_emb.weight", 2)
    _, tokens, _ = checkpoint.shape("_denoise_fn.pos_emb", 3)
    found = {
        "tokens": tokens,
        "num_bits": num_bits,
        "prior.network.width": width,
        "prior.network.num_layers": checkpoint.count("_denoise_fn.blocks."),
        "data.num_classes": 0,
    }
    label = "_denoise_fn.cls_embedding"
    if checkpoint.children("_denoise_fn.blocks.0.cross."):
        found["prior.condition"] = "text_cross"
        kv_shape = checkpoint.shape("_denoise_fn.blocks.0.cross.kv.weight", 2)
        found["prior.text_width"] = kv_shape[1]
    elif f"{label}.bias" in checkpoint:
        found["prior.condition"] = "text_token"
        found["prior.text_width"] = checkpoint.shape(f"{label}.weight", 2)[1]
    elif f"{label}.weight" in checkpoint:
        found["prior.condition"] = "class"
        found["data.num_classes"] = checkpoint.shape(f"{label}.weight", 2)[0]
    return found


def find_schedule(checkpoint: released.Checkpoint) -> tuple[str | tuple[float, ...], int] | None:
    """Returns the schedule, a name or k_0..k_T, and T from a prior's buffers, if any."""
    if "scheduler.k_final" not in checkpoint:
        return None
    (length,) = checkpoint.shape("scheduler.k_final", 1)
    keep = checkpoint.left["scheduler.k_final"]
    try:
        schedule = tuple(map(float, keep))
        schedules.check_schedule(schedule)
    except (ValueError, TypeError) as error:
        raise checkpoint.error(f"its scheduler.k_final is not a schedule: {error}") from error
    for name in schedules.NAMES:
        if np.allclose(keep, schedules.keep_schedule(name, length - 1), rtol=0, atol=1e-6):
            return name, length - 1
    return schedule, length - 1


def describe_as_flags(experiment: Experiment, *, has_prior: bool) -> str:
    """Returns the flags of the authors' code that describe an experiment's models.

    Their `--dataset` selects the condition. They have no flags for the width of texts' features and
    the number of classes.
    """
    spec = experiment.autoencoder
    model, critic = spec.networks.autoencoder, spec.networks.discriminator
    h, w, c = spec.code_shape
    levels, num_blocks = model.encoder.levels, model.encoder.num_blocks
    values = {
        "img_size": spec.image_shape[0],
        "n_channels": spec.image_shape[2],
        "codebook_size": c,
        "latent_shape": (1, h, w),
        "emb_dim": spec.bottleneck.embedding_width,
        "nf": levels.base_width,
        "ch_mult": levels.multipliers,
        "res_blocks": num_blocks,
        "gen_mul": depth_ratio(model.decoder.num_blocks, num_blocks),
        "attn_resolutions": levels.attention_resolutions or (0,),
    }
    if critic:
        values |= {"ndf": critic.width, "disc_layers": critic.num_layers}
    switches = {
        "norm_first": model.decoder.norm_first,
        "use_tanh": spec.bottleneck.signed,
        "deterministic": spec.bottleneck.deterministic,
    }
    if has_prior:
        prior, condition = experiment.prior.prior, experiment.prior.conditioning.kind
        values |= {
            "sampler": "bld",
            "dataset": {"none": "custom", "class": "imagenet"}.get(condition, "laion"),
            "bert_n_emb": prior.network.width,
            "bert_n_layers": prior.network.num_layers,
            "bert_n_head": prior.network.num_heads,
            "block_size": h * w,
            "total_steps": prior.num_timesteps,
            "sample_steps": prior.num_timesteps,
            # For other schedules, their code uses the buffers in the checkpoint.
            "beta_type": prior.schedule if prior.schedule in schedules.NAMES else "linear",
            "focal": 0 if prior.pair == "balanced_plugin" else -1,
            "loss_final": "mean" if prior.time_weight == "mean" else "weighted",
        }
        switches |= {"p_flip": prior.target == "flip", "cross": condition == "text_cross"}
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words + [f"--{name}" for name, on in switches.items() if on])
