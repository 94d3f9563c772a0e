"""The best posters of an archive as a folder of images with briefs, on which a poster decoder can be trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.common.design_brief import FIELDS, DesignBrief
from pipelines.common.poster_domain import COUNTS, GRAMMAR, STYLES, nearest_color_name, rgb_color
from pipelines.tools.cli import UserError
from training.core.files import replacing_folder
from training.innovation.search import Search

METADATA = "metadata.jsonl"


def parse_export(text: str | None) -> int:
    """Return N of `top:N`; 0 for None. Raises UserError for anything else."""
    if text is None:
        return 0
    kind, _, count = text.partition(":")
    if kind != "top" or not count.isdecimal() or not int(count):
        raise UserError(f"--export is '{text}'; it must be top:N with a number of posters, such as top:64")
    return int(count)


def export(search: Search, count: int, folder: Path) -> int:
    """Write the best posters to `folder`, which is replaced, and return their number.

    Each is a PNG file; metadata.jsonl has a row for each with the columns of make_posters.py that describe a brief.
    Grammar and counts are those that the reader found, and not those that were asked for, so that a decoder learns what
    a poster is rather than what it should have been. Style, mood and palette are those of the brief.

    Raises:
        UserError: the archive is empty, or `folder` holds something other than an earlier export.
    """
    elites = search.archive.elites()[:count]
    if not elites:
        raise UserError(f"the archive in {search.folder.path} is empty, so that nothing can be exported; search longer")
    if folder.exists() and any(folder.iterdir()) and not (folder / METADATA).is_file():
        raise UserError(f"{folder} is not empty and holds no exported posters; choose another --export_dir")
    with replacing_folder(folder) as partial:
        rows = []
        for number, elite in enumerate(elites):
            (brief,), _ = search.studio.space.decode(elite["point"][None])
            record = search.records.row(elite["evaluation"])
            name = f"{number:05d}.png"
            Image.fromarray(record["posters"]).save(partial / name)
            rows.append({"file_name": name, **_row(brief, record, elite)})
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (partial / METADATA).write_text(text, encoding="utf-8")
    return len(elites)


def _row(brief: DesignBrief, record: Mapping[str, Any], elite: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: getattr(brief, name) for name in FIELDS}
    values |= {name: round(float(value), 4) for name, value in zip(GRAMMAR, record["grammar"], strict=True)}
    values |= {name: int(value) for name, value in zip(COUNTS, record["counts"], strict=True)}
    palette = list(brief.palette or ())
    names = [nearest_color_name(rgb_color(code)) for code in palette]
    return {
        "text": brief.describe(),
        "label": None if brief.style is None else STYLES.index(brief.style),
        "index": elite["evaluation"],
        **values,
        "palette": palette or None,
        "palette_names": names or None,
        "background": names[0] if names else None,
        "quality": elite["quality"],
    }
