"""Describes the sizes of a stage in one line, and warns of unsuitable sizes."""

from binlatent.autoencoder.bottleneck import Binary
from binlatent.experiment import Experiment

MIN_SIDE = 4  # tokens a side of a grid, without a warning


def describe_stage(experiment: Experiment, stage: str, num_params: int) -> str:
    """Returns the log line at the start of a stage.

    Args:
      experiment: of the run.
      stage: "autoencoder" or "prior".
      num_params: number of the stage's parameters, without the discriminator.
    """
    spec = experiment.autoencoder
    (height, width, _), (h, w, _) = spec.image_shape, spec.code_shape
    tokens = f"{h}x{w} tokens of {round(spec.bottleneck.bits, 2):,g} bits"
    bits = f"{_code_bits(experiment):,.0f} bits per image"
    if stage == "autoencoder":
        own = f"{height}x{width} images, {tokens} ({bits}, from {_image_bits(experiment):,})"
    else:
        own = f"{experiment.prior.kind}, {tokens} ({bits})"
    count = f"{num_params / 1e6:,.1f} million" if num_params >= 1e6 else f"{num_params:,}"
    train = getattr(experiment, stage).train
    images = train.num_steps * train.batch_size
    steps = f"{train.num_steps:,} step{'s' if train.num_steps != 1 else ''}"
    return f"{stage}: {own}, {count} parameters, {images:,} images in {steps}"


def size_warning(experiment: Experiment) -> str:
    """Returns a warning of too coarse a grid and too many bits, with what to change; or ""."""
    spec = experiment.autoencoder
    (height, width, _), (h, w, _) = spec.image_shape, spec.code_shape
    warnings = []
    if min(h, w) < MIN_SIDE:
        warnings.append(
            f"Images of {height}x{width} become {h}x{w} tokens of {height // h}x{width // w} "
            f"pixels. A grid below {MIN_SIDE}x{MIN_SIDE} is too coarse for an image: use fewer "
            "levels in config.autoencoder.multipliers or a smaller config.autoencoder.patch, or "
            "start from --config=images32, images64 or digits. See docs/sizes.md."
        )
    bits, of_image = _code_bits(experiment), _image_bits(experiment)
    if isinstance(spec.bottleneck, Binary) and bits >= of_image:
        coarser = (
            ", use more levels in config.autoencoder.multipliers, or increase "
            "config.autoencoder.patch"
        )
        warnings.append(
            f"A code has {bits:,} bits and an image {of_image:,}, at 8 bits per channel, so "
            "nothing is compressed: lower config.autoencoder.num_bits"
            f"{'' if warnings else coarser}. See docs/sizes.md."
        )
    return " ".join(warnings)


def _code_bits(experiment: Experiment) -> float:
    spec = experiment.autoencoder
    h, w, _ = spec.code_shape
    return h * w * spec.bottleneck.bits


def _image_bits(experiment: Experiment) -> int:
    height, width, channels = experiment.autoencoder.image_shape
    return 8 * height * width * channels
