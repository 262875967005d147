"""Table 4 of the paper: reconstruction with each kind of bottleneck.

`python -m binlatent.main --mode=table4 --config=... --workdir=DIR` trains the config's autoencoder
with each bottleneck and an equal budget, in folders of DIR; trained autoencoders are kept.
`python -m binlatent.paper table4 --workdir=DIR` writes the row of a workdir's autoencoder.
"""

import logging
import math
from pathlib import Path
from typing import Any

import jax

from binlatent import stages
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float
from binlatent.evaluation import report
from binlatent.experiment import Experiment
from binlatent.paper.runs import check_budget
from binlatent.paper.tables import markdown, no_results, stored_results
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import strict_json
from binlatent.runtime.weights import fingerprint

log = logging.getLogger(__name__)

_TITLES = ("method", "size", "bits per image")


def _bits(experiment: Experiment) -> float:
    h, w, _ = experiment.autoencoder.code_shape
    return h * w * experiment.autoencoder.bottleneck.bits


def _described(experiment: Experiment) -> list[str]:
    """Returns the cells under `_TITLES`; a size is h x w x codebook size, bits or channels."""
    bottleneck, (h, w, _) = experiment.autoencoder.bottleneck, experiment.autoencoder.code_shape
    return [bottleneck.title, f"{h}×{w}×{bottleneck.size}", f"{_bits(experiment):,.0f}"]


def _with_spread(metrics: dict[str, float], name: str, digits: int) -> str:
    """Returns mean ± standard deviation, as in the paper, or "-" if there is none."""
    mean, std = metrics.get(name), metrics.get(f"{name}_std")
    return "-" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def table4_row(pipeline: BinaryLatentDiffusion, workdir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Makes the row of Table 4 for the workdir's autoencoder.

    Args:
      pipeline, workdir: as in `tables.table1`.

    Returns:
      The table in Markdown, and its row: `metrics`, `protocol`, `size`, and `bits` per image.
    """
    metrics = {"psnr", "ssim", "lpips"}
    found = [result for result in stored_results(workdir) if metrics & result["metrics"].keys()]
    current = fingerprint(pipeline.autoencoder_params)
    own = [x for x in found if x["protocol"]["test images"].get("autoencoder") == current]
    if not own:
        raise no_results(workdir, bool(found), "psnr,ssim")
    # The result with the most images, and other results with the same images.
    best = max(own, key=lambda result: result["protocol"]["test images"]["count"])
    count = best["protocol"]["test images"]["count"]
    same = [x["metrics"] for x in own if x["protocol"]["test images"]["count"] == count]
    metrics = dict(pair for one in reversed(same) for pair in one.items())
    described, bits = _described(pipeline.experiment), _bits(pipeline.experiment)
    digits = {"psnr": 2, "ssim": 3, "lpips": 3}
    cells = [f"{count:,}", *(_with_spread(metrics, *pair) for pair in digits.items())]
    text = markdown([*_TITLES, "images", "PSNR", "SSIM", "LPIPS"], [[*described, *cells]])
    return text, [{**best, "metrics": metrics, "size": described[1], "bits": bits}]


# What --mode=table4 trains


def variants(experiment: Experiment) -> dict[str, Experiment]:
    """Returns an experiment for each row of the table, by the name of its folder.

    In addition to the three bottlenecks of the paper there is `binary_as_vq`, with as many bits as
    an index of the codebook, for a comparison at equal bits.
    """
    section = experiment.content["autoencoder"]
    num_bits = max(round(math.log2(section["codebook_size"])), 1)
    changes = {
        "vq": {"autoencoder.bottleneck": "vq"},
        "binary_as_vq": {"autoencoder.bottleneck": "binary", "autoencoder.num_bits": num_bits},
        "binary": {"autoencoder.bottleneck": "binary"},
        "real": {"autoencoder.bottleneck": "real"},
    }
    if section["num_bits"] == num_bits:
        del changes["binary_as_vq"]  # it equals `binary`
    return {name: experiment.change(values) for name, values in changes.items()}


def _use(metrics: dict[str, float]) -> str:
    """Returns a description of how much of its code a bottleneck uses."""
    if "codebook_used" in metrics:
        return (
            f"{metrics['codebook_used']:.0%} of the codebook, "
            f"perplexity {metrics['codebook_perplexity']:.0f}"
        )
    if "dead_bits" in metrics:
        return (
            f"entropy of a bit {metrics['mean_bit_entropy']:.2f}, {metrics['dead_bits']} dead, "
            f"{metrics['duplicate_bits']} duplicate"
        )
    return "float32 counted"


def compare_bottlenecks(experiment: Experiment, workdir: Path) -> str:
    """Trains missing autoencoders, writes `table4.json` and `table4.md`, and returns the table.

    PSNR and SSIM are mean ± standard deviation over `evaluate.num_images` test images, in uint8,
    with the EMA weights.
    """
    with stages.alone_in(workdir):
        return _compare(experiment, workdir)


def _compare(experiment: Experiment, workdir: Path) -> str:
    rows = variants(experiment)
    for name, row in rows.items():  # all, before any training
        check_budget(row, workdir / name, "autoencoder")
    measured, lines = {}, []
    source = open_split(experiment.data, "test")
    images = to_float(load_images(source, experiment.evaluate.num_images)[0])
    for name, row in rows.items():
        log.info("Table 4: %s", name)
        stages.train_autoencoder(row, workdir / name)
        pipeline = BinaryLatentDiffusion.from_workdir(workdir / name, prior=False)
        metrics = measured[name] = report.autoencoder_metrics(pipeline, images)
        cells = [_with_spread(metrics, "psnr", 2), _with_spread(metrics, "ssim", 3), _use(metrics)]
        lines.append([*_described(row), *cells])
    text = markdown([*_TITLES, "PSNR", "SSIM", "use of the code"], lines)
    if jax.process_index() == 0:
        strict_json.write_json(workdir / "table4.json", measured)
        (workdir / "table4.md").write_text(text)
    log.info("%s", text)
    return text
