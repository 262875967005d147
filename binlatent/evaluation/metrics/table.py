"""The rows of tables of metrics."""

from collections import ChainMap
from collections.abc import Callable
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A metric; users name it by the key of its row."""

    measure: Callable[..., Any]  # returns numbers by name; the table describes the arguments
    titles: dict[str, str] = {}  # of these numbers; default: their names
    needs: tuple[str, ...] = ()  # requirements; the table describes them
    settles: Callable[..., str] | None = None  # how it was measured, for the protocol
    smallest: int = 1  # smallest side of images, in pixels
    elsewhere: str = ""  # its name for networks other than FID's


Table = dict[str, Metric]


def title(name: str, *tables: Table) -> str:
    """Returns the title of a number for readers."""
    titles = ChainMap(*(metric.titles for table in tables for metric in table.values()))
    return titles.get(name, name.replace("_", " "))
