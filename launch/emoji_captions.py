"""Writes captions.jsonl beside the images of the npm package emoji-datasource-google.

python launch/emoji_captions.py FOLDER

FOLDER has emoji.json (or emoji_pretty.json of an older package) and google/*.png. A line of the
table is an image: `file`, `caption`, a list of phrasings, and `split`. A tenth of the names, with
all their variants, are of the test split.
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


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of the table, sorted by file."""
    names = sorted({row["name"] for row in rows})
    random.Random(0).shuffle(names)
    held_out = set(names[: len(names) // 10])
    return [
        {
            "file": f"google/{row['image']}",
            "caption": captions(row),
            "split": "test" if row["name"] in held_out else "train",
        }
        for row in sorted(rows, key=lambda row: row["image"])
    ]


def variants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the package's own file with a row for each variant of a skin tone."""
    every = []
    for row in rows:
        tones = row.get("skin_variations", {}).items()
        own = [(row, "")] + [(variation, tone) for tone, variation in tones]
        for image, tone in own:
            if image.get("has_img_google", True):
                every.append(row | {"image": image["image"], "skin_tones": tone})
    return every


def main(folder: Path) -> None:
    """Writes the table of a folder."""
    rows = json.loads((folder / "emoji.json").read_text())
    if rows and "skin_variations" in rows[0] or "has_img_google" in rows[0]:
        rows = variants(rows)
    lines = table([row for row in rows if (folder / "google" / row["image"]).exists()])
    unfinished = folder / "captions.jsonl.unfinished"
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(unfinished, folder / "captions.jsonl")
    print(f"{len(lines)} images with captions are in {folder / 'captions.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
