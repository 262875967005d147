"""Table 4 of the paper: what a format of the code is worth in reconstruction, at equal budget.

`python -m binlatent.main --mode=table4 --config=... --workdir=DIR` trains the config's autoencoder
with each bottleneck, in folders of DIR; what is trained already is not trained again.
"""

import copy
import json
import logging
import math
from pathlib import Path

import jax
import ml_collections

from binlatent import build, checks
from binlatent.evaluation import report
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint, loop

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict


def variants(config: Config) -> dict[str, Config]:
    """Returns a config for each row of the table, by the name of its folder.

    Beside the three bottlenecks of the paper there is `binary_as_vq`, with as many bits as an index
    of the codebook, which makes a comparison at equal bits.
    """
    num_bits = max(round(math.log2(config.autoencoder.codebook_size)), 1)
    overrides = {
        "vq": {"bottleneck": "vq"},
        "binary_as_vq": {"bottleneck": "binary", "num_bits": num_bits},
        "binary": {"bottleneck": "binary"},
        "real": {"bottleneck": "real"},
    }
    if config.autoencoder.num_bits == num_bits:
        del overrides["binary_as_vq"]  # it would be the same
    rows = {}
    for name, values in overrides.items():
        rows[name] = copy.deepcopy(config)
        rows[name].autoencoder.update(values)
    return rows


def size(config: Config) -> str:
    """Returns h x w x codebook size, bits or channels, as the paper writes it."""
    section = config.autoencoder
    depth = {
        "vq": section.codebook_size,
        "binary": section.num_bits,
        "real": section.num_channels,
    }
    h, w, _ = build.code_shape(config)
    return f"{h}×{w}×{depth[section.bottleneck]}"


def with_spread(metrics: dict[str, float], name: str, digits: int) -> str:
    """Returns a mean ± its standard deviation, as the paper writes it, or "-" if there is none."""
    if name not in metrics:
        return "-"
    return f"{metrics[name]:.{digits}f} ± {metrics[f'{name}_std']:.{digits}f}"


NAMES = {"vq": "VQ", "binary_as_vq": "Binary", "binary": "Binary", "real": "Real value"}


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


def table(config: Config, results: dict[str, dict[str, float]]) -> str:
    """Returns the table in Markdown, from the rows' metrics by name."""
    lines = ["| method | size | bits an image | PSNR | SSIM | use of the code |", "|" + "---|" * 6]
    for name, metrics in results.items():
        row = variants(config)[name]
        lines.append(
            f"| {NAMES[name]} | {size(row)} | {metrics['bit_rate']:,.0f} "
            f"| {with_spread(metrics, 'psnr', 2)} | {with_spread(metrics, 'ssim', 3)} "
            f"| {_use(metrics)} |"
        )
    return "\n".join(lines) + "\n"


def _check_budget(row: Config, workdir: Path) -> None:
    """Refuses a folder whose autoencoder was trained in another way than the others will be.

    Raises:
      UserError: naming the first key that differs.
    """
    if not checkpoint.exists(workdir, "autoencoder"):
        return
    with checkpoint.Checkpoints.open(workdir, "autoencoder") as checkpoints:
        trained = checkpoints.newest(checkpoint.Checkpoints.config)
    for section in ("data", "autoencoder"):
        here, there = (json.loads(x[section].to_json()) for x in (row, trained))
        here.pop("num_classes", None)  # filled in by training, and nothing to an autoencoder
        for key, value in here.items():
            if value != there.get(key):
                raise UserError(
                    f"The autoencoder in {workdir} was trained with config.{section}.{key} = "
                    f"{there.get(key)}, not {value}, so the rows would not be comparable: "
                    "use the same config, or another --workdir."
                )


def run(config: Config, workdir: Path) -> str:
    """Trains what is not trained yet, writes `table4.json` and `table4.md`, returns the table.

    PSNR and SSIM are mean ± standard deviation over `config.evaluate.num_images` test images, in
    uint8, of the averaged weights.

    Raises:
      UserError: as of `loop.train_autoencoder`, and if a row was trained by another config.
    """
    rows = variants(config)
    for name, row in rows.items():  # all, before any training
        checks.check(row)
        _check_budget(row, workdir / name)
    results = {}
    images, _ = report.test_images(config, config.evaluate.num_images)
    for name, row in rows.items():
        log.info("Table 4: %s", name)
        loop.train_autoencoder(row, workdir / name)
        pipeline = BinaryLatentDiffusion.from_workdir(workdir / name, prior=False)
        results[name] = report.autoencoder_metrics(pipeline, images)
    text = table(config, results)
    if jax.process_index() == 0:
        (workdir / "table4.json").write_text(json.dumps(results, indent=2) + "\n")
        (workdir / "table4.md").write_text(text)
    return text
