"""Read files that users write, and check before a model is loaded that the output can be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .cli import UserError, one_line


def read_text(path: str | Path) -> str:
    """Read a text file that a user may have written: UTF-8, with or without a byte order mark, as of Notepad.

    Raises:
        OSError: If the file cannot be opened.
        UserError: If the file is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}: {error.reason}); save it as UTF-8") from None


def read_image(path: Path, name: str | None = None) -> Image.Image:
    """Read and decode an image file.

    Args:
        path: Path of the file.
        name: Name of the file in error messages; None is its path.

    Raises:
        UserError: If the file does not exist, is not an image, or is damaged.
    """
    with _image_errors(name or str(path)), Image.open(path) as image:
        image.load()
        return image


def check_image_header(path: Path) -> None:
    """Check that a file has the header of an image, without decoding its pixels. Raises UserError."""
    with _image_errors(str(path)):
        Image.open(path).close()


@contextlib.contextmanager
def _image_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{name} cannot be read as an image ({reason}); choose another file") from error


def check_output(output: Path) -> None:
    """Create the folder of the file `--output` and check that the file can be written. Raises UserError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another file") from None
