"""The text encoder of a run, and where its weights are."""

import dataclasses
from pathlib import Path

from binlatent.runtime.errors import UserError
from binlatent.texts.encoder import TextEncoder


@dataclasses.dataclass(frozen=True)
class Texts:
    """The section `texts` of a config.

    Fields:
      encoder: a key of `encoder.ENCODERS`; "" if the data hold features of texts.
      weights: path of its weight file, "" for NAME.npz.
      sha256: of the weight file; "" if it was never opened.
    """

    encoder: str
    weights: str
    sha256: str

    def load(self, workdir: Path | None = None) -> TextEncoder:
        """Loads the weight file, which must have the hash `sha256`, if known.

        If the file does not exist, NAME.npz in the workdir is loaded.
        """
        name = f"{self.encoder}.npz"
        path = Path(self.weights or name)
        if workdir and not path.is_file() and (workdir / name).is_file():
            path = workdir / name
        if workdir and not path.is_file():
            raise UserError(
                f"There is no file {str(path)!r} with the text encoder {self.encoder!r}: create it "
                f"with `python -m binlatent.convert {self.encoder} --from FILE --out {name}` "
                f"(docs/text.md describes FILE), and put it there or into {workdir}."
            )
        encoder = TextEncoder.load(path)
        if encoder.name != self.encoder:
            raise UserError(
                f"{path} holds the text encoder {encoder.name!r}, not {self.encoder!r}: set "
                f"--config.texts.weights to its file, or --config.texts.encoder={encoder.name}."
            )
        if self.sha256 not in ("", encoder.sha256):
            raise UserError(
                f"{path} is not the text encoder that the prior was trained with (SHA-256 "
                f"{encoder.sha256[:16]}…, not {self.sha256[:16]}…): set --config.texts.weights to "
                "that file."
            )
        return encoder
