"""Caption images with an image–caption model:

    python pipelines/caption.py photo.jpg drawing.png --model runs/image_caption/emoji_64
    python pipelines/caption.py *.png --model runs/image_caption/emoji_64 --num_beams 4 --output captions.jsonl

Prints one caption per image; images may have any size. With --top_p, captions are sampled instead of decoded greedily.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import Options, UserError, entry_point, printable
from pipelines.tools.commands import command
from pipelines.tools.devices import DEVICE_HELP
from pipelines.tools.files import check_image_header, check_output, read_image

if TYPE_CHECKING:
    from PIL.Image import Image


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    files = [Path(name).expanduser() for name in options.files]
    for path in files:
        check_image_header(path)
    output = Path(options.output).expanduser() if options.output else None
    if output is not None:
        _check_output(output, options.overwrite)
    pipeline = load_captioner(options.model, options.device)
    # Print and write each batch as soon as it is done: an image that cannot be decoded must not lose earlier captions.
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") if output else contextlib.nullcontext() as lines:
        for start in range(0, len(files), options.batch_size):
            paths = files[start : start + options.batch_size]
            captions = _captions(pipeline, [read_image(path) for path in paths], options, start)
            for path, caption in zip(paths, captions, strict=True):
                print(printable(f"{path}: {caption}"), flush=True)
                if output and lines:
                    # The format of an imagefolder's metadata.jsonl, whose file names are relative to its folder.
                    record = {"file_name": _relative(path, output.parent), "text": caption}
                    print(json.dumps(record, ensure_ascii=False), file=lines, flush=True)
    if output:
        print(f"{len(files)} captions: {output}")
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="Image files")
    add("--model", required=True, help="Run folder, checkpoint, pipeline folder or Hub id of an image–caption model")
    add("--num_beams", type=int, default=1, help="Number of beams for beam search; 1 decodes greedily (default: 1)")
    add(
        "--top_p",
        type=float,
        help="Sample from the most likely tokens whose probabilities add up to this value, e.g. 0.9 "
        "(default: no sampling)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="Temperature for sampling; values below 1 favour likely tokens (default: 1)",
    )
    add(
        "--num_candidates",
        type=int,
        default=1,
        help="If above 1, number of captions to sample per image, of which the one most similar to all others is used"
        " (default: 1)",
    )
    add("--max_length", type=int, help="Maximum number of tokens per caption (default: as in training)")
    add(
        "--seed",
        type=int,
        default=0,
        help="Random seed; image k is captioned with seed + k (default: 0)",
    )
    add("--batch_size", type=int, default=16, help="Images per batch; does not change the captions (default: 16)")
    add("--device", help=DEVICE_HELP)
    add("--output", help="JSON Lines file to write, with file_name and text (default: only print the captions)")
    add("--overwrite", action="store_true", help="Overwrite the file given by --output if it exists")
    options = parser.parse(argv)
    for name in ("num_beams", "batch_size", "num_candidates"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    return options


def load_captioner(model: str, device: str | None) -> Any:
    """Load an image–caption pipeline on the device that `--device` names (see `get_device`).

    Raises:
        UserError: If the model or the device does not exist, or the model does not caption images.
    """
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(model, device)
    if type(pipeline).__name__ != "ImageCaptionPipeline":
        raise UserError(
            f"--model {model} is a {type(pipeline).__name__}, which does not caption images; "
            f"use a model trained with `{command('training/train_image_caption.py')}`"
        )
    return pipeline


def _captions(pipeline: Any, images: Sequence[Image], options: argparse.Namespace, first: int) -> list[str]:
    import torch

    generators = [torch.Generator().manual_seed(options.seed + first + i) for i in range(len(images))]
    try:
        return pipeline.caption(
            images,
            num_beams=options.num_beams,
            top_p=options.top_p,
            temperature=options.temperature,
            generator=generators,
            max_length=options.max_length,
            num_candidates=options.num_candidates,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _relative(path: Path, folder: Path) -> str:
    """Return the path relative to `folder`, with forward slashes."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_file() and output.stat().st_size and not overwrite:
        raise UserError(f"--output {output} already exists; choose another file, or add --overwrite to replace it")
    check_output(output)


if __name__ == "__main__":
    entry_point(main)
