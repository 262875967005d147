"""Lists the images of a folder, with their classes and their split."""

import dataclasses
import os

from binlatent.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_TEST_NAMES = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split."""

    files: list[str]
    labels: list[int]  # one a file; 0 where there are no classes
    num_classes: int  # 0: unlabelled


def list_images(path: str, split: str) -> Listing:
    """Lists the images below a folder in sorted order.

    Two or more subfolders, with no image beside them, are classes, numbered in sorted order;
    anything else is unlabelled. Subfolders `train/` and `test/` (or `val/`, `validation/`) are the
    splits if there; otherwise every tenth image of each class, from the first on, is a test image.
    Names that start with a dot are skipped.

    Args:
      path: the folder.
      split: "train" or "test".

    Raises:
      UserError: if the folder is missing, has no images, or has nothing left for one of the splits.
    """
    if not path:
        raise UserError("data.name=folder needs the folder of images: --config.data.path=DIR")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path!r}: give --config.data.path=DIR, one of images")
    train = os.path.join(path, "train")
    tests = [os.path.join(path, name) for name in _TEST_NAMES]
    test = next((folder for folder in tests if os.path.isdir(folder)), None)
    if not os.path.isdir(train):
        if test:
            raise UserError(f"there is {test!r} but no {train!r}: add it, or rename the former")
        return _split_listing(path, split)
    if not test:
        return _split_listing(train, split)
    train_images = _find(train)
    classes = _classes(train_images)
    return _listing(train_images if split == "train" else _find(test), classes)


def _find(root: str) -> list[tuple[str, str]]:
    """Returns (name of the first subfolder below root or "", file), sorted by file."""
    found = []
    for directory, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(directory, root)
        top = "" if relative == "." else relative.split(os.sep)[0]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append((top, os.path.join(directory, name)))
    if not found:
        raise UserError(f"there are no images in {root!r} (looked for {', '.join(EXTENSIONS)})")
    return sorted(found, key=lambda image: image[1])


def _classes(images: list[tuple[str, str]]) -> list[str]:
    """Returns the sorted names; none where images lie beside subfolders, or for a single one."""
    names = sorted({top for top, _ in images})
    return names if "" not in names and len(names) > 1 else []


def _split_listing(root: str, split: str) -> Listing:
    images = _find(root)
    classes = _classes(images)
    kept = []
    for name in classes or [None]:
        of_class = [image for image in images if name is None or image[0] == name]
        # A class of one image goes to train.
        is_test = [i % 10 == 0 and len(of_class) > 1 for i in range(len(of_class))]
        wanted = split == "test"
        kept += [image for image, test in zip(of_class, is_test, strict=True) if test == wanted]
    if not kept:
        raise UserError(f"{root!r} has too few images to hold out a test image: add images")
    return _listing(kept, classes)


def _listing(images: list[tuple[str, str]], classes: list[str]) -> Listing:
    numbers = {name: number for number, name in enumerate(classes)}
    for top, file in images:
        if classes and top not in numbers:
            raise UserError(
                f"{file!r} is in none of the class folders of train/ ({', '.join(classes)}): "
                "move or remove it"
            )
    labels = [numbers[top] if classes else 0 for top, _ in images]
    return Listing([file for _, file in images], labels, len(classes))
