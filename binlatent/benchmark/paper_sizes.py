"""The paper's networks, most important first: the rows of `python -m binlatent.benchmark paper`."""

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from binlatent import experiment
from binlatent.benchmark import speed
from binlatent.benchmark.rows import Row
from binlatent.configs import churches256, ffhq1024, imagenet256
from binlatent.experiment import Experiment
from binlatent.runtime.errors import UserError

log = logging.getLogger("binlatent.benchmark")


class Subject(NamedTuple):
    """What to measure; the arguments of `speed.measure_speed`."""

    name: str
    experiment: Experiment
    batch_size: int


def paper_subjects() -> list[Subject]:
    """Returns all rows: 24 x 512 without and 24 x 768 with classes, 256 or 1,024 tokens, bfloat16.

    A training step of 24 x 768 at 1,024 tokens is left out: the paper does not have it, and it
    takes a minute to compile.
    """

    def at_16_steps(module, **changes):
        common = {"dtype": "bfloat16", "prior.cache_codes": True, "sample.steps": 16}
        return experiment.resolve(module.get_config()).change({**common, **changes})

    churches, ffhq = at_16_steps(churches256), at_16_steps(ffhq1024)
    churches64 = churches.change({"sample.steps": 64})
    imagenet = at_16_steps(imagenet256, **{"data.num_classes": 1000})
    wide = {"data.image_size": 512, "autoencoder.attention_resolutions": (32,)}
    imagenet512 = imagenet.change(wide)
    return [
        Subject("sample", churches, 1),
        Subject("sample", churches64, 1),
        Subject("sample", churches, 64),
        Subject("train_prior", imagenet, 64),
        Subject("sample", imagenet, 1),
        Subject("sample", imagenet, 64),
        Subject("train_autoencoder", churches, 8),
        Subject("train_prior", churches, 64),
        Subject("decode", churches, 1),
        Subject("decode", churches, 64),
        Subject("encode", churches, 64),
        Subject("train_prior", ffhq, 16),
        Subject("network", churches, 1),
        Subject("network", churches, 64),
        Subject("network", imagenet, 64),
        Subject("network", ffhq, 1),
        Subject("network", ffhq, 16),
        Subject("network", imagenet512, 16),
    ]


def known_rows(path: str | Path, subjects: list[Subject]) -> dict[int, Row]:
    """Returns the rows of a file that measure the subjects with these devices, JAX and driver.

    Rows are keyed by the index of the subject; the last line counts. The file may be missing.
    """
    lines = []
    texts = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    for number, text in enumerate(texts, 1):
        try:
            lines += [dict(json.loads(text))] if text.strip() else []
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is not a row of the benchmark: delete that line, or give "
                "another --out."
            ) from error
    found = {}
    for number, subject in enumerate(subjects):
        about = speed.subject(*subject).items()
        if same := [x for x in lines if about <= x.items() and "compile_seconds" in x]:
            found[number] = same[-1]
    return found


def measure_subjects(subjects: list[Subject], **options: Any) -> Iterator[Row]:
    """Yields a row of `speed.measure_speed(..., **options)` for each; goes on after failures."""
    failed = 0
    for number, subject in enumerate(subjects, 1):
        log.info("%d of %d: %s", number, len(subjects), speed.caption(*subject))
        try:
            measured = speed.measure_speed(*subject, **options)
        except Exception as error:  # such as too little memory, or an error of cuDNN
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.error("This row failed: %s", what)
            measured, failed = None, failed + 1
        if measured:
            yield measured
        else:
            gc.collect()  # frees its memory for the next row
    if failed:
        raise UserError(
            f"{failed} of {len(subjects)} rows failed; with --out a second run tries only these."
        )
