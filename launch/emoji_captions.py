"""Writes captions.jsonl beside the images of the npm package emoji-datasource-google.

python launch/emoji_captions.py FOLDER

FOLDER is the package, or has its emoji.json and the images in google/. A line of the table is an
image: `file`, `caption`, a list of phrasings, and `split`. A tenth of the names, with all their
variants, are of the test split.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def plain(words: str) -> str:
    """Returns words in small letters, without the signs that join them in the package."""
    for sign, other in (("_", " "), ("-", " "), ("&", "and"), (":", ","), ("  ", " ")):
        words = words.replace(sign, other)
    return words.lower().strip()


def skin(tones: str) -> str:
    """Returns ", light skin tone" of "1F3FB", also of two people; "" of none."""
    named = dict.fromkeys(TONES[tone] for tone in tones.split("-") if tone)
    return f", {' and '.join(named)} skin tone" if named else ""


def captions(row: dict[str, Any]) -> list[str]:
    """Returns the phrasings of an image, each with its skin tone if it has any."""
    name, tone = plain(row["name"]), skin(row.get("skin_tones") or "")
    kind = f"{plain(row['category'])}, {plain(row['subcategory'])}"
    names = [plain(short) for short in row["short_names"]]
    phrasings = [name, f"an emoji of {name}", *names, f"{kind}, {name}"]
    return [phrasing + tone for phrasing in dict.fromkeys(phrasings)]


def table(rows: list[dict[str, Any]], images: str) -> list[dict[str, Any]]:
    """Returns the lines of the table, sorted by file, which lies in the folder `images`."""
    names = sorted({row["name"] for row in rows})
    random.Random(0).shuffle(names)
    held_out = set(names[: len(names) // 10])
    return [
        {
            "file": f"{images}/{row['image']}",
            "caption": captions(row),
            "split": "test" if row["name"] in held_out else "train",
        }
        for row in sorted(rows, key=lambda row: row["image"])
    ]


def variants(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row of the package as it is, and one more for each skin tone."""
    tones = row.get("skin_variations") or {}
    more = [row | {"image": own["image"], "skin_tones": tone} for tone, own in tones.items()]
    return [row, *more]


def main(folder: Path) -> None:
    """Writes the table of a folder."""
    content = json.loads((folder / "emoji.json").read_text("utf-8"))
    images = next(x for x in ("img/google/64", "google") if (folder / x).is_dir())
    rows = [variant for row in content for variant in variants(row)]
    lines = table([row for row in rows if (folder / images / row["image"]).exists()], images)
    unfinished = folder / "captions.jsonl.unfinished"
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    os.replace(unfinished, folder / "captions.jsonl")
    print(f"{len(lines)} images with captions: {folder / 'captions.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
