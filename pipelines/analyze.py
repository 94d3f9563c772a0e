"""Analyze posters and report their text, pictures, colour roles, visual hierarchy and design grammar:

    python pipelines/analyze.py poster.png photo.jpg --model runs/posters/abstractor_small --output_dir report

Writes a PNG report for each poster (the poster, its text and pictures highlighted, its colour roles, its visual
hierarchy and its design grammar) and one report.json with the values for all posters. Posters may have any size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.commands import command
from pipelines.tools.devices import DEVICE_HELP
from pipelines.tools.files import read_image
from pipelines.tools.layout_report import describe, sheet


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    files = [Path(name).expanduser() for name in options.files]
    images = [read_image(path) for path in files]
    folder = Path(options.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be created ({error.strerror}); choose another folder") from None
    pipeline = _load(options.model, options.device)
    report = []
    for path, image, sheet_path in zip(files, images, _sheet_paths(files, folder), strict=True):
        reading = pipeline(image, reading_size=options.reading_size)
        facts = describe(image, reading, path)
        sheet(image, reading, facts).save(sheet_path)
        report.append({**facts, "report": str(sheet_path)})
        print(f"{path}: {_summary(facts)} → {sheet_path}")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"All values: {folder / 'report.json'}")
    return None


def _summary(facts: dict[str, Any]) -> str:
    if "grammar" not in facts:
        return f"text on {facts['text_share']:.0%}, pictures on {facts['picture_share']:.0%} of the page"
    blocks, pictures = facts["text_blocks"], facts["pictures"]
    return f"{blocks} text block{'s' * (blocks != 1)}, {pictures} picture{'s' * (pictures != 1)}"


def _sheet_paths(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return the path of each file's PNG, named after the file and numbered where two files have the same name."""
    paths: list[Path] = []
    for file in files:
        path, number = folder / f"{file.stem}_layout.png", 1
        while path in paths:
            number += 1
            path = folder / f"{file.stem}_{number}_layout.png"
        paths.append(path)
    return paths


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Options(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="Image files of posters")
    parser.add_argument(
        "--model",
        required=True,
        help="Run folder, checkpoint, pipeline folder or Hub id of a layout encoder or grammar abstractor",
    )
    parser.add_argument(
        "--reading_size", type=int, help="Resize the shorter side of the posters to N pixels (default: as in training)"
    )
    parser.add_argument(
        "--output_dir",
        default="layout_report",
        help="Folder for the PNG files and report.json (default: layout_report)",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    options = parser.parse(argv)
    if options.reading_size is not None and options.reading_size < 16:
        raise UserError(f"--reading_size is {options.reading_size}; it must be at least 16 pixels")
    return options


def _load(model: str, device: str | None) -> Any:
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(model, device)
    if type(pipeline).__name__ != "LayoutAnalysisPipeline":
        raise UserError(
            f"--model {model} is a {type(pipeline).__name__}, which does not read posters; use a model trained with "
            f"`{command('training/train_encoder.py')}` or `{command('training/train_abstractor.py')}`"
        )
    if pipeline.encoder is None:
        raise UserError(f"--model {model} was trained without --encoder and cannot read images; train one with it")
    return pipeline


if __name__ == "__main__":
    entry_point(main)
