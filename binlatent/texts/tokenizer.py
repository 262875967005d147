"""Converts texts to token ids, with the library `tokenizers`."""

import logging
from collections.abc import Sequence
from typing import Any

from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 60  # characters of a text in a warning


def import_tokenizers() -> Any:
    """Imports the library; raises UserError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "Text encoders need the library tokenizers: run `pip install 'binlatent[texts]'`, or "
            "`pip install tokenizers`."
        ) from error
    return tokenizers


def load_tokenizer(text: str, model: Any) -> Any:
    """Returns a tokenizer that cuts texts after `model.max_tokens` tokens.

    Args:
      text: the content of a tokenizer.json.
      model: an encoder's module, with `vocab_size` and `max_tokens`.

    Raises:
      ValueError: if the text is damaged, or belongs to another encoder.
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
    except BaseException as error:  # the library raises PanicException
        raise ValueError("its tokenizer is damaged") from error
    if largest + 1 != model.vocab_size:
        raise ValueError(
            f"its tokenizer has {largest + 1} tokens, and its embedding {model.vocab_size}"
        )
    if not shortest:
        raise ValueError("its tokenizer adds no start or end token")
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Returns the tokens of each text, with start and end, and the texts that were cut."""
    # One by one: for batches the library starts threads, which are unsafe in forking processes.
    try:
        encodings = [tokenizer.encode(text) for text in texts]
    except TypeError as error:  # from the library, for lone surrogates too
        raise UserError("A text for the text encoder is not valid UTF-8: correct it.") from error
    cut = [text for text, found in zip(texts, encodings, strict=True) if found.overflowing]
    return [encoding.ids for encoding in encodings], cut


def warn_of_cut(cut: Sequence[str], max_tokens: int) -> None:
    """Warns of texts that were cut after `max_tokens` tokens, if any."""
    if cut:
        shown = cut[0] if len(cut[0]) <= _SHOWN else f"{cut[0][:_SHOWN]}..."
        others = f", and {len(cut) - 1} other texts" if len(cut) > 1 else ""
        log.warning("Cut at the %d tokens that the encoder reads: %r%s", max_tokens, shown, others)
