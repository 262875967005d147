"""The metric `retrieval`: compares images drawn from captions with the images of the captions."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from binlatent.data.sources import Source
from binlatent.data.splits import open_split
from binlatent.evaluation.metrics.retrieval_metrics import SEED, Choice, retrieval
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.networks import features
from binlatent.evaluation.networks.features import Network
from binlatent.evaluation.reference import features_of_split
from binlatent.evaluation.report import HeldOut
from binlatent.evaluation.samples import Samples
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError
from binlatent.runtime.weights import digest

log = logging.getLogger(__name__)

_SPLITS = {"train": "training", "test": "held-out"}
_DRAWN = {"": "samples", "_reconstructions": "reconstructions", "_shuffled": "shuffled captions"}


class _Captioned(NamedTuple):
    """The images of a split that have captions and kept features."""

    split: str
    source: Source
    rows: np.ndarray  # of the features that are kept
    indices: np.ndarray  # in the source
    captions: list[tuple[str, ...]]
    choice: Choice

    @classmethod
    def open(cls, experiment: Experiment, split: str, workdir: Path, num: int) -> "_Captioned":
        source = open_split(experiment.data, split, workdir, keep=False)
        captions = source.captions() if source.captions else [()] * len(source.examples)
        kept = features.kept(len(captions))
        rows = np.array([row for row, i in enumerate(kept) if captions[i]], int)
        if not len(rows):
            raise UserError(
                f"The metric retrieval needs captions, and no image of the split {split!r} has one."
            )
        captions = [captions[i] for i in kept[rows]]
        return cls(split, source, rows, kept[rows], captions, Choice.of(captions, num, split))

    @property
    def prompts(self) -> list[str]:
        return [self.captions[i][0] for i in self.choice.own]

    @property
    def images(self) -> np.ndarray:
        """Of the prompts, uint8 (n, h, w, c)."""
        indices = self.indices[self.choice.own]
        return np.stack([self.source.examples[int(i)]["image"] for i in indices])


def check(experiment: Experiment) -> None:
    """Refuses a prior without prompts."""
    if not experiment.prior.conditioning.of_texts or not experiment.texts.encoder:
        raise UserError(
            "The metric retrieval draws images from captions, and this prior takes no prompts: "
            "leave it out, or train a prior with config.texts.encoder."
        )


def measure(
    pipeline: BinaryLatentDiffusion, judge: Network, workdir: Path, **drawing: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Draws an image from each of `num` captions per split, and ranks real images by similarity.

    Args:
      pipeline: with a prior of prompts.
      judge: whose features are compared.
      workdir: samples and features are kept in its folder `evaluation`.
      **drawing: `num`, reduced to the number of images with captions, and `seed`, `keep` and
        `options` of `Samples`.

    Returns:
      Shares in [0, 1] by the names in `METRIC`, and the protocol; {} in all processes but the
      first.
    """
    experiment, folder = pipeline.experiment, workdir / "evaluation"
    num = drawing.pop("num")
    splits = [_Captioned.open(experiment, split, workdir, num) for split in _SPLITS]
    values, protocol = {}, {}
    for x in splits:
        samples = _samples(pipeline, judge, folder, x, drawing)
        if jax.process_index():
            continue
        if drawing["keep"] == "npz":
            log.info("Wrote %s", samples.write_batch())
        known, images = features_of_split(experiment, judge, workdir, x.split)
        real, drawn = known.pool[x.rows], samples.features().pool
        parts = HeldOut(pipeline, x.images).reconstructions()
        batch_size = experiment.sample.batch_size
        rebuilt = [judge.apply(part, batch_size)["pool"] for _, part in parts]
        of_kinds = drawn, np.concatenate(rebuilt), drawn[x.choice.shuffled]
        for kind, compared in zip(_DRAWN, of_kinds, strict=True):
            shares = retrieval(real, compared, x.choice.candidates)
            values |= dict(zip(_names(x.split, kind), shares, strict=True))
        n, c = x.choice.candidates.shape
        protocol |= {f"{x.split}_captions": n, f"{x.split}_candidates": c}
        protocol[f"{x.split}_images"] = images["pixels"]
        protocol[f"{x.split}_labels"] = samples.protocol["labels"]
        protocol |= {k: v for k, v in samples.protocol.items() if k not in ("labels", "count")}
    if protocol:
        protocol |= {"distance": "cosine", "choice": f"seed {SEED}"}
    return values, protocol


def _samples(
    pipeline: BinaryLatentDiffusion,
    judge: Network,
    folder: Path,
    x: _Captioned,
    drawing: dict[str, Any],
) -> Samples:
    prompts = x.prompts
    described = (
        f"first captions of images of the split {x.split}, in the order of seed {SEED}, "
        f"{digest(x.captions)}"
    )

    def of_indices(indices: np.ndarray) -> np.ndarray:
        return pipeline.text_features([prompts[i] for i in indices])

    labels = described, of_indices
    return Samples(pipeline, judge, folder, len(prompts), labels=labels, **drawing)


def _names(split: str, kind: str) -> tuple[str, str]:
    return f"retrieval_{split}_top1{kind}", f"retrieval_{split}_top5{kind}"


def _titles() -> dict[str, str]:
    titles = {}
    for split, split_title in _SPLITS.items():
        for kind, kind_title in _DRAWN.items():
            for name, top in zip(_names(split, kind), (1, 5), strict=True):
                titles[name] = f"retrieval top-{top}, {split_title}, {kind_title}"
    return titles


METRIC = Metric(measure, _titles(), needs=("captions", "prior"))
