"""The sizes of a stage, in a line for people, and those that a warning is due for."""

from binlatent.autoencoder.bottleneck import Binary
from binlatent.experiment import Experiment

MIN_SIDE = 4  # tokens a side of a grid, without a warning


def describe_stage(experiment: Experiment, stage: str, num_params: int) -> str:
    """Returns the line that a stage starts with.

    Args:
      experiment: of the run.
      stage: "autoencoder" or "prior".
      num_params: numbers that the stage trains, without those of a discriminator.
    """
    spec = experiment.autoencoder
    (height, width, _), (h, w, _) = spec.image_shape, spec.code_shape
    tokens = f"{h}x{w} tokens of {round(spec.bottleneck.bits, 2):,g} bits"
    if stage == "autoencoder":
        own = f"{height}x{width} images, {tokens} ({_code_bits(experiment):,.0f} bits, an image "
        own += f"has {_image_bits(experiment):,})"
    else:
        own = f"{experiment.prior.kind}, {tokens}"
    count = f"{num_params / 1e6:,.1f} million" if num_params >= 1e6 else f"{num_params:,}"
    train = getattr(experiment, stage).train
    images = train.num_steps * train.batch_size
    return f"{stage}: {own}, {count} parameters, {images:,} images in {train.num_steps:,} steps"


def size_warning(experiment: Experiment) -> str:
    """Returns what is wrong with the grid or the bits of a code, and what to change; or ""."""
    spec = experiment.autoencoder
    (height, width, _), (h, w, _) = spec.image_shape, spec.code_shape
    if min(h, w) < MIN_SIDE:
        return (
            f"Images of {height}x{width} become {h}x{w} tokens of {height // h}x{width // w} "
            f"pixels, a grid below {MIN_SIDE}x{MIN_SIDE}: too coarse for an image. Give "
            "config.autoencoder.multipliers fewer levels or config.autoencoder.patch a smaller "
            "value, or begin with --config=images32, images64 or digits; docs/sizes.md says more."
        )
    bits, of_image = _code_bits(experiment), _image_bits(experiment)
    if isinstance(spec.bottleneck, Binary) and bits >= of_image:
        return (
            f"A code has {bits:,} bits, and an image of 8 bits a channel {of_image:,}: nothing is "
            "compressed. Lower config.autoencoder.num_bits, give config.autoencoder.multipliers "
            "more levels or config.autoencoder.patch a larger value; docs/sizes.md says more."
        )
    return ""


def _code_bits(experiment: Experiment) -> float:
    spec = experiment.autoencoder
    h, w, _ = spec.code_shape
    return h * w * spec.bottleneck.bits


def _image_bits(experiment: Experiment) -> int:
    height, width, channels = experiment.autoencoder.image_shape
    return 8 * height * width * channels
