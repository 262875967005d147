"""What a prior is conditioned on: a class, the features of a text, or nothing."""

import dataclasses
import difflib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.data import classes
from binlatent.data.sources import Source
from binlatent.runtime.errors import UserError

Array = jax.Array

# Number of dimensions of one label, by the value of config.prior.condition: a class; the vector of
# a text, which becomes one token; the tokens of a text, for cross-attention.
CONDITIONS = {"class": 0, "text_token": 1, "text_cross": 2}


class Condition(NamedTuple):
    """The labels of a batch, for networks and priors.

    In texts (n, m, e), rows of zeros at the end are padding. A text of zeros only means that the
    image has no label.

    Fields:
      label: int (n,) for classes, (n, e) or (n, m, e) for texts.
      given: bool (n,), which images have a label; None for all.
      against: labels like `label`, of any m, that guidance leads away from; None: guidance leads
        away from no label.
    """

    label: Array
    given: Array | None = None
    against: Array | None = None


def padded(texts: Any) -> np.ndarray:
    """Returns features of texts, an array or a list of arrays (m, e) of any m, as one array.

    Shorter texts get rows of zeros at the end. Anything else is passed to `np.asarray`.
    """
    try:
        if isinstance(texts, list | tuple) and {np.ndim(text) for text in texts} == {2}:
            m = max(len(text) for text in texts)
            texts = [np.pad(text, ((0, m - len(text)), (0, 0))) for text in texts]
        return np.asarray(texts)
    except ValueError:  # arrays of different shapes
        raise UserError("The features of texts must be arrays of the same width.") from None


def label_and_given(condition: Condition | None) -> tuple[Array | None, Array | None]:
    """Returns `label` and `given`, which networks take; both None without a condition."""
    return (None, None) if condition is None else (condition.label, condition.given)


def negative(condition: Condition | None) -> Condition | None:
    """Returns the condition that guidance leads away from; None for no label."""
    if condition is None or condition.against is None:
        return None
    return Condition(condition.against)


def side_by_side(condition: Condition) -> Condition:
    """Returns 2 n labels: each of the n labels, followed by the one guidance leads away from."""
    label, given, against = condition
    n = len(label)
    given = jnp.ones(n, bool) if given is None else given
    against_given = jnp.full(n, against is not None)
    against = label if against is None else against
    if label.ndim == 3:  # texts (n, m, e), both padded to the longer m
        m = max(label.shape[1], against.shape[1])
        label, against = (
            jnp.pad(x, ((0, 0), (0, m - x.shape[1]), (0, 0))) for x in (label, against)
        )
    label = jnp.stack([label, against], axis=1).reshape(2 * n, *label.shape[1:])
    return Condition(label, jnp.stack([given, against_given], axis=1).reshape(-1))


def has_text(label: Array) -> Array:
    """Returns which images have a label, bool (n,): all with classes, and texts that are not 0."""
    if jnp.issubdtype(label.dtype, jnp.integer):
        return jnp.ones(len(label), bool)
    return jnp.any(label != 0, axis=tuple(range(1, label.ndim)))


def given_labels(label: Array, given: Array | None) -> Array | None:
    """Returns `given`, bool (n,) or None for all, without images whose text is all zeros."""
    if jnp.issubdtype(label.dtype, jnp.integer):
        return given
    return has_text(label) if given is None else given & has_text(label)


def count_tokens(text: Array, given: Array | None) -> Array:
    """Returns the number of tokens of each text without padding, int (n,); 0 without a text.

    Args:
      text: (n, m, e).
      given: bool (n,), False where there is no text; None for all.
    """
    places = jnp.arange(1, text.shape[1] + 1)
    last = jnp.max(jnp.where(jnp.any(text != 0, axis=-1), places[None], 0), axis=1)
    return last if given is None else jnp.where(given, last, 0)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a prior is conditioned on.

    Fields:
      kind: a key of `CONDITIONS`, or "none".
      num_classes: for "class"; -1 until the data was opened.
      text_width: e, of the features of texts; 0 until data or an encoder was opened.
      names: of the classes, by number; () if unknown.
    """

    kind: str = "none"
    num_classes: int = 0
    text_width: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def of_config(
        cls, condition: str, num_classes: int, text_width: int, names: tuple[str, ...] = ()
    ) -> "Conditioning":
        """Returns the conditioning of a config; without classes, "class" becomes "none"."""
        if condition not in CONDITIONS:
            raise UserError(
                f"config.prior.condition must be one of {', '.join(CONDITIONS)}; got {condition!r}."
            )
        if condition == "class" and not num_classes:
            condition = "none"
        known = condition == "class" and num_classes in (-1, len(names))
        return cls(condition, num_classes, text_width, names if known else ())

    @property
    def of_texts(self) -> bool:
        """Whether labels are the features of texts."""
        return CONDITIONS.get(self.kind, 0) > 0

    def example(self, n: int = 1) -> jax.ShapeDtypeStruct | None:
        """Returns the shape and type of the labels of n images, None without a condition."""
        if self.kind == "none":
            return None
        if self.of_texts and not self.text_width:
            raise UserError(
                "config.prior.text_width is 0, so it would be taken from the data, which are not "
                "open here: set it to the width of the text features."
            )
        shape = {"class": (), "text_token": (self.text_width,), "text_cross": (1, self.text_width)}
        dtype = jnp.int32 if self.kind == "class" else jnp.float32
        return jax.ShapeDtypeStruct((n, *shape[self.kind]), dtype)

    def labels(self, label: Any, num: int) -> np.ndarray | None:
        """Returns the labels of `num` samples for the network; None stays None.

        Args:
          label: a class by name or number, or `num` classes; or the features of one text or of
            `num` texts, in an array or a list. In a list, texts may differ in length.
          num: n.
        """
        if label is None:
            return None
        if self.kind == "none":
            raise UserError("This prior is unconditional, so it takes no label.")
        if self.of_texts:
            return self._features(label, num, CONDITIONS[self.kind])
        given = np.asarray(label)
        if given.dtype.kind == "U":
            given = label = np.vectorize(self._number, otypes=[np.int32])(given)
        whole = given.dtype.kind in "iuf" and not np.any(given % 1)
        if given.shape not in ((), (num,)) or not whole:
            shown = label if given.ndim == 0 else f"an array of {given.dtype} {given.shape}"
            raise UserError(
                f"This prior takes classes as labels: one name or integer, or {num} of them, not "
                f"{shown}."
            )
        labels = np.broadcast_to(np.asarray(label, np.int32), num)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            listed = f" ({classes.numbered(self.names)})" if self.names else ""
            raise UserError(
                f"A label must be the name of a class, or between 0 and {self.num_classes - 1}; "
                f"got {labels.min() if labels.min() < 0 else labels.max()}{listed}."
            )
        return labels

    def _number(self, label: str) -> int:
        """Returns the number of a class from its name, or from a number if no name is a number."""
        name = classes.clean(label)
        if name in self.names:
            return self.names.index(name)
        # If names are numbers, a number that is not a name is refused.
        if re.fullmatch(r"[+-]?[0-9]{1,9}", name) and not classes.are_numbers(self.names):
            return int(name)
        near = difflib.get_close_matches(name, self.names, n=1)
        meant = f", did you mean {near[0]!r}" if near else ""
        raise UserError(
            f"There is no class {label!r}{meant}: the classes are "
            f"{classes.numbered(self.names) or f'0 to {self.num_classes - 1}, without names'}."
        )

    def _features(self, features: Any, num: int, ndim: int) -> np.ndarray:
        """Returns the features of `num` samples' texts, each an array of `ndim` dimensions."""
        features, width = padded(features), self.text_width
        one = features.ndim == ndim
        if (
            features.dtype.kind not in "fiu"
            or not (one or (features.ndim == ndim + 1 and len(features) in (1, num)))
            or features.shape[-1] != width
            or not features.size
        ):
            shape = f"({width},)" if ndim == 1 else f"(tokens, {width})"
            raise UserError(
                f"This prior takes the features {shape} of a text as a label, or {num} of them, "
                f"not an array of {features.dtype} {features.shape}."
            )
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)
        if not np.isfinite(features).all():
            raise UserError("The features of a text must be finite.")
        return np.broadcast_to(features, (num, *features.shape[-ndim:]))

    def known(self, source: Source, labels: np.ndarray) -> np.ndarray | None:
        """Returns the labels of images for the prior; None if the images have no such labels.

        Args:
          source: of the images.
          labels: of some images of the source.
        """
        if self.kind == "none":
            return None
        if self.kind == "class":
            classes.check_same_classes(source.classes, self.names, "prior")
            if self.num_classes != -1 and source.num_classes not in (0, self.num_classes):
                raise UserError(
                    f"The prior has {self.num_classes} classes, but the images have "
                    f"{source.num_classes}: give the images that it was trained on."
                )
            return labels if source.num_classes else None
        if labels.dtype.kind != "f":
            return None
        width = self.text_width or labels.shape[-1]
        if labels.ndim - 1 != CONDITIONS[self.kind] or labels.shape[-1] != width:
            tokens = "" if self.kind == "text_token" else "tokens, "
            expected = f"({tokens}{width}{'' if tokens else ','})"
            raise UserError(
                f"The features of a text in the data have the shape {labels.shape[1:]}, but the "
                f"prior, with config.prior.condition = {self.kind!r}, takes {expected}."
            )
        return labels
