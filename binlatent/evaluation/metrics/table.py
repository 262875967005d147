"""What a row of a table of metrics says."""

from collections import ChainMap
from collections.abc import Callable
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A metric that can be asked for by its name, the key of its row."""

    measure: Callable[..., Any]  # numbers by name, of what the table is about
    titles: dict[str, str] = {}  # of these numbers; others are shown by their names
    needs: tuple[str, ...] = ()  # what it cannot do without, in the words of its table
    settles: Callable[..., str] | None = None  # how it was measured, for the protocol
    smallest: int = 1  # side of the smallest images that it takes, in pixels
    elsewhere: str = ""  # what it is called in the features of another network than FID's


Table = dict[str, Metric]


def title(name: str, *tables: Table) -> str:
    """Returns the name of a metric's number as people write it."""
    titles = ChainMap(*(metric.titles for table in tables for metric in table.values()))
    return titles.get(name, name.replace("_", " "))
