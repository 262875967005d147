"""The Bernoulli bottleneck (paper, Section 3, (1))."""

import jax

Array = jax.Array


def straight_through(probs: Array, bits: Array) -> Array:
    """Returns `bits` with the gradient of `probs`: stop(z) + y - stop(y) (paper, (1)).

    Args:
      probs: y = sigmoid(logits), in [0, 1].
      bits: z, in {0, 1}, of the same shape.
    """
    # y - stop(y) first: it is exactly 0, whereas (z + y) - y can round away from {0, 1}.
    return jax.lax.stop_gradient(bits) + (probs - jax.lax.stop_gradient(probs))


def binarize(probs: Array, mode: str, uniform: Array | None = None) -> Array:
    """Maps Bernoulli parameters to a code, differentiable with respect to them.

    Args:
      probs: y, in [0, 1], any shape.
      mode: "sample" draws z ~ B(y), "deterministic" takes y > 0.5, both with the straight-through
        gradient; "soft" returns y itself.
      uniform: noise in [0, 1) of the shape of `probs`, for "sample".

    Returns:
      The code, the shape and type of `probs`.

    Raises:
      ValueError: for another mode.
    """
    if mode == "sample":
        return straight_through(probs, (uniform < probs).astype(probs.dtype))
    if mode == "deterministic":
        return straight_through(probs, (probs > 0.5).astype(probs.dtype))
    if mode == "soft":
        return probs
    raise ValueError(f"mode must be 'sample', 'deterministic' or 'soft', got {mode!r}")
