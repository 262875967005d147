"""Builds CLIP's tokenizer from OpenAI's merges (byte-pair encoding; Sennrich et al., 2016)."""

import gzip
import zipfile
import zlib
from pathlib import Path

from binlatent.convert import snapshots
from binlatent.runtime.errors import UserError
from binlatent.texts.tokenizer import import_tokenizers

_NAME = "bpe_simple_vocab_16e6.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of other characters.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_tokenizer(path: Path, vocab_size: int) -> str:
    """Returns the text of a tokenizer.json for CLIP.

    Args:
      path: a tokenizer.json, OpenAI's file of merges, or a wheel that contains that file.
      vocab_size: of the weights; the file of merges holds more than CLIP uses.
    """
    if not path.is_file():
        raise UserError(f"There is no file {str(path)!r}: check --tokenizer.")
    if path.suffix == ".json":
        return snapshots.read_text(path)
    try:
        lines = _read_lines(path)
        merges = [tuple(line.split(" ")) for line in lines[1:] if line]
        return clip_tokenizer(merges, vocab_size)
    except (OSError, UserError):
        raise
    except Exception as error:  # of many types, depending on the damage
        raise UserError(
            f"{path} is not a file of CLIP's merges, such as {_NAME}: download it again."
        ) from error


def _read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(_NAME))
            content = wheel.read(name)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except gzip.BadGzipFile as error:  # an OSError without the path
            raise zlib.error from error
    return content.decode().split("\n")


def clip_tokenizer(merges: list[tuple[str, ...]], vocab_size: int) -> str:
    """Returns the text of a tokenizer.json for CLIP.

    OpenAI's code also repairs texts before. Of these repairs, only typographic quotes are replaced.

    Args:
      merges: pairs in order of priority; those beyond the vocabulary are left out.
      vocab_size: 2 * 256 bytes, the merges, a start and an end token.
    """
    used = merges[: max(vocab_size - 2 * 256 - 2, 0)]
    if len(used) + 2 * 256 + 2 != vocab_size:
        raise ValueError(f"{len(merges)} merges are too few for {vocab_size} tokens")
    letters = list(_byte_letters().values())
    words = [*letters, *(x + _WORD_END for x in letters), *("".join(pair) for pair in used)]
    vocab = {word: number for number, word in enumerate([*words, _START, _END])}
    library = import_tokenizers()
    from tokenizers import models, normalizers, pre_tokenizers, processors

    tokenizer = library.Tokenizer(
        models.BPE(vocab, used, unk_token=_END, end_of_word_suffix=_WORD_END)
    )
    as_ascii = {r"\s+": " ", "[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"'}
    replaced = [normalizers.Replace(library.Regex(x), y) for x, y in as_ascii.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *replaced, normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(library.Regex(_WORDS), behavior="removed", invert=True)
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_letters])
    special = [(token, vocab[token]) for token in (_START, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=special
    )
    tokenizer.add_special_tokens([_START, _END])
    return tokenizer.to_str()


def _byte_letters() -> dict[int, str]:
    """Returns the letter of each byte, in the order of CLIP's vocabulary (as in GPT-2).

    A printable byte is its own letter; the others are letters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
