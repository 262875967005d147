"""The rows of docs/performance.md's table for GPUs: the paper's networks, most wanted first."""

import copy
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from binlatent.benchmark import speed
from binlatent.runtime.errors import UserError
from binlatent.training.logbook import drop_torn_line

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row to measure, as `speed.measure` takes it."""

    name: str
    config: ml_collections.ConfigDict
    batch_size: int


def rows() -> list[Row]:
    """Returns all: 24 x 512 without classes and 24 x 768 with them, 256 and 1,024 tokens, bfloat16.

    A training step of 24 x 768 at 1,024 tokens, which the paper has not, is left out: it takes a
    minute to compile.

    Raises:
      UserError: outside of a checkout, which has the configs.
    """
    try:
        from binlatent.configs import churches256, ffhq1024, imagenet256
    except ImportError as error:
        raise UserError("Start this in the checkout, which has the folder configs.") from error
    churches, imagenet, ffhq = (
        module.get_config() for module in (churches256, imagenet256, ffhq1024)
    )
    for config in (churches, imagenet, ffhq):
        config.dtype = "bfloat16"
        config.prior.cache_codes = True
        config.sample.steps = 16
    imagenet.data.num_classes = 1000
    imagenet512 = copy.deepcopy(imagenet)
    imagenet512.data.image_size = 512
    imagenet512.autoencoder.attention_resolutions = (32,)
    churches64 = copy.deepcopy(churches)
    churches64.sample.steps = 64
    return [
        Row("sample", churches, 1),
        Row("sample", churches64, 1),
        Row("sample", churches, 64),
        Row("train_prior", imagenet, 64),
        Row("sample", imagenet, 1),
        Row("sample", imagenet, 64),
        Row("train_autoencoder", churches, 8),
        Row("train_prior", churches, 64),
        Row("decode", churches, 1),
        Row("decode", churches, 64),
        Row("encode", churches, 64),
        Row("train_prior", ffhq, 16),
        Row("network", churches, 1),
        Row("network", churches, 64),
        Row("network", imagenet, 64),
        Row("network", ffhq, 1),
        Row("network", ffhq, 16),
        Row("network", imagenet512, 16),
    ]


def known(path: str | Path, rows: list[Row]) -> dict[int, dict[str, Any]]:
    """Returns what a file has of the rows, measured on these devices with this JAX and driver.

    Args:
      path: of lines of JSON, as `speed.measure` returns them; there need be no such file.
      rows: to look for.

    Returns:
      By the number of the row; the last line that is of it.

    Raises:
      UserError: if the file holds something else.
    """
    lines = _lines(path)
    found = {}
    for number, row in enumerate(rows):
        subject = speed.subject(*row).items()
        if same := [x for x in lines if subject <= x.items() and "compile_seconds" in x]:
            found[number] = same[-1]
    return found


def _lines(path: str | Path) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines, [] if there is none."""
    lines = []
    if Path(path).exists():
        for number, text in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
            try:
                lines += [dict(json.loads(text))] if text.strip() else []
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}, is no row of the benchmark: delete that line, or "
                    "have the rows written elsewhere."
                ) from error
    return lines


def missing(path: str, rows: list[Row]) -> tuple[list[Row], Path]:
    """Returns the rows that a file of `known` has not, those first that were begun least often.

    A line of either file that a kill has cut is dropped.

    Args:
      path: of the rows that are there.
      rows: all.

    Returns:
      The rows, and the file of attempts beside `path`, for `measure`.

    Raises:
      UserError: if a file holds something else.
    """
    attempts = Path(f"{path}.attempts")
    for file in (Path(path), attempts):
        drop_torn_line(file, b'{"program"')
    there, begun = known(path, rows), _lines(attempts)
    if there:
        log.info("%d of %d rows are there already", len(there), len(rows))
    left = [row for number, row in enumerate(rows) if number not in there]
    return sorted(left, key=lambda row: begun.count(speed.subject(*row))), attempts


def measure(
    rows: list[Row], attempts: Path | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yields a row of `speed.measure` for each; what fails costs no other.

    Args:
      rows: to measure.
      attempts: file to append a line to before each row: one that ends the whole process then
        keeps no other from its turn in the next.
      **options: of `speed.measure`.

    Raises:
      UserError: after the last row, if some failed.
    """
    failed = 0
    for number, row in enumerate(rows, 1):
        log.info("%d of %d: %s", number, len(rows), speed.title(*row))
        if attempts:
            with attempts.open("a") as file:
                file.write(json.dumps(speed.subject(*row)) + "\n")
        measured = None
        try:
            measured = speed.measure(*row, **options)
        except Exception as error:  # of memory, of a compiler, of cuDNN: the next may fare better
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.error("That failed: %s", what)
            failed += 1
        if measured:
            yield measured
        else:
            gc.collect()  # what it held must not make the next one fail
    if failed:
        raise UserError(
            f"{failed} of {len(rows)} rows failed; with --out a second run tries these alone."
        )
