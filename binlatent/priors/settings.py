"""Makes the settings of a prior's sampler from `config.sample` and a caller's options."""

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from binlatent.priors.prior import Prior
from binlatent.runtime.errors import UserError


def make_settings(prior: Prior, section: Mapping[str, Any]) -> Any:
    """Returns the settings of a prior's sampler from the keys of `config.sample` that it uses."""
    names = [field.name for field in dataclasses.fields(prior.Settings)]
    values = {name: section[name] for name in names if name in section}
    return prior.check_settings(prior.Settings(**values))


def with_options(prior: Prior, settings: Any, options: Mapping[str, Any]) -> Any:
    """Returns settings with some values replaced, all checked.

    Args:
      prior: the prior of the sampler.
      settings: to start from.
      options: values by name; None changes nothing.
    """
    names = {field.name for field in dataclasses.fields(settings)}
    changes = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in prior.lacks:
            raise UserError(prior.lacks[name])
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, cutoff=0.75)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            known = ", ".join(sorted(names))
            raise UserError(
                f"There is no sampling option {name!r}{meant}: the options are {known}."
            )
        example = getattr(settings, name)
        if not _fits(value, example):
            raise UserError(f"The sampling option {name} must be like {example!r}, not {value!r}.")
        changes[name] = value
    return prior.check_settings(dataclasses.replace(settings, **changes)) if changes else settings


def _fits(value: Any, example: Any) -> bool:
    """Returns whether a value has an example's type; integers pass as floats, lists as tuples."""
    if example is None:
        return True
    if isinstance(example, tuple):
        listed = isinstance(value, tuple | list) and len(value) == len(example)
        return listed and all(map(_fits, value, example))
    if isinstance(value, bool | np.bool_) or isinstance(example, bool):
        return isinstance(value, bool | np.bool_) and isinstance(example, bool)
    if isinstance(example, str):
        return isinstance(value, str)
    return isinstance(value, numbers.Integral if isinstance(example, int) else numbers.Real)
