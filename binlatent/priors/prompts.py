"""The condition of samples, from labels or prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from binlatent.priors.conditions import Condition, Conditioning
from binlatent.runtime.errors import UserError


def make_condition(
    conditioning: Conditioning,
    features: Callable[[Sequence[str]], np.ndarray],
    num: int,
    label: Any = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
) -> Condition | None:
    """Returns the condition of `num` samples, None for no condition; a blank prompt means no text.

    Args:
      conditioning: of the prior.
      features: maps texts to features for the prior, (n, ...).
      num: n.
      label: as in `Conditioning.labels`.
      prompt: a text or n texts, in place of a label.
      negative_prompt: a text or n texts that guidance leads away from; None for no text.
    """
    if label is not None and prompt is not None:
        raise UserError("Give only one of a label, the features of a text, and a prompt.")
    given = {"prompt": prompt, "negative prompt": negative_prompt}
    texts = {name: _texts(x, num, name) for name, x in given.items() if x is not None}
    if texts and not conditioning.of_texts:
        if conditioning.kind == "class":
            own = "takes classes: give --label"
        else:
            own = "is unconditional: leave it out"
        raise UserError(f"A {[*texts][0]} is for a prior of texts; this prior {own}.")
    # All at once, so that texts of several tokens are padded to one length.
    found = features([text for of_name in texts.values() for text in of_name]) if texts else ()
    if prompt is not None:
        label = found[: len(texts["prompt"])]
    labels = conditioning.labels(label, num)
    if labels is None and negative_prompt is not None:
        raise UserError("A negative prompt needs a prompt that guidance goes towards.")
    if labels is None:
        return None
    against = None
    if negative_prompt is not None:
        against = conditioning.labels(found[-len(texts["negative prompt"]) :], num)
    return Condition(labels, against=against)


def _texts(texts: str | Sequence[str], num: int, name: str) -> list[str]:
    """Returns one text or `num` of them as a list."""
    texts = [texts] if np.ndim(texts) == 0 else list(texts)
    if len(texts) not in (1, num) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"Give one {name}, a string, or {num}, one per sample.")
    return texts
