"""Caption the images of a folder with a model, so that they can be trained on with captions.

    python data_scripts/caption_images.py --train_data_dir scans --model Salesforce/blip-image-captioning-base

The model can be any of Transformers for images and text, by its name on the Hub or its folder, or an image–caption
model of Halftone: a run, a checkpoint or a pipeline. A folder without captions gets a metadata.jsonl. A folder with
some captions keeps them: only empty captions of its table are filled, or text files are added beside the images that
have none. The same command resumes an interrupted one. Images that cannot be read are listed and left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_scripts.captioning.journal import Journal
from data_scripts.captioning.models import Captioner, load_captioner
from data_scripts.captioning.writing import OWN_FOLDER, Missing, delete_leftovers, missing_captions
from pipelines.tools.cli import UserError, entry_point, located, printable
from pipelines.tools.grids import image_grid
from pipelines.tools.private import without_private
from pipelines.tools.progress import Progress
from training.core.files import write_atomically
from training.core.made_folders import lock_of
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.data.caption_text import caption_problem, cleaned_caption
from training.data.transforms import BrokenImage, load_rgb

if TYPE_CHECKING:
    from PIL import Image

JOURNAL, SHEET = "journal.jsonl", "contact_sheet.png"
SHOWN = 10
SHEET_SIDE = 256  # pixels: larger images are made smaller for the contact sheet


@dataclass
class CaptionConfig(Options):
    """Flags of this script."""

    train_data_dir: str = ""
    """Folder of images (required)"""
    model: str = ""
    """Model that captions the images (required): name or folder of a model of Transformers, or run folder, checkpoint,
    pipeline folder or Hub id of an image–caption model"""
    prompt: str | None = None
    """Text for models that answer or continue one, such as 'Describe this image in one sentence.'; captions of BLIP and
    GIT begin with it"""
    batch_size: int = option(8, at_least=1)
    """Images per batch"""
    max_new_tokens: int | None = option(None, at_least=1)
    """Maximum number of tokens per caption; if unset, 50, or as in training for an image–caption model"""
    caption_column: str | None = None
    """Column with the captions of a table that is in the folder; if unset, the one with a usual name, such as text"""
    add_rows: bool = False
    """Also caption images that no row of the folder's table names, and add rows for them; otherwise they stay left
    out"""
    contact_sheet_images: int = option(24, at_least=0)
    """Number of captioned images on the contact sheet; 0 makes none"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""

    def validate(self, prefix: str = "") -> None:
        """Raise UserError if a required flag is missing, or the folder does not exist."""
        super().validate(prefix)
        if not self.train_data_dir:
            raise UserError("--train_data_dir is missing; it is the folder with the images")
        if not self.model:
            raise UserError("--model is missing; name a model that captions images, or the folder of one")
        if not Path(self.train_data_dir).is_dir():
            raise UserError(f"--train_data_dir {located(self.train_data_dir)} is not a folder; check its path")

    @property
    def settings(self) -> dict[str, str | int | None]:
        """What the captions depend on."""
        return without_private(
            {
                "model": self.model,
                "prompt": self.prompt,
                "batch_size": self.batch_size,
                "max_new_tokens": self.max_new_tokens,
            }
        )


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(CaptionConfig, argv, description=__doc__)
    root = Path(config.train_data_dir).resolve()
    with _writing(root), lock_of(root, f"another process is captioning {root}; wait until it has ended"):
        file = root / OWN_FOLDER / JOURNAL
        if file.is_file():  # an earlier process was stopped
            delete_leftovers(root)
        missing = missing_captions(root, config.caption_column, config.add_rows)
        if missing.images or file.is_file():
            journal = Journal(file, config.settings)
            _caption(config, root, missing, journal)
            _finish(config, root, missing, journal)
        else:
            print(f"Every image of {config.train_data_dir} that is read has a caption.")
    if missing.unlisted:
        print(
            f"{len(missing.unlisted):,} images are in no row of {missing.where} and stay left out, such as "
            f"{printable(missing.unlisted[0])}; caption them with --add_rows true"
        )
    return 0


def _caption(config: CaptionConfig, root: Path, missing: Missing, journal: Journal) -> None:
    """Caption the images that the journal does not know, batch by batch."""
    # The same batches as in an undisturbed run: the sums of a batch, and so a caption, can depend on its size.
    size = config.batch_size
    batches = [missing.images[start : start + size] for start in range(0, len(missing.images), size)]
    batches = [batch for batch in batches if not all(map(journal.knows, batch))]
    if not batches:
        return
    captioner = load_captioner(config.model, config.prompt, config.max_new_tokens, config.device)
    done = len(missing.images) - sum(map(len, batches))
    with Progress(len(missing.images), "image", "captions", done=done) as progress:
        for batch, images in _read_ahead(root, batches):
            readable = {name: image for name, image in images.items() if not isinstance(image, str)}
            problems = {name: image for name, image in images.items() if isinstance(image, str)}
            texts = _texts(captioner, list(readable.values()))
            for name, text in zip(readable, texts, strict=True):
                problem = caption_problem(text)
                if problem:
                    problems[name] = f"the model gave no caption: {problem}"
            journal.add({name: text for name, text in zip(readable, texts) if name not in problems}, problems)
            progress.update(len(batch))


def _texts(captioner: Captioner, images: Sequence[Image.Image]) -> list[str]:
    return [" ".join(cleaned_caption(text).split()) for text in captioner(images)] if images else []


def _read_ahead(
    root: Path, batches: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], dict[str, Image.Image | str]]]:
    """Yield each batch with its decoded images, or the reason why an image cannot be read.

    The next batch is read while this one is captioned.
    """

    def read(name: str) -> Image.Image | str:
        try:
            return load_rgb(str(root / name))
        except BrokenImage as error:
            return str(error)

    def read_all(names: Sequence[str]) -> dict[str, Image.Image | str]:
        return {name: read(name) for name in names}

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read_all, batches[0])
        for number, batch in enumerate(batches):
            images = following.result()
            if number + 1 < len(batches):
                following = pool.submit(read_all, batches[number + 1])
            yield batch, images


def _finish(config: CaptionConfig, root: Path, missing: Missing, journal: Journal) -> None:
    """Write the contact sheet and the captions, report, and delete the journal, which marks the end."""
    captions = {name: text for name, text in journal.captions.items() if (root / name).is_file()}
    if not captions:
        _list_problems(journal)
        journal.delete()
        raise UserError(f"no image of {config.train_data_dir} was captioned; the reasons are listed above")
    sheet = root / OWN_FOLDER / SHEET
    if config.contact_sheet_images:
        _contact_sheet(root, captions, config.contact_sheet_images, sheet)
    missing.write(captions)
    _list_problems(journal)
    print(f"{len(captions):,} images were captioned; the captions are in {missing.where} of {config.train_data_dir}")
    if config.contact_sheet_images:
        print(f"Look at some of them: {Path(config.train_data_dir, OWN_FOLDER, SHEET)}")
    print(f"Train with them: --train_data_dir {config.train_data_dir}")
    journal.delete()


def _list_problems(journal: Journal) -> None:
    if not journal.problems:
        return
    print(f"{len(journal.problems):,} images have no caption:")
    for name, problem in list(journal.problems.items())[:SHOWN]:
        print(printable(f"  {name}: {problem}"))
    if len(journal.problems) > SHOWN:
        print(f"  and {len(journal.problems) - SHOWN:,} more")


def _contact_sheet(root: Path, captions: dict[str, str], number: int, file: Path) -> None:
    """Write an image with some captioned images, which are chosen by their names, and their captions."""
    chosen = sorted(sorted(captions, key=lambda name: hashlib.sha256(name.encode()).digest())[:number])
    images = [load_rgb(str(root / name)) for name in chosen]
    for image in images:
        image.thumbnail((SHEET_SIDE, SHEET_SIDE))
    grid = image_grid(images, [captions[name] for name in chosen])
    write_atomically(file, lambda opened: grid.save(opened, format="PNG"))


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Convert an error of the file system to a UserError."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout is gone
        raise
    except OSError as error:
        raise UserError(
            f"the captions of {root} cannot be written ({error.strerror or error}); make room or change its "
            "permissions, and run the same command again"
        ) from error


if __name__ == "__main__":
    entry_point(main)
