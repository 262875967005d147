"""Texts to the numbers of their tokens, by the library `tokenizers`."""

import logging
from collections.abc import Sequence
from typing import Any

from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 60  # characters of a text in a warning


def import_tokenizers() -> Any:
    """Returns the library; UserError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "Text encoders need the library tokenizers: run `pip install 'binlatent[texts]'`, or "
            "`pip install tokenizers`."
        ) from error
    return tokenizers


def load_tokenizer(text: str, model: Any) -> Any:
    """Returns the tokenizer of the text of a tokenizer.json, which cuts texts at `max_tokens`.

    Args:
      model: an encoder's module, with `vocab_size` and `max_tokens`.

    Raises:
      ValueError: if it is damaged or of another encoder.
    """
    library = import_tokenizers()
    try:
        tokenizer = library.Tokenizer.from_str(text)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        tokenizer.no_padding()
        tokenizer.enable_truncation(model.max_tokens)
        shortest = tokenizer.encode("").ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as is the library's PanicException
        raise ValueError("its tokenizer is damaged") from error
    if largest + 1 != model.vocab_size:
        raise ValueError(
            f"its tokenizer has {largest + 1} tokens, and its embedding {model.vocab_size}"
        )
    if not shortest:
        raise ValueError("its tokenizer adds no start or end to a text")
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Returns the tokens of each text, start and end included, and the texts that are cut."""
    # One by one: in batches, the library starts threads, which processes that fork must not have.
    try:
        encodings = [tokenizer.encode(text) for text in texts]
    except TypeError as error:  # by the library, of half a character too
        raise UserError("A text for the text encoder is not in UTF-8: write it anew.") from error
    cut = [text for text, found in zip(texts, encodings, strict=True) if found.overflowing]
    return [encoding.ids for encoding in encodings], cut


def warn_of_cut(cut: Sequence[str], max_tokens: int) -> None:
    """Warns of texts, if any, that are cut after so many tokens."""
    if cut:
        shown = cut[0] if len(cut[0]) <= _SHOWN else f"{cut[0][:_SHOWN]}..."
        others = f", and {len(cut) - 1} other texts" if len(cut) > 1 else ""
        log.warning("Cut at the %d tokens that the encoder reads: %r%s", max_tokens, shown, others)
