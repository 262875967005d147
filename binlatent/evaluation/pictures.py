"""Draws the pictures of a run, as uint8 arrays (height, width, channels)."""

import ast
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from binlatent.data import masks
from binlatent.data.images import read_image
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation.report import test_images
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors.prior import has, optional
from binlatent.runtime import png
from binlatent.runtime.errors import UserError
from binlatent.runtime.files import atomic
from binlatent.runtime.keys import key_for


def class_rows(num_classes: int, columns: int = 10) -> tuple[int, np.ndarray | None]:
    """Returns the number and the labels of samples for a row per class, ten classes at most."""
    if not num_classes:
        return 10 * columns, None
    classes = np.unique(np.linspace(0, num_classes - 1, 10).round().astype(np.int32))
    return len(classes) * columns, np.repeat(classes, columns)


def as_rows(images: np.ndarray, columns: int = 10) -> list[np.ndarray]:
    """Cuts images, float in [-1, 1], into uint8 rows of `columns`; black fills the last row."""
    images = to_uint8(images)
    columns = min(columns, len(images))
    images = np.pad(images, ((0, -len(images) % columns), (0, 0), (0, 0), (0, 0)))
    return list(images.reshape(-1, columns, *images.shape[1:]))


def samples(
    pipeline: BinaryLatentDiffusion,
    key: jax.Array,
    num: int | None = None,
    label: Any = None,
    prompts: Sequence[str] = (),
    **options: Any,
) -> np.ndarray:
    """Draws samples.

    Without `num`, a row of ten for each class (at most ten classes). With `num`, that number of
    images, of the classes in turn. With a label, all have that label. With prompts, a row of
    `num` images, or eight, for each. The names of classes and the prompts are next to their rows.
    A single image has neither name nor frame.
    """
    if prompts:
        columns = 8 if num is None else num
        every = [prompt for prompt in prompts for _ in range(columns)]
        drawn = pipeline.sample(len(every), key, label, prompt=every, **options)
        names = {"captions": prompts}
    else:
        columns, (all_classes, labels) = 10, class_rows(pipeline.num_classes)
        if label is not None:
            labels = label
        elif num is not None and pipeline.num_classes:
            labels = np.arange(num) % pipeline.num_classes
        num = all_classes if num is None else num
        drawn = pipeline.sample(num, key, labels, **options)
        names = _names_of_rows(pipeline, labels, num, columns)
    rows = as_rows(drawn, columns)
    return rows[0][0] if len(drawn) == 1 else png.grid(rows, **names)


def _names_of_rows(
    pipeline: BinaryLatentDiffusion, label: Any, num: int, columns: int
) -> dict[str, list[str] | None]:
    """Returns the classes of rows of images as arguments of `png.grid`; {} without classes.

    They are titles where each row has a single class, and else captions with a name per image.
    """
    if label is None or pipeline.num_classes < 1:  # -1: not yet read from the data
        return {}
    labels, names = pipeline.experiment.prior.conditioning.labels(label, num), pipeline.class_names
    rows = [labels[i : i + columns] for i in range(0, num, columns)]
    if all(np.all(row == row[0]) for row in rows):
        return {"titles": row_titles(pipeline, labels, columns)}
    return {"captions": [", ".join(names[i] for i in row) for row in rows]}


def row_titles(
    pipeline: BinaryLatentDiffusion, labels: np.ndarray | None, columns: int = 10
) -> list[str] | None:
    """Returns titles of rows, such as "3 cat", from the labels of their images; None for None."""
    if labels is None:
        return None
    named = [(str(label), pipeline.class_names[label]) for label in labels[::columns]]
    return [name if name == number else f"{number} {name}" for number, name in named]


def reconstructions(
    pipeline: BinaryLatentDiffusion, images: np.ndarray, labels: np.ndarray | None = None
) -> np.ndarray:
    """Draws images above their reconstructions, ten per row, with the classes of `labels`."""
    pairs = zip(as_rows(images), as_rows(pipeline.reconstruct(images)), strict=True)
    rows = [row for pair in pairs for row in pair]
    names = _names_of_rows(pipeline, labels, len(images), columns=10)
    texts = names.get("captions") or names.get("titles")
    captions = texts and [text for name in texts for text in (name, "reconstructions")]
    return png.grid(rows, captions=captions)


def inpaintings(
    pipeline: BinaryLatentDiffusion,
    images: np.ndarray,
    keep: np.ndarray,
    label: Any,
    key: jax.Array,
    num: int = 6,
    **options: Any,
) -> np.ndarray:
    """Draws a row for each image: the image, its known part, and `num` completions.

    The images are float in [-1, 1]; `keep`, bool (n, height, width), is True for known pixels.
    """
    keys = [jax.random.fold_in(key, i) for i in range(num)]
    completions = [pipeline.inpaint(images, keep, k, label, **options) for k in keys]
    given = np.where(keep[..., None], images, 0.0)  # grey where hidden
    titles = _names_of_rows(pipeline, label, len(images), columns=1)
    return _columns(images, given, *completions, **titles)


def variations(
    pipeline: BinaryLatentDiffusion,
    images: np.ndarray,
    label: Any,
    key: jax.Array,
    num: int = 6,
    **options: Any,
) -> np.ndarray:
    """Draws a row for each image, float in [-1, 1]: the image and `num` variations of it."""
    keys = [jax.random.fold_in(key, i) for i in range(num)]
    titles = _names_of_rows(pipeline, label, len(images), columns=1)
    return _columns(images, *(pipeline.vary(images, k, label, **options) for k in keys), **titles)


def _columns(*columns: np.ndarray, titles: Sequence[str] | None = None) -> np.ndarray:
    return png.grid(list(np.stack([to_uint8(column) for column in columns], axis=1)), titles)


def trajectory(pipeline: BinaryLatentDiffusion, key: jax.Array, columns: int = 9) -> np.ndarray:
    """Draws a row for each sample: z_t decoded at several times, from noise to sample."""
    num, labels = class_rows(pipeline.num_classes, columns=1)
    states = pipeline.trajectory(num, key, labels).z_t
    shown = np.unique(np.linspace(0, states.shape[1] - 1, columns).round().astype(int))
    rows = [to_uint8(pipeline.decode(row[shown])) for row in states]
    return png.grid(rows, row_titles(pipeline, labels, columns=1))


class Request(NamedTuple):
    """The flags of `binlatent.main` that describe a picture."""

    options: dict[str, Any]  # of the sampler; replace `config.sample`
    num: int | None = None  # of images, or results per prompt or image; None for the default
    seed: int = 0
    label: str | int | None = None  # class of all images, by name or number
    prompt: Sequence[str] = ()  # texts, in place of a label
    prompts: str | None = None  # path of a file with one prompt per line
    negative_prompt: str | None = None  # text that guidance leads away from
    features: str | None = None  # path of a .npy file with the features of a text
    image: str | None = None  # path of an image file; None for test images
    mask: str | None = None  # a preset or a path; None for all presets in turn
    strength: float = 0.5  # of variations


def parse_options(options: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns sampling options from NAME=VALUE and from flags; a flag, if given, wins."""
    values = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--option={option} must have the form --option=NAME=VALUE.")
        try:
            values[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            values[name] = value  # a word
    return values | {name: value for name, value in flags.items() if value is not None}


_PROMPTS = "prompts.txt"  # in a workdir: the prompts of `--mode=sample` if none are given


def write_prompts(workdir: Path, prompts: Sequence[str]) -> None:
    """Writes prompts into a workdir, one per line; they are used if a user gives none."""
    lines = [" ".join(prompt.split()) for prompt in prompts]
    with atomic(workdir / _PROMPTS) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines if line), "utf-8")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path} of prompts: check --prompts.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8: it must have one prompt per line."
        ) from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} has no prompts: it must have one per line.")
    return prompts


def _samples(pipeline: BinaryLatentDiffusion, asked: Request) -> np.ndarray:
    key, label, prompts = key_for(asked.seed, "sample"), _label(asked), _prompts(asked)
    default = pipeline.workdir and pipeline.workdir / _PROMPTS
    if label is None and not prompts and default and default.exists():
        prompts = _read_prompts(default)
    return samples(pipeline, key, asked.num, label, prompts, **_options(asked))


def _prompts(asked: Request) -> list[str]:
    """Returns the prompts of --prompt and of the file of --prompts."""
    return [*asked.prompt, *(_read_prompts(Path(asked.prompts)) if asked.prompts else ())]


def _options(asked: Request, prompt: bool = False) -> dict[str, Any]:
    """Returns options of the pipeline's methods: sampling options and prompts."""
    options = dict(asked.options)
    if asked.negative_prompt is not None:
        options["negative_prompt"] = asked.negative_prompt
    if prompt and (prompts := _prompts(asked)):
        if len(prompts) > 1:
            raise UserError(f"Give one prompt for all images, not {len(prompts)}.")
        options["prompt"] = prompts[0]
    return options


def _trajectory(pipeline: BinaryLatentDiffusion, asked: Request) -> np.ndarray:
    return trajectory(pipeline, key_for(asked.seed, "trajectory"))


def _reconstructions(pipeline: BinaryLatentDiffusion, asked: Request) -> np.ndarray:
    own = asked._replace(label=None, features=None)  # the images' classes, not a wanted one
    return reconstructions(pipeline, *_subjects(pipeline, own, asked.num or 20))


def _inpaintings(pipeline: BinaryLatentDiffusion, asked: Request) -> np.ndarray:
    images, label = _subjects(pipeline, asked, len(masks.PRESETS) if asked.mask is None else 8)
    keep, key = _masks(pipeline, asked, len(images)), key_for(asked.seed, "inpaint")
    return inpaintings(
        pipeline, images, keep, label, key, asked.num or 6, **_options(asked, prompt=True)
    )


def _variations(pipeline: BinaryLatentDiffusion, asked: Request) -> np.ndarray:
    optional(pipeline.experiment.prior.prior, "vary")  # refuses a prior without it
    images, label = _subjects(pipeline, asked, 8)
    key, options = key_for(asked.seed, "vary"), _options(asked, prompt=True)
    options = {"strength": asked.strength, **options}
    return variations(pipeline, images, label, key, asked.num or 6, **options)


def _label(asked: Request) -> Any:
    """Returns the class or the features of a text that were given; None without either."""
    if asked.features is None:
        return asked.label
    if asked.label is not None:
        raise UserError("Give --label for a class or --features for a text, not both.")
    try:
        return np.load(asked.features, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # its type depends on the damage
        raise UserError(f"{asked.features} is not a .npy file of numbers: {error}") from error


def _subjects(pipeline: BinaryLatentDiffusion, asked: Request, num: int) -> tuple[np.ndarray, Any]:
    """Returns the images of a picture and their labels: the user's own image, or test images."""
    if asked.image:
        data = pipeline.experiment.data
        image = read_image(asked.image, data.image_size, data.channels)
        return to_float(image[None]), _label(asked)
    images, labels = test_images(pipeline, num)
    label = _label(asked)
    return images, labels if label is None and not _prompts(asked) else label


def _presets(pipeline: BinaryLatentDiffusion) -> list[str]:
    """Returns the preset masks that the prior can inpaint."""
    height, width, _ = pipeline.experiment.data.image_shape
    names = []
    for name in masks.PRESETS:
        with contextlib.suppress(UserError):
            pipeline.known_bits(masks.preset(name, height, width)[None])
            names.append(name)
    return names


def _masks(pipeline: BinaryLatentDiffusion, asked: Request, num: int) -> np.ndarray:
    """Returns the pixels to keep of `num` images, bool (num, height, width)."""
    height, width, _ = pipeline.experiment.data.image_shape
    if asked.image and asked.mask is None:
        raise UserError(f"--image needs --mask: a file, or one of {', '.join(masks.PRESETS)}.")
    name = asked.mask and masks.preset_name(asked.mask)
    if name or asked.mask is None:
        names = [name] if name else _presets(pipeline)
        turns = [(names[i % len(names)], asked.seed + i) for i in range(num)]
        return np.stack([masks.preset(name, height, width, seed) for name, seed in turns])
    if not asked.image:
        raise UserError(
            f"--mask={asked.mask} is not one of {', '.join(masks.PRESETS)}; a mask file needs "
            "--image."
        )
    if not os.path.exists(asked.mask):
        raise UserError(
            f"--mask={asked.mask} is neither a file nor one of {', '.join(masks.PRESETS)}."
        )
    return masks.read_mask(asked.mask, asked.image, height)[None]


# By mode: the name of the picture, without its ending, and the function that draws it.
PICTURES = {
    "sample": ("samples", _samples),
    "reconstruct": ("reconstructions", _reconstructions),
    "inpaint": ("inpainting", _inpaintings),
    "vary": ("variations", _variations),
    "trajectory": ("trajectory", _trajectory),
}


def of_all(pipeline: BinaryLatentDiffusion) -> list[str]:
    """Returns which of `PICTURES` a run draws at its end; some priors have no trajectory."""
    shows_its_way = has(pipeline.experiment.prior.prior, "trajectory")
    return ["sample", "reconstruct", "inpaint"] + ["trajectory"] * shows_its_way
