"""The programs whose speed is measured, with random weights, and their FLOPs.

Random weights are made here without Flax's initialisation, which compiles dozens of small programs
and takes as long as the measurement.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from binlatent.autoencoder import lpips, programs
from binlatent.autoencoder.spec import AutoencoderSpec
from binlatent.autoencoder.step import Networks
from binlatent.benchmark import flops
from binlatent.experiment import Experiment
from binlatent.priors.conditions import Condition, Conditioning
from binlatent.priors.dit import DiT
from binlatent.priors.step import parts_for_caches
from binlatent.runtime.devices import parallel, replicate, shard, spread
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import sample_keys
from binlatent.training.state import TrainState

TEXT_TOKENS = 77  # of a text for cross-attention, as in CLIP


class Program(NamedTuple):
    """A compiled program."""

    compiled: jax.stages.Compiled  # called with the arguments that are not static
    seconds: float  # of tracing and compiling

    @property
    def flops(self) -> float | None:
        """The FLOPs on one device as XLA counts them; the body of a loop is counted once.

        None if XLA does not count them: JAX guarantees no analysis.
        """
        return (self.compiled.cost_analysis() or {}).get("flops")

    @property
    def memory(self) -> int | None:
        """The bytes that the program needs on one device, None if XLA does not report them."""
        stats = self.compiled.memory_analysis()
        if stats is None:
            return None
        # Outputs that do not reuse arguments.
        own = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return stats.argument_size_in_bytes + stats.temp_size_in_bytes + own


def compile_program(function: Any, *arguments: Any, **statics: Any) -> Program:
    """Traces and compiles a jitted function for arguments of these shapes."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **statics).compile()
    return Program(compiled, time.perf_counter() - start)


def counted_flops(*calls: tuple[int, Program]) -> float | None:
    """Returns the FLOPs of (number of calls, program) pairs, None if XLA does not count them."""
    if any(program.flops is None for _, program in calls):
        return None
    return sum(times * program.flops for times, program in calls)


class Work(NamedTuple):
    """A call to measure."""

    call: Callable[[], Any]  # runs one step, or one batch, and returns the arrays to wait for
    programs: list[Program]  # run by the call
    flops: int  # of a call on one device, by `benchmark.flops`
    xla_flops: float | None  # as XLA counts them, None if it cannot


def check_measurable(name: str, experiment: Experiment) -> None:
    """Refuses an experiment that lacks something that one of `PROGRAMS` needs."""
    if name not in ("train_prior", "sample", "network"):
        return
    experiment.autoencoder.check_bits()
    conditioning = experiment.prior.conditioning
    if conditioning.kind == "class" and conditioning.num_classes == -1:
        raise UserError(
            "Give the number of classes, such as --config.data.num_classes=10, or 0 for none: the "
            "benchmark opens no data to count them."
        )


def describe_size(name: str, experiment: Experiment) -> str:
    """Returns a description of the size of one of `PROGRAMS`."""
    if name in ("train_autoencoder", "decode", "encode"):
        height, width, _ = experiment.autoencoder.image_shape
        return f"{height}x{width}"
    prior = experiment.prior.prior
    h, w, _ = prior.code_shape
    network = prior.network
    name = "dit " if isinstance(network, DiT) else ""
    return f"{name}{network.num_layers}x{network.width}, {h * w} tokens"


def _images(spec: AutoencoderSpec, num: int) -> np.ndarray:
    images = np.random.default_rng(0).uniform(-1, 1, (num, *spec.image_shape))
    return images.astype(np.float32)


def _bits(spec: AutoencoderSpec, num: int) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2, (num, *spec.code_shape))
    return bits.astype(np.float32)


def _labels(conditioning: Conditioning, num: int) -> np.ndarray | None:
    """Returns labels of the prior's condition, None if it has none."""
    like, rng = conditioning.example(num), np.random.default_rng(0)
    if like is None:
        return None
    if not conditioning.of_texts:
        return rng.integers(0, conditioning.num_classes, num, dtype=np.int32)
    tokens = (TEXT_TOKENS,) * (like.ndim - 2)
    return rng.standard_normal((num, *tokens, conditioning.text_width)).astype(np.float32)


def _drawn(shapes: Any) -> Any:
    """Returns small random weights of the given shapes, repeating the same million numbers."""
    million = 0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)
    return jax.tree.map(lambda x: jnp.array(np.resize(million[: x.size], x.shape)), shapes)


def _weights(init: Callable) -> Any:
    """Returns weights, on all devices, for what `init(key)` would initialise."""
    return replicate(_drawn(jax.eval_shape(init, jax.random.key(0))))


def lpips_shapes(networks: Networks) -> dict[str, Any]:
    """Returns the shapes of LPIPS's parameters, {} if no loss needs them."""
    vgg16 = traverse_util.unflatten_dict(lpips.vgg16_shapes(), sep="/")
    return {"params": vgg16} if networks.lpips else {}


def _state(init_state: Callable) -> TrainState:
    """Returns a state like that of `init_state(seed)`, with Adam's moments and the EMA at 0."""
    shapes = jax.eval_shape(functools.partial(init_state, 0))
    zeros = shapes.replace(key=None)
    zeros = jax.tree.map(lambda like: jnp.array(np.zeros(like.shape, like.dtype)), zeros)
    if zeros.discriminator:
        zeros.discriminator["params"] = _drawn(shapes.discriminator["params"])
    return zeros.replace(key=jax.random.key(0), params=_drawn(shapes.params))


def _compile_step(state: TrainState, batch: dict, frozen: Any, step: Callable) -> tuple:
    """Returns a function that takes the next step, and its program."""
    state, batch, frozen = replicate(state), shard(batch), replicate(frozen)
    program = compile_program(parallel(step, num_frozen=1), state, batch, frozen)

    def call():
        nonlocal state
        state, metrics = program.compiled(state, batch, frozen)
        return metrics

    return call, program


def _forward_work(
    function: Any, init: Callable, flops_a_call: int, *batch: Any, **statics: Any
) -> Work:
    """Returns the work of a program without a loop; weights and batch are on the devices."""
    arguments = (_weights(init), *spread(batch))
    program = compile_program(function, *arguments, **statics)
    call = functools.partial(program.compiled, *arguments)
    return Work(call, [program], flops_a_call, program.flops)


def train_autoencoder_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """The training step of stage 1 with its discriminator, even if that starts later."""
    spec = experiment.autoencoder
    state, frozen = _state(spec.init_state), _drawn(lpips_shapes(spec.networks))
    batch = {"image": _images(spec, num)}
    call, program = _compile_step(state, batch, frozen, spec.step(spec.networks))
    per_image = flops.count_autoencoder_step(
        spec.networks, spec.image_shape, spec.code_shape, r1=bool(spec.objective.r1)
    )
    xla_flops = counted_flops((spec.train.accumulate, program))
    return Work(call, [program], on_device * per_image, xla_flops)


def train_prior_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """The training step of stage 2, with the encoder unless the config caches codes."""
    spec, autoencoder = experiment.prior, experiment.autoencoder
    model, debug = autoencoder.networks.autoencoder, experiment.run.debug_nans
    labels = _labels(spec.conditioning, num)
    batch = {"label": np.zeros(num, np.int32) if labels is None else labels}
    code_shape = spec.prior.code_shape
    per_image = flops.count_prior_step(spec.prior, TEXT_TOKENS)
    frozen = None
    if spec.cache_codes or spec.codes:
        batch["probs"] = (255 * _bits(autoencoder, num)).astype(np.uint8)
    else:
        batch["image"] = _images(autoencoder, num)
        frozen = _weights(autoencoder.init)
        per_image += flops.count_encoding(model, autoencoder.image_shape, code_shape)
    step = spec.step(functools.partial(model.apply, method="probs"), debug)
    call, program = _compile_step(_state(spec.init_state), batch, frozen, step)
    h, w, _ = code_shape
    parts = 1 if debug else spec.train.accumulate or parts_for_caches(on_device, h * w)
    # XLA counts a loop once, and the encoder is outside of the loop.
    xla_flops = None if parts > 1 and "image" in batch else counted_flops((parts, program))
    return Work(call, [program], on_device * per_image, xla_flops)


def decode_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """Decodes codes to images, both in the device's memory."""
    spec = experiment.autoencoder
    model = spec.networks.autoencoder
    total = on_device * flops.count_decoding(model, spec.code_shape)
    return _forward_work(programs.decode_codes, spec.init, total, _bits(spec, num), model=model)


def encode_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """Encodes images to deterministic codes, both in the device's memory."""
    spec = experiment.autoencoder
    model = spec.networks.autoencoder
    total = on_device * flops.count_encoding(model, spec.image_shape, spec.code_shape)
    return _forward_work(programs.encode_codes, spec.init, total, _images(spec, num), model=model)


def network_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """One call of the prior's network, with labels if it takes any."""
    spec = experiment.prior
    network = spec.prior.network
    per_image = flops.count_network(network, spec.prior.code_shape, True, TEXT_TOKENS)
    times, labels = np.zeros(num, np.float32), _labels(spec.conditioning, num)
    batch = (_bits(experiment.autoencoder, num), times, labels)
    return _forward_work(jax.jit(network.apply), spec.init, on_device * per_image, *batch)


def sample_work(experiment: Experiment, num: int, on_device: int) -> Work:
    """Both programs of sampling, from the key to images in the host's memory."""
    spec, prior = experiment.prior, experiment.prior.prior
    settings, model = experiment.sample.settings, experiment.autoencoder.networks.autoencoder
    labels = _labels(spec.conditioning, num)

    @jax.jit
    def sample(params, keys, label):
        condition = None if label is None else Condition(label)
        return prior.sample(params, keys, condition, settings)

    def inputs(number):
        return spread([sample_keys(jax.random.key(number), num), labels])

    prior_params, decoder_params = _weights(spec.init), _weights(experiment.autoencoder.init)
    sampler = compile_program(sample, prior_params, *inputs(0))
    codes = spread(_bits(experiment.autoencoder, num))
    decoder = compile_program(programs.decode_codes, decoder_params, codes, model=model)
    numbers = itertools.count()

    def call():
        codes = jax.device_get(sampler.compiled(prior_params, *inputs(next(numbers))))
        return jax.device_get(decoder.compiled(decoder_params, spread(codes)))

    calls = prior.network_calls(settings, labels is not None)
    per_image = flops.count_decoding(model, prior.code_shape)
    for times, labelled in zip(calls, (True, False), strict=True):
        cost = flops.count_network(prior.network, prior.code_shape, labelled, TEXT_TOKENS)
        per_image += times * cost
    # XLA counts the loop over the steps once, and the more expensive branch of a condition. So the
    # count is multiplied by the number of steps, which is correct only if all steps are equal.
    steps = getattr(settings, "steps", None)
    alike = calls == (steps, steps) if labels is not None else sum(calls) == steps
    xla_flops = counted_flops((steps, sampler), (1, decoder)) if alike else None
    return Work(call, [sampler, decoder], on_device * per_image, xla_flops)


# Arguments: the experiment, the number of images over all devices, and that on one device.
PROGRAMS = {
    "train_autoencoder": train_autoencoder_work,
    "train_prior": train_prior_work,
    "sample": sample_work,
    "decode": decode_work,
    "encode": encode_work,
    "network": network_work,
}
