"""Read files that users write, and check before a model is loaded that the output can be written.

Images may come from anybody. `open_image_file` is the only function that opens them, here and in training.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image

from .cli import UserError, one_line

# Formats whose decoders are part of Pillow and read pixels only. Not among them are EPS, for which Pillow runs
# Ghostscript, and formats that are rare, so that their decoders are less tested.
IMAGE_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 89_000_000
"""Limit of an image's width times its height, unless the variable `PIXELS_VARIABLE` sets another one. A file of some
hundred kB can have more, and a decoded image takes three to eight bytes per pixel. Pillow warns at this number."""
PIXELS_VARIABLE = "HALFTONE_MAX_IMAGE_PIXELS"


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


def open_image_file(file: str | Path | IO[bytes]) -> Image.Image:
    """Open an image without decoding it, whoever it comes from.

    Raises:
        OSError: The file cannot be opened, or its format is none of `IMAGE_FORMATS`.
        ValueError, SyntaxError: The header is damaged, or the image has more pixels than allowed.
    """
    limit = max_image_pixels()
    advice = f"the limit is {limit / 1e6:g} million; make it smaller, or set the environment variable {PIXELS_VARIABLE}"
    if limit > (Image.MAX_IMAGE_PIXELS or limit):  # the user allows more than Pillow does
        Image.MAX_IMAGE_PIXELS = limit
    try:
        image = Image.open(file, formats=known_formats())
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels, and {advice}") from None
    width, height = image.size
    if width * height > limit:
        image.close()
        raise ValueError(f"it has {width}×{height} = {width * height / 1e6:g} million pixels, and {advice}")
    return image


def max_image_pixels() -> int:
    """Return the limit of an image's width times its height. Raises UserError for a variable that is not a number."""
    value = os.environ.get(PIXELS_VARIABLE)
    if value is None:
        return MAX_IMAGE_PIXELS
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{PIXELS_VARIABLE} is '{value}'; set it to a number of pixels, or unset it")
    return int(value)


def image_suffixes() -> set[str]:
    """Return the file name extensions of the images that can be opened, in lower case with their dot."""
    formats = known_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Return the `IMAGE_FORMATS` that the installed Pillow was built with, and HEIF if pillow-heif is installed."""
    Image.init()
    known = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        known.append("HEIF")
    return tuple(known)


def read_image(path: Path, name: str | None = None) -> Image.Image:
    """Read and decode an image file.

    Args:
        path: Path of the file.
        name: Name of the file in error messages; None is its path.

    Raises:
        UserError: If the file does not exist, is not an image, is damaged, or has float pixels that are not finite.
    """
    with _image_errors(name or str(path)), open_image_file(path) as image:
        image.load()
        if image.mode == "F":
            from ..common.pixels import require_finite  # imports PyTorch, for which other errors need not wait

            require_finite(image)
        return image


def check_image_header(path: Path) -> None:
    """Check that a file has the header of an image, without decoding its pixels. Raises UserError."""
    with _image_errors(str(path)):
        open_image_file(path).close()


@contextlib.contextmanager
def _image_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            reason += f": {os.path.abspath(error.filename)}"
        raise UserError(f"{name} cannot be read as an image ({reason}); choose another file") from error


def check_output(output: Path) -> None:
    """Check that the file `--output` can be written, and leave no trace. Raises UserError."""
    file = Path(os.path.realpath(output))  # what a link leads to
    with _trying(output, "file"), _for_a_moment(file.parent):
        exists = file.exists()
        with file.open("ab"):
            pass
        if not exists:
            file.unlink()


def check_output_folder(folder: Path) -> None:
    """Check that files can be written into the folder `--output`, and leave no trace. Raises UserError."""
    with _trying(folder, "folder"), _for_a_moment(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _trying(output: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another {kind}") from None


@contextlib.contextmanager
def _for_a_moment(folder: Path) -> Iterator[None]:
    """Create a folder, and delete it and those above it again if they did not exist."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # another process writes there as well
                path.rmdir()
