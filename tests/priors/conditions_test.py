"""Labels by number and by name."""

import numpy as np
import pytest

from binlatent.data.sources import Source
from binlatent.priors.conditions import Conditioning
from binlatent.runtime.errors import UserError

ANIMALS = Conditioning("class", 3, 0, ("cat", "dog", "7"))
YEARS = Conditioning("class", 3, 0, ("2001", "2002", "2005"))


@pytest.mark.parametrize(
    "label, expected",
    [
        (1, [1, 1]),
        ("dog", [1, 1]),
        (" dog ", [1, 1]),
        (["7", "cat"], [2, 0]),  # a name before a number
        (np.array(["0", "2"]), [0, 2]),
        ([2.0, 0.0], [2, 0]),
    ],
)
def test_a_label_is_a_name_or_a_number(label, expected):
    labels = ANIMALS.labels(label, 2)
    assert labels.dtype == np.int32 and labels.tolist() == expected


@pytest.mark.parametrize(
    "label, message",
    [
        ("dgo", "no class 'dgo', did you mean 'dog': the classes are 0 'cat', 1 'dog', 2 '7'"),
        ("3", "must be the name of a class, or between 0 and 2; got 3"),
        ("-1", "between 0 and 2; got -1"),
        (1.5, "one name or integer, or 2 of them, not 1.5"),
        (["cat", "dog", "cat"], "or 2 of them, not an array of"),
    ],
)
def test_other_labels_are_refused(label, message):
    with pytest.raises(UserError, match=message):
        ANIMALS.labels(label, 2)


def test_numbers_that_are_names_are_nothing_else():
    assert YEARS.labels("2005", 1).tolist() == YEARS.labels(2, 1).tolist() == [2]
    with pytest.raises(UserError, match="no class '2': the classes are 0 '2001', 1 '2002'"):
        YEARS.labels("2", 1)
    with pytest.raises(UserError, match="between 0 and 2; got 2005 .0 '2001', 1 '2002', 2 '2005'"):
        YEARS.labels(2005, 1)


def test_classes_without_names_have_numbers_alone():
    nameless = Conditioning("class", 3)
    assert nameless.labels("2", 1).tolist() == [2]
    with pytest.raises(UserError, match="the classes are 0 to 2, without names"):
        nameless.labels("cat", 1)


def test_images_of_other_classes_are_refused():
    labels = np.array([0, 2])
    assert ANIMALS.known(Source([], ("cat", "dog", "7")), labels).tolist() == [0, 2]
    assert ANIMALS.known(Source([]), labels) is None
    message = "trained with 3 classes, 0 'cat', .* have 3, 0 '7', .* differ from number 0 on"
    with pytest.raises(UserError, match=message):
        ANIMALS.known(Source([], ("7", "cat", "dog")), labels)
