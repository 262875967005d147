"""What a row of a table of metrics says."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A metric that can be asked for by its name, the key of its row.

    Fields:
      measure: numbers by name, of what the table is about.
      titles: of these numbers, as people write them; others are shown by their names.
      needs: what it cannot do without, in the words of its table.
      settles: how it was measured, for the protocol.
      smallest: side of the smallest images that it takes, in pixels.
      elsewhere: what it is called in the features of another network than FID's.
    """

    measure: Callable[..., Any]
    titles: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    settles: Callable[..., str] | None = None
    smallest: int = 1
    elsewhere: str = ""


Table = dict[str, Metric]


def title(name: str, *tables: Table) -> str:
    """Returns the name of a metric's number as people write it."""
    titles = {
        key: text
        for table in tables
        for metric in table.values()
        for key, text in metric.titles.items()
    }
    return titles.get(name, name.replace("_", " "))
