"""Write generated images for `sample.py`: one grid, or a PNG file for each image.

PNG files contain the prompt, the seed and the other settings as text metadata, without paths of this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .cli import UserError, one_line, printable
from .files import check_output, check_output_folder
from .grids import enlarged, plain_grid
from .private import without_private
from .replacing import replacing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_CHARACTERS_IN_NAME = 40
# What the title of a row names: the first of these that there is.
TITLES = (("prompt", "class_label"), ("caption",), ("brief",), ("control_image",))


@dataclass
class Generated:
    """Rows of generated images, and what they were generated from."""

    rows: list[list[Image.Image]]
    seeds: list[list[int]]
    """The seed of each image."""
    conditions: list[dict[str, str]]
    """Conditions of each row by option: `prompt`, `class_label`, `brief`, `control_image` (names of files), `caption`
    (generated)."""
    settings: dict[str, str]
    """Settings of all images, such as `guidance_scale`."""
    batches: list[list[int]] = field(default_factory=list)
    """Seeds of the images that were generated together, for each batch of a single row; see `batches_of`."""

    def titles(self) -> list[str]:
        """Return the title of each row; an empty string if it was generated without a condition."""
        return [_title(conditions) for conditions in self.conditions]

    def metadata(self, row: int | None = None, column: int = 0) -> dict[str, str]:
        """Return the metadata of one image; with `row` None, that of a grid, with a line for each row."""
        if row is not None:
            seed = self.seeds[row][column]
            facts = self.conditions[row] | {"seed": str(seed)}
            # An image has the same bits only in a batch of the same size: with another number of rows, a matrix
            # product adds the same numbers in another order. So the file says what else was in the batch.
            batch = next((batch for batch in self.batches if seed in batch), [])
            if len(batch) > 1:
                facts["batch_seeds"] = ", ".join(map(str, batch))
        else:
            names = dict.fromkeys(name for conditions in self.conditions for name in conditions)
            facts = {name: "\n".join(one.get(name, "") for one in self.conditions) for name in names}
            seeds = [", ".join(map(str, row)) for row in self.seeds]
            facts["seed"] = seeds[0] if len(set(seeds)) == 1 else "\n".join(seeds)
        return facts | self.settings


def batches_of(seeds: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divide the seeds of a row into batches of at most `batch_size` images."""
    return [list(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size)]


def is_folder(output: str) -> bool:
    """Whether `--output` names a folder: it ends with a slash, has no extension, or is a folder that exists."""
    path = Path(output).expanduser()
    return output.endswith(("/", os.sep)) or not path.suffix or path.is_dir()


def check_image_output(output: str) -> None:
    """Check that the file or folder `--output` can be written, before a model is loaded. Raises UserError."""
    path = Path(output).expanduser()
    if is_folder(output):
        check_output_folder(path)
        return
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(
            f"--output must be an image file such as grid.png, or a folder such as images/ for single files, but is "
            f"{output}"
        )
    check_output(path)


def save(
    generated: Generated,
    output: str,
    *,
    scale: int | None = None,
    titled: bool = True,
    controls: Sequence[Sequence[Image.Image]] = (),
    sheet: Image.Image | None = None,
) -> str:
    """Save what was generated as the file or into the folder `--output`, and return what was written, for a message.

    Args:
        scale: Factor by which images are enlarged; None enlarges only small ones, and only in a grid.
        titled: Whether each row of the grid has a title.
        controls: Control images of each row, with which the row begins, or nothing.
        sheet: Image to save instead of the grid.

    Raises:
        UserError: If a file cannot be written.
    """
    path = Path(output).expanduser()
    if is_folder(output):
        written = save_each(generated, path, scale=scale or 1)
        return str(written[0]) if len(written) == 1 else f"{written[0]} … {written[-1].name}"
    if sheet is None:
        left = controls or [[]] * len(generated.rows)
        rows = [[enlarged(image, scale) for image in (*shown, *row)] for shown, row in zip(left, generated.rows)]
        sheet = plain_grid(rows, generated.titles() if titled else None)
    save_image(sheet, path, generated.metadata())
    return str(path)


def save_each(generated: Generated, folder: Path, *, scale: int) -> list[Path]:
    """Save each image as a PNG file named after its row, title and seed; no file is replaced. Raises UserError."""
    digits, paths = len(str(len(generated.rows))), []
    for number, (row, title) in enumerate(zip(generated.rows, generated.titles()), start=1):
        for column, image in enumerate(row):
            parts = [f"{number:0{digits}}", slug(title), f"seed{generated.seeds[number - 1][column]}"]
            path = _free_path(folder / "_".join(filter(None, parts)))
            save_image(enlarged(image, scale), path, generated.metadata(number - 1, column))
            paths.append(path)
    return paths


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Save an image, with metadata if it is a PNG file; after an error, there is the old file or none.

    Raises:
        UserError: If the file cannot be written.
    """
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        for name, value in metadata.items():
            options["pnginfo"].add_text(name, _clean(value))
    with _write_errors(path):
        file = Path(os.path.realpath(path))  # what a link leads to
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            image.save(temporary, **options)


def model_name(model: str) -> str:
    """Return the name of `--model` for metadata: a Hub id, a path below the working folder, or a folder name."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    if not path.exists():
        return model
    path = path.parent if path.name == "pipeline" else path
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) and path != here else path.name


def slug(text: str) -> str:
    """Return the words of `text` in lower case with hyphens between them, for a file name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:MOST_CHARACTERS_IN_NAME].rstrip("-")


def _title(conditions: Mapping[str, str]) -> str:
    given = ([conditions[name] for name in names if conditions.get(name)] for names in TITLES)
    return _clean(", ".join(next(filter(None, given), [])))


def _clean(text: str) -> str:
    """Return a text without tokens, home folder and control characters, which can be encoded as UTF-8."""
    return printable(without_private(text)).encode("utf-8", "replace").decode("utf-8")


def _free_path(stem: Path) -> Path:
    names: Iterable[str] = (f"{stem.name}{f'_{number}' if number > 1 else ''}.png" for number in range(1, 1_000_000))
    return next(path for name in names if not os.path.lexists(path := stem.with_name(name)))


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: the format has a limit of width and height
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"--output {path} cannot be written ({reason}); choose another file or free space") from error
