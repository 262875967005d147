"""The programs that are measured, with random weights: what to call, and what it multiplies.

Weights are drawn here: to initialise a network JAX compiles dozens of small programs, which takes
as long as the measurement.
"""

import copy
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from binlatent import build, checks, programs
from binlatent.autoencoder import lpips
from binlatent.benchmark import flops
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.bernoulli import schedules
from binlatent.priors.step import parts_for_caches
from binlatent.runtime import devices
from binlatent.runtime.devices import parallel, replicate, shard, spread
from binlatent.runtime.errors import UserError
from binlatent.training.state import TrainState

Config = ml_collections.ConfigDict

TEXT_TOKENS = 77  # of a text to attend to, as of CLIP


class Program(NamedTuple):
    """A compiled program.

    Fields:
      compiled: takes the arguments that are not static.
      seconds: that tracing and compiling took.
    """

    compiled: jax.stages.Compiled
    seconds: float

    @property
    def flops(self) -> float | None:
        """Returns the FLOPs on one device, as XLA counts them, the body of a loop once.

        None where it does not count: JAX promises no analysis on any platform.
        """
        return (self.compiled.cost_analysis() or {}).get("flops")

    @property
    def memory(self) -> int | None:
        """Returns the bytes that it asks for on one device, None where XLA does not tell."""
        stats = self.compiled.memory_analysis()
        if stats is None:
            return None
        own = stats.output_size_in_bytes - stats.alias_size_in_bytes  # not in an argument's place
        return stats.argument_size_in_bytes + stats.temp_size_in_bytes + own


def compile_program(function: Any, *arguments: Any, **statics: Any) -> Program:
    """Traces and compiles a jitted function for arguments such as these."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **statics).compile()
    return Program(compiled, time.perf_counter() - start)


def counted_flops(*calls: tuple[int, Program]) -> float | None:
    """Returns the FLOPs of programs that are called so many times each, None if XLA cannot tell."""
    counts = [program.flops for _, program in calls]
    if None in counts:
        return None
    return sum(times * count for (times, _), count in zip(calls, counts, strict=True))


class Work(NamedTuple):
    """What is measured.

    Fields:
      call: makes one step, or one batch, and returns what to wait for.
      programs: that it runs.
      flops: of a call on one device, by `binlatent.flops`.
      xla_flops: as XLA counts them, None where it cannot tell.
    """

    call: Callable[[], Any]
    programs: list[Program]
    flops: int
    xla_flops: float | None


def _images(config: Config, num: int) -> np.ndarray:
    shape = (num, *build.image_shape(config))
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def _bits(config: Config, num: int) -> np.ndarray:
    shape = (num, *build.code_shape(config))
    return np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)


def _labels(config: Config, num: int) -> np.ndarray | None:
    """Returns labels of the prior's condition, None if it has none."""
    condition, e = build.condition(config), config.prior.text_width
    shapes = {"text_token": (num, e), "text_cross": (num, TEXT_TOKENS, e)}
    rng = np.random.default_rng(0)
    if condition in shapes:
        return rng.standard_normal(shapes[condition]).astype(np.float32)
    if condition == "none":
        return None
    return rng.integers(0, config.data.num_classes, num, dtype=np.int32)


def _drawn(shapes: Any) -> Any:
    """Returns small random weights of such shapes: the same million again and again."""
    million = 0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)

    def draw(like):
        return jnp.array(np.resize(million[: like.size], like.shape))

    return jax.tree.map(draw, shapes)


def _weights(init: Callable, config: Config) -> Any:
    """Returns weights for what `init(config, key)` would initialise."""
    return _drawn(jax.eval_shape(functools.partial(init, config), jax.random.key(0)))


def _state(init: Callable, config: Config) -> TrainState:
    """Returns a state such as that of `init(config)`, with Adam's moments and the EMA at 0."""
    shapes = jax.eval_shape(functools.partial(init, config))
    zeros = jax.tree.map(
        lambda like: jnp.array(np.zeros(like.shape, like.dtype)), shapes.replace(key=None)
    )
    if zeros.discriminator:
        zeros.discriminator["params"] = _drawn(shapes.discriminator["params"])
    return zeros.replace(key=jax.random.key(0), params=_drawn(shapes.params))


def check(name: str, config: Config) -> None:
    """Raises a UserError if the config lacks what one of `PROGRAMS` needs."""
    if name not in ("train_prior", "sample", "network"):
        return
    checks.check_bits(config)
    if config.prior.condition == "class" and config.data.num_classes == -1:
        raise UserError(
            "Say how many classes there are, as in --config.data.num_classes=10, 0 for none: to "
            "measure a prior, no data is opened that could tell."
        )


def size(name: str, config: Config) -> str:
    """Returns what one of `PROGRAMS` is as large as, for people."""
    if name in ("train_autoencoder", "decode", "encode"):
        height, width, _ = build.image_shape(config)
        return f"{height}x{width}"
    height, width, _ = build.code_shape(config)
    return f"{config.prior.num_layers}x{config.prior.width}, {height * width} tokens"


def _train(state: Any, batch: Any, frozen: Any, step: Callable) -> tuple[Callable, Program]:
    """Returns what takes a step from where the last one ended, and its program."""
    state, batch, frozen = replicate(state), shard(batch), replicate(frozen)
    program = compile_program(parallel(step, num_frozen=1), state, batch, frozen)

    def call():
        nonlocal state
        state, metrics = program.compiled(state, batch, frozen)
        return metrics

    return call, program


def train_autoencoder(config: Config, num: int, on_device: int) -> Work:
    """Training's step of stage 1 with its discriminator, whenever that starts."""
    networks = build.networks(config)
    lpips_params = {}
    if networks.lpips:
        vgg16 = traverse_util.unflatten_dict(lpips.vgg16_shapes(), sep="/")
        lpips_params = {"params": _drawn(vgg16)}
    call, program = _train(
        _state(build.init_autoencoder_state, config),
        {"image": _images(config, num)},
        lpips_params,
        build.autoencoder_step(config, networks),
    )
    per_image = flops.train_autoencoder(
        networks,
        build.image_shape(config),
        build.code_shape(config),
        r1=bool(config.autoencoder.loss.r1),
    )
    parts = config.autoencoder.train.accumulate
    xla_flops = counted_flops((parts, program))
    return Work(call, [program], on_device * per_image, xla_flops)


def train_prior(config: Config, num: int, on_device: int) -> Work:
    """Training's step of stage 2, with the encoder unless the config caches codes."""
    model, denoiser = build.autoencoder(config), build.denoiser(config)
    step = build.prior_step(config)
    labels = _labels(config, num)
    batch = {"label": np.zeros(num, np.int32) if labels is None else labels}
    code_shape, image_shape = build.code_shape(config), build.image_shape(config)
    per_image = 3 * flops.transformer(denoiser.network, code_shape, True, TEXT_TOKENS)
    frozen = None
    if config.prior.cache_codes or config.prior.codes:
        batch["probs"] = (255 * _bits(config, num)).astype(np.uint8)
    else:
        batch["image"] = _images(config, num)
        frozen = _weights(build.init_autoencoder, config)
        per_image += flops.encode(model, image_shape, code_shape)
    call, program = _train(_state(build.init_prior_state, config), batch, frozen, step)
    h, w, _ = code_shape
    parts = step.keywords["accumulate"] or parts_for_caches(on_device, h * w)
    # XLA counts a loop once; the encoder, before the parts, is not in it.
    xla_flops = None if parts > 1 and "image" in batch else counted_flops((parts, program))
    return Work(call, [program], on_device * per_image, xla_flops)


def decode(config: Config, num: int, on_device: int) -> Work:
    """Codes to images, both in the device's memory."""
    model = build.autoencoder(config)
    params = replicate(_weights(build.init_autoencoder, config))
    codes = spread(_bits(config, num))
    program = compile_program(programs.decode_codes, params, codes, model=model)
    return Work(
        lambda: program.compiled(params, codes),
        [program],
        on_device * flops.decode(model, build.code_shape(config)),
        program.flops,
    )


def encode(config: Config, num: int, on_device: int) -> Work:
    """Images to deterministic codes, both in the device's memory."""
    model = build.autoencoder(config)
    params = replicate(_weights(build.init_autoencoder, config))
    images = spread(_images(config, num))
    program = compile_program(programs.encode, params, images, model=model)
    return Work(
        lambda: program.compiled(params, images),
        [program],
        on_device * flops.encode(model, build.image_shape(config), build.code_shape(config)),
        program.flops,
    )


def network(config: Config, num: int, on_device: int) -> Work:
    """The prior's network once, with labels if it knows any."""
    denoiser, labels = build.denoiser(config), _labels(config, num)
    params = replicate(_weights(build.init_prior, config))
    codes, times, labels = spread([_bits(config, num), np.ones(num, np.float32), labels])
    program = compile_program(jax.jit(denoiser.output), params, codes, times, labels)
    per_image = flops.transformer(denoiser.network, build.code_shape(config), True, TEXT_TOKENS)
    return Work(
        lambda: program.compiled(params, codes, times, labels),
        [program],
        on_device * per_image,
        program.flops,
    )


def sample(config: Config, num: int, on_device: int) -> Work:
    """The pipeline's own call, from the key to images in the host's memory."""
    config = copy.deepcopy(config)
    config.sample.batch_size = num
    settings, labels = checks.sample_settings(config), _labels(config, num)
    model, denoiser = build.autoencoder(config), build.denoiser(config)
    try:
        times = schedules.visited_times(
            settings.steps, denoiser.num_timesteps, continuous=denoiser.continuous
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    guidance = checks.guidance_weights(settings, times, denoiser.num_timesteps)
    if labels is None:
        guidance = np.zeros_like(guidance)
    pipeline = BinaryLatentDiffusion(
        config,
        _weights(build.init_autoencoder, config),
        _weights(build.init_prior, config),
    )
    start = np.full((num, *pipeline.code_shape), 0.5, np.float32)
    # As the pipeline calls them, so that it finds them compiled.
    sampler = compile_program(
        programs.sampler(start, denoiser),
        pipeline.prior_params,
        *spread([devices.sample_keys(jax.random.key(0), num), labels, start]),
        None,
        times,
        guidance,
        float(settings.temperature),
        float(settings.corrector_size),
        denoiser=denoiser,
        pair=settings.pair,
        threshold_last=settings.threshold_last,
        corrector_steps=settings.corrector_steps,
        return_trajectory=False,
    )
    decoder = compile_program(
        programs.decode_codes, pipeline.autoencoder_params, spread(start), model=model
    )
    keys = iter(range(10**9))

    def call():
        return pipeline.sample(num, jax.random.key(next(keys)), labels)

    per_image = flops.sample(
        denoiser.network,
        pipeline.code_shape,
        labels is not None,
        guidance,
        settings.corrector_steps,
        TEXT_TOKENS,
    ) + flops.decode(model, pipeline.code_shape)
    # Of a condition XLA counts the dearer branch, whichever is taken.
    exact = not settings.corrector_steps and (labels is None or bool(np.all(guidance)))
    return Work(
        call,
        [sampler, decoder],
        on_device * per_image,
        counted_flops((settings.steps, sampler), (1, decoder)) if exact else None,
    )


# Each takes the config, the images of all devices together and those of one.
PROGRAMS = {
    "train_autoencoder": train_autoencoder,
    "train_prior": train_prior,
    "sample": sample,
    "decode": decode,
    "encode": encode,
    "network": network,
}
