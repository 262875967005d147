"""What samples are asked for, by labels or by prompts."""

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
    """Returns the condition of `num` samples, None for none; a prompt that is blank is no text.

    Args:
      conditioning: of the prior.
      features: of texts, as the prior takes them, (n, ...).
      num: n.
      label: as of `Conditioning.labels`.
      prompt: in place of a label, a text or n of them.
      negative_prompt: that guidance goes against, one or n; None for no text.
    """
    if label is not None and prompt is not None:
        raise UserError("Give a label, features of a text or a prompt: one of them.")
    given = {"prompt": prompt, "negative prompt": negative_prompt}
    texts = {name: _texts(x, num, name) for name, x in given.items() if x is not None}
    if texts and not conditioning.of_texts:
        asked = "classes: give --label" if conditioning.kind == "class" else "nothing: leave it out"
        raise UserError(f"A {[*texts][0]} is for a prior of texts; this one is asked by {asked}.")
    # All at once, so that those of several tokens are padded to one length.
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
        raise UserError(f"Give one {name}, a string, or {num} of them, one a sample.")
    return texts
