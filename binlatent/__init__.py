"""Binary Latent Diffusion (Wang et al., CVPR 2023) for JAX and Flax."""

import os
from typing import TYPE_CHECKING, Any

from binlatent.runtime.version import VERSION as __version__

if TYPE_CHECKING:
    from binlatent.pipeline import BinaryLatentDiffusion

__all__ = ["BinaryLatentDiffusion", "__version__"]

if not os.path.isdir(os.path.join(__path__[0], "configs")):
    # In a checkout, configs/ (imported as binlatent.configs) lies beside this folder.
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str) -> Any:
    """Imports `BinaryLatentDiffusion` on first use, because importing JAX takes a second."""
    if name == "BinaryLatentDiffusion":
        from binlatent.pipeline import BinaryLatentDiffusion

        return BinaryLatentDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
