"""Compares two sets of images. No model or workdir is needed.

python -m binlatent.evaluation --reference REAL --images GENERATED --metrics fid,kid,is,pr,dc

Each set is one of:
  a folder of images
  an .npz file of images in the format of ADM's evaluator (arr_0)
  an .npz file of statistics (mu, sigma), as pytorch-fid, ADM and this command write them
  a .pt file of torch-fidelity's cache
psnr, ssim and lpips compare the images of two sets in pairs, in sorted order.
"""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import argparse
import logging
from pathlib import Path
from typing import Any

from binlatent.evaluation import comparison, exchange, results
from binlatent.evaluation.metrics import pairs
from binlatent.evaluation.networks import features
from binlatent.runtime import command, strict_json
from binlatent.runtime.errors import UserError
from binlatent.training import logbook

log = logging.getLogger("binlatent.evaluation")  # also as __main__

_METRICS = comparison.METRICS | pairs.METRICS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "binlatent.evaluation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flag, path = parser.add_argument, command.path_argument
    flag("--reference", type=path, metavar="PATH", help="the real images, or their statistics")
    flag("--images", type=path, metavar="PATH", help="the images to judge")
    default = "default: %(default)s"
    flag("--metrics", default="fid,kid,is,pr,dc", help=f"any of {','.join(_METRICS)}; {default}")
    flag(
        "--network",
        choices=features.WIDTHS,
        help="default: inception, or the network of the statistics",
    )
    flag("--weights", type=path, help="weights of the network, .npz; default: NETWORK.npz")
    flag("--vgg16", type=path, default=Path("vgg16.npz"), help=f"weights for lpips; {default}")
    flag("--size", type=int, help="crop and resize the images of folders to squares of this side")
    about = "largest share of unreadable images in a folder; not for psnr, ssim, lpips"
    flag("--max_broken", type=float, default=0.0, help=f"{about}; {default}")
    flag("--batch_size", type=int, default=64, help=f"affects speed and memory only; {default}")
    flag("--out", type=path, metavar="FILE", help=".json file for the metrics and their protocol")
    flag(
        "--tensorboard",
        type=path,
        metavar="DIR",
        help="folder for the metrics as TensorBoard events",
    )
    flag(
        "--write_statistics",
        type=path,
        metavar="FILE",
        help="write the statistics of the reference to an .npz file, for use as --reference, or to "
        "a .pt file for torch-fidelity",
    )
    return parser


def _feature_metrics(
    names: list[str], flags: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics of features and their protocol; writes --write_statistics if given."""
    if flags.images is not None and flags.reference is None:
        comparison.check_reference(None, names)
    both = {"reference": flags.reference, "images": flags.images}
    given = {name: path for name, path in both.items() if path is not None}
    for path in given.values():
        if not path.exists():
            raise UserError(f"There is no folder or .npz file {str(path)!r}.")
    network = None
    if any(exchange.holds_images(x) or not exchange.holds_statistics(x) for x in given.values()):
        name = flags.network or "inception"
        network = features.published(name, flags.weights or "", "--weights=FILE")
        comparison.check_network(network.name, names, network.logits)
    found, protocol = {}, {}
    for name, path in given.items():
        how = network, flags.batch_size, flags.size
        tolerance = {"max_broken": flags.max_broken}
        found[name], protocol[name] = comparison.load_features(path, *how, **tolerance)
        if name == "reference" and "images" in given:  # refuses it before the images are read
            comparison.check_reference(found[name], names)
    sizes = {x["size"] for x in protocol.values() if "size" in x}
    name, protocol["network"] = _network(network, protocol, found, flags.network)
    if flags.write_statistics:
        described = {**protocol["reference"], "network": protocol["network"]}
        exchange.write_statistics(flags.write_statistics, found["reference"], described)
        log.info("Wrote %s", flags.write_statistics)
    if "images" not in found:
        return {}, protocol
    if len(sizes) > 1:
        log.warning("The two sets have images of different sizes, %s.", " and ".join(sizes))
    sets = found.get("reference"), found["images"]
    values, protocol["metrics"] = comparison.compare(*sets, names, features.SUFFIXES[name])
    return values, protocol


def _network(
    network: features.Network | None,
    protocol: dict[str, Any],
    found: dict[str, features.Features],
    asked: str | None,
) -> tuple[str, Any]:
    """Removes the network from the protocols; returns its name and its description."""
    known = [x.pop("network") for x in protocol.values() if "network" in x]
    known += [network.protocol] if network is not None else []
    if any(x != known[0] for x in known):
        raise UserError(
            f"The two statistics come from different networks or weights, {known[0]} and "
            f"{known[1]}: make both with the same network."
        )
    name = known[0].get("name") if known else asked or "inception"
    if name not in features.SUFFIXES or (asked and asked != name):
        raise UserError(f"The statistics come from the network {name!r}: leave --network out.")
    for width in (x.gaussians["pool"].mean.size for x in found.values()):
        if width != features.WIDTHS.get(name, width):
            raise UserError(
                f"The statistics have {width} features, but the network {name} has "
                f"{features.WIDTHS[name]}: give the network of the statistics with --network."
            )
    return name, known[0] if known else f"{name} (assumed: the file of statistics does not name it)"


def _pair_metrics(
    names: list[str], flags: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    if flags.reference is None or flags.images is None:
        raise UserError(f"{', '.join(names)} compare pairs: give --reference and --images.")
    x, y = (exchange.open_set(path, flags.size) for path in (flags.reference, flags.images))
    if x.count != y.count or x.protocol["size"] != y.protocol["size"]:
        raise UserError(
            f"{', '.join(names)} compare pairs, but there are {x.count} images of "
            f"{x.protocol['size']} in {flags.reference} and {y.count} of {y.protocol['size']} in "
            f"{flags.images}."
        )
    if x.names and y.names and x.names != y.names:
        pair = next(pair for pair in zip(x.names, y.names, strict=True) if pair[0] != pair[1])
        log.warning("Pairs are formed in sorted order: for example, %s is compared with %s.", *pair)
    both = zip(x.batches(flags.batch_size), y.batches(flags.batch_size), strict=True)
    instead = "give the file with --vgg16=FILE, or leave out the metric lpips"
    how = {"vgg16": flags.vgg16, "instead": instead, "batch_size": flags.batch_size}
    values, settings = pairs.pair_metrics(both, names, **how)
    protocol = {"reference": x.protocol, "images": y.protocol, "pairs": "in sorted order"}
    return values, protocol | settings


def main(argv: list[str] | None = None) -> None:
    """Runs the command; an error that the user caused prints one line, and the exit code is 1."""
    parser = _parser()
    flags = parser.parse_args(argv)
    if flags.images is None and flags.write_statistics is None:
        parser.error("give --images, or --reference and --write_statistics")
    if flags.write_statistics is not None and flags.reference is None:
        parser.error("--write_statistics needs --reference")
    if flags.batch_size < 1 or (flags.size is not None and flags.size < 1):
        parser.error("--batch_size and --size must be at least 1")
    if not 0 <= flags.max_broken <= 1:
        parser.error("--max_broken must be between 0 and 1")
    command.prepare_jax()
    with command.reporting():
        names = [name.strip() for name in flags.metrics.split(",") if name.strip()]
        comparison.check_metrics(names, _METRICS)
        for path, suffixes in ((flags.out, (".json",)), (flags.write_statistics, (".npz", ".pt"))):
            if path is not None and path.suffix not in suffixes:
                raise UserError(f"{str(path)!r} must end in {' or '.join(suffixes)}.")
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)  # before the work, in case it fails
        of_pairs = [name for name in names if name in pairs.METRICS]
        of_features = [name for name in names if name not in of_pairs]
        values, protocol = {}, {}
        if of_features or flags.images is None:
            values, protocol = _feature_metrics(of_features, flags)
        if of_pairs and flags.images is not None:
            more, by = _pair_metrics(of_pairs, flags)
            values, protocol = values | more, by | protocol
        if not values:
            return
        protocol |= {"quantised": "uint8", **results.machine()}
        print(f"{results.table(values, _METRICS)}\n\n{results.describe(protocol)}")
        if flags.out:
            strict_json.write_json(flags.out, {"metrics": values, "protocol": protocol})
        if flags.tensorboard:
            logbook.write_scalars(flags.tensorboard, values)


if __name__ == "__main__":
    main()
