"""Which text encoder the captions and prompts of a run go through, and where its weights lie."""

import dataclasses
from pathlib import Path

from binlatent.runtime.errors import UserError
from binlatent.texts.encoder import TextEncoder


@dataclasses.dataclass(frozen=True)
class Texts:
    """The section `texts` of a config.

    Fields:
      encoder: of `encoder.ENCODERS`, "" for none: features of texts come prepared.
      weights: path of its file, "" for NAME.npz.
      sha256: of that file; "" as long as it was not opened.
    """

    encoder: str
    weights: str
    sha256: str

    def load(self, workdir: Path | None = None) -> TextEncoder:
        """Returns the encoder of the file, which must be that of `sha256`, if known.

        Where there is no such file, NAME.npz in the workdir is taken.
        """
        name = f"{self.encoder}.npz"
        path = Path(self.weights or name)
        if workdir and not path.is_file() and (workdir / name).is_file():
            path = workdir / name
        if workdir and not path.is_file():
            raise UserError(
                f"There is no file {str(path)!r} with the text encoder {self.encoder!r}: make it "
                f"by `python -m binlatent.convert {self.encoder} --from FILE --out {name}` "
                f"(docs/text.md says what FILE is), and put it there or into {workdir}."
            )
        encoder = TextEncoder.load(path)
        if encoder.name != self.encoder:
            raise UserError(
                f"{path} holds the text encoder {encoder.name!r}, not {self.encoder!r}: give its "
                f"file by --config.texts.weights, or set config.texts.encoder={encoder.name}."
            )
        if self.sha256 not in ("", encoder.sha256):
            raise UserError(
                f"{path} is another file than the text encoder that the prior was trained with "
                f"(SHA-256 {encoder.sha256[:16]}…, not {self.sha256[:16]}…): give that one by "
                "--config.texts.weights."
            )
        return encoder
