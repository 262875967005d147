"""What a prior can be asked for: a class, the features of a text, or nothing."""

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

# Dimensions of one label, by the value of config.prior.condition: a class; a text's vector, that
# becomes one token; a text's tokens, that are attended to.
CONDITIONS = {"class": 0, "text_token": 1, "text_cross": 2}


class Condition(NamedTuple):
    """The labels of a batch, as networks and priors take them.

    Of texts (n, m, e), rows of zeros at the end are padding. A text of zeros alone is no text: its
    image has no label.

    Fields:
      label: int (n,) of classes, (n, e) or (n, m, e) of texts.
      given: bool (n,), which images have their label; None for all.
      against: labels like `label`, of any m, that guidance goes against; None for no label.
    """

    label: Array
    given: Array | None = None
    against: Array | None = None


def padded(texts: Any) -> np.ndarray:
    """Returns features of texts, an array or a list of arrays (m, e) of any m, as one array.

    Shorter texts get rows of zeros at the end. What is no such list is as of `np.asarray`.
    """
    try:
        if isinstance(texts, list | tuple) and {np.ndim(text) for text in texts} == {2}:
            m = max(len(text) for text in texts)
            texts = [np.pad(text, ((0, m - len(text)), (0, 0))) for text in texts]
        return np.asarray(texts)
    except ValueError:  # of several shapes
        raise UserError("The features of texts must be arrays of one width.") from None


def label_and_given(condition: Condition | None) -> tuple[Array | None, Array | None]:
    """Returns the two fields that networks take, None both without a condition."""
    return (None, None) if condition is None else (condition.label, condition.given)


def negative(condition: Condition | None) -> Condition | None:
    """Returns the condition that guidance goes against, None for no label."""
    if condition is None or condition.against is None:
        return None
    return Condition(condition.against)


def side_by_side(condition: Condition) -> Condition:
    """Returns 2 n labels: each one of n, followed by what guidance goes against."""
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
    """Returns which labels are given at all, bool (n,): texts but those of zeros, all classes."""
    if jnp.issubdtype(label.dtype, jnp.integer):
        return jnp.ones(len(label), bool)
    return jnp.any(label != 0, axis=tuple(range(1, label.ndim)))


def given_labels(label: Array, given: Array | None) -> Array | None:
    """Returns `given`, bool (n,) or None for all, without the images whose text is none."""
    if jnp.issubdtype(label.dtype, jnp.integer):
        return given
    return has_text(label) if given is None else given & has_text(label)


def count_tokens(text: Array, given: Array | None) -> Array:
    """Returns the tokens of each text without its padding, int (n,); 0 where there is no text.

    Args:
      text: (n, m, e).
      given: bool (n,), where False there is no text; None for all.
    """
    places = jnp.arange(1, text.shape[1] + 1)
    last = jnp.max(jnp.where(jnp.any(text != 0, axis=-1), places[None], 0), axis=1)
    return last if given is None else jnp.where(given, last, 0)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a prior is asked by.

    Fields:
      kind: of `CONDITIONS`, or "none".
      num_classes: of "class"; -1 as long as no data was opened that could tell.
      text_width: e, of the features of texts; 0 as long as nothing was opened that could tell.
      names: of the classes, by number; () if they are not known.
    """

    kind: str = "none"
    num_classes: int = 0
    text_width: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def of_config(
        cls, condition: str, num_classes: int, text_width: int, names: tuple[str, ...] = ()
    ) -> "Conditioning":
        """Returns the conditioning of a config; data without classes has none of "class"."""
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
                "config.prior.text_width is 0, the width of the texts' features in the data, which "
                "are not open here: set it."
            )
        shape = {"class": (), "text_token": (self.text_width,), "text_cross": (1, self.text_width)}
        dtype = jnp.int32 if self.kind == "class" else jnp.float32
        return jax.ShapeDtypeStruct((n, *shape[self.kind]), dtype)

    def labels(self, label: Any, num: int) -> np.ndarray | None:
        """Returns the labels of `num` samples as the network takes them; None stays None.

        Args:
          label: a class, by name or number, or `num` of them; the features of one text, or of
            `num`, an array or a list; texts of several tokens, in a list, may differ in length.
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
                f"This prior is asked for by classes: one name or integer, or {num} of them, not "
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
        """Returns the number of a class by its name, or by itself where no name is a number."""
        name = classes.clean(label)
        if name in self.names:
            return self.names.index(name)
        # Where names are numbers, other numbers are not theirs.
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
                f"This prior is asked for by the features {shape} of a text, or {num} of them, not "
                f"by an array of {features.dtype} {features.shape}."
            )
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)
        if not np.isfinite(features).all():
            raise UserError("The features of a text must be finite.")
        return np.broadcast_to(features, (num, *features.shape[-ndim:]))

    def known(self, source: Source, labels: np.ndarray) -> np.ndarray | None:
        """Returns labels of images as the prior takes them; None if the images have none for it.

        Args:
          source: that the images are from.
          labels: of some of its images.
        """
        if self.kind == "none":
            return None
        if self.kind == "class":
            classes.check_same_classes(source.classes, self.names, "prior")
            if self.num_classes != -1 and source.num_classes not in (0, self.num_classes):
                raise UserError(
                    f"The prior has {self.num_classes} classes, but the images have "
                    f"{source.num_classes}: give those that it was trained on."
                )
            return labels if source.num_classes else None
        if labels.dtype.kind != "f":
            return None
        width = self.text_width or labels.shape[-1]
        if labels.ndim - 1 != CONDITIONS[self.kind] or labels.shape[-1] != width:
            tokens = "" if self.kind == "text_token" else "tokens, "
            expected = f"({tokens}{width}{'' if tokens else ','})"
            raise UserError(
                f"The features of texts beside the images have the shape {labels.shape[1:]}, but "
                f"the prior, with config.prior.condition = {self.kind!r}, takes {expected}."
            )
        return labels
