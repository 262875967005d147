"""The floors of a Frechet distance: the distances of real images and of reconstructions.

They are measured in the features of the same network as the distance of samples. The distance of
real images is that of finite sets from one distribution. The distance of reconstructions is the
cost of the autoencoder, whatever the prior.
"""

from pathlib import Path

from binlatent.evaluation.metrics.feature_metrics import Gaussian, frechet_distance
from binlatent.evaluation.networks.features import Network
from binlatent.evaluation.reconstructions import ends, features_of_reconstructions
from binlatent.evaluation.reference import features_of_split
from binlatent.pipeline import BinaryLatentDiffusion


def floors(
    pipeline: BinaryLatentDiffusion,
    network: Network,
    workdir: Path,
    known: Gaussian,
    split: str,
    num: int,
) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the Frechet distances to compare that of samples with, and their numbers of images.

    The features are kept in the folder `evaluation` of the workdir, so a second call is fast.

    Args:
      pipeline: with the autoencoder.
      network: whose features are compared.
      workdir: of the pipeline.
      known: the Gaussian that samples are compared with.
      split: of the images of `known`, "train" or "test".
      num: the number of samples; at most as many real images and reconstructions are used.

    Returns:
      `real`: between images of the other split and `known`. `reconstructions`: between test images
      and their reconstructions, from codes drawn as for the prior's training if the bottleneck
      draws bits. A distance is left out if it has fewer than two images.
    """
    experiment, found, counts = pipeline.experiment, {}, {}
    other = {"train": "test", "test": "train"}[split]
    real, _ = features_of_split(experiment, network, workdir, other, num)
    if real.count > 1:
        found["real"], counts["real"] = frechet_distance(known, real.gaussians["pool"]), real.count
    test = real
    if other != "test":
        test, _ = features_of_split(experiment, network, workdir, "test", num)
    if test.count > 1:
        codes = ends(experiment)[-1]
        rebuilt = features_of_reconstructions(pipeline, network, workdir, codes, num)
        gaussians = (x.gaussians["pool"] for x in (test, rebuilt))
        found["reconstructions"] = frechet_distance(*gaussians)
        counts["reconstructions"] = test.count
    return found, counts


def in_words(distances: dict[str, float]) -> str:
    """Returns the floors as a sentence below a table, after a space; "" if there are none."""
    of = {
        "real": "{:.3g} for real images of the other split",
        "reconstructions": "{:.3g} for test images and their reconstructions",
    }
    shown = [of[name].format(value) for name, value in distances.items()]
    return f" Frechet distances to compare with: {'; '.join(shown)}." if shown else ""
