"""Table 4 of the paper: what a format of the code is worth in reconstruction, at equal budget.

`python -m binlatent.main --mode=table4 --config=... --workdir=DIR` trains the config's autoencoder
with each bottleneck, in folders of DIR; what is trained already is not trained again.
"""

import json
import logging
import math
from pathlib import Path

import jax

from binlatent import stages
from binlatent.evaluation import report
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints, exists

log = logging.getLogger(__name__)


def variants(experiment: Experiment) -> dict[str, Experiment]:
    """Returns an experiment for each row of the table, by the name of its folder.

    Beside the three bottlenecks of the paper there is `binary_as_vq`, with as many bits as an index
    of the codebook, which makes a comparison at equal bits.
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
        del changes["binary_as_vq"]  # it would be the same
    return {name: experiment.change(values) for name, values in changes.items()}


def size(experiment: Experiment) -> str:
    """Returns h x w x codebook size, bits or channels, as the paper writes it."""
    h, w, _ = experiment.autoencoder.code_shape
    return f"{h}×{w}×{experiment.autoencoder.bottleneck.size}"


def with_spread(metrics: dict[str, float], name: str, digits: int) -> str:
    """Returns a mean ± its standard deviation, as the paper writes it, or "-" if there is none."""
    if name not in metrics:
        return "-"
    return f"{metrics[name]:.{digits}f} ± {metrics[f'{name}_std']:.{digits}f}"


def _use(metrics: dict[str, float]) -> str:
    """Returns how much of its code a bottleneck uses, in words."""
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


def table(experiment: Experiment, results: dict[str, dict[str, float]]) -> str:
    """Returns the table in Markdown, from the rows' metrics by name."""
    rows = variants(experiment)
    lines = ["| method | size | bits an image | PSNR | SSIM | use of the code |", "|" + "---|" * 6]
    for name, metrics in results.items():
        lines.append(
            f"| {rows[name].autoencoder.bottleneck.title} | {size(rows[name])} "
            f"| {metrics['bit_rate']:,.0f} "
            f"| {with_spread(metrics, 'psnr', 2)} | {with_spread(metrics, 'ssim', 3)} "
            f"| {_use(metrics)} |"
        )
    return "\n".join(lines) + "\n"


def _check_budget(row: Experiment, workdir: Path) -> None:
    """Refuses a folder whose autoencoder was trained in another way than the others will be."""
    if not exists(workdir, "autoencoder"):
        return
    with Checkpoints.open(workdir, "autoencoder") as checkpoints:
        trained = checkpoints.newest(Checkpoints.meta)["config"]
    for section in ("data", "autoencoder"):
        # As JSON, as the checkpoint has it.
        for key, value in json.loads(json.dumps(row.content[section])).items():
            before = trained[section].get(key)
            # The classes are filled in by training, and nothing to an autoencoder.
            if value != before and key != "num_classes":
                raise UserError(
                    f"The autoencoder in {workdir} was trained with config.{section}.{key} = "
                    f"{before}, not {value}, so the rows would not be comparable: "
                    "use the same config, or another --workdir."
                )


def run(experiment: Experiment, workdir: Path) -> str:
    """Trains what is not trained yet, writes `table4.json` and `table4.md`, returns the table.

    PSNR and SSIM are mean ± standard deviation over `evaluate.num_images` test images, in uint8,
    of the averaged weights.
    """
    rows = variants(experiment)
    for name, row in rows.items():  # all, before any training
        _check_budget(row, workdir / name)
    results = {}
    images, _ = report.test_images(experiment, experiment.evaluate.num_images)
    for name, row in rows.items():
        log.info("Table 4: %s", name)
        stages.train_autoencoder(row, workdir / name)
        pipeline = BinaryLatentDiffusion.from_workdir(workdir / name, prior=False)
        results[name] = report.autoencoder_metrics(pipeline, images)
    text = table(experiment, results)
    if jax.process_index() == 0:
        (workdir / "table4.json").write_text(json.dumps(results, indent=2) + "\n")
        (workdir / "table4.md").write_text(text)
    log.info("%s", text)
    return text
