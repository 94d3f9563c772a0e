"""Make a dataset of emoji with this machine's colour emoji font: images, captions (Unicode names) and classes.

    python data_scripts/make_emoji.py --output_dir data/emoji_64 --resolution 64

The folder loads with datasets.load_dataset("data/emoji_64"). The same font and flags give the same bytes.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from data_scripts.dataset_folder import check_replaceable, making, new_folder, write_manifest
from pipelines.common.pixels import on_white
from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.progress import watched
from training.core.draws import mix
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.data import emoji_font

if TYPE_CHECKING:
    from datasets import Dataset

# A bitmap font opens only at the size that it has (Noto: 109, Apple: 160). An outline font opens at any
# size, so the first one is used.
FONT_SIZES = (109, 160, 136, 128, 96, 64)
SCRIPT = "make_emoji.py"
CAPTION = "an emoji of {}"
SHEET_COLUMNS, SHEET_CELL, SHEET_LABEL_WIDTH = 12, 64, 150

_ZERO_WIDTH_JOINER, _VARIATION_SELECTOR, _KEYCAP = 0x200D, 0xFE0F, 0x20E3
_BLACK_FLAG, _CANCEL_TAG, _FIRST_TAG = 0x1F3F4, 0xE007F, 0xE0000
_SKIN_TONES = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium-light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium-dark skin tone",
    0x1F3FF: "dark skin tone",
}
_GENDERS = {0x2640: "woman", 0x2642: "man"}
# Tables in which OpenType fonts store colour glyphs: bitmaps (Google, Apple), layers, drawings.
_COLOR_TABLES = {"CBDT", "sbix", "COLR", "SVG "}
# Code points that can begin a sequence in reading order: people, faces, flags and hearts; signs follow them.
_FIRST_IN_SEQUENCE = {0x1F468, 0x1F469, 0x1F9D1, 0x1F3F3, _BLACK_FLAG, 0x2764, *range(0x1F600, 0x1F650)}
_FIRST_PICTOGRAPH = 0x1F300
_REGIONAL_A, _REGIONAL_Z = 0x1F1E6, 0x1F1FF
# Unicode blocks that contain emoji: (first, last, name).
_BLOCKS = (
    (0x0000, 0x00FF, "latin signs"),
    (0x2000, 0x218F, "punctuation and letterlike symbols"),
    (0x2190, 0x21FF, "arrows"),
    (0x2300, 0x23FF, "technical"),
    (0x2460, 0x24FF, "enclosed alphanumerics"),
    (0x2500, 0x25FF, "geometric shapes"),
    (0x2600, 0x26FF, "symbols"),
    (0x2700, 0x27BF, "dingbats"),
    (0x2900, 0x2BFF, "arrows"),
    (0x3000, 0x33FF, "cjk symbols"),
    (0x1F000, 0x1F0FF, "game pieces"),
    (0x1F100, 0x1F2FF, "enclosed alphanumerics"),
    (0x1F300, 0x1F5FF, "symbols and pictographs"),
    (0x1F600, 0x1F64F, "emoticons"),
    (0x1F650, 0x1F67F, "dingbats"),
    (0x1F680, 0x1F6FF, "transport and map"),
    (0x1F700, 0x1F8FF, "geometric shapes"),
    (0x1F900, 0x1F9FF, "supplemental pictographs"),
    (0x1FA00, 0x1FAFF, "extended pictographs"),
)


@dataclass
class MakeEmojiConfig(Options):
    """Flags of this script."""

    output_dir: str = "data/emoji_64"
    """Folder to write the dataset to"""
    font: str | None = None
    """Colour emoji font (.ttf, .ttc); if unset, the first one in the system's font folders"""
    resolution: int = option(64, at_least=8, at_most=512)
    """Width and height in pixels; the glyphs of Noto are 128 pixels high"""
    transparent: bool = False
    """Keep the transparent background (RGBA, for --image_mode rgba); otherwise the emoji are on white"""
    sequences: Literal["all", "none"] = "all"
    """all: include emoji of several code points (skin tones, flags, people at work); none: single code points only"""
    validation_fraction: float = option(0.05, at_least=0, below=1)
    """Fraction of the emoji held out for validation, each together with its skin tones and variants"""
    seed: int = 0
    """Random seed that decides which emoji are held out"""
    overwrite: bool = False
    """Rename an earlier dataset in --output_dir (it is not deleted), and make a new one"""


class Emoji(NamedTuple):
    """An emoji that has not been drawn yet."""

    text: str
    caption: str
    label: str

    @property
    def codepoints(self) -> str:
        return "_".join(f"{ord(c):04x}" for c in self.text)


def main(argv: Sequence[str] | None = None) -> int | None:
    config = parse_config(MakeEmojiConfig, argv, description=__doc__)
    with making(Path(config.output_dir)) as folder:
        check_replaceable(folder, SCRIPT, "emoji", config.overwrite)
        _make(config, folder)
    return 0


def _make(config: MakeEmojiConfig, folder: Path) -> None:
    """Draw the emoji and write them to `folder`."""
    path = find_font(config.font)
    font = open_font(path)
    print(f"Drawing the emoji of {path} at {config.resolution} px.")
    candidates = list(named_emoji(path, sequences=config.sequences == "all"))
    drawn = []
    for emoji in watched(candidates, len(candidates), "emoji", "emoji"):
        image = draw(font, emoji.text, config.resolution, transparent=config.transparent)
        if image is not None:
            drawn.append((emoji, image))
    drawn = without_mirrored_order(drawn)
    if not drawn:
        raise UserError(f"{path} has no emoji that can be drawn; choose a colour emoji font with --font FILE")
    splits = split_by_base(drawn, config.validation_fraction, config.seed)
    with new_folder(folder) as (partial, aside):
        _write(splits, contact_sheet(drawn), partial)
        settings = {"font": path.name, "resolution": config.resolution, "sequences": config.sequences}
        if config.transparent:
            settings["transparent"] = True
        settings |= {"validation_fraction": config.validation_fraction, "seed": config.seed}
        write_manifest(partial, SCRIPT, settings, (partial / "data").iterdir())
    for earlier in aside:
        print(f"The earlier emoji are now in {earlier}.")
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items())
    classes = len({emoji.label for emoji, _ in drawn})
    print(f"{len(drawn):,} emoji in {classes} classes ({sizes}) are in {config.output_dir}.")
    print(f"Look at them: {Path(config.output_dir) / 'contact_sheet.png'}")
    mode = " --image_mode rgba" if config.transparent else ""
    print(f"Train on them: --dataset_name {config.output_dir} --resolution {config.resolution}{mode}")


def find_font(given: str | None) -> Path:
    """Return the path of the font to draw with.

    Raises:
        UserError: the given font does not exist, or this machine has no colour emoji font.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"the font '{given}' does not exist; check --font")
        return path
    font = emoji_font.system_emoji_font()
    if font is None:
        advice = f"{emoji_font.HOW_TO_INSTALL}, or name a file: --font NotoColorEmoji.ttf"
        raise UserError(f"this machine has no colour emoji font; {advice}")
    return font


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open the font at a size that it has.

    Raises:
        UserError: Pillow cannot read the font.
    """
    for size in FONT_SIZES:
        try:
            return ImageFont.truetype(str(path), size)
        except OSError as error:
            reason = str(error)
    raise UserError(f"'{path}' cannot be read as a font ({reason}); name a .ttf or .ttc file with --font")


def named_emoji(path: Path, *, sequences: bool) -> Iterator[Emoji]:
    """Yield the emoji that are in the font and have a Unicode name, in the order of their code points."""
    codepoints, ligatures = _contents(path)
    texts: list[tuple[int, ...]] = [(codepoint,) for codepoint in codepoints]
    if sequences and features.check("raqm"):  # without raqm, Pillow draws the parts of a sequence side by side
        texts += ligatures
    for text in sorted(set(texts)):
        name = name_of(text)
        if name is not None:
            yield Emoji("".join(map(chr, text)), CAPTION.format(name), label_of(text))


def name_of(codepoints: Sequence[int]) -> str | None:
    """Return the name of an emoji, built from the Unicode names of its parts.

    Return None if this version of Python has no name for one of the parts. Examples: "runner, woman, light skin tone",
    "flag of d e" and "keycap digit one".
    """
    if all(_REGIONAL_A <= c <= _REGIONAL_Z for c in codepoints):
        letters = " ".join(chr(c - _REGIONAL_A + ord("a")) for c in codepoints)
        return f"flag of {letters}" if len(codepoints) > 1 else f"regional indicator letter {letters}"
    if codepoints[0] == _BLACK_FLAG and codepoints[-1] == _CANCEL_TAG:
        return "flag of " + " ".join(chr(c - _FIRST_TAG) for c in codepoints[1:-1])
    if codepoints[-1] == _KEYCAP and len(codepoints) > 1:
        name = name_of(codepoints[:1])
        return name and f"keycap {name}"
    words: list[str] = []
    tones: list[str] = []
    for codepoint in codepoints:
        if codepoint in _SKIN_TONES and len(codepoints) > 1:
            tones.append(_SKIN_TONES[codepoint])
        elif codepoint in _GENDERS and len(codepoints) > 1:
            words.append(_GENDERS[codepoint])
        elif codepoint not in (_ZERO_WIDTH_JOINER, _VARIATION_SELECTOR):
            name = unicodedata.name(chr(codepoint), "")
            if not name:
                return None
            words.append(name.lower().removeprefix("emoji component "))
    return ", ".join(words + tones) if words else None


def label_of(codepoints: Sequence[int]) -> str:
    """Return the class of an emoji: flags, keycaps, or the Unicode block of its first code point."""
    if len(codepoints) > 1 and (_REGIONAL_A <= codepoints[0] <= _REGIONAL_Z or codepoints[-1] == _CANCEL_TAG):
        return "flags"
    if len(codepoints) > 1 and codepoints[-1] == _KEYCAP:
        return "keycaps"
    return next((name for first, last, name in _BLOCKS if first <= codepoints[0] <= last), "other")


def draw(font: ImageFont.FreeTypeFont, text: str, resolution: int, *, transparent: bool = False) -> Image.Image | None:
    """Draw the emoji on white, as an RGB image of `resolution` pixels along each side, or on nothing, as RGBA.

    Return None if the font has no glyph for the emoji or would draw its parts side by side.
    """
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    width, height = right - left, bottom - top
    one_glyph = font.getlength("\U0001f600")
    if width <= 0 or height <= 0 or font.getlength(text) > 1.5 * one_glyph:
        return None
    side = max(width, height)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    place = ((side - width) // 2 - left, (side - height) // 2 - top)
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    if canvas.getchannel("A").getextrema()[1] == 0:
        return None
    flat = canvas if transparent else on_white(canvas)
    return flat.resize((resolution, resolution), Image.Resampling.LANCZOS)


def without_mirrored_order(drawn: Sequence[tuple[Emoji, Image.Image]]) -> list[tuple[Emoji, Image.Image]]:
    """Keep each image once.

    Fonts list sequences in right-to-left order as well ("woman, runner" for "runner, woman").
    """
    kept: dict[tuple[str, bytes], tuple[Emoji, Image.Image]] = {}
    for emoji, image in drawn:
        twin = ("".join(sorted(emoji.text)), image.tobytes())
        if twin not in kept or _reading_order(emoji) < _reading_order(kept[twin][0]):
            kept[twin] = (emoji, image)
    return sorted(kept.values(), key=lambda row: row[0].text)


def _reading_order(emoji: Emoji) -> tuple[int, str]:
    first = ord(emoji.text[0])
    rank = 0 if first in _FIRST_IN_SEQUENCE else 1 if first >= _FIRST_PICTOGRAPH else 2
    return (3 if first in _GENDERS or first in _SKIN_TONES else rank), emoji.text


def split_by_base(
    drawn: Sequence[tuple[Emoji, Image.Image]], validation_fraction: float, seed: int
) -> dict[str, list[tuple[Emoji, Image.Image]]]:
    """Split into train and validation, with all variants of an emoji in one split.

    An emoji that differs only in skin tone from one in training would not be a fair test.
    """
    bases = sorted({emoji.text[0] for emoji, _ in drawn})
    random.Random(mix(seed, "emoji")).shuffle(bases)
    held_out = set(bases[: round(len(bases) * validation_fraction)])
    splits = {
        "train": [row for row in drawn if row[0].text[0] not in held_out],
        "validation": [row for row in drawn if row[0].text[0] in held_out],
    }
    return {name: rows for name, rows in splits.items() if rows}


def contact_sheet(drawn: Sequence[tuple[Emoji, Image.Image]]) -> Image.Image:
    """Draw a row of images for each class, with its name and number of emoji; the most frequent class comes first."""
    counts = Counter(emoji.label for emoji, _ in drawn)
    width = SHEET_LABEL_WIDTH + SHEET_COLUMNS * SHEET_CELL
    sheet = Image.new("RGB", (width, len(counts) * SHEET_CELL), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, count) in enumerate(counts.most_common()):
        pen.text((6, row * SHEET_CELL + 24), f"{label}\n{count:,}", fill="black")
        members = [image for emoji, image in drawn if emoji.label == label]
        chosen = members[:: max(1, len(members) // SHEET_COLUMNS)][:SHEET_COLUMNS]
        for column, image in enumerate(chosen):
            small = image.resize((SHEET_CELL - 4, SHEET_CELL - 4), Image.Resampling.LANCZOS)
            place = (SHEET_LABEL_WIDTH + column * SHEET_CELL + 2, row * SHEET_CELL + 2)
            sheet.paste(small, place, small if small.mode == "RGBA" else None)
    return sheet


def _contents(path: Path) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the code points of a font, and the sequences of code points that have a glyph of their own."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        font = TTFont(path, lazy=True, fontNumber=0)
        codepoints = font.getBestCmap()
    except (TTLibError, OSError) as error:
        raise UserError(f"'{path}' cannot be read as a font ({error}); name a .ttf or .ttc file with --font") from error
    if not _COLOR_TABLES & set(font.keys()):
        raise UserError(f"'{path}' is a font without colour; choose a colour emoji font with --font")
    by_glyph = {glyph: codepoint for codepoint, glyph in codepoints.items()}
    ligatures = []
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for subtable in (subtable for lookup in lookups for subtable in lookup.SubTable):
        for first, choices in getattr(subtable, "ligatures", {}).items():
            for choice in choices:
                glyphs = [first, *choice.Component]
                if all(glyph in by_glyph for glyph in glyphs):
                    ligatures.append(tuple(by_glyph[glyph] for glyph in glyphs))
    return list(codepoints), ligatures


def _write(splits: dict[str, list[tuple[Emoji, Image.Image]]], sheet: Image.Image, folder: Path) -> None:
    """Write the splits and the contact sheet to an empty folder."""
    labels = sorted({emoji.label for rows in splits.values() for emoji, _ in rows})
    (folder / "data").mkdir()
    for name, rows in splits.items():
        _table(rows, labels).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    sheet.save(folder / "contact_sheet.png")


def _table(rows: Sequence[tuple[Emoji, Image.Image]], labels: list[str]) -> Dataset:
    import datasets

    kinds = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=labels),
        codepoints=datasets.Value("string"),
    )
    columns = {
        "image": [image for _, image in rows],
        "text": [emoji.caption for emoji, _ in rows],
        "label": [labels.index(emoji.label) for emoji, _ in rows],
        "codepoints": [emoji.codepoints for emoji, _ in rows],
    }
    return datasets.Dataset.from_dict(columns, features=kinds)


if __name__ == "__main__":
    entry_point(main)
