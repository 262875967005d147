"""The floors of a Frechet distance: what real images and reconstructions have.

A distance of samples is read beside two others, in the features of the same network. That of real
images is what finite sets of images have even if both are of one distribution. That of
reconstructions is what the autoencoder costs, whatever the prior.
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
) -> dict[str, float]:
    """Returns the Frechet distances beside which one of samples is read.

    The features are kept in the folder `evaluation` of the workdir, so that a second call is fast.

    Args:
      pipeline: with the autoencoder.
      network: that judges the samples.
      workdir: of the pipeline.
      known: of the features that samples are compared with.
      split: of these, "train" or "test".
      num: of samples; of real images and reconstructions so many too, if there are.

    Returns:
      `real`: between images of the other split and the `known` ones. `reconstructions`: between
      test images and their reconstructions, of codes that are drawn as those that the prior learns,
      if the bottleneck draws any. Each if it is of two images or more.
    """
    experiment, found = pipeline.experiment, {}
    other = {"train": "test", "test": "train"}[split]
    real, _ = features_of_split(experiment, network, workdir, other, num)
    if real.count > 1:
        found["real"] = frechet_distance(known, real.gaussians["pool"])
    test = real
    if other != "test":
        test, _ = features_of_split(experiment, network, workdir, "test", num)
    if test.count > 1:
        codes = ends(experiment)[-1]
        rebuilt = features_of_reconstructions(pipeline, network, workdir, codes, num)
        gaussians = (x.gaussians["pool"] for x in (test, rebuilt))
        found["reconstructions"] = frechet_distance(*gaussians)
    return found


def in_words(distances: dict[str, float]) -> str:
    """Returns the floors as a sentence for below a table, with a space before; "" without any."""
    of = {
        "real": "real images of the other split, in place of samples, {:.3g}",
        "reconstructions": "test images and their reconstructions {:.3g}",
    }
    shown = [of[name].format(value) for name, value in distances.items()]
    return f" Frechet distances to compare with: {'; '.join(shown)}." if shown else ""
