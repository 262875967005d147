"""From a config to modules, optimisers and keys: the only reader of its model sections."""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from binlatent.autoencoder import adversarial, bottleneck, discriminator, lpips
from binlatent.autoencoder import step as autoencoder_stage
from binlatent.autoencoder.modules import Autoencoder, Decoder, Encoder, Levels
from binlatent.priors import step as prior_stage
from binlatent.priors.bernoulli import losses, schedules, targets
from binlatent.priors.transformer import CONDITIONS, Transformer
from binlatent.runtime.devices import AXIS
from binlatent.runtime.errors import UserError
from binlatent.training.state import TrainState, create_optimizer, create_schedule, create_state

Config = ml_collections.ConfigDict

# Of config.autoencoder.loss, and of stage 1's Objective.
LOSS_WEIGHTS = ("mse", "l1", "perceptual", "adversarial", "r1", "entropy", "commitment", "kl")


def key(seed: int, purpose: str) -> jax.Array:
    """Returns the key of a seed for one purpose, so that no two purposes share randomness."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def _dtype(config: Config) -> jnp.dtype:
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype must be float32 or bfloat16, not {config.dtype!r}.")
    return jnp.dtype(config.dtype)


def autoencoder(config: Config) -> Autoencoder:
    """Returns the autoencoder of `config.autoencoder` for images of `config.data`.

    Raises:
      UserError: if its levels do not fit together or do not divide the image.
    """
    section = config.autoencoder
    multipliers = tuple(section.multipliers)
    if min(multipliers, default=0) < 1:
        raise UserError(
            "config.autoencoder.multipliers must have at least one entry, each at least 1, not "
            f"{multipliers}."
        )
    side, downsampling = config.data.image_size, _downsampling(config)
    if side % downsampling:
        raise UserError(
            f"config.data.image_size is {side}, which the downsampling of config.autoencoder, "
            f"{downsampling} (patch {section.patch}, {len(multipliers)} levels), does not divide."
        )
    sides = [side // section.patch // 2**level for level in range(len(multipliers))]
    attention = tuple(section.attention_resolutions)
    if absent := sorted(set(attention) - set(sides)):
        raise UserError(
            f"config.autoencoder.attention_resolutions names {absent[0]}, but the levels of an "
            f"image of {side} have the sides {', '.join(map(str, sides))}."
        )
    if attention and not section.num_blocks:
        raise UserError(
            "config.autoencoder.attention_resolutions needs num_blocks of at least 1, as attention "
            "follows a residual block; set it to () or num_blocks to 1."
        )
    widths = [section.base_width * multiplier for multiplier in multipliers]
    widths += [section.base_width] + [section.embedding_width] * section.norm_first
    if bad := [width for width in widths if width % 32]:
        raise UserError(
            "config.autoencoder.base_width times each multiplier, and embedding_width if "
            f"norm_first, must be multiples of the 32 groups of a norm, not {bad[0]}."
        )
    levels = Levels(
        section.base_width,
        multipliers,
        attention,
        section.patch,
        section.remat,
        _dtype(config),
    )
    return Autoencoder(
        Encoder(levels, section.num_blocks, section.embedding_width),
        _bottleneck(config),
        Decoder(
            levels,
            int(section.num_blocks * section.decoder_depth),
            config.data.channels,
            section.norm_first,
        ),
    )


def _downsampling(config: Config) -> int:
    """Returns k, pixels a side of a token."""
    return config.autoencoder.patch * 2 ** (len(config.autoencoder.multipliers) - 1)


def _bottleneck(config: Config) -> bottleneck.Bottleneck:
    section = config.autoencoder
    if section.bottleneck == "binary":
        return bottleneck.Binary(
            section.num_bits, section.embedding_width, section.deterministic, section.signed
        )
    if section.bottleneck == "vq":
        return bottleneck.VectorQuantized(
            section.codebook_size, section.codebook_width, section.embedding_width
        )
    if section.bottleneck == "real":
        return bottleneck.Real(section.num_channels, section.embedding_width, section.variational)
    raise UserError(
        f'config.autoencoder.bottleneck must be "binary", "vq" or "real", '
        f"not {section.bottleneck!r}."
    )


def networks(config: Config) -> autoencoder_stage.Networks:
    """Returns all modules of stage 1, None for those that no loss of `config` needs.

    Raises:
      UserError: for images that are too small for them, or options that are none.
    """
    weights, section = config.autoencoder.loss, config.autoencoder.discriminator
    side = config.data.image_size
    perceptual = critic = None
    if not (weights.mse or weights.l1 or weights.perceptual):
        raise UserError(
            "config.autoencoder.loss: one of mse, l1 and perceptual must be above 0, or nothing "
            "compares the reconstruction with the image."
        )
    if weights.perceptual:
        if side < lpips.MIN_SIZE:
            raise UserError(
                f"config.autoencoder.loss.perceptual needs images of at least {lpips.MIN_SIZE} "
                f"pixels a side, not {side}: set it to 0."
            )
        perceptual = lpips.LPIPS(_dtype(config))
    if weights.adversarial:
        if section.norm not in discriminator.NORMS:
            raise UserError(
                "config.autoencoder.discriminator.norm must be "
                f"{' or '.join(discriminator.NORMS)}, not {section.norm!r}."
            )
        if unknown := sorted(set(section.augment) - set(adversarial.POLICIES)):
            raise UserError(
                f"config.autoencoder.discriminator.augment knows "
                f"{' and '.join(adversarial.POLICIES)}, not {unknown[0]!r}."
            )
        if discriminator.logits_side(side, section.num_layers) < 1:
            raise UserError(
                f"An image of {side} is too small for config.autoencoder.discriminator.num_layers "
                f"= {section.num_layers}: have fewer layers, or set loss.adversarial to 0."
            )
        critic = discriminator.Discriminator(
            section.width, section.num_layers, section.norm, AXIS, _dtype(config)
        )
    return autoencoder_stage.Networks(autoencoder(config), critic, perceptual)


def autoencoder_objective(config: Config) -> autoencoder_stage.Objective:
    """Returns the weights of the losses of stage 1."""
    weights = config.autoencoder.loss
    return autoencoder_stage.Objective(
        adaptive=weights.adaptive,
        augment=tuple(config.autoencoder.discriminator.augment),
        **{name: weights[name] for name in LOSS_WEIGHTS},
    )


def autoencoder_step(config: Config, networks: autoencoder_stage.Networks) -> Callable:
    """Returns the step of stage 1, (state, batch, LPIPS's parameters) -> (state, metrics).

    Args:
      config: of the whole run.
      networks: of `networks(config)`; without the discriminator, the step before it starts.
    """
    train = config.autoencoder.train
    return functools.partial(
        autoencoder_stage.train_step,
        code_shape=code_shape(config),
        networks=networks,
        objective=autoencoder_objective(config),
        optimizer=optimizer(train),
        ema_decay=train.ema_decay,
        accumulate=train.accumulate,
    )


def init_autoencoder_state(config: Config) -> TrainState:
    """Returns the state of stage 1 before its first step."""
    init_key, base_key = jax.random.split(key(config.seed, "autoencoder"))
    adam, critic = optimizer(config.autoencoder.train), networks(config).discriminator
    discriminator_state = critic and autoencoder_stage.create_discriminator_state(
        critic, key(config.seed, "discriminator"), image_shape(config), adam
    )
    return create_state(base_key, init_autoencoder(config, init_key), adam, discriminator_state)


def code_shape(config: Config) -> tuple[int, int, int]:
    """Returns (h, w, c) of a code; of "vq", c is the width of a vector."""
    section = config.autoencoder
    depths = {
        "binary": section.num_bits,
        "vq": section.codebook_width,
        "real": section.num_channels,
    }
    side = config.data.image_size // _downsampling(config)
    return side, side, depths[section.bottleneck]


def image_shape(config: Config) -> tuple[int, int, int]:
    """Returns (height, width, channels) of an image."""
    return config.data.image_size, config.data.image_size, config.data.channels


def condition(config: Config) -> str:
    """Returns what the prior can be asked for: of the transformer's `CONDITIONS`, or "none"."""
    if config.prior.condition == "class" and not config.data.num_classes:
        return "none"
    return config.prior.condition


def denoiser(config: Config) -> prior_stage.Denoiser:
    """Returns the prior of `config.prior`.

    Raises:
      UserError: if its width and heads do not fit, or for an unknown schedule, target or pair, or
        some that do not go together.
    """
    section = config.prior
    if section.width % section.num_heads or section.width % 4:
        raise UserError(
            f"config.prior.width must be a multiple of 4 and of config.prior.num_heads; "
            f"{section.width} and {section.num_heads} are not."
        )
    named = {
        "target": targets.TARGETS,
        "pair": losses.PAIRS,
        "time_weight": losses.TIME_WEIGHTS,
        "condition": CONDITIONS,
    }
    for name, values in named.items():
        if section[name] not in values:
            raise UserError(
                f"config.prior.{name} must be one of {', '.join(values)}; got {section[name]!r}."
            )
    if section.pair == "balanced_plugin" and section.target != "flip":
        raise UserError('config.prior.pair "balanced_plugin" needs config.prior.target "flip".')
    if section.evidence and (section.target == "z_s" or section.pair != "plain_mixture"):
        raise UserError(
            'config.prior.evidence needs the target "flip" or "z_0" and the pair "plain_mixture"; '
            "set it to False."
        )
    if (section.schedule == "given") != bool(section.keep):
        raise UserError(
            'config.prior.keep, k_0 to k_T, goes with config.prior.schedule "given", and only so.'
        )
    schedule = tuple(section.keep) if section.keep else section.schedule
    try:
        schedules.keep_schedule(schedule, section.num_timesteps)
    except ValueError as error:
        raise UserError(f"config.prior: {error}.") from error
    network = Transformer(
        width=section.width,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        condition=condition(config),
        num_classes=config.data.num_classes,
        text_width=section.text_width,
        dtype=_dtype(config),
        cudnn=section.cudnn,
    )
    return prior_stage.Denoiser(
        network,
        schedule,
        section.num_timesteps,
        section.continuous,
        section.target,
        section.pair,
        section.evidence,
    )


def prior_objective(config: Config) -> prior_stage.Objective:
    """Returns what the prior of `config.prior` is trained for."""
    section = config.prior
    return prior_stage.Objective(
        section.vlb_weight, section.time_weight, section.stratified, section.label_dropout
    )


def prior_step(config: Config) -> Callable:
    """Returns the training step of stage 2 with everything but its state and batch filled in."""
    return functools.partial(
        prior_stage.train_step,
        encode=functools.partial(autoencoder(config).apply, method="probs"),
        denoiser=denoiser(config),
        objective=prior_objective(config),
        optimizer=optimizer(config.prior.train),
        ema_decay=config.prior.train.ema_decay,
        # Inside a loop JAX could not name the operation that made a NaN.
        accumulate=1 if config.debug_nans else config.prior.train.accumulate,
    )


def init_autoencoder(config: Config, key: jax.Array) -> dict:
    """Returns fresh parameters of the autoencoder."""
    return autoencoder(config).lazy_init(key, _shape(*image_shape(config)))


def _shape(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    """Returns the shape of one example: to initialise a network nothing has to run through it."""
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def init_prior(config: Config, key: jax.Array) -> dict:
    """Returns fresh parameters of the prior's network."""
    labels = {
        "none": None,
        "class": _shape(dtype=jnp.int32),
        "text_token": _shape(config.prior.text_width),
        "text_cross": _shape(1, config.prior.text_width),
    }
    return denoiser(config).network.lazy_init(
        key, _shape(*code_shape(config)), _shape(), labels[condition(config)]
    )


def init_prior_state(config: Config) -> TrainState:
    """Returns the state of stage 2 before its first step."""
    init_key, base_key = jax.random.split(key(config.seed, "prior"))
    return create_state(base_key, init_prior(config, init_key), optimizer(config.prior.train))


def schedule(train: Config) -> optax.Schedule:
    """Returns the learning rate of a `train` section by the number of updates made before."""
    return create_schedule(train.learning_rate, train.warmup_steps, train.num_steps, train.decay)


def optimizer(train: Config) -> optax.GradientTransformation:
    """Returns the optimiser of a stage's `train` section."""
    try:
        return create_optimizer(
            train.learning_rate,
            train.warmup_steps,
            train.num_steps,
            train.decay,
            train.max_grad_norm,
        )
    except ValueError as error:
        raise UserError(f"config train section: {error}.") from error
