"""Groups of near-duplicates: which images belong together, what they mean for training, and a sheet to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from data_scripts.duplicates.prints import Place, Prints
from data_scripts.duplicates.search import Pair
from pipelines.tools.grids import image_grid
from training.core.files import write_json
from training.core.previews import save_png

GROUPS_LISTED = 20
PLACES_LISTED = 6  # of one group
SHEET_GROUPS, SHEET_COLUMNS, SHEET_CELL = 60, 10, 128
SHEET_FILE, LIST_FILE = "near_duplicates.png", "near_duplicates.json"


class Group(NamedTuple):
    """Images that are copies of each other, directly or through others in the group."""

    places: list[Place]
    distinct: int
    """number of files with different bytes"""
    difference: float
    """of its closest pair, see `Pair`; 0 if all files have the same bytes"""

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(place.part for place in self.places))


def groups_of(prints: Prints, pairs: Sequence[Pair]) -> list[Group]:
    """Return the groups that near-duplicates and files with the same bytes form.

    Groups in several parts of the data are first. Among these and among the others, the closest near-duplicates are
    first, and files with the same bytes are last.
    """
    leader = list(range(len(prints.places)))

    def find(position: int) -> int:
        while leader[position] != position:
            leader[position] = leader[leader[position]]
            position = leader[position]
        return position

    for pair in pairs:
        leader[find(pair.other)] = find(pair.one)
    differences: dict[int, float] = {}
    for pair in pairs:  # the closest first
        differences.setdefault(find(pair.one), pair.difference)
    members: dict[int, list[list[Place]]] = {}
    for position, places in enumerate(prints.places):
        members.setdefault(find(position), []).append(places)
    groups = [
        Group(sorted(place for places in files for place in places), len(files), differences.get(first, 0.0))
        for first, files in members.items()
        if len(files) > 1 or len(files[0]) > 1
    ]
    return sorted(groups, key=lambda group: (len(group.parts) == 1, group.distinct == 1, group.difference))


def describe(prints: Prints, groups: Sequence[Group], where: Callable[[Place], str]) -> list[str]:
    """Return the lines of the report: what was found, why it matters, and the first groups.

    Args:
        where: describes a place, with its row and file.
    """
    if not groups:
        return ["No near-duplicates (copies in another size or compression, mirrored, or slightly cropped)."]
    total, number = sum(map(len, prints.places)), sum(len(group.places) for group in groups)
    lines = [
        f"{number:,} images are duplicates or near-duplicates (copies in another size or compression, mirrored, or "
        f"slightly cropped), in {len(groups):,} groups. With one image of each group, "
        f"{total - number + len(groups):,} of {total:,} images remain. Repeated images are the first that a model "
        "reproduces instead of generating new ones."
    ]
    mixed = [group for group in groups if len(group.parts) > 1]
    if mixed:
        lines.append(
            f"{len(mixed):,} of these groups are in more than one part of the data ({', '.join(_all_parts(mixed))}). "
            "Remove these first: the model would be validated on images that it was trained on, so that the "
            "validation loss, early stopping and the check for copies would be too optimistic."
        )
    for group in groups[:GROUPS_LISTED]:
        shown = [where(place) for place in group.places[:PLACES_LISTED]]
        more = f" and {len(group.places) - len(shown):,} more" if len(group.places) > len(shown) else ""
        lines.append(f"  - {' = '.join(shown)}{more}")
    if len(groups) > GROUPS_LISTED:
        lines.append(f"  and {len(groups) - GROUPS_LISTED:,} more groups (--near_duplicates_dir DIR lists them all)")
    return lines


def _all_parts(groups: Iterable[Group]) -> list[str]:
    return list(dict.fromkeys(part for group in groups for part in group.parts))


def write_groups(
    folder: str | os.PathLike[str],
    groups: Sequence[Group],
    image_at: Callable[[Place], Image.Image],
    file_at: Callable[[Place], str | None],
) -> tuple[Path, Path]:
    """Write all groups as JSON and the first ones as a contact sheet into `folder`; return the paths of both files."""
    folder = Path(os.path.expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[list[dict[str, Any]]] = [
        [{"split": place.split, "row": place.row, "file": file_at(place), "part": place.part} for place in group.places]
        for group in groups
    ]
    write_json(folder / LIST_FILE, listed)
    save_png(contact_sheet(groups, image_at), folder / SHEET_FILE)
    return folder / LIST_FILE, folder / SHEET_FILE


def contact_sheet(groups: Sequence[Group], image_at: Callable[[Place], Image.Image]) -> Image.Image:
    """Draw the first groups side by side, each image with the number of its group, its split and its row.

    Groups of files with the same bytes are left out: there is nothing to compare.
    """
    images: list[Image.Image] = []
    captions: list[str] = []
    empty = Image.new("RGB", (SHEET_CELL, SHEET_CELL), "white")
    shown = [group for group in groups if group.distinct > 1][:SHEET_GROUPS]
    for number, group in enumerate(shown, 1):
        places = group.places[:SHEET_COLUMNS]
        free = -len(images) % SHEET_COLUMNS
        if len(places) > free:  # a group stays on one line
            images += [empty] * free
            captions += [""] * free
        images += [_in_cell(image_at(place)) for place in places]
        captions += [f"{number}: {place.split} {place.row}" for place in places]
    return image_grid(images, captions, columns=SHEET_COLUMNS, cell=SHEET_CELL)


def _in_cell(image: Image.Image) -> Image.Image:
    """Return an image of at most `SHEET_CELL` pixels in the middle of a white square."""
    return ImageOps.pad(image, (SHEET_CELL, SHEET_CELL), Image.Resampling.LANCZOS, color="white")
